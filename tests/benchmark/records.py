"""Made-up records of runs that never happened, for the tests of what reads records."""

from __future__ import annotations

import copy
from typing import Any

from flashcore.benchmark import contest, results
from flashcore.benchmark.shapes import NINE, Shape
from flashcore.measure.statistics import summarize

GPU = "Made-up H100 of the tests"
ERRORS = {name: {"value": 0.5, "limit": 1.0} for name in ("allclose", "frobenius", "max_error", "row_ratio", "lse")}


def environment(gpu: str = GPU, recorded: str = "2001-01-01T00:00:00+00:00") -> dict[str, Any]:
    return {
        "recorded": recorded, "commit": "0" * 40, "source": "0" * 16, "python": "3.12.0", "cpu": "made up",
        "system": "Linux x86_64", "torch": "9.9", "triton": "9.8", "cuda": "9.7", "cudnn": 90000, "driver": "9.6",
        "gpu": gpu, "capability": [9, 0], "sms": 132, "l2_bytes": 50 * 2**20, "memory_bytes": 80 * 2**30,
    }  # fmt: skip


def ok(**timings: Any) -> dict[str, Any]:
    return {"status": "ok", "reason": "", "version": "9.9", "errors": ERRORS, **timings}


def call(us: float) -> dict[str, Any]:
    return results.latency(summarize([us * (1 + i / 1000) for i in range(-50, 51)]), us * 0.999, us * 1.001)


def gpu(us: dict[str, float]) -> dict[str, dict[str, Any]]:
    """Name -> timing, as contest.gpu_clock gives them."""
    rounds = {name: [value * (1 + i / 1000) for i in range(-3, 4)] for name, value in us.items()}
    return {
        name: results.timing(values, calls=100, sets=1, over_flashcore=contest._ratio(rounds, name))
        for name, values in rounds.items()
    }


def validation(**changes: Any) -> dict[str, Any]:
    """Nine correct configurations on target; FlashCore is 1.25x as fast as cuDNN on device time and as fast by call."""
    cases = []
    for shape in NINE:
        base = shape.seqlen * shape.batch / 1024
        extra = {"flashcore": 20, "sdpa": 22, "sdpa-flash": 24, "sdpa-cudnn": 20}
        contestants = {name: ok(call=call(base + us)) for name, us in extra.items()}
        for clock, factor in (("gpu_warm", 1.0), ("gpu_cold", 1.5)):
            us = {"flashcore": base, "sdpa": 1.5 * base, "sdpa-flash": 1.5 * base, "sdpa-cudnn": 1.25 * base}
            for name, timing in gpu({name: factor * value for name, value in us.items()}).items():
                contestants[name][clock] = timing
        cases.append({
            "shape": shape.as_json(), "kernel": "portable", "block": [64, 64], "correct": True,
            "contestants": contestants, "same_qkv": ok(),
            "against_torch": {kind: {"max_abs_diff": 5e-4, "allclose": True} for kind in ("independent", "same_qkv")},
        })
    return {
        "kind": "validation", "environment": environment(),
        "protocol": {"name": "call + gpu warm + gpu cold", "seed": 42, "trials": 1000, "warmup": 100,
                     "target_us_per_sequence": 5.0, "rtol": 1e-3, "atol": 2e-3},
        "event_floor_us": call(6.0), "gpu_states": [{"sm_mhz": 1755, "held_back_by": []}], "cases": cases, **changes,
    }  # fmt: skip


def wrong(record: dict[str, Any], index: int = 0) -> dict[str, Any]:
    """The record, with one configuration that failed a gate."""
    case = record["cases"][index]
    case["correct"] = False
    case["contestants"]["flashcore"] = {
        "status": "wrong", "reason": "frobenius 0.5 exceeds 0.00042", "version": "9.9", "errors": ERRORS,
    }  # fmt: skip
    for name in ("sdpa", "sdpa-flash", "sdpa-cudnn"):
        case["contestants"][name] = ok()
    return record


def peers(suite: str = "nine", shapes: list[Shape] = NINE, **changes: Any) -> dict[str, Any]:
    """FlashCore is 1.5x as fast as the best peer, warm and cold; fa4 is missing, flex fails at the first shape."""
    cases = []
    for i, shape in enumerate(shapes):
        us = {"flashcore": 10.0, "sdpa-cudnn": 16.0, "triton-plain": 15.0, "flex": 20.0}
        if i == 0:
            del us["flex"]
        found: dict[str, Any] = {name: ok() for name in us}
        for clock in ("gpu_warm", "gpu_cold"):
            for name, timing in gpu(us).items():
                found[name][clock] = timing
        if i == 0:
            found["flex"] = {"status": "failed", "reason": "RuntimeError: no", "version": "9.9", "errors": {}}
        found["fa4"] = {"status": "missing", "reason": "pip install it", "version": None, "errors": {}}
        cases.append({"case": shape.label, "shape": shape.as_json(), "contestants": found, "gpu_states": []})
    return {
        "kind": "peers", "suite": suite, "complete": True, "environment": environment(),
        "protocol": {"name": "gpu warm + gpu cold", "seed": 42, "replays": 7,
                     "contestants": ["flashcore", "sdpa-cudnn", "triton-plain", "fa4", "flex"]},
        "ceilings": {"matmul_tflops": 700.0, "l2_copy_tb_s": 5.0, "hbm_copy_tb_s": 2.4, "empty_kernel_us": 1.1},
        "faults": [], "cases": cases, **changes,
    }  # fmt: skip


def timing(**changes: Any) -> dict[str, Any]:
    """A timing audit of one kernel: of the gates on few blocks one is missed by the clock and two by the cycles; over
    the whole GPU wall time follows the clock; controls that were caught; and a batch of 8.
    """

    def entry(pair: str, clock: str = "cycles", relative: float = 0.0, **more: Any) -> dict[str, Any]:
        t = 1.5 if not relative else 40.0
        return {
            "kernel": "hopper", "config": "64x128 4w", "clock": clock, "pair": pair,
            "measurements": [1_000_100, 999_900], "mean": 12_345.6, "deviation": 300.0, "t": t, "largest_t": t,
            "cropped_t": {"50": 1.0}, "difference": 0.1, "relative": relative, "relative_low": relative - 2e-4,
            "relative_high": relative + 2e-4, "needed": 1234.5, "slow": [0, 0], "even": not relative, "gated": True,
            "ok": not relative, **more,
        }  # fmt: skip

    def walls(pair: str, wall: float, cycles: float, frequency: float, **more: Any) -> list[dict[str, Any]]:
        told = {"explained": not cycles and bool(wall), "dropped": [0, 0], "moved": False, "blocks": 2}
        beside = {"gated": more.get("gated", True), "ok": more.get("ok", not cycles)}
        return [entry(pair, "wall", wall, **told | more), entry(pair, "elapsed", cycles, mean=13_000.0, **beside),
                entry(pair, "frequency", frequency, gated=False, ok=True, step_ns=32)]  # fmt: skip

    free = {"gated": False, "ok": True, "blocks": 256}
    return {
        "kind": "audit-timing", "complete": True, "environment": environment(),
        "protocol": {"t_limit": 4.5, "t_control": 10.0, "relative_limit": 1e-3, "confidence": 0.95},
        "gpu_states": [{"sm_mhz": 1755, "held_back_by": ["software power cap"]}],
        "cases": [
            entry("fixed/random"), entry("rising/falling", relative=0.005),
            *walls("nan/finite", 0.01, 0.0, -0.01, dropped=[1, 2]), *walls("fixed/random", 0.01, 0.01, 0.0, blocks=8),
            walls("zeros/random", 0.0, 0.0, 0.0, dropped=[999_000, 999_000], moved=True, slow=[4, 5])[0],
        ],
        "controls": [entry("rising/falling", relative=0.2, control="rescale", ok=True),
                     entry("fixed/random", "wall", relative=0.02, control="rescale", blocks=2, ok=True)],
        "full": walls("zeros/random", -0.02, 0.004, 0.015, **free),
        "batch": [entry("zeros/random", "wall", batch=8, public=False),
                  entry("64/512 keys", "wall", relative=0.1, batch=8, public=True)], **changes,
    }


def measured(pattern: str) -> dict[str, Any]:
    """The newest committed record of this name."""
    path = max(results.FOLDER.glob(pattern))
    return {**results.read(path), "file": path.name}


def elsewhere(record: dict[str, Any], gpu: str, ours: float, others: float) -> dict[str, Any]:
    """As if another GPU took `ours` times as long with FlashCore and `others` times as long with everybody else."""
    record = copy.deepcopy(record)
    record["environment"]["gpu"] = gpu
    for case in record["cases"]:
        for name, found in case["contestants"].items():
            factor = ours if name.startswith("flashcore") else others
            for clock in ("gpu_warm", "gpu_cold"):
                if timing := found.get(clock):
                    timing |= {key: timing[key] * factor for key in ("us", "low", "high")}
                    timing["rounds"] = [us * factor for us in timing["rounds"]]
                    ratio = timing["over_flashcore"]
                    timing["over_flashcore"] = {key: value * factor / ours for key, value in ratio.items()}
    return record

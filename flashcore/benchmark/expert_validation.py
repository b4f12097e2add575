"""The validation: is attention correct on this machine, and how many microseconds does a sequence cost?

    cd flashcore/benchmark && python expert_validation.py        or: flashcore validate, python -m ..., make validate

Nine configurations (S = 128, 256, 512; B = 8, 16, 32; H = 8, D = 64, fp16, seed 42). Each must pass the error gates on
independent q, k and v and on q = k = v before any of its speeds is printed. Then 1,000 calls after 100 warm-up calls,
CUDA events around each one, synchronised each time; the target is a median below 5 µs per sequence. Beside it, in the
same process and with the order rotated call by call, torch's SDPA: its default, flash and cuDNN; and the device times
of all of them, with inputs in the L2 (warm) and out of it (cold). Exit status 1 when a configuration is wrong or misses
the target. Without a GPU: the gates in Triton's interpreter and a compilation of every kernel; no timings.
"""

from __future__ import annotations

import argparse
import io
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: `flashcore` is two folders up, and this folder's names are not top-level modules
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from torch import Tensor

from flashcore.benchmark import results, validation_text
from flashcore.benchmark.shapes import NINE, SEED, Shape
from flashcore.benchmark.terminal import Terminal
from flashcore.measure import machine

TARGET_US = 5.0  # per sequence, at P50 on the call clock
TRIALS = 1000
WARMUP = 100
RTOL, ATOL = 1e-3, 2e-3  # against torch's SDPA, as the first validation had it
AUTOMATIC = Path("results/<kind>-<gpu>-<date>.json")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the validation and print it. Returns the exit status."""
    options = _options(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without µ gets "?", not a traceback
    if not torch.cuda.is_available():
        from flashcore.benchmark import without_gpu

        return without_gpu.main()
    record = run(options.configs, options.trials)
    if options.json:
        path = results.default_path("validation", record["environment"]) if options.json == AUTOMATIC else options.json
        results.write(path, record)
        print(f"Measurements written to {path}\n")
    return 0 if validation_text.passed(record) else 1


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="flashcore validate", description="Is attention correct here, and what does a sequence cost?"
    )
    parser.add_argument("--trials", type=_count, default=TRIALS, metavar="N", help="timed calls (default 1000)")
    parser.add_argument(
        "--configs", type=_configs, default=NINE, metavar="S128B8,...", help="these configurations, not the nine"
    )
    parser.add_argument(
        "--json", type=Path, nargs="?", const=AUTOMATIC, metavar="FILE",
        help=f"write every figure to FILE (default {AUTOMATIC}); only with a GPU",
    )  # fmt: skip
    return parser.parse_args(argv)


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text!r}")
    return int(text)


def _configs(text: str) -> list[Shape]:
    found = []
    for name in text.split(","):
        match = re.fullmatch(r"S([1-9]\d*)B([1-9]\d*)", name.strip(), re.IGNORECASE)
        if not match:
            raise argparse.ArgumentTypeError(f"expected configurations like S128B8, got {name!r}")
        found.append(Shape(int(match[2]), 8, int(match[1]), 64))
    return found


def run(shapes: Sequence[Shape], trials: int = TRIALS) -> dict[str, Any]:
    """Measure these shapes, print as it goes, and return the record."""
    from flashcore.measure import clocks, statistics

    environment = machine.environment()
    floor = statistics.summarize(clocks.event_floor(trials=trials))
    record: dict[str, Any] = {
        "kind": "validation",
        "environment": environment,
        "protocol": {
            "name": "call + gpu warm + gpu cold",
            "seed": SEED,
            "trials": trials,
            "warmup": WARMUP,
            "target_us_per_sequence": TARGET_US,
            "rtol": RTOL,
            "atol": ATOL,
        },
        "event_floor_us": results.latency(floor, None, None),
        "gpu_states": [machine.gpu_state()],
        "cases": [],
    }
    with Terminal(len(shapes) * (trials + WARMUP), "validating") as terminal:
        for text in validation_text.head(record):
            terminal.line(text)
        for shape in shapes:
            config = measure(shape, trials, environment["l2_bytes"], terminal)
            record["gpu_states"].append(machine.gpu_state())
            record["cases"].append(config)
            terminal.line(validation_text.row(record, config))
    for text in validation_text.rest(record):
        print(text)
    return record


def measure(shape: Shape, trials: int, l2_bytes: int, terminal: Terminal) -> dict[str, Any]:
    """Gates first, then the clocks, of one configuration."""
    from flashcore.benchmark import contest
    from flashcore.benchmark.peers import OURS, PEERS
    from flashcore.fast import planning

    q, k, v = shape.inputs()
    independent, shared = (q, k, v), (q, q.clone(), q.clone())
    peers = {"flashcore": OURS["flashcore"], **{name: PEERS[name] for name in validation_text.TORCH}}
    admissions = {name: contest.admit(peer, shape, independent) for name, peer in peers.items()}
    same_qkv = contest.admit(peers["flashcore"], shape, shared)
    found: dict[str, Any] = {
        "shape": shape.as_json(),
        "contestants": {name: admission.as_json(peers[name]) for name, admission in admissions.items()},
        "same_qkv": same_qkv.as_json(peers["flashcore"]),
        "correct": False,
    }
    statuses = {admissions["flashcore"].status, same_qkv.status}
    if statuses <= {"ok", "wrong"}:  # it computed something
        config = planning.explain(*independent, is_causal=shape.is_causal).config
        assert config is not None
        close = {"independent": closeness(shape, independent), "same_qkv": closeness(shape, shared)}
        found["kernel"], found["block"] = config.kernel, [config.block_m, config.block_n]
        found["against_torch"] = close
        found["correct"] = statuses == {"ok"} and all(each["allclose"] for each in close.values())
    if not found["correct"]:
        terminal.advance(trials + WARMUP)
        return found
    admitted = {name: a.prepared for name, a in admissions.items() if a.prepared}
    call = contest.call_clock(admitted, trials=trials, warmup=WARMUP, progress=terminal.advance)
    for name, latency in call.items():
        found["contestants"][name]["call"] = latency
    for clock, cold in (("gpu_warm", False), ("gpu_cold", True)):
        timed, failed = contest.gpu_clock({n: peers[n] for n in admitted}, shape, cold=cold, l2_bytes=l2_bytes)
        for name, timing in timed.items():
            found["contestants"][name][clock] = timing
        for name, why in failed.items():
            found["contestants"][name] |= {"status": "failed", "reason": f"{clock}: {why}"}
            found["correct"] &= name != "flashcore"
    return found


def closeness(shape: Shape, inputs: tuple[Tensor, Tensor, Tensor]) -> dict[str, Any]:
    """The first validation's own check: FlashCore beside torch's SDPA in the same precision."""
    from flashcore.fast.attention_production import attention

    ours = attention(*inputs, is_causal=shape.is_causal)
    torchs = torch.nn.functional.scaled_dot_product_attention(*inputs, is_causal=shape.is_causal)
    assert isinstance(ours, Tensor)
    return {
        "max_abs_diff": (ours.float() - torchs.float()).abs().max().item(),
        "allclose": torch.allclose(ours, torchs, rtol=RTOL, atol=ATOL),
    }


if __name__ == "__main__":
    sys.exit(main())

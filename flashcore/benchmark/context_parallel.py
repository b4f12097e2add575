"""One long sequence on several GPUs: how much faster than on one, and how much of the communication is hidden.

    python -m torch.distributed.run --nproc-per-node 2 -m flashcore.benchmark.context_parallel --json FILE

Every rank holds the whole problem, for one GPU to compute, and its own rows of it. The output and lse of either way
pass the error gates against fp64 on sampled rows, or no time is taken. All contestants take turns within each round.
A turn is a few calls back to back, as the layers of a model are, and its time that of one call on the slowest rank; one
GPU's time is the faster GPU's, with the others computing the same meanwhile. A call that is not timed comes first: it
takes up what one rank starts later than another, and gives the GPU the clock that it has under this very load, not
under the contestant's before.

    one          attention() of the whole problem on one GPU
    ring         context_parallel_attention, method "ring"
    all_to_all   context_parallel_attention, method "all_to_all"
    compute      the ring's computation without its transfers
    transfer     the ring's transfers without its computation

The share of communication that is hidden: 1 - (ring - compute) / transfer.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from flashcore.benchmark import results
from flashcore.fast.attention_production import attention
from flashcore.integrations.distributed import context_parallel_attention, ring, shard, unshard
from flashcore.integrations.distributed.rows import Rows
from flashcore.measure import clocks, machine, statistics
from flashcore.testing import gates

SEED = 0
BAR = 0.85  # of the speed that so many GPUs could have: 1.7x with two
IN_A_ROW = 3  # calls that are timed together
SAMPLE = 64  # neighbouring rows that one sample has
CONTESTANTS = ("one", "ring", "all_to_all", "compute", "transfer")
Call = Callable[[], Any]


class _Still(ring.Ring):
    """A ring that passes nothing on. What it computes with is what earlier turns left in the buffers' memory."""

    def pass_on(self, send: Sequence[Tensor], receive: Sequence[Tensor]) -> list[dist.Work]:
        return []


def sampled(seqlen: int, ranks: int) -> list[slice]:
    """Rows to check: the first and the last ones, and those around every border between two chunks."""
    half = min(SAMPLE, seqlen) // 2
    borders = [seqlen * i // (2 * ranks) for i in range(2 * ranks + 1)]
    return [slice(max(0, b - half), min(seqlen, b + half)) for b in borders]


def check(out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, is_causal: bool, ranks: int) -> list[str]:
    """Reasons why a result of the whole problem is wrong; none is as it should be."""
    wrong = []
    for rows in sampled(q.shape[2], ranks):
        keys = slice(rows.stop if is_causal else None)
        verdict = gates.check(
            out[:, :, rows], q[:, :, rows], k[:, :, keys], v[:, :, keys], lse=lse[:, :, rows], is_causal=is_causal
        )
        if not verdict.passed:
            wrong.append(f"rows {rows.start}..{rows.stop}: {verdict.failures}")
    return wrong


def measure(
    heads: int, dim: int, seqlen: int, is_causal: bool, trials: int, group: dist.ProcessGroup, device: torch.device
) -> dict[str, Any]:
    """One case: gates, then times; the same on all ranks."""
    ranks = dist.get_world_size(group)
    generator = torch.Generator(device).manual_seed(SEED)
    q, k, v = (torch.randn(1, heads, seqlen, dim, generator=generator, device=device).half() for _ in range(3))
    for tensor in (q, k, v):
        dist.broadcast(tensor, 0, group=group)
    own = shard(q, group), shard(k, group), shard(v, group)
    options: dict[str, Any] = {"is_causal": is_causal, "return_lse": True}
    case: dict[str, Any] = {
        "shape": {"batch": 1, "heads": heads, "seqlen": seqlen, "head_dim": dim, "is_causal": is_causal}, "wrong": {},
    }  # fmt: skip

    calls: dict[str, Call] = {"one": lambda: attention(q, k, v, **options)}
    for method in ("ring", "all_to_all"):
        if method == "ring" or heads % ranks == 0:
            calls[method] = partial(
                context_parallel_attention, *own, group, method=method, seqlen=seqlen, **options
            )
    for name, call in calls.items():
        out, lse = call() if name == "one" else (unshard(t, group) for t in call())
        everyones: list[list[str]] = [[] for _ in range(ranks)]
        dist.all_gather_object(everyones, check(out, lse, q, k, v, is_causal, ranks), group=group)
        if wrong := [f"rank {r}: {reason}" for r, reasons in enumerate(everyones) for reason in reasons]:
            case["wrong"][name] = wrong
    if case["wrong"]:
        return case

    still = ring.Call(_Still(group), Rows(seqlen, ranks), is_causal, dim**-0.5)
    calls["compute"] = lambda: ring.forward(*own, still)
    calls["transfer"] = _transfer(own[1], own[2], group)
    rounds = _rounds(calls, trials, group, device)
    case["contestants"] = {name: results.timing(values) for name, values in rounds.items()}
    for method in set(rounds) & {"ring", "all_to_all"}:
        case[f"speedup_{method}"] = asdict(statistics.ratio_interval(rounds["one"], rounds[method]))
    exposed = [a - b for a, b in zip(rounds["ring"], rounds["compute"], strict=True)]
    transfer = statistics.median(rounds["transfer"])
    case["exposed_us"] = statistics.median(exposed)
    case["hidden"] = 1.0 - min(max(case["exposed_us"] / transfer, 0.0), 1.0)
    return case


def _transfer(k: Tensor, v: Tensor, group: dist.ProcessGroup) -> Call:
    way = ring.Ring(group)
    buffers = [[torch.empty_like(t) for t in (k, v)] for _ in range(2)]

    def call() -> None:
        here = [k, v]
        for step in range(way.size - 1):
            for work in way.pass_on(here, buffers[step % 2]):
                work.wait()
            here = buffers[step % 2]

    return call


def _rounds(
    calls: dict[str, Call], trials: int, group: dist.ProcessGroup, device: torch.device
) -> dict[str, list[float]]:
    """Microseconds of every contestant, round by round: the slowest rank's, for `one` the fastest's."""
    names = list(calls)
    mine: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(-2, trials):  # two rounds to warm up
        for name in clocks.rotation(names, turn):
            spent = _timed(calls[name], group, device)
            if turn >= 0:
                mine[name].append(spent)
    everyones: list[dict[str, list[float]]] = [{} for _ in range(dist.get_world_size(group))]
    dist.all_gather_object(everyones, mine, group=group)
    return {
        name: [(min if name == "one" else max)(turns) for turns in zip(*(e[name] for e in everyones), strict=True)]
        for name in names
    }


def _timed(call: Call, group: dist.ProcessGroup, device: torch.device) -> float:
    """Microseconds of a call behind another one, which all ranks start together."""
    if device.type != "cuda":
        dist.barrier(group=group)
        before = time.perf_counter()
        call()
        return (time.perf_counter() - before) * 1e6
    gpu = clocks.Cuda()
    start, end = gpu.event(), gpu.event()
    gpu.synchronize()
    dist.barrier(group=group)
    call()
    start.record()
    for _ in range(IN_A_ROW):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3 / IN_A_ROW


def line(case: dict[str, Any]) -> str:
    """A case as one line of the table under `HEADER`, or the reasons why there are no times."""
    shape = case["shape"]
    label = f"H={shape['heads']:<3} D={shape['head_dim']:<4} {'causal' if shape['is_causal'] else 'full':<7}"
    if case["wrong"]:
        return "\n".join([f"{label} WRONG", *(f"  {n}: {r}" for n, reasons in case["wrong"].items() for r in reasons)])
    found = case["contestants"]
    times = "".join(f"{found[n]['us'] / 1e3:>12.3f}" if n in found else f"{'-':>12}" for n in CONTESTANTS)
    speedups = "".join(
        f"{case[f'speedup_{m}']['value']:>11.2f}x" if f"speedup_{m}" in case else f"{'-':>12}"
        for m in ("ring", "all_to_all")
    )
    return f"{label}{times}{speedups}{case['hidden']:>9.0%}"


HEADER = f"{'ms':<20}" + "".join(f"{n:>12}" for n in (*CONTESTANTS, "one/ring", "one/a2a")) + f"{'hidden':>9}"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print. Returns the exit status: 0 = as it should be, 1 = wrong, below the bar, or no GPUs.

    Only the first rank tells: where one fails early, torch.distributed.run ends the others.
    """
    parser = argparse.ArgumentParser(
        prog="python -m torch.distributed.run --nproc-per-node N -m flashcore.benchmark.context_parallel",
        description="One long sequence on several GPUs, against one.",
    )
    parser.add_argument("--seqlen", type=int, default=65536, metavar="S", help="rows of the sequence (65536)")
    parser.add_argument("--heads", type=int, nargs="+", default=[8, 16], metavar="H")
    parser.add_argument("--dims", type=int, nargs="+", default=[64, 128], metavar="D")
    parser.add_argument("--trials", type=int, default=10, metavar="N", help="rounds (10)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure here")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: over gloo, without the bar")
    options = parser.parse_args(argv)
    local = int(os.environ.get("LOCAL_RANK", "-1"))
    if local < 0:
        print("context_parallel: start it through torch.distributed.run, one process a GPU", file=sys.stderr)
        return 1
    on_gpu = options.device == "cuda"
    if on_gpu and torch.cuda.device_count() <= local:
        print("context_parallel: each rank needs a CUDA GPU of its own", file=sys.stderr)
        return 1
    device = torch.device("cuda", local) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if on_gpu else "gloo", timeout=timedelta(minutes=3), device_id=device if on_gpu else None
    )
    try:
        return _run(options, device)
    finally:
        dist.destroy_process_group()


def _run(options: argparse.Namespace, device: torch.device) -> int:
    group = dist.group.WORLD
    assert group is not None
    ranks, is_first = dist.get_world_size(group), dist.get_rank(group) == 0
    if options.seqlen % (2 * ranks):
        print(f"context_parallel: expected a multiple of {2 * ranks} rows, got {options.seqlen}", file=sys.stderr)
        return 1
    bar = BAR * ranks if device.type == "cuda" else 0.0
    index = device.index or 0
    record: dict[str, Any] = {
        "kind": "context-parallel",
        "environment": machine.environment(index),
        "protocol": {
            "name": "events around calls in a row, ranks together, slowest rank", "calls": IN_A_ROW, "seed": SEED,
            "ranks": ranks,
            "trials": options.trials, "dtype": "float16", "bar": bar, "backend": dist.get_backend(group),
        },
        "gpu_states": [machine.gpu_state(index)],
        "cases": [],
    }  # fmt: skip
    if is_first:
        print(f"S={options.seqlen}, {ranks} ranks, {record['environment']['gpu'] or 'CPU'}\n{HEADER}", flush=True)
    for heads in options.heads:
        for dim in options.dims:
            for is_causal in (False, True):
                case = measure(heads, dim, options.seqlen, is_causal, options.trials, group, device)
                record["cases"].append(case)
                record["gpu_states"].append(machine.gpu_state(index))
                if is_first:
                    print(line(case), flush=True)
    wrong = [case for case in record["cases"] if case["wrong"]]
    slow = [case for case in record["cases"] if not case["wrong"] and case["speedup_ring"]["value"] < bar]
    record["met"] = not wrong and not slow
    if is_first:
        found = f"{len(wrong)} wrong, {len(slow)} slower than {bar:.2f}x one GPU"
        print(f"{len(record['cases'])} cases: {found}")
        if options.json:
            results.write(options.json, record)
            print(f"Measurements written to {options.json}")
    return 0 if record["met"] or not is_first else 1


if __name__ == "__main__":
    sys.exit(main())

"""`flashcore tune`: measure every configuration on this GPU and write the tuning table that chooses among them.

What is to be measured is compiled in several processes first. Each configuration passes the error gate before it is
timed. All that serve a problem are timed together on the gpu clock with warm inputs, the fastest few again for longer,
and the table gets one row a problem: the winner and its time. Problems that the table has already, from an earlier run,
keep their rows unless they are measured again.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import Tensor

from flashcore.benchmark.shapes import Shape
from flashcore.benchmark.terminal import Terminal, kind_of
from flashcore.core import target as targets
from flashcore.core.config import Config
from flashcore.core.problem import Problem
from flashcore.core.target import Target
from flashcore.launch import compile_check, compiled, launcher, packet, select
from flashcore.launch.arguments import Options, problem_of
from flashcore.measure import machine
from flashcore.measure.clocks import Contestant, gpu_times
from flashcore.measure.statistics import median
from flashcore.testing import gates
from flashcore.tuning import lookup

FIRST_REPLAYS, LAST_REPLAYS = 5, 30
FINALISTS = 4

HEADS = (8, 16, 32, 64, 128, 256, 512)  # of all sequences together
SEQLENS = (32, 64, 100, 128, 197, 256, 512, 577, 1024, 1500, 2048, 4096)
HEAD_DIMS = (32, 64, 128, 256)


@dataclass(frozen=True, slots=True)
class Timed:
    """One configuration on one problem."""

    config: Config
    us: float  # gpu warm, the median


def measure(shape: Shape, report: Callable[[str], object] = lambda text: None) -> tuple[Problem, list[Timed]]:
    """Time every configuration that can compute `shape` on the current GPU, the fastest first.

    `report` hears of configurations that fail or are wrong: they are left out.

    Raises:
        UnsupportedError: no kernel serves the shape.
    """
    q, k, v = shape.inputs()
    out = torch.empty_like(q)
    problem = problem_of(q, k, v, out, Options(is_causal=shape.is_causal))
    expected = gates.expect(q, k, v, out.dtype, is_causal=shape.is_causal)
    calls: dict[str, Callable[[], None]] = {}
    configs: dict[str, Config] = {}
    for config in select.candidates(problem, targets.current(q.get_device())):
        name = repr(config)
        try:
            call = _launcher(problem, config, {"q": q, "k": k, "v": v, "o": out})
            out.fill_(float("nan"))
            call()
            verdict = expected.check(out)
        except Exception as error:
            torch.cuda.synchronize()  # raises again where the context is lost
            report(f"{shape.label}, {config}: {kind_of(error)}")
            continue
        if not verdict.passed:
            report(f"{shape.label}, {config}: WRONG, {verdict.failures}")
            continue
        calls[name], configs[name] = call, config
    if not calls:
        return problem, []
    for replays in (FIRST_REPLAYS, LAST_REPLAYS):
        times, _ = gpu_times({name: Contestant([call]) for name, call in calls.items()}, replays=replays)
        order = sorted(times, key=lambda name: median(times[name]))
        calls = {name: calls[name] for name in order[:FINALISTS]}
    return problem, [Timed(configs[name], median(times[name])) for name in order]


def variants(work: Sequence[Shape], target: Target) -> list[tuple[Problem, Config, Target]]:
    """All that `measure` compiles for these shapes on that GPU, each code once."""
    found: dict[object, tuple[Problem, Config, Target]] = {}
    for shape in work:
        q, k = (
            torch.empty((shape.batch, heads, shape.seqlen, shape.head_dim), dtype=shape.torch_dtype, device="meta")
            for heads in (shape.heads, shape.kv_heads)
        )
        problem = problem_of(q, k, k, q, Options(is_causal=shape.is_causal))
        for config in select.candidates(problem, target):
            binding = launcher.bind(problem, config, problem.head_dim**-0.5, target)
            found.setdefault(compiled.identity(binding), (problem, config, target))
    return list(found.values())


def _compile(work: Sequence[Shape], target: Target, jobs: int) -> None:
    """Into Triton's cache, in so many processes. What fails here says why when it is measured."""
    wanted = variants(work, target)
    with Terminal(len(wanted), "compiling") as terminal, ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        for _ in pool.map(compile_check.check, *zip(*wanted, strict=True)):
            terminal.advance()


def _launcher(problem: Problem, config: Config, tensors: dict[str, Tensor]) -> Callable[[], None]:
    """Launches exactly this configuration, on the stream that is current when it is called."""
    device = tensors["q"].get_device()
    target = targets.current(device)
    launch = packet.load(launcher.bind(problem, config, problem.head_dim**-0.5, target), device, target.arch)
    addresses = [tensors[name].data_ptr() for name in launch.tensors]

    def call() -> None:
        launch.launch(launch.fill(torch.cuda.current_stream().cuda_stream, *addresses))

    return call


def shapes(
    heads: Sequence[int], seqlens: Sequence[int], head_dims: Sequence[int], masks: Sequence[bool]
) -> Iterator[Shape]:
    """Every combination that fits comfortably in memory: at most 2^28 elements of q."""
    for d, is_causal, s, h in product(head_dims, masks, seqlens, heads):
        if h * s * d <= 2**28:
            together = math.gcd(h, 8)
            yield Shape(h // together, together, s, d, is_causal)


def merged(old: Sequence[lookup.Row], new: Sequence[lookup.Row]) -> list[lookup.Row]:
    """Both, the new row where they speak of one problem, in the order in which a reviewer looks for one."""

    def problem(row: lookup.Row) -> tuple[str, int, bool, int, int, int]:
        return row.dtype, row.head_dim, row.is_causal, row.seqlen_q, row.seqlen_k, row.heads

    rows = {problem(row): row for row in (*old, *new)}
    return [rows[key] for key in sorted(rows)]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write the table. Returns 1 when a configuration was wrong or nothing could be measured."""
    options = _options(argv)
    if not torch.cuda.is_available():
        print("flashcore tune: this measures on a CUDA GPU, and there is none here", file=sys.stderr)
        return 1
    environment = machine.environment()
    gpu = targets.current(torch.cuda.current_device())
    path = options.out or lookup.TABLES / f"sm{gpu.arch}.json"
    masks = {"full": (False,), "causal": (True,), "both": (False, True)}[options.mask]
    work = list(shapes(options.heads, options.seqlens, options.head_dims, masks))
    if options.jobs:
        _compile(work, gpu, options.jobs)
    troubles: list[str] = []
    rows: list[lookup.Row] = []
    with Terminal(len(work), "tuning") as terminal:

        def trouble(text: str) -> None:
            troubles.append(text)
            terminal.line(f"  {text}")

        for shape in work:
            problem, timed = measure(shape, trouble)
            terminal.advance()
            if timed:
                best = timed[0]
                rows.append(lookup.row(problem, best.config, best.us, gpu.name, environment["commit"] or "unknown"))
                # now: a run that is cut short keeps what it has measured
                lookup.update(path, gpu.arch, lambda table: merged(table, rows))
                second = f", then {timed[1].us:.2f} µs" if len(timed) > 1 else ""
                c = best.config
                terminal.line(
                    f"{shape.label:<28} {c.kernel} {c.schedule} {c.block_m}x{c.block_n}, {c.num_warps} warps, "
                    f"{c.num_stages} stages: {best.us:.2f} µs{second}"
                )
    if rows:
        print(f"{len(rows)} rows written to {path}")
    return int(bool(troubles) or not rows)


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="flashcore tune", description="Measure every configuration on this GPU and write its tuning table."
    )
    for name, values, what in (
        ("heads", HEADS, "heads of all sequences together"),
        ("seqlens", SEQLENS, "sequence lengths"),
        ("head-dims", HEAD_DIMS, "head dimensions"),
    ):
        parser.add_argument(f"--{name}", type=int, nargs="+", default=values, metavar="N", help=f"{what} (%(default)s)")
    parser.add_argument("--mask", choices=("full", "causal", "both"), default="both")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, metavar="N",
        help="compile in N processes first, one for each core when left out; 0 = when it is measured",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="FILE", help="the table; default: the one that is shipped")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())

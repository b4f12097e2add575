"""`flashcore tune`: measure every configuration on this GPU and write the tuning table that chooses among them.

    flashcore tune --heads 64 256 --seqlens 512 --queries 1 64 --head-dims 128 --mask full --out sm90.json
    flashcore tune --check --suite nine window bias --json results/choices.json

What is to be measured is compiled in several processes first. Each configuration passes the error gate before it is
timed. All that serve a problem are timed together on the gpu clock with warm inputs, the fastest few again for longer
and on the rested clock: in turns with others some are ahead that take longer where nothing holds a GPU's clock back.
The table gets one row a problem: who wins by the geometric mean of both, and its time in turns. Problems that the table
has already, from an earlier run, keep their rows unless they are measured again. With --check nothing is written to a
table: it says where another configuration is faster than the one that calls get today, also for problems with options,
which no table knows.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashcore.benchmark import results
from flashcore.benchmark.shapes import SUITES, Shape
from flashcore.benchmark.terminal import Terminal, kind_of
from flashcore.core import target as targets
from flashcore.core.config import Config
from flashcore.core.problem import Problem
from flashcore.core.target import Target
from flashcore.launch import compile_check, compiled, launcher, packet, select
from flashcore.launch.arguments import Options, problem_of
from flashcore.measure import machine
from flashcore.measure.clocks import REST_S, Contestant, gpu_times
from flashcore.measure.statistics import median
from flashcore.testing import gates
from flashcore.tuning import lookup

DEVICE = "cuda"
FIRST_REPLAYS, LAST_REPLAYS, RESTED_REPLAYS = 5, 30, 10
RESTED_US = 500.0  # of a replay: in longer ones one code's times were seen to differ by 8% (results/trials/76)
FINALISTS = 4
SLOWER = 1.05  # times as long as the fastest configuration: what a check lets a choice take

HEADS = (8, 16, 32, 64, 128, 256, 512)  # of all sequences together
SEQLENS = (32, 64, 100, 128, 197, 256, 512, 577, 1024, 1500, 2048, 4096)
HEAD_DIMS = (32, 64, 128, 256)


@dataclass(frozen=True, slots=True)
class Case:
    """A shape, of whose query rows the first `queries` count; 0 = all."""

    shape: Shape
    queries: int = 0

    @property
    def label(self) -> str:
        return self.shape.label + (f" Q{self.queries}" if self.queries else "")

    def problem(self, device: str) -> tuple[Problem, dict[str, Tensor]]:
        """What is to be computed, and the tensors of a launch by their parameters' names; the output is not filled."""
        s = self.shape
        q, k, v, *bias = s.inputs(device)
        if self.queries:
            q = q[:, :, : self.queries].contiguous()
        tensors = {"q": q, "k": k, "v": v, "o": torch.empty_like(q)}
        options: dict[str, Tensor] = {}
        if bias:
            options["attn_mask"] = tensors["mask"] = bias[0]
        if s.lengths:
            options["seqused_k"] = tensors["seqused_k"] = s.seqused_k(q.device)
        asked = Options(is_causal=s.is_causal, window=s.window, softcap=s.softcap)
        return problem_of(q, k, v, tensors["o"], asked, **options), tensors


@dataclass(frozen=True, slots=True)
class Timed:
    """One configuration on one problem."""

    config: Config
    us: float  # gpu warm, in turns with the others, the median
    rested_us: float

    @property
    def mean(self) -> float:
        """What configurations are ranked by."""
        return math.sqrt(self.us * self.rested_us)


def measure(case: Case, report: Callable[[str], object] = lambda text: None) -> tuple[Problem, Config, list[Timed]]:
    """Time every configuration that can compute `case` on the current GPU. Returns the problem, the configuration that
    a call gets today, and the times of the fastest few and of that one, the fastest first.

    `report` hears of configurations that fail or are wrong: they are left out.

    Raises:
        UnsupportedError: no kernel serves the shape.
    """
    problem, tensors = case.problem(DEVICE)
    q, k, v, out = (tensors[name] for name in "qkvo")
    target = targets.current(q.get_device())
    expected = gates.expect(q, k, v, out.dtype, **case.shape.gate(q.device), attn_mask=tensors.get("mask"))
    chosen = select.select(problem, target)
    calls: dict[Config, Callable[[], None]] = {}
    for config in select.candidates(problem, target):
        try:
            call = _launcher(problem, config, tensors)
            out.fill_(float("nan"))
            call()
            verdict = expected.check(out)
        except Exception as error:
            torch.cuda.synchronize()  # raises again where the context is lost
            report(f"{case.label}, {config}: {kind_of(error)}")
            continue
        if not verdict.passed:
            report(f"{case.label}, {config}: WRONG, {verdict.failures}")
            continue
        calls[config] = call
    if not calls:
        return problem, chosen, []
    contestants = {repr(config): Contestant([call]) for config, call in calls.items()}
    first, _ = gpu_times(contestants, replays=FIRST_REPLAYS)
    order = sorted(contestants, key=lambda name: median(first[name]))
    kept = {*order[:FINALISTS], repr(chosen)}
    contestants = {name: contestant for name, contestant in contestants.items() if name in kept}
    in_turns, _ = gpu_times(contestants, replays=LAST_REPLAYS)
    rested, _ = gpu_times(contestants, replays=RESTED_REPLAYS, replay_us=RESTED_US, rest_s=REST_S)
    timed = [
        Timed(config, median(in_turns[repr(config)]), median(rested[repr(config)]))
        for config in calls if repr(config) in contestants
    ]  # fmt: skip
    return problem, chosen, sorted(timed, key=lambda entry: entry.mean)


def variants(work: Sequence[Case], target: Target) -> list[tuple[Problem, Config, Target]]:
    """All that `measure` compiles for these problems on that GPU, each code once."""
    found: dict[object, tuple[Problem, Config, Target]] = {}
    for case in work:
        problem, _ = case.problem("meta")
        for config in select.candidates(problem, target):
            binding = launcher.bind(problem, config, problem.head_dim**-0.5, target)
            found.setdefault(compiled.identity(binding), (problem, config, target))
    return list(found.values())


def _compile(work: Sequence[Case], target: Target, jobs: int) -> None:
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


def cases(
    heads: Sequence[int], seqlens: Sequence[int], queries: Sequence[int], head_dims: Sequence[int],
    masks: Sequence[bool],
) -> Iterator[Case]:  # fmt: skip
    """Every combination that fits comfortably in memory: at most 2^28 elements of k. Query rows: 0 = as many as keys,
    and never more.
    """
    for d, is_causal, s, rows, h in product(head_dims, masks, seqlens, queries, heads):
        if h * s * d <= 2**28 and rows < s:
            together = math.gcd(h, 8)
            yield Case(Shape(h // together, together, s, d, is_causal), rows)


def merged(old: Sequence[lookup.Row], new: Sequence[lookup.Row]) -> list[lookup.Row]:
    """Both, the new row where they speak of one problem, in the order in which a reviewer looks for one."""

    def problem(row: lookup.Row) -> tuple[str, int, bool, int, int, int]:
        return row.dtype, row.head_dim, row.is_causal, row.seqlen_q, row.seqlen_k, row.heads

    rows = {problem(row): row for row in (*old, *new)}
    return [rows[key] for key in sorted(rows)]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and write the table or what came of the check. Returns 1 when a configuration was wrong, nothing could
    be measured, or a choice that was checked takes more than SLOWER times as long as the fastest configuration.
    """
    options = _options(argv)
    if not torch.cuda.is_available():
        print("flashcore tune: this measures on a CUDA GPU, and there is none here", file=sys.stderr)
        return 1
    environment = machine.environment()
    gpu = targets.current(torch.cuda.current_device())
    path = options.out or lookup.TABLES / f"sm{gpu.arch}.json"
    if options.jobs:
        _compile(options.work, gpu, options.jobs)
    troubles: list[str] = []
    rows: list[lookup.Row] = []
    checked: list[dict[str, Any]] = []
    with Terminal(len(options.work), "tuning") as terminal:

        def trouble(text: str) -> None:
            troubles.append(text)
            terminal.line(f"  {text}")

        for case in options.work:
            problem, chosen, timed = measure(case, trouble)
            terminal.advance()
            # written at once: a run that is cut short keeps what it has measured
            if timed and options.check:
                checked.append(compared(case, chosen, timed))
                terminal.line(_verdict(checked[-1]))
                if options.json:
                    results.write(options.json, {"kind": "choices", "environment": environment, "choices": checked})
            elif timed:
                best = timed[0]
                rows.append(lookup.row(problem, best.config, best.us, gpu.name, environment["commit"] or "unknown"))
                lookup.update(path, gpu.arch, lambda table: merged(table, rows))
                second = f", then {_times(timed[1])}" if len(timed) > 1 else ""
                terminal.line(f"{case.label:<28} {_named(best.config)}: {_times(best)}{second}")
    if rows:
        print(f"{len(rows)} rows written to {path}")
    behind = [entry for entry in checked if entry["ratio"] > SLOWER]
    if checked:
        print(f"{len(behind)} of {len(checked)} choices take more than {SLOWER:g} times as long as the fastest")
    return int(bool(troubles or behind) or not (rows or checked))


def compared(case: Case, chosen: Config, timed: Sequence[Timed]) -> dict[str, Any]:
    """What a call gets today beside the fastest configuration; a choice that failed counts as infinitely slow."""
    fastest = timed[0]
    mine = next((entry for entry in timed if entry.config == chosen), Timed(chosen, math.inf, math.inf))
    return {
        "case": case.label, "shape": case.shape.as_json(), "queries": case.queries or case.shape.seqlen,
        "chosen": asdict(chosen), "us": mine.us, "rested_us": mine.rested_us, "fastest": asdict(fastest.config),
        "fastest_us": fastest.us, "fastest_rested_us": fastest.rested_us, "ratio": mine.mean / fastest.mean,
    }  # fmt: skip


def _verdict(entry: dict[str, Any]) -> str:
    chosen, fastest = (Config(**entry[name]) for name in ("chosen", "fastest"))
    line = f"{entry['case']:<28} {_named(chosen)}: {_times(Timed(chosen, entry['us'], entry['rested_us']))}"
    if entry["ratio"] > SLOWER:
        best = Timed(fastest, entry["fastest_us"], entry["fastest_rested_us"])
        line += f", {entry['ratio']:.2f} times as long as {_named(fastest)}: {_times(best)}"
    return line


def _times(timed: Timed) -> str:
    return f"{timed.us:.2f} µs, rested {timed.rested_us:.2f}"


def _named(c: Config) -> str:
    kernel = f"{c.kernel} {c.schedule}".strip()
    registers = f", {c.maxnreg} registers" if c.maxnreg else ""
    return f"{kernel} {c.block_m}x{c.block_n}, {c.num_warps} warps, {c.num_stages} stages{registers}"


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="flashcore tune", description="Measure every configuration on this GPU and write its tuning table."
    )
    for name, values, what in (
        ("heads", HEADS, "heads of all sequences together"),
        ("seqlens", SEQLENS, "sequence lengths"),
        ("queries", (0,), "query rows that are fewer than a sequence's keys; 0 = as many"),
        ("head-dims", HEAD_DIMS, "head dimensions"),
    ):
        parser.add_argument(f"--{name}", type=int, nargs="+", default=values, metavar="N", help=f"{what} (%(default)s)")
    parser.add_argument("--mask", choices=("full", "causal", "both"), default="both")
    parser.add_argument("--suite", nargs="+", choices=list(SUITES), default=[], help="the benchmark's shapes instead")
    parser.add_argument(
        "--check", action="store_true", help="write no table: say where the choice that calls get is not the fastest"
    )
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, metavar="N",
        help="compile in N processes first, one for each core when left out; 0 = when it is measured",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="FILE", help="the table; default: the one that is shipped")
    parser.add_argument("--json", type=Path, metavar="FILE", help="with --check, what came of it as a record")
    options = parser.parse_args(argv)
    if options.json and not options.check:
        parser.error("--json: the record of a check, with --check")
    if options.out and options.check:
        parser.error("--out: a check writes no table")
    masks = {"full": (False,), "causal": (True,), "both": (False, True)}[options.mask]
    if options.suite:
        named = dict.fromkeys(shape for name in options.suite for shape in SUITES[name])
        options.work = [Case(shape) for shape in named if shape.lengths != "packed"]
    else:
        options.work = list(cases(options.heads, options.seqlens, options.queries, options.head_dims, masks))
    unknown = [case.label for case in options.work if case.shape.features - {"causal"}]
    if unknown and not options.check:
        parser.error(f"--suite: a table knows plain and causal problems, not {unknown[0]!r}; --check measures it")
    if not options.work:
        parser.error("nothing to measure: packed sequences are not, nor more query rows than keys")
    return options


if __name__ == "__main__":
    sys.exit(main())

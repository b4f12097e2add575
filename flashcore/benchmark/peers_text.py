"""The comparison with the peers as text, from its record: a row a shape and clock, then what it comes to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flashcore.benchmark import results
from flashcore.benchmark.shapes import SUITES, Shape
from flashcore.benchmark.terminal import us
from flashcore.measure import machine
from flashcore.measure.statistics import Interval, geometric_mean

Record = dict[str, Any]

CLOCKS = {"gpu_warm": "warm", "gpu_cold": "cold"}


def figure(case: Record, name: str, clock: str = "gpu_warm") -> float | None:
    """µs per call of one contestant; None where it has none."""
    timed = case["contestants"][name].get(clock)
    return timed["us"] if timed else None


def best_peer(case: Record, clock: str = "gpu_warm") -> str | None:
    """The fastest contestant that isn't FlashCore; None when none was timed."""
    times = {name: figure(case, name, clock) for name in case["contestants"] if not name.startswith("flashcore")}
    timed = {name: t for name, t in times.items() if t is not None}
    return min(timed, key=timed.__getitem__) if timed else None


def ratio(case: Record, clock: str = "gpu_warm") -> Interval | None:
    """How many times as long as FlashCore the best peer takes, with its 95% interval; None without both."""
    best = best_peer(case, clock)
    found = case["contestants"][best][clock].get("over_flashcore") if best else None
    return Interval(**found) if found else None


def tflops(case: Record, clock: str = "gpu_warm") -> float | None:
    """FlashCore's useful arithmetic per second, in 10^12."""
    ours = figure(case, "flashcore", clock)
    return Shape(**case["shape"]).flops / ours / 1e6 if ours is not None else None


def ratios(record: Record, clock: str) -> list[float]:
    """The ratio of every case that has one."""
    return [found.value for case in record["cases"] if (found := ratio(case, clock))]


def of_suite(record: Record, suite: str) -> Record | None:
    """A record's cases of one suite, as a record; None where the suite was not asked for.

    It is complete when every case of that suite is there, whatever became of the others.
    """
    names = record["suite"].split()
    if suite not in names:
        return None
    if "suites" not in record:  # one suite a file, as the first records were
        return record if names == [suite] else None
    order = {shape.label: place for place, shape in enumerate(SUITES.get(suite, ()))}
    cases = [case for case in record["cases"] if suite in case["suites"]]
    cases.sort(key=lambda case: order.get(case["case"], len(order)))
    return {**record, "suite": suite, "complete": record["suites"][suite], "cases": cases}


def newest(folder: Path, suite: str) -> dict[str, Record]:
    """GPU -> the newest complete run of a suite."""
    return results.newest(folder, "peers", part=lambda record: of_suite(record, suite))


@dataclass(frozen=True, slots=True)
class Beside:
    """FlashCore on one case beside something on another case of the same record; medians of both, no interval."""

    shape: Shape
    other: Shape
    what: str
    ratio: float


def across(record: Record) -> list[Beside]:
    """Comparisons that need two cases.

    Sequences of different lengths: the best peer on the same batch as if it had no padding, divided by FlashCore's time
    with lengths. Odd lengths: FlashCore's time for a score divided by that at the next multiple of 64.
    """
    cases = {Shape(**case["shape"]): case for case in record["cases"]}
    found = []
    for shape, case in cases.items():
        ours, full = figure(case, "flashcore"), replace(shape, lengths="")
        if ours is None:
            continue
        if shape.lengths and full in cases and (best := best_peer(cases[full])):
            theirs = figure(cases[full], best)
            assert theirs is not None
            found.append(Beside(shape, full, f"{best} on the padded batch without lengths / FlashCore", theirs / ours))
        longer = replace(shape, seqlen=-(-shape.seqlen // 64) * 64)
        if longer != shape and longer in cases and (even := figure(cases[longer], "flashcore")):
            cost = ours / shape.scores / (even / longer.scores)
            found.append(Beside(shape, longer, f"time per score / that of {longer.label}", cost))
    return found


def passed(record: Record) -> bool:
    """Whether FlashCore computed every case, rightly."""
    return all(case["contestants"]["flashcore"]["status"] == "ok" for case in record["cases"])


def _width(name: str) -> int:
    return max(8, len(name))


def head(protocol: Record) -> Iterator[str]:
    """The title and the column names."""
    names = protocol["contestants"]
    yield f"FLASHCORE AND ITS PEERS: µs per call on the gpu clock ({protocol['name']}); ratio = best peer / FlashCore"
    columns = " ".join(f"{name:>{_width(name)}}" for name in names)
    line = f"{'Shape':<28} {'L2':<5}{columns} {'Ratio':>7} {'TFLOP/s':>8}  Best peer"
    yield line
    yield "-" * len(line)


def rows(case: Record, protocol: Record) -> Iterator[str]:
    """One shape: a row a clock."""
    label = Shape(**case["shape"]).label
    for clock, title in CLOCKS.items():
        if clock == "gpu_cold" and "cold" not in protocol["name"]:
            continue
        columns = " ".join(us(figure(case, name, clock), _width(name)) for name in protocol["contestants"])
        times, done = ratio(case, clock), tflops(case, clock)
        yield (
            f"{label if clock == 'gpu_warm' else '':<28} {title:<5}{columns} "
            f"{'-' if times is None else f'{times.value:.2f}x':>7} {'-' if done is None else f'{done:.0f}':>8}  "
            f"{best_peer(case, clock) or '-'}"
        )


def rest(record: Record) -> Iterator[str]:
    """What it comes to, who was left out and why, and what the GPU did meanwhile."""
    yield ""
    for clock, title in CLOCKS.items():
        if values := ratios(record, clock):
            ahead = sum(value > 1 for value in values)
            yield (
                f"{title}: the best peer takes {geometric_mean(values):.3f}x as long (geometric mean over "
                f"{len(values)}; {min(values):.2f}x to {max(values):.2f}x; FlashCore ahead on {ahead})"
            )
    for beside in across(record):
        yield f"{beside.shape.label}: {beside.what}: {beside.ratio:.2f}x"
    if found := record["ceilings"]:
        yield (
            f"ceilings: matmul {found['matmul_tflops']:.0f} TFLOP/s, copy in L2 {found['l2_copy_tb_s']:.2f} TB/s, "
            f"in HBM {found['hbm_copy_tb_s']:.2f} TB/s, empty kernel {found['empty_kernel_us']:.2f} µs"
        )
    yield from left_out(record)
    if reasons := machine.throttled(state for case in record["cases"] for state in case["gpu_states"]):
        yield f"NOTE: the GPU's clock was held back during this run: {', '.join(reasons)}."
    if not record["complete"]:
        yield "NOTE: not every shape was measured."


def left_out(record: Record) -> Iterator[str]:
    """Who has no figures, where and why: one line for each reason."""
    where: dict[tuple[str, str, str], list[str]] = {}
    for case in record["cases"]:
        for name, found in case["contestants"].items():
            if found["status"] != "ok":
                where.setdefault((name, found["status"], found["reason"]), []).append(Shape(**case["shape"]).label)
    for (name, status, reason), labels in where.items():
        places = "everywhere" if len(labels) == len(record["cases"]) else ", ".join(labels)
        yield f"{name}: {status} ({places}): {reason}"

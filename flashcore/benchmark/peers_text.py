"""The comparison with the peers as text, from its record: a row a shape and clock, then what it comes to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from flashcore.benchmark import results
from flashcore.benchmark.shapes import SUITES, Shape
from flashcore.benchmark.terminal import us
from flashcore.measure import machine
from flashcore.measure.statistics import Interval, geometric_mean, ratio_interval

Record = dict[str, Any]

PLACES = 4  # shapes that a line names, before it counts the rest
ODD_BAR = 1.15  # a score at an odd length takes at most so many times as long as at the next multiple of 64
CLOCKS = {  # as protocols name them
    "gpu_warm": "gpu warm", "gpu_cold": "gpu cold", "gpu_alone": "gpu alone", "call": "call", "host": "host",
}  # fmt: skip


def clocks(protocol: Record) -> list[str]:
    """The clocks of a record, in CLOCKS' order."""
    named = protocol["name"].split(" + ")
    return [clock for clock, title in CLOCKS.items() if title in named]


def figure(case: Record, name: str, clock: str = "gpu_warm") -> float | None:
    """Median µs per call of one contestant; None where it has none."""
    timed = case["contestants"].get(name, {}).get(clock)
    if not timed:
        return None
    us: float = timed["us"] if "us" in timed else timed["p50"]
    return us


def best_peer(case: Record, clock: str = "gpu_warm") -> str | None:
    """The fastest contestant that isn't FlashCore; None when none was timed."""
    times = {name: figure(case, name, clock) for name in case["contestants"] if not name.startswith("flashcore")}
    timed = {name: t for name, t in times.items() if t is not None}
    return min(timed, key=timed.__getitem__) if timed else None


def over_flashcore(case: Record, name: str, clock: str = "gpu_warm") -> Interval | None:
    """How many times as long as FlashCore a contestant takes, with its 95% interval; None without both.

    Of the rounds, where a record has them: what it says itself may be by an earlier definition.
    """
    timed, ours = (case["contestants"].get(each, {}).get(clock, {}) for each in (name, "flashcore"))
    if "rounds" in timed and "rounds" in ours:
        return ratio_interval(timed["rounds"], ours["rounds"])
    return Interval(**timed["over_flashcore"]) if "over_flashcore" in timed else None


def ratio(case: Record, clock: str = "gpu_warm") -> Interval | None:
    """The best peer's `over_flashcore`."""
    best = best_peer(case, clock)
    return over_flashcore(case, best, clock) if best else None


def tflops(case: Record, clock: str = "gpu_warm") -> float | None:
    """FlashCore's useful arithmetic per second of device time, in 10^12."""
    ours = figure(case, "flashcore", clock) if clock.startswith("gpu") else None
    return Shape(**case["shape"]).flops / ours / 1e6 if ours is not None else None


def roof(shape: Shape, ceilings: dict[str, float], clock: str) -> float:
    """TFLOP/s that this GPU could reach: bound by matmul, or by reading q, k, v and writing the output once.

    Warm, they move at the speed of copies inside the L2, and cold through HBM, as `measure.ceilings` measured both.
    """
    bandwidth = ceilings["hbm_copy_tb_s" if clock == "gpu_cold" else "l2_copy_tb_s"]
    return min(ceilings["matmul_tflops"], shape.flops * bandwidth / (shape.input_bytes + shape.output_bytes))


def share(case: Record, ceilings: dict[str, float] | None, clock: str = "gpu_warm") -> float | None:
    """FlashCore's TFLOP/s as a part of the roof; None without both."""
    done = tflops(case, clock)
    return None if done is None or not ceilings else done / roof(Shape(**case["shape"]), ceilings, clock)


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
    if not record.get("suites"):  # one suite a file, as the first records were, or shapes of the user's own
        return record if names == [suite] else None
    order = {shape.label: place for place, shape in enumerate(SUITES.get(suite, ()))}
    cases = [case for case in record["cases"] if suite in case["suites"]]
    cases.sort(key=lambda case: order.get(case["case"], len(order)))
    return {**record, "suite": suite, "complete": record["suites"][suite], "cases": cases}


def newest(folder: Path, suite: str) -> dict[str, Record]:
    """GPU -> the run of a suite that stands: of its complete ones, the newest by `standing`."""
    found = {}
    for gpu, records in results.runs(folder, "peers").items():
        parts = [part for record in records if (part := of_suite(record, suite)) and results.complete(part)]
        if parts:
            found[gpu] = standing(parts)
    return found


def standing(runs: Sequence[Record]) -> Record:
    """Of runs of the same cases, the oldest first, the newest that heard, on each case and clock that it measured,
    whoever was the fastest peer there in any of them: no figure is to improve by whom it is not compared with. The
    newest where no run did.
    """
    fastest: dict[tuple[str, str], set[str]] = {}
    for run in runs:
        for case, clock in product(run["cases"], CLOCKS):
            if best := best_peer(case, clock):
                fastest.setdefault((case["case"], clock), set()).add(best)

    def heard(case: Record, clock: str) -> bool:
        asked = {name for name, found in case["contestants"].items() if found["status"] != "missing"}
        return figure(case, "flashcore", clock) is None or fastest.get((case["case"], clock), set()) <= asked

    whole = [run for run in runs if all(heard(case, clock) for case, clock in product(run["cases"], CLOCKS))]
    return (whole or runs)[-1]


@dataclass(frozen=True, slots=True)
class Beside:
    """FlashCore on one case beside something on another case of the same record; medians of both, no interval."""

    shape: Shape
    other: Shape
    what: str
    ratio: float
    note: str = ""


def across(record: Record) -> list[Beside]:
    """Comparisons that need two cases.

    Sequences of different lengths: the best peer on the same batch as if it had no padding, divided by FlashCore's time
    with lengths. Odd lengths beyond 64: FlashCore's time for a score divided by that at the next multiple of 64, beside
    its bar and what is to be expected of a kernel that computes whole tiles of 64 rows and no key too many.
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
        if 64 < shape.seqlen < longer.seqlen and longer in cases and (even := figure(cases[longer], "flashcore")):
            cost = ours / shape.scores / (even / longer.scores)
            tiles = f"whole tiles of 64 rows alone: {longer.seqlen / shape.seqlen:.2f}x, computed"
            note = f" (bar {ODD_BAR:.2f}x; {tiles})"
            found.append(Beside(shape, longer, f"time per score / that of {longer.label}", cost, note))
    return found


def told(name: str) -> str:
    """How a contestant is told the lengths of a padded batch."""
    if name.startswith("sdpa"):
        return f"a mask [B, 1, {'S' if name.endswith('-square') else '1'}, S]"
    return "a block mask" if name == "flex" else "key counts"


def by_form(record: Record) -> Iterator[str]:
    """Padded batches: for each form in which peers are told the lengths, how many times as long the fastest one takes.

    A mask with a row for every query costs more than one row for all of them, so that a ratio says little without it.
    """
    for case in record["cases"]:
        shape = Shape(**case["shape"])
        best: dict[str, tuple[float, str]] = {}
        for name in case["contestants"] if shape.lengths == "padded" else ():
            found = None if name.startswith("flashcore") else over_flashcore(case, name)
            if found:
                best[told(name)] = min(best.get(told(name), (found.value, name)), (found.value, name))
        for form, (ratio, name) in best.items():
            yield f"{shape.label}: {name} with {form} / FlashCore with key counts: {ratio:.2f}x"


def passed(record: Record) -> bool:
    """Whether FlashCore computed every case, rightly."""
    return all(case["contestants"]["flashcore"]["status"] == "ok" for case in record["cases"])


def _width(name: str) -> int:
    return max(8, len(name))


def head(protocol: Record) -> Iterator[str]:
    """The title and the column names."""
    names = protocol["contestants"]
    yield f"FLASHCORE AND ITS PEERS: µs per call ({protocol['name']}); ratio = best peer / FlashCore"
    columns = " ".join(f"{name:>{_width(name)}}" for name in names)
    line = f"{'Shape':<28} {'Clock':<9}{columns} {'Ratio':>7} {'TFLOP/s':>8} {'of roof':>8}  Best peer"
    yield line
    yield "-" * len(line)


def rows(case: Record, protocol: Record, ceilings: dict[str, float] | None = None) -> Iterator[str]:
    """One shape: a row a clock."""
    label = Shape(**case["shape"]).label
    for clock in clocks(protocol):
        columns = " ".join(us(figure(case, name, clock), _width(name)) for name in protocol["contestants"])
        times, done, part = ratio(case, clock), tflops(case, clock), share(case, ceilings, clock)
        yield (
            f"{label:<28} {CLOCKS[clock]:<9}{columns} "
            f"{'-' if times is None else f'{times.value:.2f}x':>7} {'-' if done is None else f'{done:.0f}':>8} "
            f"{'-' if part is None else f'{100 * part:.0f}%':>8}  {best_peer(case, clock) or '-'}"
        )
        label = ""


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
    if found := record["ceilings"]:
        yield (
            f"ceilings: matmul {found['matmul_tflops']:.0f} TFLOP/s, copy in L2 {found['l2_copy_tb_s']:.2f} TB/s, "
            f"in HBM {found['hbm_copy_tb_s']:.2f} TB/s, empty kernel {found['empty_kernel_us']:.2f} µs"
        )
    yield from beside_the_table(record)
    yield from left_out(record)
    if reasons := machine.throttled(state for case in record["cases"] for state in case["gpu_states"]):
        yield f"NOTE: the GPU's clock was held back during this run: {', '.join(reasons)}."
    if not record["complete"]:
        yield "NOTE: not every shape was measured."


def beside_the_table(record: Record) -> Iterator[str]:
    """What has no column: comparisons across cases, memory, the event floor and the cross-check of the clock."""
    yield from by_form(record)
    for beside in across(record):
        yield f"{beside.shape.label}: {beside.what}: {beside.ratio:.2f}x{beside.note}"
    yield from memory(record)
    if floor := record.get("event_floor_us"):
        yield f"event floor: CUDA events around nothing read {floor['p50']:.2f} µs (P50): no call can read less"
    if checked := record.get("cross_check"):
        what = f"cross-check: {checked['contestant']} on {checked['case']}"
        yield (
            f"{what}: none: {checked['reason']}"
            if "reason" in checked
            else f"{what} takes {checked['ours_us']:.2f} µs by our clock and {checked['us']:.2f} by {checked['tool']} "
            f"{checked['version']} ({100 * (checked['ratio'] - 1):+.1f}%)"
        )


def memory(record: Record) -> Iterator[str]:
    """The most that a call of each contestant held beyond its inputs, over all shapes."""
    most: dict[str, int] = {}
    for case in record["cases"]:
        for name, found in case["contestants"].items():
            if "memory_bytes" in found:
                most[name] = max(most.get(name, 0), found["memory_bytes"])
    if most:
        yield "memory of a call beyond its inputs, at most: " + ", ".join(
            f"{name} {held / 2**20:.1f} MiB" for name, held in most.items()
        )


def left_out(record: Record) -> Iterator[str]:
    """Who has no figures, where and why: one line for each reason, and one alone for who is not installed."""
    where: dict[tuple[str, str, str], list[str]] = {}
    for case in record["cases"]:
        for name, found in case["contestants"].items():
            if found["status"] != "ok":
                where.setdefault((name, found["status"], found["reason"]), []).append(Shape(**case["shape"]).label)
    missing = {name: reason for name, status, reason in where if status == "missing"}
    yield from (f"{name}: missing (everywhere): {reason}" for name, reason in missing.items())
    for (name, status, reason), labels in where.items():
        if name in missing:
            continue
        places = "everywhere" if len(labels) == len(record["cases"]) else ", ".join(labels[:PLACES])
        more = f" and {len(labels) - PLACES} more" if len(labels) > PLACES and places != "everywhere" else ""
        yield f"{name}: {status} ({places}{more}): {reason}"

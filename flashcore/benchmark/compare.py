"""Two results files of one kind side by side: two versions, two machines, or one of each twice.

    flashcore compare results/peers-nine-h100-2026-11-22.json results/peers-nine-h200-2026-11-22.json

Every ratio is B's median divided by A's, of the same shape, contestant and clock: below 1, B is faster. A ratio lies
outside the noise when both hold:

- the 95% intervals of the two medians do not overlap: the recorded ones, or bootstrapped here from the recorded rounds;
- it is further from 1 than the libraries beside FlashCore are, 19 times of 20, on this clock between these runs. The
  intervals are of one run each and leave out what changes from run to run (the GPU's clock, its heat, the host);
  libraries whose version stayed the same, on the same machine and software, show how much that is. Where there are
  none, the first rule decides alone, and the output says so.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flashcore.benchmark import results
from flashcore.benchmark.shapes import Shape
from flashcore.benchmark.terminal import us
from flashcore.measure import machine
from flashcore.measure.statistics import Interval, geometric_mean, median_interval, percentile

Record = dict[str, Any]

KINDS = ("validation", "peers", "host")
CLOCKS = {"call": "call", "gpu_warm": "gpu warm", "gpu_cold": "gpu cold", "gpu_alone": "gpu alone", "host": "host"}
MACHINE = ("gpu", "driver", "cpu")
SOFTWARE = ("cuda", "cudnn", "torch", "triton", "python")
OTHER_METHOD = ("contestants",)  # of the protocol: what was compared, not how


@dataclass(frozen=True, slots=True)
class Row:
    """One contestant on one shape and clock in both files: medians in µs per call, and B's divided by A's."""

    shape: str
    contestant: str
    clock: str
    a: Interval
    b: Interval
    control: bool  # nothing that makes up this time has changed but the run

    @property
    def ours(self) -> bool:
        return _ours(self.contestant)

    @property
    def ratio(self) -> Interval:
        """B / A; its bounds are reached at the ends of the two intervals, and exclude 1 when those do not overlap."""
        (a, a_low, a_high), (b, b_low, b_high) = ((i.value, i.low, i.high) for i in (self.a, self.b))
        if a_low is None or a_high is None or b_low is None or b_high is None:
            return Interval(b / a, None, None)
        return Interval(b / a, b_low / a_high, b_high / a_low)

    def outside(self, drift: float | None) -> bool | None:
        """Whether the ratio lies outside the noise, by the module's rule; None where no interval is known."""
        ratio = self.ratio
        if ratio.low is None or ratio.high is None:
            return None
        return not ratio.low <= 1 <= ratio.high and (drift is None or _distance(ratio.value) > drift)


def _ours(contestant: str) -> bool:
    return contestant.startswith("flashcore") or contestant == "naive"  # host.py's name for our kernel launched by hand


def _distance(ratio: float) -> float:
    """How far a ratio is from 1, as a factor: 0.8 is as far as 1.25."""
    return max(ratio, 1 / ratio)


def rows(a: Record, b: Record) -> list[Row]:
    """Everything that was timed in both records, FlashCore first, in A's order."""
    same = all(a["environment"].get(name) == b["environment"].get(name) for name in (*MACHINE, *SOFTWARE))
    before, after = _cases(a), _cases(b)
    found = []
    for label, case in before.items():
        for name, ours in case["contestants"].items() if label in after else ():
            theirs = after[label]["contestants"].get(name)
            if theirs is None or ours["status"] != "ok" or theirs["status"] != "ok":
                continue
            control = same and not _ours(name) and ours["version"] == theirs["version"]
            for clock in CLOCKS:
                if clock in ours and clock in theirs:
                    found.append(Row(label, name, clock, _interval(ours[clock]), _interval(theirs[clock]), control))
    order = list(dict.fromkeys(row.contestant for row in found))
    return sorted(found, key=lambda row: (not row.ours, order.index(row.contestant)))


def _cases(record: Record) -> dict[str, Record]:
    """The cases by what tells them apart."""
    return {
        Shape(**case["shape"]).label + (", gradients" if case.get("gradients") else ""): case
        for case in record["cases"]
    }


def _interval(timing: Record) -> Interval:
    """The median of one contestant's timing with its interval, whichever clock recorded it."""
    value, low, high = (
        (timing["us"], timing["low"], timing["high"])
        if "us" in timing
        else (timing["p50"], timing["p50_low"], timing["p50_high"])
    )
    if low is None and "rounds" in timing:
        return median_interval(timing["rounds"])
    return Interval(value, low, high)


def drifts(found: Iterable[Row]) -> dict[str, float | None]:
    """Clock -> the factor within which 19 of 20 unchanged libraries stay between the runs; None without any."""
    distances: dict[str, list[float]] = {}
    for row in found:
        distances.setdefault(row.clock, []).extend([_distance(row.ratio.value)] if row.control else [])
    return {clock: percentile(values, 95) if values else None for clock, values in distances.items()}


def warnings(a: Record, b: Record) -> list[str]:
    """What keeps the two files from being the same measurement of two things."""
    found = []
    ours, theirs = a["environment"], b["environment"]
    if ours["gpu"] != theirs["gpu"]:
        found.append(f"the GPUs differ ({ours['gpu']}; {theirs['gpu']}): the ratios compare machines")
    ways = [{k: v for k, v in record["protocol"].items() if k not in OTHER_METHOD} for record in (a, b)]
    for name in sorted(set().union(*ways)):
        if ways[0].get(name) != ways[1].get(name):
            found.append(f"the protocols differ in {name}: {ways[0].get(name)!r}; {ways[1].get(name)!r}")
    for side, record in (("A", a), ("B", b)):
        if reasons := machine.throttled(_states(record)):
            found.append(f"{side}: the GPU's clock was held back: {', '.join(reasons)}")
        if not record.get("complete", True):
            found.append(f"{side}: not every shape was measured")
    return found


def _states(record: Record) -> list[Record]:
    return record.get("gpu_states") or [state for case in record["cases"] for state in case.get("gpu_states", ())]


def unmatched(a: Record, b: Record) -> list[str]:
    """What has a time in one file alone, and why where that is recorded."""
    before, after = _cases(a), _cases(b)
    found = [f"{label}: only in A" for label in before if label not in after]
    found += [f"{label}: only in B" for label in after if label not in before]
    places: dict[str, list[str]] = {}
    shared = [label for label in before if label in after]
    for label in shared:
        ours, theirs = before[label]["contestants"], after[label]["contestants"]
        for name in {**ours, **theirs}:
            states = [_state(side.get(name)) for side in (ours, theirs)]
            if states[0] != states[1] and "timed" in states:
                places.setdefault(f"{name}: {states[0]} in A, {states[1]} in B", []).append(label)
    return found + [
        f"{what} ({'everywhere' if len(labels) == len(shared) else ', '.join(labels)})"
        for what, labels in places.items()
    ]


def _state(contestant: Record | None) -> str:
    if contestant is None:
        return "absent"
    if contestant["status"] == "ok":
        return "timed"
    status, reason = contestant["status"], contestant["reason"]
    return f"{status} ({reason})" if reason else f"{status}"


# -- as text ----------------------------------------------------------------------------------------------------


def text(a: Record, b: Record, found: Sequence[Row]) -> Iterator[str]:
    """The whole comparison, line by line."""
    yield "FLASHCORE COMPARE: B / A of the medians; below 1, B is faster"
    yield ""
    yield from _sides(a, b)
    if found_wanting := warnings(a, b):
        yield ""
        yield from (f"WARNING: {line}" for line in found_wanting)
    drift = drifts(found)
    for clock, title in CLOCKS.items():
        if clock in drift:
            yield ""
            yield from _table(f"{title} (µs per call)", [row for row in found if row.clock == clock], drift[clock])
    if left := unmatched(a, b):
        yield ""
        yield "Without a ratio:"
        yield from (f"  {line}" for line in left)
    yield ""
    yield from _summary(found, drift)


def _sides(a: Record, b: Record) -> Iterator[str]:
    ours, theirs = (_identity(record) for record in (a, b))
    width = max(len(value) for value in ours.values())
    yield f"{'':<10}{'A':<{width}}  B"
    for name, value in ours.items():
        differs = name not in ("file", "recorded") and value != theirs[name]
        yield f"{name:<10}{value:<{width}}  {theirs[name]}{'   (differs)' if differs else ''}"


def _identity(record: Record) -> dict[str, str]:
    environment = record["environment"]
    return {"file": record["file"]} | {
        name: str(environment.get(name) or "unknown")
        for name in ("recorded", *MACHINE, *SOFTWARE, "commit", "source")
    }


def _table(title: str, found: Sequence[Row], drift: float | None) -> Iterator[str]:
    names, labels = (max(len(getattr(row, field)) for row in found) for field in ("contestant", "shape"))
    line = f"{title:<{names + labels + 1}} {'A':>8} {'B':>8}   {'B / A':>6}  {'bounds':<14}  Outside the noise"
    yield line
    yield "-" * len(line)
    last = None
    for row in found:
        ratio = row.ratio
        bounds = "-" if ratio.low is None else f"{ratio.low:.3f} to {ratio.high:.3f}"
        verdict = {None: "no interval", False: "", True: "faster" if ratio.value < 1 else "SLOWER"}[row.outside(drift)]
        name = row.contestant if row.contestant != last else ""
        last = row.contestant
        yield (
            f"{name:<{names}} {row.shape:<{labels}} {us(row.a.value)} {us(row.b.value)}   {ratio.value:>6.3f}  "
            f"{bounds:<14}  {verdict}"
        ).rstrip()


def _summary(found: Sequence[Row], drift: dict[str, float | None]) -> Iterator[str]:
    for line in summaries(found, drift):
        yield (
            f"{CLOCKS[line['clock']]}, {line['contestant']}: {line['mean']:.3f}x (geometric mean over {line['n']}; "
            f"{line['min']:.3f}x to {line['max']:.3f}x); outside the noise: {line['faster']} faster, "
            f"{line['slower']} slower"
        )
    for clock, (before, after) in leads(found).items():
        yield (
            f"{CLOCKS[clock]}, FlashCore beside the fastest other in both files: it takes {before:.3f}x as long in A, "
            f"{after:.3f}x in B (geometric mean)"
        )
    yield ""
    yield "Outside the noise: the 95% intervals of the two medians do not overlap, and"
    for clock, factor in drift.items():
        title = CLOCKS[clock]
        if factor is None:
            yield (
                f"  {title}: nothing more is asked, as no library was measured unchanged on the same machine in both "
                "files. Intervals are of one run each: two runs of the same code often differ by more."
            )
        else:
            n = sum(row.control for row in found if row.clock == clock)
            yield (
                f"  {title}: the ratio is further from 1 than a factor of {factor:.3f}, within which 95% of the {n} "
                "times of unchanged libraries stay between these runs."
            )


def summaries(found: Sequence[Row], drift: dict[str, float | None]) -> list[dict[str, Any]]:
    """For each of FlashCore's contestants and each clock: mean, extremes, and how many lie outside the noise."""
    lines = []
    for clock in (clock for clock in CLOCKS if clock in drift):
        for name in dict.fromkeys(row.contestant for row in found if row.ours and row.clock == clock):
            mine = [row for row in found if (row.contestant, row.clock) == (name, clock)]
            values = [row.ratio.value for row in mine]
            moved = [row.ratio.value for row in mine if row.outside(drift[clock])]
            lines.append({
                "contestant": name, "clock": clock, "n": len(values), "mean": geometric_mean(values),
                "min": min(values), "max": max(values),
                "faster": sum(value < 1 for value in moved), "slower": sum(value > 1 for value in moved),
            })  # fmt: skip
    return lines


def leads(found: Sequence[Row]) -> dict[str, tuple[float, float]]:
    """Clock -> how many times as long as FlashCore the fastest other takes in A and in B, over the same contestants.

    Each run's own ratio: what remains comparable where the machines differ. The geometric mean over the shapes.
    """
    times: dict[str, dict[str, list[Row]]] = {}
    for row in found:
        times.setdefault(row.clock, {}).setdefault(row.shape, []).append(row)
    answer = {}
    for clock, shapes in times.items():
        ratios: list[tuple[float, float]] = []
        for each in shapes.values():
            ours = next((row for row in each if row.contestant == "flashcore"), None)
            others = [row for row in each if not row.ours]
            if ours and others:
                fastest = (min(row.a.value for row in others), min(row.b.value for row in others))
                ratios.append((fastest[0] / ours.a.value, fastest[1] / ours.b.value))
        if ratios:
            before, after = zip(*ratios, strict=True)
            answer[clock] = (geometric_mean(before), geometric_mean(after))
    return answer


def as_json(a: Record, b: Record, found: Sequence[Row]) -> dict[str, Any]:
    """The comparison as plain data. Ratios are B / A; `drift` is a factor, null where nothing tells it."""
    drift = drifts(found)
    return {
        "kind": "comparison",
        "of": a["kind"],
        "sides": {
            side: {"file": record["file"], "environment": record["environment"], "protocol": record["protocol"]}
            for side, record in (("a", a), ("b", b))
        },
        "warnings": warnings(a, b),
        "drift": drift,
        "rows": [
            {
                "shape": row.shape, "contestant": row.contestant, "clock": row.clock, "a": asdict(row.a),
                "b": asdict(row.b), "ratio": asdict(row.ratio), "control": row.control,
                "outside": row.outside(drift[row.clock]),
            }
            for row in found
        ],
        "unmatched": unmatched(a, b),
        "summary": summaries(found, drift),
        "leads": {clock: {"a": before, "b": after} for clock, (before, after) in leads(found).items()},
    }  # fmt: skip


def _read(path: Path) -> Record:
    try:
        record = results.read(path)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{path.name}: not JSON: {error}") from error
    if record["kind"] not in KINDS:
        raise ValueError(f"{path.name}: expected a record of kind {', '.join(KINDS)}, got {record['kind']}")
    return {**record, "file": path.name}


def main(argv: Sequence[str] | None = None) -> int:
    """Print the comparison. Returns the exit status: 0 = compared, 2 = the files can't be."""
    parser = argparse.ArgumentParser(
        prog="flashcore compare", description="Two results files of one kind: ratios, and what is outside the noise."
    )
    parser.add_argument("a", type=Path, metavar="A.json", help="what B is held against")
    parser.add_argument("b", type=Path, metavar="B.json")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    options = parser.parse_args(argv)
    try:
        a, b = _read(options.a), _read(options.b)
        if a["kind"] != b["kind"]:
            raise ValueError(f"expected two files of one kind, got {a['kind']} and {b['kind']}")
        found = rows(a, b)
        if not found:
            raise ValueError("no shape was timed in both files with the same contestant and clock")
    except ValueError as misuse:
        print(f"flashcore compare: {misuse}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps(as_json(a, b, found), indent=1))
    else:
        for line in text(a, b, found):
            print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())

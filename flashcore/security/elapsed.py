"""Is a difference of wall time one of cycles, or of the clock that counts them?

Between two probes in one graph (probe.py) lie cycles of an SM and nanoseconds. Their quotient is the frequency that the
SM really had meanwhile, which may move within microseconds with the current that the data draw: the driver's own figure
is an average over far longer. Time is cycles over frequency, so that a class that takes longer in as many cycles ran on
a slower clock.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from flashcore.security import leakage
from flashcore.security.leakage import Leak

MOVED = 0.1  # of the readings: where more than this is dropped, what is left may be no fair sample
SHARE = 0.8  # of a difference of wall time, which that of the frequency has to reach to explain it
VERDICT = "differs: the clock, not the cycles"


class Reading(NamedTuple):
    """What passed between two probes on one SM."""

    cycles: int
    ns: int


class Reads(Protocol):
    """What is launched in front of and behind what is read; probe.Probe, or a stand-in."""

    def before(self) -> None: ...
    def after(self) -> None: ...
    def reading(self) -> Reading | None: ...


Readings = Sequence[Sequence[Reading | None]]  # [groups, places]; None where the probes ran on two SMs


class Clocks(NamedTuple):
    """Two classes compared by cycles a call, and by the frequency in MHz."""

    elapsed: Leak
    frequency: Leak


def dropped(readings: Readings, classes: Sequence[Sequence[bool]]) -> list[int]:
    """How many readings of each class are missing."""
    of = [is_one for reads, picked in zip(readings, classes, strict=True)
          for each, is_one in zip(reads, picked, strict=True) if each is None]  # fmt: skip
    return [len(of) - sum(of), sum(of)]


def moved(readings: Readings) -> float:
    """The share of readings that are missing."""
    every = [each for reads in readings for each in reads]
    return every.count(None) / len(every)


def compare(readings: Readings, classes: Sequence[Sequence[bool]], calls: int) -> Clocks | None:
    """Class 1 against class 0; None where less than half of the readings are there."""
    if moved(readings) > 0.5:
        return None
    cycles = [[each.cycles / calls if each else math.nan for each in reads] for reads in readings]
    megahertz = [[1e3 * each.cycles / each.ns if each else math.nan for each in reads] for reads in readings]
    return Clocks(*(leakage.compare(each, classes, replays=True) for each in (cycles, megahertz)))


def step(readings: Readings) -> int:
    """The nanoseconds in which the GPU's timer moves on, as far as the readings tell."""
    return math.gcd(*(each.ns for reads in readings for each in reads if each))


def explained(wall: Leak, clocks: Clocks | None) -> bool:
    """Whether the clock, and not the cycles, makes a difference of wall time: the cycles are even by the gate, and the
    frequency differs for certain, the other way round and by most of what the wall time does.
    """
    if clocks is None or wall.even or not clocks.elapsed.even:
        return False
    frequency = clocks.frequency
    certain = frequency.low > 0 or frequency.high < 0
    opposite = frequency.relative * wall.relative < 0
    return certain and opposite and abs(frequency.relative) >= SHARE * abs(wall.relative)


def given_away(entries: Sequence[dict[str, Any]]) -> tuple[float, float]:
    """The largest difference of wall time and of the frequency, as shares: what can be read off the clock."""
    wall, frequency = (
        max((abs(entry["relative"]) for entry in entries if entry["clock"] == clock), default=0.0)
        for clock in ("wall", "frequency")
    )
    return wall, frequency


def gates(record: dict[str, Any]) -> tuple[int, int, int]:
    """How many gates there are, how many hold, and how many that do not are explained by the clock."""
    gated = [entry for entry in record["cases"] if entry["gated"]]
    missed = [entry for entry in gated if not entry["ok"]]
    return len(gated), len(gated) - len(missed), sum(entry.get("explained", False) for entry in missed)

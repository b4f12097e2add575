"""Do two classes of measurements differ? Welch's t, as dudect (Reparaz, Balasch, Verbauwhede 2017) applies it.

A class is drawn at random for each measurement, so that whatever else moves a time, its place on the GPU, a clock that
drifts, what ran before, moves both classes alike, and a difference of means can only come from the class. What moves
a whole launch, or one place in every launch, is taken off both first, which makes the test see smaller differences.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

T_LIMIT = 4.5  # |t| above which dudect calls a difference certain
T_CONTROL = 10.0  # what a planted leak has to pass
RELATIVE_LIMIT = 1e-3  # of the mean: within this the interval of the difference has to be
CONFIDENCE = 0.95
PERCENTILES = (100, 99.9, 99, 90, 75, 50)  # cropped above each; 100 is uncropped
SLOW = 5.0  # times the deviation that nine tenths stay within: what is slower by more was disturbed
DISTURBED = 0.02  # of the measurements: where more were, the others may be no fair sample
Array = Any  # numpy's types need numpy, which only the bench extra brings


@dataclass(frozen=True, slots=True)
class Leak:
    """Two classes compared: class 1 minus class 0. Times in the measurements' own unit."""

    measurements: tuple[int, int]  # of each class
    mean: float  # of both classes; as all but the ts, without the `slow` ones
    deviation: float  # of both, without what moves whole launches and places
    t: float
    difference: float
    low: float  # of the difference, bounds of its 95% interval
    high: float
    cropped: dict[str, float]  # t without what lies above these percentiles, where that leaves both classes
    needed: float | None  # measurements a class until |t| passes 4.5, were the difference what it seems; None for none
    slow: tuple[int, int] = 0, 0  # disturbed measurements of each class

    @property
    def relative(self) -> float:
        """The difference as a share of the mean."""
        return self.difference / self.mean

    @property
    def largest_t(self) -> float:
        """The largest |t|, cropped or not."""
        return max(abs(t) for t in (self.t, *self.cropped.values()))

    @property
    def even(self) -> bool:
        """Whether no difference was seen, and one above the limit is ruled out."""
        bound = RELATIVE_LIMIT * self.mean
        fair = sum(self.slow) <= DISTURBED * sum(self.measurements)
        return fair and self.largest_t < T_LIMIT and -bound <= self.low and self.high <= bound

    def as_json(self) -> dict[str, object]:
        """Plain data; differences also relative to the mean."""
        return {
            "measurements": list(self.measurements), "mean": self.mean, "deviation": self.deviation, "t": self.t,
            "largest_t": self.largest_t, "cropped_t": self.cropped, "difference": self.difference,
            "relative": self.relative, "relative_low": self.low / self.mean,
            "relative_high": self.high / self.mean, "needed": self.needed, "slow": list(self.slow),
            "even": self.even,
        }  # fmt: skip


def compare(values: Array, classes: Array, *, replays: bool = False) -> Leak:
    """Compare class 1 with class 0.

    Args:
        values: [launches, places], one measurement each; NaN where one is missing.
        classes: the same shape, True for class 1, drawn at random.
        replays: the values are in the order of time, so that a column is no place, and a few may be of a GPU that did
            something else meanwhile. One that is `SLOW` does not count in the means and in the interval, which a
            handful would widen beyond use. The bound is the same for both classes and knows neither, and to t such a
            measurement counts as any other.

    Raises:
        ValueError: shapes that differ, or a class with fewer than two measurements.
    """
    import numpy

    values, classes = numpy.asarray(values, dtype=numpy.float64), numpy.asarray(classes, dtype=bool)
    if values.shape != classes.shape or values.ndim != 2:
        raise ValueError(f"compare: expected two arrays [launches, places], got {values.shape} and {classes.shape}")
    there = ~numpy.isnan(values)
    counts = int((~classes & there).sum()), int((classes & there).sum())
    if min(counts) < 2:
        raise ValueError(f"compare: expected at least 2 measurements of each class, got {counts[0]} and {counts[1]}")
    some = there.any(axis=1)  # an empty launch has no median
    centred, classes = _centred(values[some], (1,) if replays else (1, 0))[there[some]], classes[there]
    cropped = {}
    bounds = numpy.percentile(centred, PERCENTILES[1:])
    for percentile, bound in zip(PERCENTILES[1:], bounds, strict=True):
        kept = centred <= bound
        if 1 < classes[kept].sum() < kept.sum() - 1:  # a large difference crops a whole class away
            cropped[f"{percentile:g}"] = float(_welch(centred[kept], classes[kept]).statistic)
    t = float(_welch(centred, classes).statistic)
    kept = centred <= (SLOW * numpy.percentile(numpy.abs(centred), 90) if replays else numpy.inf)
    slow = int((~kept & ~classes).sum()), int((~kept & classes).sum())
    mean, centred, classes = float(values[there][kept].mean()), centred[kept], classes[kept]
    interval = _welch(centred, classes).confidence_interval(CONFIDENCE)
    difference = float(centred[classes].mean() - centred[~classes].mean())
    deviation = float(centred.std())
    needed = 2 * (T_LIMIT * deviation / difference) ** 2 if difference else None
    return Leak(
        counts, mean, deviation, t, difference, float(interval.low), float(interval.high), cropped, needed, slow,
    )  # fmt: skip


def _centred(values: Array, axes: tuple[int, ...]) -> Array:
    """Without what moves a whole launch, or one place in all of them: medians, which rare slow ones do not move."""
    import numpy

    median = numpy.nanmedian if numpy.isnan(values).any() else numpy.median  # the former is slow
    for axis in axes:
        if values.shape[axis] > 2:  # of two values, the median is half of the difference sought
            values = values - median(values, axis=axis, keepdims=True)
    return values


def _welch(values: Array, classes: Array) -> Any:
    from scipy.stats import ttest_ind

    return ttest_ind(values[classes], values[~classes], equal_var=False)

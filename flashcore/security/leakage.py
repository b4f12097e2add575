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
Array = Any  # numpy's types need numpy, which only the bench extra brings


@dataclass(frozen=True, slots=True)
class Leak:
    """Two classes compared: class 1 minus class 0. Times in the measurements' own unit."""

    measurements: tuple[int, int]  # of each class
    mean: float  # of all
    deviation: float  # of all, without what moves whole launches and places
    t: float
    difference: float
    low: float  # of the difference, bounds of its 95% interval
    high: float
    cropped: dict[str, float]  # t without what lies above these percentiles
    needed: float | None  # measurements a class until |t| passes 4.5, were the difference what it seems; None for none

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
        return self.largest_t < T_LIMIT and -bound <= self.low and self.high <= bound

    def as_json(self) -> dict[str, object]:
        """Plain data; differences also relative to the mean."""
        return {
            "measurements": list(self.measurements), "mean": self.mean, "deviation": self.deviation, "t": self.t,
            "largest_t": self.largest_t, "cropped_t": self.cropped, "difference": self.difference,
            "relative": self.relative, "relative_low": self.low / self.mean,
            "relative_high": self.high / self.mean, "needed": self.needed, "even": self.even,
        }  # fmt: skip


def compare(values: Array, classes: Array) -> Leak:
    """Compare class 1 with class 0.

    Args:
        values: [launches, places], one measurement each; NaN where one is missing.
        classes: the same shape, True for class 1, drawn at random.

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
    mean = float(values[there].mean())
    some = there.any(axis=1)  # an empty launch has no median
    centred, classes = _centred(values[some])[there[some]], classes[there]
    whole = _welch(centred, classes)
    interval = whole.confidence_interval(CONFIDENCE)
    difference = float(centred[classes].mean() - centred[~classes].mean())
    cropped = {}
    bounds = numpy.percentile(centred, PERCENTILES[1:])
    for percentile, bound in zip(PERCENTILES[1:], bounds, strict=True):
        kept = centred <= bound
        cropped[f"{percentile:g}"] = float(_welch(centred[kept], classes[kept]).statistic)
    deviation = float(centred.std())
    needed = 2 * (T_LIMIT * deviation / difference) ** 2 if difference else None
    return Leak(
        counts, mean, deviation, float(whole.statistic), difference, float(interval.low), float(interval.high),
        cropped, needed,
    )  # fmt: skip


def _centred(values: Array) -> Array:
    """Without what moves a whole launch, or one place in all of them: medians, which rare slow ones do not move."""
    import numpy

    median = numpy.nanmedian if numpy.isnan(values).any() else numpy.median  # the former is slow
    for axis in (1, 0):
        if values.shape[axis] > 2:  # of two values, the median is half of the difference sought
            values = values - median(values, axis=axis, keepdims=True)
    return values


def _welch(values: Array, classes: Array) -> Any:
    from scipy.stats import ttest_ind

    return ttest_ind(values[classes], values[~classes], equal_var=False)

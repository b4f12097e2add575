"""Percentiles, medians and their confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

RESAMPLES = 2000
CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Summary:
    """What a list of timings comes to, in the unit of its values."""

    n: int
    mean: float
    min: float
    p50: float
    p95: float
    p99: float
    max: float


@dataclass(frozen=True, slots=True)
class Interval:
    """A value and its 95% confidence interval; the bounds are None where scipy is missing."""

    value: float
    low: float | None
    high: float | None


def percentile(values: Sequence[float], q: float) -> float:
    """The q-th percentile (0..100), interpolated linearly between the two nearest values, as numpy's default.

    Raises:
        ValueError: no values, or q outside 0..100.
    """
    if not values:
        raise ValueError("percentile: expected at least one value, got none")
    if not 0 <= q <= 100:
        raise ValueError(f"percentile: expected q in 0..100, got {q}")
    ordered = sorted(values)
    position = (len(ordered) - 1) * q / 100
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def median(values: Sequence[float]) -> float:
    """The 50th percentile."""
    return percentile(values, 50)


def summarize(values: Sequence[float]) -> Summary:
    """The figures a latency table needs."""
    return Summary(
        n=len(values),
        mean=math.fsum(values) / len(values) if values else math.nan,
        min=percentile(values, 0),
        p50=percentile(values, 50),
        p95=percentile(values, 95),
        p99=percentile(values, 99),
        max=percentile(values, 100),
    )


def geometric_mean(values: Sequence[float]) -> float:
    """The mean that ratios want: the n-th root of their product.

    Raises:
        ValueError: no values, or one that is not positive.
    """
    if not values or min(values) <= 0:
        raise ValueError("geometric_mean: expected one or more positive values")
    return math.exp(math.fsum(math.log(v) for v in values) / len(values))


def median_interval(values: Sequence[float]) -> Interval:
    """The median with its bootstrap interval."""
    return Interval(median(values), *_bootstrap(values))


def ratio_interval(numerator: Sequence[float], denominator: Sequence[float]) -> Interval:
    """The median of the rounds' ratios with its bootstrap interval.

    Element i of both lists comes from the same round of an interleaved measurement: a drift of the machine that hit
    both sides cancels in each round's ratio, and does not in the ratio of the two medians, which may come from rounds
    at different clocks.

    Raises:
        ValueError: lists of different lengths.
    """
    if len(numerator) != len(denominator):
        raise ValueError(f"ratio_interval: expected paired rounds, got {len(numerator)} and {len(denominator)}")
    ratios = [a / b for a, b in zip(numerator, denominator, strict=True)]
    return Interval(median(ratios), *_bootstrap(ratios))


def _bootstrap(sample: Sequence[float]) -> tuple[float | None, float | None]:
    """Bounds of the sample's median."""
    try:
        import numpy
        from scipy.stats import bootstrap
    except ModuleNotFoundError:
        return None, None
    if len(sample) < 2:
        return None, None
    found = bootstrap(
        (sample,),
        numpy.median,
        vectorized=True,
        n_resamples=RESAMPLES,
        confidence_level=CONFIDENCE,
        method="percentile",  # the bias-corrected one is undefined for a median whose resamples all agree
        rng=numpy.random.default_rng(0),  # the same timings give the same report
    ).confidence_interval
    return float(found.low), float(found.high)

from __future__ import annotations

import math
import sys

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashcore.measure import statistics

values = st.lists(st.floats(0.01, 1e6), min_size=1, max_size=200)


@given(values, st.floats(0, 100))
def test_percentile_is_numpys(sample: list[float], q: float) -> None:
    assert statistics.percentile(sample, q) == pytest.approx(float(numpy.percentile(sample, q)), rel=1e-12)


def test_percentile_refuses() -> None:
    with pytest.raises(ValueError, match="at least one value"):
        statistics.percentile([], 50)
    with pytest.raises(ValueError, match="0..100"):
        statistics.percentile([1.0], 101)


def test_summary_of_a_known_list() -> None:
    found = statistics.summarize([float(i) for i in range(101)])
    assert (found.n, found.min, found.p50, found.p95, found.p99, found.max) == (101, 0, 50, 95, 99, 100)
    assert found.mean == 50


def test_geometric_mean() -> None:
    assert statistics.geometric_mean([1.0, 4.0]) == pytest.approx(2.0)
    for bad in ([], [1.0, 0.0], [-1.0]):
        with pytest.raises(ValueError, match="positive"):
            statistics.geometric_mean(bad)


@given(st.lists(st.floats(1, 100), min_size=2, max_size=30))
def test_interval_holds_the_median(sample: list[float]) -> None:
    found = statistics.median_interval(sample)
    assert found.low is not None and found.high is not None
    assert min(sample) <= found.low <= found.value <= found.high <= max(sample)


def test_interval_is_reproducible_and_narrows() -> None:
    noise = numpy.random.default_rng(1)
    few, many = noise.normal(10, 1, 20).tolist(), noise.normal(10, 1, 500).tolist()
    assert statistics.median_interval(few) == statistics.median_interval(few)

    def width(sample: list[float]) -> float:
        found = statistics.median_interval(sample)
        assert found.low is not None and found.high is not None
        return found.high - found.low

    assert width(many) < width(few) / 2


def test_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    noise = numpy.random.default_rng(2)
    inside = 0
    for _ in range(60):
        found = statistics.median_interval(noise.normal(10, 1, 41).tolist())
        assert found.low is not None and found.high is not None
        inside += found.low <= 10 <= found.high
    assert inside >= 51  # 57 expected; 51 is three standard deviations below


def test_a_common_drift_cancels_in_a_ratio() -> None:
    drift = [1 + i / 10 for i in range(30)]
    found = statistics.ratio_interval([3 * d for d in drift], [2 * d for d in drift])
    assert [found.value, found.low, found.high] == pytest.approx([1.5] * 3)
    assert statistics.ratio_interval([2.0, 4.0, 12.0], [1.0, 4.0, 10.0]).value == 1.2  # of the medians it is 1
    with pytest.raises(ValueError, match="paired"):
        statistics.ratio_interval([1.0], [1.0, 2.0])


def test_without_scipy_there_is_a_median_and_no_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    assert statistics.median_interval([1.0, 2.0, 9.0]) == statistics.Interval(2.0, None, None)


def test_one_value_has_no_interval() -> None:
    assert statistics.median_interval([4.0]) == statistics.Interval(4.0, None, None)
    assert math.isclose(statistics.median([4.0]), 4.0)

"""Welch's t on simulated times: a planted difference is found, and none where none is, whatever else moves them."""

from __future__ import annotations

import pytest

numpy = pytest.importorskip("numpy")
pytest.importorskip("scipy")

from flashcore.security import leakage  # noqa: E402


def simulated(shift: float = 0.0, launches: int = 200, places: int = 1000, seed: int = 0):
    """Times of 10,000 cycles that drift, depend on the place, and have rare outliers; class 1 is `shift` slower."""
    rng = numpy.random.default_rng(seed)
    classes = rng.random((launches, places)) < 0.5
    values = rng.normal(10_000, 150, (launches, places))
    values += numpy.linspace(0, 800, launches)[:, None] + rng.normal(0, 700, places)[None, :]
    values += (rng.random((launches, places)) < 1e-3) * rng.exponential(5_000, (launches, places))
    return values * (1 + shift * classes), classes


def test_a_shift_of_a_fifth_of_a_percent_is_found() -> None:
    found = leakage.compare(*simulated(0.002))
    assert found.t > 10 and not found.even
    assert 0.0018 < found.difference / found.mean < 0.0022
    assert found.low < 0.002 * 10_400 < found.high
    assert all(t > 10 for t in found.cropped.values())


@pytest.mark.parametrize("seed", range(20))
def test_none_is_found_where_none_is(seed: int) -> None:
    found = leakage.compare(*simulated(seed=seed))
    assert found.even, found
    assert found.measurements[0] + found.measurements[1] == 200_000


def test_t_is_standard_normal_where_nothing_differs() -> None:
    """Centring must not make it larger: the share of |t| above 1.96 is that of a normal distribution, 5%."""
    ts = [leakage.compare(*simulated(launches=30, places=32, seed=seed)).t for seed in range(400)]
    assert 0.03 <= numpy.mean(numpy.abs(ts) > 1.96) <= 0.075
    assert 0.9 < numpy.std(ts) < 1.1


def test_an_effect_on_rare_slow_measurements_alone_is_found_uncropped_and_one_on_the_rest_cropped() -> None:
    values, classes = simulated()
    rare = numpy.random.default_rng(1).random(values.shape) < 0.01
    slow = leakage.compare(values + classes * rare * 4_000, classes)
    assert abs(slow.t) > 10 > abs(slow.cropped["50"])
    noisy = values + numpy.abs(numpy.random.default_rng(2).standard_cauchy(values.shape)) * 50
    fast = leakage.compare(noisy * (1 + 0.003 * classes), classes)
    assert abs(fast.cropped["90"]) > 10 and fast.largest_t > 10


def test_too_few_measurements_rule_nothing_out() -> None:
    found = leakage.compare(*simulated(launches=4, places=50))
    assert found.largest_t < leakage.T_LIMIT and not found.even


def test_how_many_measurements_a_difference_needs() -> None:
    found = leakage.compare(*simulated(0.002))
    few = int(found.needed or 0)
    assert 100 < few < 10_000
    launches = 2 * few // 1000 + 1
    beyond = [abs(leakage.compare(*simulated(0.002, launches=max(4 * launches, 3), seed=s)).t) for s in range(5)]
    assert min(beyond) > leakage.T_LIMIT


def test_bad_shapes_are_refused() -> None:
    values, classes = simulated(launches=3, places=4)
    for wrong in ((values[0], classes[0]), (values, classes[:2])):
        with pytest.raises(ValueError, match="launches, places"):
            leakage.compare(*wrong)
    with pytest.raises(ValueError, match="at least 2"):
        leakage.compare(values, numpy.zeros_like(classes))


def test_what_is_missing_is_left_out() -> None:
    values, classes = simulated(0.002)
    whole = leakage.compare(values, classes)
    gone = numpy.random.default_rng(1).random(values.shape) < 0.1
    gone[7] = True
    values[gone] = numpy.nan
    found = leakage.compare(values, classes)
    assert sum(found.measurements) == (~gone).sum() and found.t > 10
    assert found.difference == pytest.approx(whole.difference, rel=0.1)
    assert found.mean == pytest.approx(whole.mean, rel=1e-3)


def replays(shift: float = 0.0, disturbed: float = 0.005, of_class=(0, 1), seed: int = 0):
    """1,600 wall times of each class with a deviation of 0.2%; a share of some classes' takes half as long again."""
    rng = numpy.random.default_rng(seed)
    classes = numpy.stack([rng.permutation(32) < 16 for _ in range(100)])
    values = rng.normal(5, 0.01, classes.shape) * (1 + shift * classes)
    return values + 2.5 * (rng.random(classes.shape) < disturbed) * numpy.isin(classes, of_class), classes


def test_disturbed_measurements_widen_no_interval_and_count_to_t() -> None:
    raw, found = leakage.compare(*replays()), leakage.compare(*replays(), replays=True)
    assert not raw.even and raw.slow == (0, 0) and found.even and 5 < sum(found.slow) < 30
    assert abs(found.t - raw.t) < 0.1 and found.measurements == raw.measurements
    assert found.mean < raw.mean and found.high - found.low < (raw.high - raw.low) / 5
    clean = replays(disturbed=0)
    assert leakage.compare(*clean, replays=True).slow == (0, 0)


@pytest.mark.parametrize("shift", [0.002, 0.5])
def test_a_shift_is_found_beside_disturbed_measurements_and_is_none(shift: float) -> None:
    found = leakage.compare(*replays(shift), replays=True)
    assert not found.even and found.largest_t > 10
    assert found.relative == pytest.approx(shift / (1 + shift / 2), rel=0.2) and sum(found.slow) < 30
    assert all(numpy.isfinite(t) for t in found.cropped.values()), "where a class is cropped away there is no t"


def test_disturbances_of_one_class_or_too_many_of_them_are_not_even() -> None:
    one = leakage.compare(*replays(disturbed=0.03, of_class=(1,)), replays=True)
    assert one.largest_t > leakage.T_LIMIT and one.slow[0] == 0 and abs(one.relative) < leakage.RELATIVE_LIMIT
    often = leakage.compare(*replays(disturbed=0.03), replays=True)
    assert often.largest_t < leakage.T_LIMIT and not often.even

"""Intervals of medians and of numbers made of medians: they cover at their rate, and the order is no matter."""

from __future__ import annotations

import math

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from ldmperf.profiling.measure.intervals import (
    _SEED,
    RESAMPLES,
    Interval,
    each_of,
    extreme_interval,
    median_interval,
    medians_interval,
    p_value,
    ratio_interval,
    reachable,
)

TIMES = st.floats(0.01, 1e6)
GROUP = st.lists(TIMES, min_size=1, max_size=12)
# Draws of samples, and the median of the distribution.
DISTRIBUTIONS = {
    "normal": (lambda rng, n: rng.normal(100.0, 3.0, n), 100.0),
    "lognormal": (lambda rng, n: 50.0 * numpy.exp(rng.normal(0.0, 0.2, n)), 50.0),
    "exponential": (lambda rng, n: 10.0 + rng.exponential(5.0, n), 10.0 + 5.0 * math.log(2.0)),
}


def coverage(trials: int, covers) -> float:
    return sum(bool(covers()) for _ in range(trials)) / trials


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("count", [3, 6, 7, 20, 31])
def test_a_median_interval_covers_at_its_rate(name, count):
    rng = numpy.random.default_rng(count)
    draw, median = DISTRIBUTIONS[name]
    found = []

    def covers() -> bool:
        found.append(median_interval(draw(rng, count).tolist()))
        return found[-1].low <= median <= found[-1].high

    rate = coverage(300, covers)
    promised = found[0].confidence
    # At least what it promises, within three standard errors of 300 trials.
    assert rate >= promised - 3 * math.sqrt(promised * (1 - promised) / 300)
    # And not by being endless: order statistics at 20 samples cover 95.9 %, at 31 95.5 %.
    assert count < 20 or rate < 0.99


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("count", [3, 6, 15])
def test_a_ratio_interval_covers_at_its_rate(name, count):
    rng = numpy.random.default_rng(count)
    draw, _ = DISTRIBUTIONS[name]
    found = []

    def covers() -> bool:
        found.append(ratio_interval((2.0 * draw(rng, count)).tolist(), draw(rng, count).tolist()))
        return found[-1].low <= 2.0 <= found[-1].high

    rate = coverage(150, covers)
    promised = found[0].confidence
    assert rate >= promised - 3 * math.sqrt(promised * (1 - promised) / 150)


@pytest.mark.parametrize(("count", "sizes"), [(3, 2), (3, 10), (7, 10), (20, 10)])
def test_the_interval_of_the_largest_of_several_ratios_covers_at_its_rate(count, sizes):
    """All of them alike in truth: the largest measured one is above it, ten times out of ten."""
    rng, found = numpy.random.default_rng(count), []

    def covers() -> bool:
        base = rng.normal(100.0, 3.0, count).tolist()
        each = each_of(sizes)
        ratios = [ratio_interval(rng.normal(200.0, 6.0, count).tolist(), base, each) for _ in range(sizes)]
        found.append(extreme_interval(max, ratios))
        return found[-1].low <= 2.0 <= found[-1].high

    rate = coverage(40, covers)
    promised = found[0].confidence
    assert promised == min(0.95, reachable(count))
    assert rate >= promised - 3 * math.sqrt(promised * (1 - promised) / 40)


def test_the_interval_of_the_smallest_of_several_medians_covers_at_its_rate():
    rng, each = numpy.random.default_rng(4), each_of(8)

    def covers() -> bool:
        medians = [median_interval(rng.exponential(1.0, 12).tolist(), each) for _ in range(8)]
        found = extreme_interval(min, medians)
        return found.low <= math.log(2.0) <= found.high

    assert coverage(100, covers) >= 0.95 - 3 * math.sqrt(0.95 * 0.05 / 100)
    assert each == pytest.approx(1 - 0.05 / 8)


def test_an_interval_of_five_percent_more_is_far_from_one():
    rng = numpy.random.default_rng(0)
    base = rng.normal(100.0, 1.0, 20)
    interval = ratio_interval((1.05 * rng.normal(100.0, 1.0, 20)).tolist(), base.tolist())
    assert 1.03 < interval.low < 1.05 < interval.high < 1.07


@settings(deadline=None)
@given(st.lists(TIMES, min_size=1, max_size=30))
def test_the_median_is_numpys_and_lies_in_its_interval(samples):
    interval = median_interval(samples)
    assert interval.value == pytest.approx(float(numpy.median(samples)), rel=1e-12)
    assert min(samples) <= interval.low <= interval.value <= interval.high <= max(samples)
    assert interval.confidence == min(0.95, reachable(len(samples)))


@settings(max_examples=15, deadline=None)
@given(GROUP, GROUP, st.randoms(use_true_random=False))
def test_shuffled_and_doubled_samples_give_the_same_ratio(over, under, random):
    interval = ratio_interval(over, under)
    shuffled = random.sample(over, len(over)), random.sample(under, len(under))
    assert ratio_interval(*shuffled) == interval
    assert ratio_interval([2 * x for x in over], [2 * x for x in under]) == interval
    assert interval.low <= interval.value <= interval.high
    assert min(over) / max(under) <= interval.low * (1 + 1e-9)
    assert interval.high <= max(over) / min(under) * (1 + 1e-9)


@settings(max_examples=15, deadline=None)
@given(st.lists(TIMES, min_size=2, max_size=30), st.sampled_from([0.5, 0.95, 0.995]))
def test_one_group_is_resampled_as_scipy_does(samples, confidence):
    """Its own bootstrap, from the same random numbers."""
    if min(samples) == max(samples):
        return
    expected = stats.bootstrap(
        [sorted(samples)],
        numpy.median,
        n_resamples=RESAMPLES,
        confidence_level=confidence,
        method="percentile",
        rng=numpy.random.default_rng([_SEED, 0]),
    ).confidence_interval
    found = medians_interval([samples], lambda median: median, confidence)
    assert found.low == pytest.approx(min(expected.low, found.value), rel=1e-12)
    assert found.high == pytest.approx(max(expected.high, found.value), rel=1e-12)


@settings(max_examples=15, deadline=None)
@given(GROUP, GROUP, GROUP)
def test_groups_are_resampled_independently_each_with_its_own_numbers(first, second, third):
    """Counted with numpy's median of every resample."""
    groups = first, second, third
    medians = [
        numpy.median(
            numpy.asarray(sorted(group))[
                numpy.random.default_rng([_SEED, place]).integers(0, len(group), (RESAMPLES, len(group)))
            ],
            axis=1,
        )
        for place, group in enumerate(groups)
    ]
    ends = numpy.quantile((medians[0] + medians[1]) / medians[2], (0.025, 0.975))
    found = medians_interval(groups, lambda a, b, c: (a + b) / c)
    assert found.low == pytest.approx(min(ends[0], found.value), rel=1e-12)
    assert found.high == pytest.approx(max(ends[1], found.value), rel=1e-12)
    # Two groups alike are not resampled alike: their ratio varies.
    alike = [1.0, 2.0, 4.0]
    assert ratio_interval(alike, alike).low < 1 < ratio_interval(alike, alike).high


def test_few_samples_say_what_they_can():
    assert median_interval([2.0, 1.0, 3.0]) == Interval(1.0, 2.0, 3.0, 0.75)
    assert median_interval([2.0, 1.0, 3.0], 0.75) == Interval(1.0, 2.0, 3.0, 0.75)
    assert median_interval([1.0] * 5).confidence == 0.9375
    assert ratio_interval([4.0], [2.0]) == Interval(2.0, 2.0, 2.0, 0.0)
    assert ratio_interval([4.0], [2.0, 2.0, 4.0]).confidence == 0.0
    # Order statistics of scipy, which has none at 95 % for five samples.
    assert math.isnan(stats.quantile_test([1, 2, 3, 4, 5], q=3).confidence_interval(0.95).low)


def test_a_median_that_may_be_zero_gives_no_ratio():
    assert ratio_interval([1.0], [0.0]) is None
    assert ratio_interval([1.0, 2.0, 3.0], [0.0, 1.0, 2.0]) is None


def test_no_samples_are_refused():
    for call in (lambda: median_interval([]), lambda: ratio_interval([], [1.0]), lambda: p_value([1.0], [])):
        with pytest.raises(ValueError, match="at least one sample"):
            call()


def test_any_statistic_of_medians_has_an_interval():
    rng = numpy.random.default_rng(1)
    groups = [rng.normal(mean, 0.5, 15).tolist() for mean in (10.0, 20.0, 40.0)]
    interval = medians_interval(groups, lambda a, b, c: (a + b) / c)
    assert interval.low < 0.75 < interval.high
    assert interval.high - interval.low < 0.05


@settings(max_examples=25, deadline=None)
@given(st.lists(TIMES, min_size=2, max_size=8), st.lists(TIMES, min_size=2, max_size=8))
def test_the_p_value_is_that_of_all_permutations(a, b):
    p = p_value(a, b)
    assert 0.0 < p <= 1.0
    assert p_value(b, a) == pytest.approx(p)
    assert p_value(a[::-1], b) == p
    if len({*a, *b}) == len(a) + len(b):
        assert p == pytest.approx(stats.mannwhitneyu(a, b, method="exact").pvalue)


def test_the_p_value_rejects_at_its_rate_and_finds_a_difference():
    rng = numpy.random.default_rng(2)
    rejected = [p_value(rng.normal(0, 1, 12).tolist(), rng.normal(0, 1, 12).tolist()) < 0.05 for _ in range(300)]
    assert sum(rejected) / 300 < 0.05 + 3 * math.sqrt(0.05 * 0.95 / 300)
    assert p_value([1.0, 2.0, 3.0], [4.0, 5.0, 6.0]) == pytest.approx(0.1)
    assert p_value([1.0] * 5, [1.0] * 5) == 1.0
    # Ties by permutation: 2 of the 20 splits are as far apart.
    assert p_value([1.0] * 3, [2.0] * 3) == pytest.approx(0.1)

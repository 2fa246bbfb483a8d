"""The statistics of a comparison against scipy's tests, a brute-force Holm, and simulated noise."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from ldmperf.profiling.compare.contrast import Contrast, NoContrast, contrast, holm

Runs = list[list[float]]


def of(a: Runs, b: Runs, *, in_turn: bool = False, noise: float = 0.05, counted: bool = False) -> Contrast:
    return contrast(a, b, in_turn=in_turn, assumed_noise=noise, counted=counted)


def some_runs(seed: int, count: int, scale: float = 1.0) -> Runs:
    """Runs of seven samples each, every run with a level of its own."""
    draw = np.random.default_rng(seed)
    return [list(scale * 100 * draw.lognormal(0, 0.03) * draw.lognormal(0, 0.01, 7)) for _ in range(count)]


def log_medians(runs: Runs) -> list[float]:
    return [math.log(np.median(run)) for run in runs]


@pytest.mark.parametrize("seed", range(5))
def test_runs_in_turn_are_scipys_paired_test_of_log_medians(seed: int) -> None:
    a, b = some_runs(seed, 6), some_runs(seed + 100, 6, 1.04)
    found = of(a, b, in_turn=True)
    expected = stats.ttest_rel(log_medians(b), log_medians(a))
    ends = expected.confidence_interval(0.95)
    assert found.basis == "in turn"
    assert found.p == pytest.approx(expected.pvalue)
    assert (found.ratio.low, found.ratio.high) == pytest.approx((math.exp(ends.low), math.exp(ends.high)))


@pytest.mark.parametrize(("count_a", "count_b"), [(6, 6), (5, 2), (4, 1), (1, 2)])
def test_runs_not_in_turn_are_scipys_pooled_test_of_log_medians(count_a: int, count_b: int) -> None:
    a, b = some_runs(1, count_a), some_runs(2, count_b, 0.9)
    found = of(a, b)
    x, y = log_medians(a), log_medians(b)
    assert found.basis == "runs"
    assert found.ratio.value == pytest.approx(math.exp(np.mean(y) - np.mean(x)))
    # scipy pools a variance of two samples at least each; beyond that the formula is the textbook's.
    if min(count_a, count_b) > 1:
        expected = stats.ttest_ind(y, x)
        ends = expected.confidence_interval(0.95)
        assert found.p == pytest.approx(expected.pvalue)
        assert (found.ratio.low, found.ratio.high) == pytest.approx((math.exp(ends.low), math.exp(ends.high)))
    else:
        many = max(x, y, key=len)
        error = np.std(many, ddof=1) * math.sqrt(1 + 1 / len(many))
        p = 2 * stats.t.sf(abs(np.mean(y) - np.mean(x)) / error, len(many) - 1)
        assert found.p == pytest.approx(p)


def test_the_noise_holds_what_two_runs_of_one_commit_differ_by() -> None:
    """Of many pairs of runs 95 % lie within it, in the mean over how well so few runs tell."""
    draw = np.random.default_rng(3)
    held = []
    for _ in range(1500):
        a, b = (list(100 * draw.lognormal(0, 0.02, 4)) for _ in range(2))
        noise = of([[v] for v in a], [[v] for v in b]).noise
        first, second = draw.lognormal(0, 0.02, 2)
        held.append(abs(math.log(second / first)) <= math.log1p(noise))
    assert np.mean(held) == pytest.approx(0.95, abs=0.02)


def test_the_noise_of_runs_in_turn_is_that_within_a_round() -> None:
    """What a whole round shares is no noise, nor is what the sides differ by."""
    draw = np.random.default_rng(4)
    held = []
    for _ in range(1500):
        rounds = 100 * draw.lognormal(0, 0.5, 6)
        a, b = ([[v] for v in level * rounds * draw.lognormal(0, 0.02, 6)] for level in (1.0, 3.0))
        noise = of(a, b, in_turn=True).noise
        first, second = draw.lognormal(0, 0.02, 2)
        held.append(abs(math.log(second / first)) <= math.log1p(noise))
    assert np.mean(held) == pytest.approx(0.95, abs=0.02)


def test_one_run_each_is_judged_by_what_assumed_noise_leaves() -> None:
    a = some_runs(1, 1)
    near, far = [[1.04 * v for v in a[0]]], [[1.4 * v for v in a[0]]]
    within = of(a, near)
    assert within.basis == "assumed"
    assert within.p == 1
    assert within.ratio.low < 1 < within.ratio.high
    beyond = of(a, far)
    assert beyond.p == stats.mannwhitneyu([v / 1.05 for v in far[0]], a[0]).pvalue
    assert beyond.ratio.low > 1
    # More noise leaves less.
    assert of(a, far, noise=0.5).p == 1
    # Faster by as much is as significant.
    mirrored = of(far, a)
    assert mirrored.p == pytest.approx(beyond.p)
    assert mirrored.ratio.value == pytest.approx(1 / beyond.ratio.value)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_one_run_each_with_few_samples_allows_nothing(count: int) -> None:
    with pytest.raises(NoContrast, match=f"{count} sample"):
        of([[100.0] * count], [[200.0] * count])


def test_counted_figures_are_exact_while_they_do_not_vary() -> None:
    found = of([[100.0], [100.0]], [[105.0]], counted=True)
    assert (found.basis, found.p, found.ratio.low, found.ratio.high) == ("exact", 0.0, 1.05, 1.05)
    assert of([[7.0]], [[7.0]], counted=True).p == 1
    # Memory that varies, as with an algorithm chosen by trying, has noise like a time.
    assert of([[100.0], [101.0]], [[100.0], [101.0]], counted=True).basis == "runs"


def test_what_has_no_ratio_is_refused() -> None:
    with pytest.raises(NoContrast, match="zero"):
        of([[0.0], [1.0]], [[1.0], [1.0]])
    with pytest.raises(NoContrast, match="no value"):
        of([], [[1.0]])


def test_two_sides_without_any_spread() -> None:
    same, other = of([[2.0], [2.0]], [[2.0], [2.0]]), of([[2.0], [2.0]], [[3.0], [3.0]], in_turn=True)
    assert (same.p, other.p) == (1, 0)


@given(st.lists(st.floats(0, 1), max_size=6))
def test_holm_is_the_closed_test_of_bonferroni(p_values: list[float]) -> None:
    """A hypothesis is rejected if Bonferroni rejects every set of hypotheses that it is in (Marcus, 1976)."""
    adjusted = holm(p_values)
    for place in range(len(p_values)):
        others = [i for i in range(len(p_values)) if i != place]
        sets = [
            [place, *chosen] for size in range(len(p_values)) for chosen in itertools.combinations(others, size)
        ]
        worst = max(min(1.0, len(chosen) * min(p_values[i] for i in chosen)) for chosen in sets)
        assert adjusted[place] == pytest.approx(worst)


@given(st.permutations(range(7)), st.integers(0, 20))
def test_neither_the_order_of_samples_nor_the_unit_matters(order: list[int], seed: int) -> None:
    a, b = some_runs(seed, 3), some_runs(seed + 1, 3)
    shuffled = [[7.0 * run[i] for i in order] for run in a]
    found, other = of(a, b, in_turn=True), of(shuffled, [[7.0 * v for v in run] for run in b], in_turn=True)
    assert other.p == pytest.approx(found.p)
    assert other.ratio.high == pytest.approx(found.ratio.high)


@given(st.integers(0, 300), st.integers(0, 300), st.integers(1, 3), st.integers(1, 3))
def test_a_count_may_be_zero(a: int, b: int, runs_a: int, runs_b: int) -> None:
    """Spills: equal where both have none, infinitely often as many where only B has some."""
    found = of([[float(a)]] * runs_a, [[float(b)]] * runs_b, counted=True)
    expected = math.inf if b and not a else 1.0 if a == b else b / a
    assert (found.basis, found.ratio.low, found.ratio.value, found.ratio.high) == ("exact", *[expected] * 3)
    assert found.p == float(a == b)

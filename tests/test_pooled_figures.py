"""Intervals of qualities on synthetic data: that they hold the truth as often as they say."""

from __future__ import annotations

import math
from typing import Any

import numpy
import pytest
from scipy import stats

from ldmperf.profiling.claims.pooled_figures import (
    DIFFERENCE,
    ERRORS,
    LOGARITHM,
    SHARE,
    PooledFigure,
    Scale,
    contrast,
)
from ldmperf.profiling.measure.intervals import Interval, each_of, extreme_interval
from ldmperf.profiling.quality import Estimate

REPLICATES = 200
WORLDS = 250


def drawn(rng: Any, network: str, truth: float, *, samples: float, between: float, seeds: int,
          common: Any = None, bias: float = 1.2, scale: Scale = LOGARITHM) -> PooledFigure:  # fmt: skip
    """A figure as an experiment gives it: each seed is off by `between`, and its samples by `samples`, both as
    shares; replicates are off the value as that is off the truth, and too large by a factor.

    common: of every record the same share of noise, as real samples that all are compared with.
    """
    estimates = []
    shared = numpy.zeros(REPLICATES + 1) if common is None else common
    for seed in range(seeds):
        luck = truth * math.exp(between * rng.normal())
        value = luck * (1 + samples * rng.normal() + shared[0])
        off = samples * rng.normal(size=REPLICATES) + shared[1:]
        estimates.append((seed, 100, Estimate(value=value, replicates=tuple(bias * value + value * off))))
    found = PooledFigure.of(network, scale, estimates)
    assert found is not None
    return found


def apart(large: Any, small: Any) -> Any:
    return large - small


def covered(seeds: int, samples: float, between: float, common: float = 0.0, scale: Scale = LOGARITHM) -> float:
    """How often the interval of a difference holds the truth."""
    rng = numpy.random.default_rng(5)
    hits = 0
    truth = scale.number(3.0) - scale.number(2.0)
    for world in range(WORLDS):
        shared = common * rng.normal(size=REPLICATES + 1)
        pair = [
            drawn(rng, f"{name}-{world}", value, samples=samples, between=between, seeds=seeds, common=shared,
                  scale=scale)
            for name, value in (("a", 3.0), ("b", 2.0))
        ]  # fmt: skip
        found = contrast(pair, apart)
        hits += found.low <= truth <= found.high
    return hits / WORLDS


@pytest.mark.parametrize("scale", [LOGARITHM, DIFFERENCE], ids=lambda scale: scale.name)
def test_with_one_seed_the_samples_noise_is_covered(scale: Scale) -> None:
    """Two standard errors below 95 % are 92 %."""
    assert covered(1, 0.05, 0.0, scale=scale) > 0.92
    # Noise that both have goes out of the difference, and the interval knows it.
    assert covered(1, 0.02, 0.0, common=0.1) > 0.92


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_a_few_seeds_are_covered_too(seeds: int) -> None:
    """Seeds that vary far more than samples: drawing two or three with replacement is too narrow."""
    assert covered(seeds, 0.001, 0.2) > 0.91
    assert covered(seeds, 0.1, 0.1) > 0.92


def test_what_a_seed_does_to_both_networks_goes_out_of_their_difference() -> None:
    """Three seeds that move both alike by factors: the interval of each is wide, that of the difference is not."""
    rng = numpy.random.default_rng(8)
    hits, widths, alone = 0, [], []
    for _ in range(WORLDS):
        lucks = numpy.exp(0.3 * rng.normal(size=3))
        pair = []
        for name, truth in (("a", 3.0), ("b", 2.0)):
            values = truth * lucks * numpy.exp(0.02 * rng.normal(size=3))
            noise = [tuple(value * (1 + 0.001 * rng.normal(size=REPLICATES))) for value in values]
            found = PooledFigure.of(
                name,
                LOGARITHM,
                [(i, 100, Estimate(value=value, replicates=noise[i])) for i, value in enumerate(values.tolist())],
            )
            assert found is not None
            pair.append(found)
        between = contrast(pair, apart)
        hits += between.low <= math.log(1.5) <= between.high
        widths.append(between.high - between.low)
        single = contrast(pair[:1], lambda number: number)
        alone.append(single.high - single.low)
    assert hits / WORLDS > 0.92
    assert float(numpy.median(widths)) < 0.15 < 0.7 < float(numpy.median(alone))


def test_one_seed_says_nothing_of_seeds() -> None:
    """Why a sentence tells of one training seed, and claims nothing of others."""
    assert covered(1, 0.02, 0.2) < 0.6


def test_noise_that_both_share_makes_no_interval_wide() -> None:
    rng = numpy.random.default_rng(3)
    shared = 0.1 * rng.normal(size=REPLICATES + 1)
    pair = [
        drawn(rng, n, v, samples=0.005, between=0.0, seeds=1, common=shared) for n, v in (("a", 3.0), ("b", 2.0))
    ]
    found = contrast(pair, apart)
    assert found.high - found.low < 0.05
    alone = contrast(pair[:1], lambda number: number)
    assert alone.high - alone.low > 0.3


def test_records_of_other_resamples_do_not_pair() -> None:
    noise = tuple(float(n) for n in numpy.random.default_rng(0).normal(1.0, 0.1, REPLICATES))
    same = Estimate(value=1.0, replicates=noise)

    def width(samples: int) -> float:
        pair = [
            PooledFigure.of(name, LOGARITHM, [(0, count, same)]) for name, count in (("a", 100), ("b", samples))
        ]
        found = contrast([figure for figure in pair if figure is not None], apart)
        return found.high - found.low

    assert width(100) == pytest.approx(0.0, abs=1e-12)
    assert width(200) > 0.3


def test_the_best_of_four_alike_is_no_winner_as_often_as_noise_makes_it_look_so() -> None:
    """Four smaller networks and the reference are the same: a bound over all of them finds a winner in 2.5 % of
    worlds at most, the interval of the best alone much more often."""
    rng = numpy.random.default_rng(11)
    bounded = naive = 0
    for world in range(WORLDS):
        reference, *smaller = (
            drawn(rng, f"{n}-{world}", 2.0, samples=0.05, between=0.0, seeds=1) for n in range(5)
        )
        each = [contrast([reference, of], apart, each_of(4)) for of in smaller]
        bounded += extreme_interval(max, each).low > 0
        best = max(smaller, key=lambda of: -of.number)
        naive += contrast([reference, best], apart).low > 0
    assert bounded / WORLDS < 0.045
    assert naive / WORLDS > 0.05


def test_replicates_that_are_too_large_do_not_move_the_interval() -> None:
    rng = numpy.random.default_rng(1)
    found = contrast([drawn(rng, "a", 2.0, samples=0.01, between=0.0, seeds=1, bias=1.5)], lambda number: number)
    assert math.exp(found.low) < math.exp(found.value) < math.exp(found.high) < 2.2


def test_the_confidence_is_what_replicates_can_give() -> None:
    def of(count: int) -> Interval:
        estimate = Estimate(value=2.0, replicates=tuple(2.0 + 0.01 * n for n in range(count)))
        figure = PooledFigure.of("a", LOGARITHM, [(0, 10, estimate)])
        assert figure is not None
        return contrast([figure], lambda number: number)

    assert of(0).confidence == 0.0
    assert of(0).low == of(0).high == of(0).value
    assert of(20).confidence == pytest.approx(1 - 2 / 21)
    assert of(200).confidence == 0.95


def share_interval(*shares: float, samples: int) -> Interval:
    figure = PooledFigure.of_shares("a", [(seed, samples, share) for seed, share in enumerate(shares)])
    assert figure is not None
    return contrast([figure], lambda number: number)


@pytest.mark.parametrize("samples", [50, 2000])
@pytest.mark.parametrize("part", [0.0, 0.02, 0.3, 0.5, 0.9, 1.0])
def test_a_share_of_one_seed_has_the_interval_of_a_proportion(samples: int, part: float) -> None:
    """scipy's: inside the exact one (Clopper and Pearson), and like Wilson's where it is not at an end."""
    right = round(part * samples)
    found = share_interval(right / samples, samples=samples)
    proportion = stats.binomtest(right, samples)
    exact, wilson = (proportion.proportion_ci(method=method) for method in ("exact", "wilson"))
    width = exact.high - exact.low
    assert exact.low - 0.05 * width <= found.low <= found.value <= found.high <= exact.high + 0.05 * width
    assert found.high - found.low > 0.6 * width
    assert found.value == right / samples
    assert found.confidence == 0.95
    if 0.1 < part < 0.95:
        assert found.low == pytest.approx(wilson.low, abs=0.1 * width)
        assert found.high == pytest.approx(wilson.high, abs=0.1 * width)


def answers(rng: Any, truths: Any, samples: int, common: float) -> Any:
    """The share right of each seed whose truth is told; what is hard for one is hard for all by `common`."""
    hard = math.sqrt(common) * rng.normal(size=samples)
    own = math.sqrt(1 - common) * rng.normal(size=(len(truths), samples))
    return (hard + own < stats.norm.ppf(truths)[:, None]).mean(1)


@pytest.mark.parametrize("common", [0.0, 0.5, 0.95])
@pytest.mark.parametrize("between", [0.0, 0.03])
def test_shares_of_three_seeds_are_covered_whether_or_not_they_err_together(common: float, between: float) -> None:
    rng = numpy.random.default_rng(4)
    hits = 0
    for _ in range(WORLDS):
        truths = 0.7 + between * rng.normal(size=3)
        found = share_interval(*answers(rng, truths, 500, common).tolist(), samples=500)
        hits += found.low <= 0.7 <= found.high
    assert hits / WORLDS > 0.92


def test_the_difference_of_two_networks_shares_is_covered() -> None:
    """Also where they err on other samples: what one is off by tells nothing of the other."""
    rng = numpy.random.default_rng(6)
    hits = 0
    for _ in range(WORLDS):
        pair = [
            PooledFigure.of_shares(name, [(0, 500, float(answers(rng, numpy.array([truth]), 500, 0.0)[0]))])
            for name, truth in (("a", 0.8), ("b", 0.7))
        ]
        found = contrast([figure for figure in pair if figure is not None], apart)
        hits += found.low <= 0.1 <= found.high
    assert hits / WORLDS > 0.92


def test_shares_that_are_missing_have_no_figure_and_none_leaves_what_is_possible() -> None:
    assert PooledFigure.of_shares("a", []) is None
    assert PooledFigure.of_shares("a", [(0, 10, 0.5), (1, 10, None)]) is None
    found = share_interval(1.0, 0.9, 1.0, samples=100)
    assert found.high > 1.0
    assert SHARE.back(found.high) == 1.0
    assert SHARE.back(-0.1) == 0.0


def test_scales() -> None:
    for scale, value in ((LOGARITHM, 0.3), (DIFFERENCE, -0.3), (SHARE, 0.3), (ERRORS, 0.3)):
        assert scale.back(scale.number(value)) == pytest.approx(value)
        step = 1e-6
        slope = (scale.number(value + step) - scale.number(value - step)) / (2 * step)
        assert scale.derivative(value) == pytest.approx(slope)
    assert PooledFigure.of("a", LOGARITHM, [(0, 1, Estimate(value=-0.1))]) is None
    assert PooledFigure.of("a", ERRORS, [(0, 1, Estimate(value=1.0))]) is None
    assert PooledFigure.of("a", DIFFERENCE, [(0, 1, Estimate(value=-0.1))]) is not None
    assert PooledFigure.of("a", DIFFERENCE, [(0, 1, Estimate(value=0.1)), (1, 1, None)]) is None
    assert PooledFigure.of("a", DIFFERENCE, []) is None


@pytest.mark.parametrize("count", [1, 4, 28])
def test_a_bound_over_many_reaches_beyond_the_replicates(count: int) -> None:
    """Of evenly spread normal replicates the ends are normal quantiles, however far out, or a little beyond."""
    normal = stats.norm.ppf((numpy.arange(REPLICATES) + 0.5) / REPLICATES)
    estimate = Estimate(value=10.0, replicates=tuple(float(10 + z) for z in normal))
    figure = PooledFigure.of("w8", DIFFERENCE, [(0, 2000, estimate)])
    assert figure is not None
    found = contrast((figure,), lambda number: number, each_of(count))
    reach = stats.norm.ppf(1 - (1 - each_of(count)) / 2)
    assert 0.95 * reach < found.high - 10 < 1.12 * reach
    assert 0.95 * reach < 10 - found.low < 1.12 * reach

"""A figure of quality over the training seeds of a network, and intervals of numbers made of such figures.

Two things vary: which samples were drawn (the replicates of a record) and which network came out of training (the
seeds). With one seed the second is unknown, and in no interval.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from ..measure.intervals import RESAMPLES, Interval
from ..quality import Estimate

_SEED = 20260401
# Of a share, whose distribution is known.
_REPLICATES_OF_SHARES = 400
# Of larger ones a float has no exponential.
_LARGEST = 700.0


@dataclass(frozen=True)
class Scale:
    """A scale on which a figure is compared: the number there, its derivative, and the way back.

    A value outside the scale (a logarithm of what is not positive) has no number there.
    """

    name: str
    number: Callable[[float], float]
    derivative: Callable[[float], float]
    back: Callable[[float], float]
    holds: Callable[[float], bool] = math.isfinite


def _positive(value: float) -> bool:
    # The derivative of the logarithm of less leaves the range of a float.
    return value > 1e-100


def _exp(number: float) -> float:
    return math.exp(min(number, _LARGEST))


# Distances of networks and budgets are factors apart, and so is what two seeds of one network differ by.
LOGARITHM = Scale("log", math.log, lambda value: 1 / value, _exp, _positive)
# KID is unbiased and lies below zero where a network is as good as real: its logarithm is not there.
DIFFERENCE = Scale("difference", lambda value: value, lambda value: 1.0, lambda number: number)
# A share of answers, of which the seeds' part of an interval may leave what is possible.
SHARE = Scale("share", lambda value: value, lambda value: 1.0, lambda number: min(max(number, 0.0), 1.0))
# Of a share that is right the logarithm of what is wrong.
ERRORS = Scale(
    "log of errors",
    lambda value: math.log(1 - value),
    lambda value: -1 / (1 - value),
    lambda number: 1 - _exp(number),
    lambda value: value < 1,
)


@dataclass(frozen=True)
class PooledFigure:
    """A figure of one network, sampler and step count on a scale, one number for each training seed.

    deviations    of each seed: by how much its replicates lie off their mean. The mean itself is not that of the
                  figure: a resample has samples twice, which raises a distance. Of shares: off the share
    resamples     of each seed: how many samples and replicates there are. Where these are the same, so are the
                  resamples
    """

    network: str
    scale: Scale
    seeds: tuple[int, ...]
    numbers: tuple[float, ...]
    deviations: tuple[tuple[float, ...], ...]
    resamples: tuple[tuple[int, int], ...]

    @classmethod
    def of(
        cls, network: str, scale: Scale, estimates: Iterable[tuple[int, int, Estimate | None]]
    ) -> PooledFigure | None:
        """Of training seed, number of samples and estimate; null where one is missing or not on the scale."""
        found = sorted(estimates, key=lambda each: each[0])
        values = [
            estimate.value for _, _, estimate in found if estimate is not None and scale.holds(estimate.value)
        ]
        if not found or len(values) < len(found):
            return None
        return cls(
            network,
            scale,
            tuple(seed for seed, _, _ in found),
            tuple(map(scale.number, values)),
            tuple(_deviations(estimate, scale) for _, _, estimate in found if estimate is not None),
            tuple((samples, len(estimate.replicates)) for _, samples, estimate in found if estimate is not None),
        )

    @classmethod
    def of_shares(cls, network: str, shares: Iterable[tuple[int, int, float | None]]) -> PooledFigure | None:
        """Of training seed, number of samples and the share of them that is right; null where one is missing.

        A share has no replicates: they are quantiles of the beta distribution with Jeffreys's prior, which has a
        width where all samples are right, too. The seeds answer the same prompts from the same noise, and what one
        of them gets wrong another often does. How often no share tells, so their deviations go together wholly,
        which is an upper bound; those of two networks are apart.
        """
        import numpy
        from scipy import stats

        found = sorted(shares, key=lambda each: each[0])
        values = [(samples, share) for _, samples, share in found if share is not None]
        if not found or len(values) < len(found):
            return None
        count = _REPLICATES_OF_SHARES
        places = numpy.random.default_rng([_SEED, zlib.crc32(network.encode())]).permutation(count)
        deviations = []
        for samples, share in values:
            right = share * samples
            of = stats.beta(right + 0.5, samples - right + 0.5)
            deviations.append(tuple((of.ppf((places + 0.5) / count) - share).tolist()))
        return cls(
            network,
            SHARE,
            tuple(seed for seed, _, _ in found),
            tuple(share for _, share in values),
            tuple(deviations),
            tuple((samples, count) for samples, _ in values),
        )

    @property
    def number(self) -> float:
        """The mean over the seeds, on the scale."""
        return math.fsum(self.numbers) / len(self.numbers)

    @property
    def value(self) -> float:
        """The same as a figure: of a logarithm the geometric mean over the seeds."""
        return self.scale.back(self.number)

    @property
    def replicates(self) -> int:
        """Of the seed with the least."""
        return min(count for _, count in self.resamples)

    def drawn(self, widened: float) -> Any:
        """`RESAMPLES` numbers that samples and seeds might have given as well, as an array.

        widened: by what the part of the seeds is multiplied.
        """
        import numpy

        found = numpy.full(RESAMPLES, self.number)
        if self.replicates:
            for deviations, (samples, count) in zip(self.deviations, self.resamples, strict=True):
                found += numpy.asarray(deviations)[_drawn_replicates(samples, count)] / len(self.seeds)
        if len(self.seeds) > 1:
            off = numpy.asarray(self.numbers) - self.number
            found += widened * (_seed_weights(self.seeds) @ off)
        return found


def contrast(figures: Sequence[PooledFigure], statistic: Callable[..., Any], confidence: float = 0.95) -> Interval:
    """The interval of `statistic(number, number, ...)` over pairs of a replicate and reweighted seeds.

    `statistic` is called with numbers, and with numpy arrays of shape [resamples], elementwise. Percentiles of the
    pairs; the part of the seeds is widened by Student's t over the normal quantile, as a few seeds tell little of
    how far seeds vary. The interval's `confidence` is what the replicates can give: 20 have 90 %, 200 have 99 %;
    without any it is 0 and the ends are the value.
    """
    import numpy
    from scipy import stats

    value = float(statistic(*(figure.number for figure in figures)))
    replicates = min(figure.replicates for figure in figures)
    if not replicates:
        return Interval(value, value, value, 0.0)
    tail = (1 - confidence) / 2
    # The same seeds count once, however many figures have them.
    freedom = sum(len(seeds) - 1 for seeds in {figure.seeds for figure in figures})
    widened = float(stats.t.ppf(tail, freedom) / stats.norm.ppf(tail)) if freedom else 1.0
    resampled = statistic(*(figure.drawn(widened) for figure in figures))
    # There are no quantiles beyond the last replicate: from there on tails are normal. A bound over many
    # comparisons would otherwise hold less often than it says.
    known = max(tail, 1 / (replicates + 1))
    stretched = float(stats.norm.ppf(tail) / stats.norm.ppf(known))
    ends = numpy.quantile(numpy.atleast_1d(resampled), (known, 1 - known))
    low, high = (value + stretched * (float(end) - value) for end in ends)
    return Interval(min(low, value), value, max(high, value), min(confidence, 1 - 2 / (replicates + 1)))


def _deviations(estimate: Estimate, scale: Scale) -> tuple[float, ...]:
    """First order: a replicate may lie outside the scale where its figure does not."""
    if not estimate.replicates:
        return ()
    mean = math.fsum(estimate.replicates) / len(estimate.replicates)
    derivative = scale.derivative(estimate.value)
    return tuple(derivative * (replicate - mean) for replicate in estimate.replicates)


@lru_cache(maxsize=64)
def _drawn_replicates(samples: int, count: int) -> Any:
    """The same for all records with so many samples and replicates: they pair."""
    import numpy

    return numpy.random.default_rng([_SEED, samples, count]).integers(0, count, RESAMPLES)


@lru_cache(maxsize=256)
def _seed_weights(seeds: tuple[int, ...]) -> Any:
    """Normal weights of the seeds' distances from their mean, whose sum varies as that mean does (wild bootstrap).

    Drawing two or three seeds with replacement gives a handful of means, whose percentiles hold the truth less
    often than they say. The weights are the same for all networks with these seeds: networks of one seed saw the
    same scenes, noise and timesteps, and what these do to both goes out of their difference.
    """
    import numpy

    drawn = numpy.random.default_rng([_SEED, zlib.crc32(f"{seeds}".encode())]).normal(size=(RESAMPLES, len(seeds)))
    return drawn / math.sqrt(len(seeds) * (len(seeds) - 1))

"""How far a median, or a number made of medians, is known from the samples of one run.

What differs between two runs (clocks, addresses, neighbours) is in no interval of one run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from .timing import quantile

# Samples: of fewer, neither quantiles nor an interval tell the spread.
FEWEST = 3
# Of the bootstrap's resamples 50 lie beyond either end of a 95 % interval.
RESAMPLES = 1999
_SEED = 20240401
# Where values repeat and one side has no more samples, the U test's normal approximation is too coarse.
_FEW_FOR_U = 8
# All 12,870 of eight samples against eight.
_PERMUTATIONS = 19_999


@dataclass(frozen=True)
class Interval:
    """A value and the ends between which it lies with this confidence, a share of 1, at least."""

    low: float
    value: float
    high: float
    confidence: float = 0.95


def reachable(count: int) -> float:
    """The confidence that the range of `count` samples holds the median: all but twice half to the power of it.

    75 % with three samples, 94 % with five, 97 % with six; none with one.
    """
    return 1.0 - 2.0 ** (1 - count) if count else 0.0


def median_interval(samples: Sequence[float], confidence: float = 0.95) -> Interval:
    """The median between two order statistics (scipy's quantile_test): exact for every continuous distribution.

    Fewer samples than the confidence needs (six for 95 %) give their range, with the confidence that it has
    (`reachable`). Raises ValueError without samples.
    """
    value = quantile(samples, 0.5)
    if reachable(len(samples)) <= confidence:
        return Interval(min(samples), value, max(samples), reachable(len(samples)))
    from scipy import stats

    ends = stats.quantile_test(sorted(samples), q=value, p=0.5).confidence_interval(confidence)
    return Interval(float(ends.low), value, float(ends.high), confidence)


def medians_interval(
    groups: Sequence[Sequence[float]], statistic: Callable[..., Any], confidence: float = 0.95
) -> Interval | None:
    """The interval of `statistic(median, median, ...)`, one median for each group of samples, by the bootstrap.

    `statistic` is called with numbers, and with numpy arrays of shape [resamples], to which it applies
    elementwise. Percentile bootstrap over the samples of each group; the seed is fixed, and the order of samples
    does not matter. With fewer than six samples in a group the ends are nearly the range of what the samples
    allow, and `confidence` is what the least group can give (`reachable`). None where the statistic is not finite
    for all resamples, as a ratio to a median of zero. Raises ValueError for a group without samples.
    """
    import numpy

    if not groups or not all(groups):
        raise ValueError("an interval needs at least one sample in each group")
    ordered = [sorted(group) for group in groups]
    with numpy.errstate(all="ignore"):
        value = float(statistic(*(numpy.float64(quantile(group, 0.5)) for group in ordered)))
        resampled = statistic(*(_resampled_medians(group, place) for place, group in enumerate(ordered)))
        tail = (1.0 - confidence) / 2
        # Of a statistic that does not depend on its samples there is one number.
        found = [float(end) for end in numpy.quantile(numpy.atleast_1d(resampled), (tail, 1.0 - tail))]
    if not all(map(math.isfinite, (value, *found))):
        return None
    # The bootstrap's quantiles need not enclose the value itself, where samples are few and far apart.
    return Interval(
        min(found[0], value), value, max(found[1], value), min(confidence, reachable(min(map(len, groups))))
    )


def _resampled_medians(ordered: Sequence[float], place: int) -> Any:
    """The medians of `RESAMPLES` resamples of a sorted group, the place-th of an interval, as an array."""
    import numpy

    values = numpy.asarray(ordered, dtype=float)
    lower, upper = _drawn_places(len(ordered), place)
    return (values[lower] + values[upper]) / 2


@lru_cache(maxsize=1024)
def _drawn_places(count: int, place: int) -> tuple[Any, Any]:
    """The places, in a sorted group, of the two middle samples of each resample; for an odd count they are one.

    Each group of an interval has a stream of random numbers of its own: they are drawn independently. The draws do
    not depend on the samples.
    """
    import numpy

    drawn = numpy.random.default_rng([_SEED, place]).integers(0, count, (RESAMPLES, count))
    middle = (count - 1) // 2, count // 2
    drawn.partition(middle, axis=1)
    lower, upper = (drawn[:, at].astype(numpy.int32) for at in middle)
    return lower, upper


def ratio_interval(
    numerator_samples: Sequence[float], denominator_samples: Sequence[float], confidence: float = 0.95
) -> Interval | None:
    """The ratio of two medians, by the bootstrap (`medians_interval`); None where a denominator may be zero."""
    return medians_interval((numerator_samples, denominator_samples), lambda over, under: over / under, confidence)


def each_of(count: int, confidence: float = 0.95) -> float:
    """The confidence that each of `count` intervals needs for all of them to hold together (Bonferroni)."""
    return 1.0 - (1.0 - confidence) / count


def extreme_interval(
    choose: Callable[[Iterable[float]], float], intervals: Sequence[Interval], confidence: float = 0.95
) -> Interval:
    """The interval of the largest of several numbers (choose: max), or of the smallest (min), out of theirs.

    Each is to have the confidence of `each_of` their count. The largest of several measured values lies above the
    largest true one, and so do its resamples: a bootstrap of ten alike at once covers at 60 %, not at 95 %.
    `confidence` is kept where the least of the intervals reaches it, for times that scatter alike.
    """
    low, value, high = (choose(getattr(i, end) for i in intervals) for end in ("low", "value", "high"))
    return Interval(low, value, high, min(confidence, *(interval.confidence for interval in intervals)))


def p_value(a: Sequence[float], b: Sequence[float]) -> float:
    """How likely two sets of samples of one distribution differ as much as these (Mann-Whitney U, two-sided).

    Exact where a set has at most eight samples; ties are then resolved by all permutations, or by as many drawn
    ones where there are more than 19,999. Three samples against three give 0.1 at the least, four against four
    0.03. Raises ValueError for a set without samples.
    """
    import numpy
    from scipy import stats

    if not a or not b:
        raise ValueError("a significance test needs at least one sample on each side")
    a, b = sorted(a), sorted(b)
    if len({*a, *b}) == 1:
        return 1.0
    method: Any = "auto"
    if len({*a, *b}) < len(a) + len(b) and min(len(a), len(b)) <= _FEW_FOR_U:
        method = stats.PermutationMethod(n_resamples=_PERMUTATIONS, rng=numpy.random.default_rng(_SEED))
    return float(stats.mannwhitneyu(a, b, method=method).pvalue)

"""The ratio of two sides in one metric: how large, how certain, and how far two runs of one commit differ.

Samples of one process are not independent of that process: addresses, clocks and neighbours differ from process
to process by more than from sample to sample. So a run counts as one observation, the logarithm of its median, and
noise is what runs of one commit differ by. Pure functions of samples.

    in turn    R pairs of runs, one of each side: Student's t on the differences of the pairs, R - 1 degrees of
               freedom
    runs       several runs, not in turn: Student's t with the variance of both sides pooled, R_a + R_b - 2
    assumed    one run each, which tells nothing about noise: a given noise is taken off the difference, and what
               is left is judged by the samples (bootstrap interval, U test)
    exact      a counted metric that does not vary; more than none is infinitely often as many
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ..measure.intervals import Interval, p_value, ratio_interval
from ..measure.timing import quantile

CONFIDENCE = 0.95
Basis = Literal["in turn", "runs", "assumed", "exact"]
Runs = Sequence[Sequence[float]]


@dataclass(frozen=True)
class Contrast:
    """b over a: `ratio` of medians with its 95 % interval, and the chance of such a difference between equals.

    noise     what two runs of one commit differ by at most, 95 times of 100, as a share: 0.03 is 3 %. In turn: two
              runs of one round, which leaves out what the rounds differ by
    freedom   degrees of freedom that the noise was measured with; None where it was not
    """

    ratio: Interval
    p: float
    noise: float
    basis: Basis
    freedom: int | None = None


class NoContrast(ValueError):
    """Samples that allow no contrast; the text says in a few words why."""


def contrast(a: Runs, b: Runs, *, in_turn: bool, assumed_noise: float, counted: bool = False) -> Contrast:
    """The contrast of two sides, each the samples of its runs; where `in_turn` is set, a[i] and b[i] are a pair.

    `assumed_noise`: a share, used for one run each. Raises NoContrast.
    """
    medians = [[quantile(samples, 0.5) for samples in side] for side in (a, b)]
    if not all(medians):
        raise NoContrast("a side has no value")
    first, second = medians
    if counted and len({*first}) == len({*second}) == 1:
        # Of none there may be more: infinitely often as many.
        ratio = 1.0 if first[0] == second[0] else second[0] / first[0] if first[0] else math.inf
        return Contrast(Interval(ratio, ratio, ratio), float(ratio == 1), 0.0, "exact")
    if any(median <= 0 for side in medians for median in side):
        raise NoContrast("a median is zero")
    if len(first) == len(second) == 1:
        return _one_run_each(a[0], b[0], assumed_noise)
    x, y = ([math.log(median) for median in side] for side in medians)
    if in_turn:
        pairs = [later - earlier for earlier, later in zip(x, y, strict=True)]
        freedom = len(pairs) - 1
        spread = math.sqrt(_squares(pairs) / freedom)
        return _from_logs(_mean(pairs), spread, spread / math.sqrt(len(pairs)), freedom, "in turn")
    freedom = len(x) + len(y) - 2
    spread = math.sqrt((_squares(x) + _squares(y)) / freedom)
    error = spread * math.sqrt(1 / len(x) + 1 / len(y))
    return _from_logs(_mean(y) - _mean(x), math.sqrt(2) * spread, error, freedom, "runs")


def _one_run_each(a: Sequence[float], b: Sequence[float], noise: float) -> Contrast:
    ratio = ratio_interval(b, a, CONFIDENCE)
    if ratio is None or ratio.confidence < CONFIDENCE:
        least = min(len(a), len(b))
        raise NoContrast(f"one run each, {least} sample{'s' * (least != 1)}: 6 at least, or several runs")
    widened = Interval(ratio.low / (1 + noise), ratio.value, ratio.high * (1 + noise))
    # What is left of the difference when noise has explained as much as it may.
    explained = min(max(ratio.value, 1 / (1 + noise)), 1 + noise)
    p = 1.0 if explained == ratio.value else p_value(a, [value / explained for value in b])
    return Contrast(widened, p, noise, "assumed")


def _from_logs(difference: float, spread: float, error: float, freedom: int, basis: Basis) -> Contrast:
    """The contrast of a mean difference of logarithms, by Student's t.

    spread: the standard deviation of the difference of two runs; error: that of the mean difference.
    """
    from scipy import stats

    p = float(2 * stats.t.sf(abs(difference) / error, freedom)) if error else float(difference == 0)
    quantile_of_t = _student(freedom)
    half, noise = quantile_of_t * error, math.expm1(min(quantile_of_t * spread, 700.0))
    # Two runs each may leave an interval beyond the range of a float.
    low, value, high = (math.exp(min(end, 700.0)) for end in (difference - half, difference, difference + half))
    return Contrast(Interval(low, value, high), p, noise, basis, freedom)


def _student(freedom: int) -> float:
    """The quantile of Student's t that holds 95 % between it and its negative."""
    from scipy import stats

    return float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom))


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _squares(values: Sequence[float]) -> float:
    """The sum of squared distances from the mean."""
    mean = _mean(values)
    return math.fsum((value - mean) ** 2 for value in values)


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values adjusted for how many there are (Holm, A simple sequentially rejective multiple test procedure,
    1979): with all sides equal, the chance that any one is below 0.05 is at most 0.05."""
    adjusted = [0.0] * len(p_values)
    highest = 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = highest
    return adjusted

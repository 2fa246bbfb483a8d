"""A gate on a comparison: which changes for the worse pass a threshold, which cannot be told."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ..measure.folders import RunError
from ..options import CaseError, known_name, percentage, split_values
from .comparison import Change, Comparison, VerdictRule
from .metrics import COMPARED, Metric

Answer = Literal["fails", "passes", "undecided"]


@dataclass(frozen=True)
class Threshold:
    """The change for the worse that a gate has to catch, as a share: 0.05 of `wall_ms:5%`."""

    metric: Metric
    worse: float

    def answer(self, change: Change, rule: VerdictRule) -> Answer:
        """fails: B is worse for certain, and by as much as the threshold within the interval.

        So noise does not fail: it is not significant. And a change by just the threshold does, with the interval's
        confidence, where noise allows to tell it from none. What fails was measured as at least about half the
        threshold worse. passes: worse by less than the threshold. undecided: neither can be told.
        """
        found = change.contrast
        if found is None or not rule.is_enough(found):
            return "undecided"
        if found.basis == "exact":
            worse = found.ratio.value
            if self.metric.bigger:
                worse = 1 / worse if worse else math.inf
            return "fails" if worse > 1 and worse * (1 + 1e-9) >= 1 + self.worse else "passes"
        # A change by just the threshold does not pass by the rounding of a logarithm.
        if found.ratio.high * (1 + 1e-9) < 1 + self.worse:
            return "passes"
        p = found.p if change.p is None else change.p
        # Significant: 1 is not in the interval, so that with such an end all of it is above 1.
        return "fails" if rule.is_significant(found, p) else "undecided"


def thresholds_named(given: Sequence[str]) -> tuple[Threshold, ...]:
    """The thresholds of texts like "wall_ms:5%", or CaseError."""
    found: dict[str, Threshold] = {}
    for text in split_values(given):
        name, colon, share = text.partition(":")
        if not colon:
            raise CaseError(f"--fail-over: {text!r} has no threshold; give METRIC:PERCENT, as in wall_ms:5%")
        metric = COMPARED[known_name("fail-over", name.strip(), COMPARED, "metric")]
        if metric.name in found:
            raise CaseError(f"--fail-over: {metric.name} is given twice")
        found[metric.name] = Threshold(metric, percentage("fail-over", share.strip()))
    if given and not found:
        raise CaseError("--fail-over: no value given; give METRIC:PERCENT, as in wall_ms:5%")
    return tuple(found.values())


def answers(
    comparison: Comparison, thresholds: Sequence[Threshold], rule: VerdictRule
) -> list[tuple[Threshold, Change, Answer]]:
    """The gate's answer on each case in each metric that has a threshold.

    Raises RunError for a metric that no case has on both sides: such a gate would let everything pass.
    """
    found = []
    for threshold in thresholds:
        judged = [change for change in comparison.changes if change.metric == threshold.metric]
        if not judged and not comparison.broken:
            raise RunError(
                f"--fail-over {threshold.metric.name}: no case has {threshold.metric.name} in both sets; "
                "name a metric that the table has"
            )
        found += [(threshold, change, threshold.answer(change, rule)) for change in judged]
    return found

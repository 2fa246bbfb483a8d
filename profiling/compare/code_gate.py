"""What a change may not make worse of the compiled code: a comparison of inspections with limits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ..static.inspection_records import InspectionRecord
from .comparison import VerdictRule, compare_sets
from .gate import Threshold, answers
from .metrics import METRICS
from .sets import MeasuredRun, RecordSet

# The least change for the worse that counts, as a share; 0: any.
LIMITS: Mapping[str, float] = {
    "spills": 0.0,
    "warps_per_multiprocessor": 0.0,
    "hot_instructions": 0.02,
    "serialized": 0.0,
    "overlap": 0.0,
}


def regressions(before: Sequence[InspectionRecord], now: Sequence[InspectionRecord]) -> list[str]:
    """What got worse, in one line each, and launches that only one of the two has."""
    a, b = (_one_run(name, records) for name, records in (("baseline", before), ("now", now)))
    thresholds = [Threshold(METRICS[name], worse) for name, worse in LIMITS.items()]
    rule = VerdictRule()
    comparison = compare_sets(a, b, [threshold.metric for threshold in thresholds], rule)
    found = [f"{name}: not in the baseline" for name in comparison.only_b]
    found += [f"{name}: in the baseline, no longer compiled" for name in comparison.only_a]
    found += comparison.broken
    has = {change.metric for change in comparison.changes}
    of_metric = [threshold for threshold in thresholds if threshold.metric in has]
    for _, change, answer in answers(comparison, of_metric, rule):
        if answer != "passes":
            found.append(f"{change.name}: {change.metric.name} {change.a:g} -> {change.b:g}")
    return found


def _one_run(name: str, records: Sequence[InspectionRecord]) -> RecordSet:
    if not records:
        return RecordSet(Path(name), ())
    by_key = {record.case_key: record for record in records}
    return RecordSet(Path(name), (MeasuredRun(name, records[0].started_at, by_key),))

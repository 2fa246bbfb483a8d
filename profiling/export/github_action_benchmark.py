"""github-action-benchmark: a JSON list of {name, unit, value, range, extra}, all of one direction.

The action (benchmark-action/github-action-benchmark, src/extract.ts) reads it by `tool: customSmallerIsBetter` or
`customBiggerIsBetter`. It takes the commit from the event that started it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..compare.metrics import Metric
from ..options import CaseError
from .series import Series, described, one_environment, series_of, shown

if TYPE_CHECKING:
    from ..record_files import AnyRecord


def github_action_benchmark(records: Sequence[AnyRecord], metrics: Sequence[Metric]) -> str:
    """An entry for each series. Raises CaseError for metrics of both directions, RunError for several commits."""
    if len({metric.bigger for metric in metrics}) > 1:
        bigger = ", ".join(metric.name for metric in metrics if metric.bigger)
        raise CaseError(
            f"--metric: a file for github-action-benchmark has one direction, and of {bigger} more is better; "
            "write these to a file of their own, for customBiggerIsBetter"
        )
    one_environment(records, "github-action-benchmark")
    entries = [_entry(series) for series in series_of(shown(records), metrics)]
    return json.dumps(entries, indent=2, allow_nan=False) + "\n"


def _entry(series: Series) -> dict[str, object]:
    figure = series.figure
    entry: dict[str, object] = {
        "name": series.name,
        # The action shows it as it is.
        "unit": series.metric.unit or "count",
        "value": figure.value,
        "extra": f"{series.metric.about}\n{described(series.record)}",
    }
    if figure.p20 is not None:
        entry["range"] = f"p20 {figure.p20:g}, p80 {figure.p80:g}"
        entry["extra"] = f"{entry['extra']}\n{len(figure.samples)} samples, the least {figure.min:g}"
    return entry

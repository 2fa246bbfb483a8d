"""Bencher Metric Format (https://bencher.dev/docs/reference/bencher-metric-format): benchmark, measure, value.

A benchmark is a case by its `case_id`; its measures are the metrics. Bencher's own `latency` is in nanoseconds and
`throughput` a second; other measures are made by the first report that has them, with the unit in their names.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ..compare.metrics import Figure, Metric
from .series import one_environment, series_of, shown

if TYPE_CHECKING:
    from ..record_files import AnyRecord

# Measures that every project has, with what a value is multiplied by.
_BUILT_IN: Mapping[str, tuple[str, float]] = {
    "wall_ms": ("latency", 1e6),
    "ms": ("latency", 1e6),
    "images_per_s": ("throughput", 1.0),
}


def bencher(records: Sequence[AnyRecord], metrics: Sequence[Metric]) -> str:
    """A JSON object of benchmarks by `case_id`. Raises RunError for several commits or machines."""
    one_environment(records, "bencher")
    benchmarks: dict[str, dict[str, dict[str, float]]] = {}
    for series in series_of(shown(records), metrics):
        name, factor = _BUILT_IN.get(series.metric.name, (series.metric.name.replace("_", "-"), 1.0))
        values = _values(series.figure, factor)
        # A time beyond the range of a float in nanoseconds is left out.
        if all(map(math.isfinite, values.values())):
            benchmarks.setdefault(series.record.case_id, {})[name] = values
    return json.dumps(benchmarks, indent=2, allow_nan=False) + "\n"


def _values(figure: Figure, factor: float) -> dict[str, float]:
    values = {"value": figure.value, "lower_value": figure.p20, "upper_value": figure.p80}
    return {name: value * factor for name, value in values.items() if value is not None}

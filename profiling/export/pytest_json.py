"""pytest-benchmark's JSON, as `pytest --benchmark-json` writes it: times in seconds, with their statistics.

Read by `pytest-benchmark compare`, github-action-benchmark (`tool: pytest`) and Bencher (adapter `python_pytest`).
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..compare.metrics import Figure, Metric
from ..options import CaseError
from ..terminal.visible import visible
from ..trajectory.records import Record
from .series import Series, conditions, environment, one_environment, series_of, shown, texts

if TYPE_CHECKING:
    from ..record_files import AnyRecord


def pytest_json(records: Sequence[AnyRecord], metrics: Sequence[Metric]) -> str:
    """A benchmark for each series. Raises CaseError for a metric that is no time, RunError for several commits."""
    if others := [metric.name for metric in metrics if metric.unit != "ms"]:
        raise CaseError(f"--metric: pytest-benchmark holds times only; leave out {', '.join(others)}")
    one_environment(records, "pytest-benchmark")
    found = shown(records)
    measured = [(series, _stats(series.figure)) for series in series_of(found, metrics)]
    # What leaves the range of a float is left out: calls a second of an immeasurably short one.
    benchmarks = [_benchmark(series, stats) for series, stats in measured if math.isfinite(stats["ops"])]
    report = _heading(found[0]) | {"benchmarks": benchmarks} if found else {"benchmarks": []}
    return json.dumps(report, indent=2, allow_nan=False) + "\n"


def _heading(first: AnyRecord) -> dict[str, Any]:
    """What pytest-benchmark tells of the machine and the commit; what is not known is an empty text."""
    of = first.environment
    known = texts(environment(first))
    time = "" if of.commit_time is None else of.commit_time.isoformat()
    machine = {
        "node": known.get("machine_id", ""),
        "processor": known.get("cpu", ""),
        "system": visible(of.os),
        "python_version": visible(of.python),
        "cpu": {"brand_raw": known.get("cpu", ""), "count": of.logical_cores},
    }
    gpu = {name: value for name, value in known.items() if name.startswith("gpu_")}
    return {
        "machine_info": machine | gpu,
        "commit_info": {
            "id": known.get("git_commit", ""),
            "time": time,
            "author_time": time,
            "dirty": of.git_dirty,
            "project": "ldmperf",
            "branch": "",
        },
        "datetime": first.started_at.isoformat(),
        "version": f"ldmperf {visible(of.ldmperf or '')}".strip(),
    }


def _benchmark(series: Series, stats: dict[str, Any]) -> dict[str, Any]:
    record, key = series.record, visible(series.record.case_key)
    options: dict[str, Any] = {"disable_gc": True}
    if isinstance(record, Record):
        harness = record.harness
        options |= {"min_rounds": harness.min_count, "min_time": harness.min_seconds}
    return {
        "group": series.metric.name,
        "name": series.name,
        "fullname": series.name,
        "params": {"case": key},
        "param": key,
        "extra_info": texts(conditions(record)) | {"run_id": visible(record.run_id or "")},
        "options": options,
        "stats": stats,
    }


def _stats(figure: Figure) -> dict[str, Any]:
    """The statistics that pytest-benchmark computes, of samples in seconds."""
    data = [ms / 1e3 for ms in figure.samples]
    ordered, n = sorted(data), len(data)
    mean, total = statistics.fmean(data), math.fsum(data)
    # By the root of squared distances over n - 1, scaled so that no square leaves the range of a float.
    stddev = math.hypot(*(value - mean for value in data)) / math.sqrt(n - 1) if n > 1 else 0.0
    q1, q3 = _quartile(ordered), -_quartile([-value for value in reversed(ordered)])
    low, high = q1 - 1.5 * (q3 - q1), q3 + 1.5 * (q3 - q1)
    beyond = sum(abs(value - mean) > stddev for value in data)
    outliers = sum(not low <= value <= high for value in data)
    return {
        "min": ordered[0],
        "max": ordered[-1],
        "mean": mean,
        "stddev": stddev,
        "rounds": n,
        "median": figure.value / 1e3,
        "iqr": q3 - q1,
        "q1": q1,
        "q3": q3,
        "iqr_outliers": outliers,
        "stddev_outliers": beyond,
        "outliers": f"{beyond};{outliers}",
        "ld15iqr": min(value for value in data if value >= low),
        "hd15iqr": max(value for value in data if value <= high),
        "ops": n / total if total else 0.0,
        "total": total,
        "data": data,
        "iterations": 1,
    }


def _quartile(ordered: Sequence[float]) -> float:
    """The lower quartile: the mean of the medians of the lower half without its middle value, and with it."""
    n = len(ordered)
    halves = ordered[: n // 2] or ordered, ordered[: (n + 1) // 2]
    return statistics.fmean(statistics.median(half) for half in halves)

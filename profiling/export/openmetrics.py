"""OpenMetrics text (https://prometheus.io/docs/specs/om/open_metrics_spec/), each sample at its record's time.

    ldmperf_<quantity>_<unit>    a gauge for each metric, in base units: seconds, bytes, joules, ratios
    ldmperf_status               a state set: how the case ended
    ldmperf_record               an info: what was measured, of which commit, with which versions

A series is told by `case_id`, `device` (the processor's name) and `machine_id`. The commit is a label of the info
alone, so that a series goes on from commit to commit.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, get_args

from ..compare.metrics import Metric
from ..measure.recorded import Status
from ..record_files import record_kind
from ..terminal.visible import visible
from .series import Series, Texts, environment, processor, series_of, shown, texts

if TYPE_CHECKING:
    from ..record_files import AnyRecord

# Of each unit: the base unit that ends a metric's name, and the power of ten between them.
_BASE: Mapping[str, tuple[str, int]] = {
    "": ("", 0),
    "ms": ("seconds", -3),
    "B": ("bytes", 0),
    "J": ("joules", 0),
    "%": ("ratio", -2),
    "images/s": ("per_second", 0),
    "GB/s": ("bytes_per_second", 9),
    "TFLOP/s": ("flop_per_second", 12),
}
# Of the environment: what changes from commit to commit, and is asked for beside a change.
_TOLD = ("git_commit", "git_dirty", "ldmperf", "torch", "triton", "cuda", "diffusers", "gpu_driver")


@dataclass(frozen=True)
class _Sample:
    """A line: labels that tell it from others, its value, its time in seconds since 1970."""

    labels: tuple[tuple[str, str], ...]
    value: float
    time: int
    suffix: str = ""


def openmetrics(records: Sequence[AnyRecord], metrics: Sequence[Metric]) -> str:
    """The families, the statuses of failed cases among them, and the end mark."""
    # The oldest first, as the format asks within a series.
    found = shown(records, _series_and_time)
    series = series_of(found, metrics)
    lines: list[str] = []
    for metric in metrics:
        name, unit, _ = family(metric)
        samples = [sample for one in series if one.metric == metric for sample in _of_series(one)]
        lines += _family(name, "gauge", unit, metric.about, samples)
    states = [sample for record in found for sample in _states(record)]
    lines += _family("ldmperf_status", "stateset", "", "How the case ended", states)
    infos = [_Sample(_info(record), 1, _time(record), "_info") for record in found]
    lines += _family("ldmperf_record", "info", "", "What was measured, and with what", infos)
    return "\n".join((*lines, "# EOF")) + "\n"


def family(metric: Metric) -> tuple[str, str, int]:
    """The name of a metric's family, its base unit, and the power of ten from the metric's unit to that."""
    unit, power = _BASE[metric.unit]
    return "_".join(filter(None, ("ldmperf", metric.quantity, unit))), unit, power


def in_base(value: float, power: int) -> float:
    """The value times ten to that power, rounded once."""
    factor = float(10 ** abs(power))
    return value * factor if power >= 0 else value / factor


def _of_series(series: Series) -> Iterable[_Sample]:
    figure, (_, _, power) = series.figure, family(series.metric)
    spread = {"p50": figure.value, "p20": figure.p20, "p80": figure.p80, "min": figure.min}
    for name, value in spread.items() if series.metric.sampled else (("", figure.value),):
        # What leaves the range of a float in base units is left out.
        if value is not None and math.isfinite(base := in_base(value, power)):
            statistic = (("statistic", name),) if name else ()
            yield _Sample((*_identity(series.record), *statistic), base, _time(series.record))


def _states(record: AnyRecord) -> Iterable[_Sample]:
    for status in get_args(Status):
        labels = (*_identity(record), ("ldmperf_status", status))
        yield _Sample(labels, int(record.status == status), _time(record))


def _info(record: AnyRecord) -> tuple[tuple[str, str], ...]:
    known = texts(environment(record))
    told: Texts = {
        "kind": record_kind(record),
        "case": visible(record.case_key),
        "run_id": visible(record.run_id or ""),
    }
    told |= {name: known[name] for name in _TOLD if name in known}
    return (*_identity(record), *((name, value) for name, value in told.items() if value))


def _identity(record: AnyRecord) -> tuple[tuple[str, str], ...]:
    """The labels of each series of a record; a machine without an id has no such label."""
    labels = [("case_id", record.case_id), ("device", visible(processor(record)))]
    if machine := record.environment.machine_id:
        labels.append(("machine_id", visible(machine)))
    return tuple(labels)


def _series_and_time(record: AnyRecord) -> Hashable:
    return _identity(record), _time(record)


def _time(record: AnyRecord) -> int:
    return int(record.started_at.timestamp())


def _family(name: str, type_name: str, unit: str, about: str, samples: Iterable[_Sample]) -> list[str]:
    """The lines of a family, none where it has no sample; those of one series stand together, as they come."""
    # A state set's states of one time stand together.
    groups: dict[tuple[tuple[str, str], ...], list[_Sample]] = {}
    for sample in samples:
        group = tuple(label for label in sample.labels if label[0] != name)
        groups.setdefault(group, []).append(sample)
    if not groups:
        return []
    lines = [f"# TYPE {name} {type_name}", *([f"# UNIT {name} {unit}"] if unit else []), f"# HELP {name} {about}."]
    for of_group in groups.values():
        lines += [_line(name, sample) for sample in of_group]
    return lines


def _line(name: str, sample: _Sample) -> str:
    labels = ",".join(f'{label}="{_escaped(value)}"' for label, value in sample.labels)
    return f"{name}{sample.suffix}{{{labels}}} {sample.value!r} {sample.time}"


def _escaped(value: str) -> str:
    r"""A label's value: backslashes, quotes and line breaks as `\\`, `\"`, `\n`."""
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")

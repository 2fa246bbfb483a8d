"""What exporters write of a record: its series by stable names, its conditions and its environment as texts."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..compare.metrics import Figure, Metric
from ..figures.best import best_of_case, by_time
from ..figures.text import joined
from ..measure.conditions import commit
from ..measure.environment import Environment, Gpu
from ..measure.folders import RunError
from ..options import device_kind
from ..quality import QualityCase, QualityRecord
from ..record_files import record_kind
from ..terminal.visible import visible
from ..trajectory.records import Record

if TYPE_CHECKING:
    from ..record_files import AnyRecord

# The text of a value in a key; any string.
Texts = dict[str, str]


@dataclass(frozen=True)
class Series:
    """A record's value in one metric. `name` is the same for the same case on every commit and machine."""

    record: AnyRecord
    metric: Metric
    figure: Figure

    @property
    def name(self) -> str:
        return f"{self.record.case_id}/{self.metric.name}"


def series_of(records: Iterable[AnyRecord], metrics: Sequence[Metric]) -> list[Series]:
    """The series of the records that are ok, in the metrics that they have."""
    return [
        Series(record, metric, figure)
        for record in records
        if record.status == "ok"
        for metric in metrics
        if (figure := metric.figure(record)) is not None
    ]


def _nothing(record: AnyRecord) -> Hashable:
    return None


def shown(records: Iterable[AnyRecord], apart: Callable[[AnyRecord], Hashable] = _nothing) -> list[AnyRecord]:
    """One record of each case, the one that a report shows.

    `apart`: what tells records of a case apart that stand side by side, such as their runs.
    """
    found: dict[Hashable, list[AnyRecord]] = {}
    for record in by_time(records):
        found.setdefault((record.case_id, apart(record)), []).append(record)
    return [best_of_case(of_case) for of_case in found.values()]


def in_its_run(record: AnyRecord) -> Hashable:
    """Tells runs apart, for formats whose series are over time; version 1 has no run_id."""
    return record.run_id, record.environment


def one_environment(records: Sequence[AnyRecord], format_name: str) -> None:
    """Raises RunError where the records are of several commits, or of unlike machines, versions or settings."""
    first: dict[Hashable, Environment] = {}
    found: dict[str, None] = {}
    for record in records:
        environment = record.environment
        known = first.setdefault("commit", environment)
        if known.git_commit != environment.git_commit:
            found[f"git_commit: {known.git_commit}, {environment.git_commit}"] = None
        known = first.setdefault((record_kind(record), _device(record)), environment)
        differ = known.differences(environment)
        if record_kind(record) == "inspection":
            # The machine that compiled says nothing of the code.
            differ = [line for line in differ if line.partition(":")[0] in ("triton", "ptxas")]
        found |= dict.fromkeys(differ)
    if found:
        more = f"; and {len(found) - 3} more" if len(found) > 3 else ""
        raise RunError(
            f"{format_name} has no place for several commits or machines, and these records differ "
            f"({'; '.join(list(found)[:3])}{more}); give those of one (`ldmperf merge` groups records), or export "
            "to openmetrics, pytorch-hud-v3 or csv"
        )


def _device(record: Any) -> str:
    """ "cpu" or "cuda"; of an inspection its architecture, of a quality its world."""
    if isinstance(record, QualityRecord):
        return record.case.world
    if isinstance(record, Record):
        return device_kind(record.case.device)
    return device_kind(getattr(record, "device", "")) or str(record.arch)


# The parts of a case that are a column or a label, in this order, beside those of `Case`.
OF_TRAJECTORIES = ("evaluations", "parameters", "gflop_per_forward")
OF_KERNELS = ("operator", "call", "size", "batch", "peer", "mode", "device", "clock", "l2")
OF_INSPECTIONS = ("arch", "kernel", "size", "batch", "dtype", "constants", "num_warps")
# "kind" is that of the record.
OF_QUALITIES = tuple(name for name in QualityCase.model_fields if name != "kind")


def conditions(record: Any) -> dict[str, object]:
    """What was measured, field by field; what is null is left out."""
    if isinstance(record, Record):
        found = record.case.model_dump() | {name: getattr(record, name) for name in OF_TRAJECTORIES}
    elif record_kind(record) == "kernel":
        own = {"operator": record.case.operator, "call": record.case.label}
        found = {name: own[name] if name in own else getattr(record, name) for name in OF_KERNELS}
    elif record_kind(record) == "quality":
        found = {name: getattr(record.case, name) for name in OF_QUALITIES} | {"generator": record.case.kind}
    else:
        found = {name: getattr(record, name) for name in OF_INSPECTIONS}
        found["constants"] = " ".join(record.constants)
    return {name: value for name, value in found.items() if value is not None}


ENVIRONMENT_FIELDS = (
    *(name for name in Environment.model_fields if name != "gpu"),
    *(f"gpu_{name}" for name in Gpu.model_fields),
)


def environment(record: AnyRecord) -> dict[str, object]:
    """Where it was measured, by the names in ENVIRONMENT_FIELDS; what is null is left out."""
    fields = record.environment.model_dump(mode="json")
    fields |= {f"gpu_{name}": value for name, value in (fields.pop("gpu") or {}).items()}
    return {name: value for name, value in fields.items() if value is not None}


def processor(record: AnyRecord) -> str:
    """The name of the GPU, or of the CPU where none was measured."""
    of = record.environment
    return of.gpu.name if of.gpu else of.cpu or "unknown processor"


def described(record: AnyRecord) -> str:
    """A line for people: the case, then where it was measured."""
    of = record.environment
    torch = f"torch {of.torch}" if of.torch else ""
    return visible(f"{record.case_key}; {joined((processor(record), commit(of), torch))}")


def texts(fields: dict[str, object]) -> Texts:
    """The values as visible texts: "true", "64", "NVIDIA H100"."""
    return {
        name: visible(str(value).lower() if isinstance(value, bool) else str(value))
        for name, value in fields.items()
    }

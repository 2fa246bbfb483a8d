"""What can be compared of a record, each metric with its samples. Less is better in all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..measure.recorded import Samples
from ..options import CaseError, known_name, split_values

if TYPE_CHECKING:
    from ..kernel_bench.kernel_records import KernelRecord
    from ..trajectory.records import Record

Values = tuple[float, ...]


@dataclass(frozen=True)
class Metric:
    """A figure of a record: `values` are its samples, one value where it is measured once, none where it is null.

    counted   a figure that does not vary from run to run, as memory does not: any difference is one of the code
    less, more    the verdicts on a change
    """

    name: str
    values: Callable[[Any], Values]
    counted: bool = False
    less: str = "FASTER"
    more: str = "SLOWER"


def _samples(name: str) -> Callable[[Any], Values]:
    # Records of trajectories and of kernels have different fields.
    def values(record: Record | KernelRecord) -> Values:
        found: Samples | None = getattr(record, name, None)
        return () if found is None else found.samples

    return values


def _ms_per_step(record: Any) -> Values:
    count = getattr(record, "evaluations", None)
    return tuple(ms / count for ms in _samples("wall_ms")(record)) if count else ()


def _first_call_ms(record: Any) -> Values:
    phases = getattr(record, "phases", None)
    found = record.first_call_ms if phases is None else phases.first_call_ms
    return () if found is None else (found,)


def _peak_memory(record: Any) -> Values:
    found = getattr(record, "peak_memory_bytes", None)
    return () if found is None else (float(found),)


def _joules_per_image(record: Any) -> Values:
    found = getattr(record, "joules_per_image", None)
    return () if found is None else (found,)


METRICS: Mapping[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("wall_ms", _samples("wall_ms")),
        Metric("gpu_ms", _samples("gpu_ms")),
        Metric("ms", _samples("ms")),
        Metric("ms_per_step", _ms_per_step),
        Metric("decoder_ms", _samples("decoder_ms")),
        Metric("first_call_ms", _first_call_ms),
        Metric("peak_memory_bytes", _peak_memory, counted=True, less="LESS", more="MORE"),
        Metric("joules_per_image", _joules_per_image, less="LESS", more="MORE"),
    )
}
# Compared unless told, where the records have them; the others repeat these, or vary much.
USUAL = ("wall_ms", "gpu_ms", "ms", "peak_memory_bytes")


def metrics_named(given: list[str]) -> tuple[Metric, ...]:
    """The metrics of these names, or CaseError; the usual ones without names."""
    names = split_values(given)
    if given and not names:
        raise CaseError(f"--metric: no value given; choose from {', '.join(METRICS)}")
    return tuple(METRICS[known_name("metric", name, METRICS)] for name in dict.fromkeys(names or USUAL))

"""What a step took by class of operator: by the ranges of `ldmperf trace`, or by the names of traced kernels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ..measure.recorded import KernelTime
from ..step.class_times import ClassTimes
from ..step.classes import OperatorClass
from ..step.groups import by_group
from ..step.launches import LaunchGroup

_CLASS_OF_GROUP: Mapping[str, OperatorClass] = {
    "convolution": "convolution",
    "linear": "linear",
    "group norm": "norm",
    "layer norm": "norm",
    "GEGLU": "elementwise",
    "elementwise and residual": "elementwise",
    "copies": "elementwise",
    "sampler": "sampler",
}
_ATTENTION: LaunchGroup = "attention"


@dataclass(frozen=True)
class StepTimes:
    """Measured milliseconds of a step.

    ms            by class; a class that cannot be told is left out
    attention_ms  of self- and cross-attention together, where kernels' names do not tell them apart
    other_ms      of no class
    step_ms       the sum of all
    """

    ms: Mapping[OperatorClass, float]
    attention_ms: float | None
    other_ms: float
    step_ms: float


def times_by_range(times: ClassTimes) -> StepTimes:
    """Those of a trace with named ranges."""
    ms = {name: of.ms for name, of in times.classes.items()}
    return StepTimes(ms=ms, attention_ms=None, other_ms=times.other.ms, step_ms=times.step_ms)


def times_by_name(kernels: Iterable[KernelTime]) -> StepTimes:
    """Those of a record's traced step, its kernels told by their names."""
    ms: dict[OperatorClass, float] = {}
    attention, other = None, 0.0
    for group, (_, group_ms) in by_group(kernels).items():
        if group == _ATTENTION:
            attention = group_ms
        elif group in _CLASS_OF_GROUP:
            name = _CLASS_OF_GROUP[group]
            ms[name] = ms.get(name, 0.0) + group_ms
        else:
            other += group_ms
    return StepTimes(ms, attention, other, sum(ms.values()) + (attention or 0.0) + other)


def percent_of(floor_ms: float, measured_ms: float | None) -> float | None:
    """The floor over the time, in percent; null without a time."""
    return 100 * floor_ms / measured_ms if measured_ms else None

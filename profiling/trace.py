"""What the device did in one call, as torch's profiler saw it: how many launches, and how long it was busy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch

from .records import Trace
from .timing import synchronize


class DeviceEvent(NamedTuple):
    """A kernel, copy or fill on the device, its times in microseconds."""

    name: str
    start: float
    end: float


def traced(call: Callable[[], object], device: torch.device, evaluations: int) -> Trace | None:
    """The trace of `call`, which evaluates a network so many times; None where there is no CUDA device."""
    if device.type != "cuda":
        return None
    synchronize(device)
    # Of the device alone: what the host does would be slowed and is not asked.
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        call()
        synchronize(device)
    return trace_of(
        [
            DeviceEvent(event.name, event.time_range.start, event.time_range.end)
            for event in profiler.events() or ()
            if event.device_type.name == "CUDA" and not getattr(event, "is_user_annotation", False)
        ],
        evaluations,
    )


def trace_of(events: Iterable[DeviceEvent], evaluations: int) -> Trace | None:
    """The trace of what a device did in a trajectory; None without events, where the profiler saw nothing."""
    ordered = sorted(events, key=lambda event: event.start)
    if not ordered:
        return None
    return Trace(
        launches=len(ordered),
        launches_per_step=launches_per_step([event.name for event in ordered], evaluations),
        busy_ms=busy_us(ordered) / 1e3,
    )


def launches_per_step(names: Sequence[str], evaluations: int) -> int | None:
    """How many launches lie from one evaluation to the next; None with one evaluation, or where it cannot be told.

    Kernels that run exactly once an evaluation mark it: the distance that is most frequent between two marks of
    the same name counts. So neither what comes before and after the loop does, nor a step that differs.
    """
    counts = Counter(names)
    places: dict[str, list[int]] = {}
    for place, name in enumerate(names):
        if counts[name] == evaluations:
            places.setdefault(name, []).append(place)
    distances = Counter(after - before for of_name in places.values() for before, after in pairwise(of_name))
    return distances.most_common(1)[0][0] if distances else None


def busy_us(events: Sequence[DeviceEvent]) -> float:
    """How long at least one of the events ran, given in the order of their starts."""
    busy, until = 0.0, float("-inf")
    for event in events:
        busy += max(event.end - max(event.start, until), 0.0)
        until = max(until, event.end)
    return busy

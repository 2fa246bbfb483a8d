"""The device's work in one call, as torch's profiler saw it: launches, busy time, kernels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch

from ..measure.recorded import KernelTime
from .record_parts import Trace

# Of templates, whose names can be pages.
LONGEST_NAME = 200


class DeviceEvent(NamedTuple):
    """A kernel, copy or fill on the device, its times in microseconds."""

    name: str
    start: float
    end: float


def traced(call: Callable[[], object], device: torch.device, evaluations: int) -> Trace | None:
    """The trace of `call`, which evaluates a network so many times; None where there is no CUDA device."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    # Of the device alone: what the host does would be slowed and is not asked.
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize(device)
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
    steps = steps_of([event.name for event in ordered], evaluations)
    whole = [[ordered[place] for place in step] for step in steps]
    return Trace(
        evaluations=evaluations,
        launches=len(ordered),
        launches_per_step=len(steps[0]) if steps else None,
        busy_ms=busy_us(ordered) / 1e3,
        step_busy_ms=sum(map(busy_us, whole)) / len(whole) / 1e3 if whole else None,
        step=mean_step(whole),
    )


def steps_of(names: Sequence[str], evaluations: int) -> list[range]:
    """The launches from one evaluation to the next, as ranges of places; steps of an unusual length are left out.

    A kernel launched once per evaluation is a marker; the commonest distance between markers of one name is the
    length of a step. The steps are those of the first name that has this distance most often. Launches before and
    after the loop are in none. Empty with one evaluation, or without markers.
    """
    counts = Counter(names)
    places: dict[str, list[int]] = {}
    for place, name in enumerate(names):
        if counts[name] == evaluations:
            places.setdefault(name, []).append(place)
    distances = Counter(after - before for of_name in places.values() for before, after in pairwise(of_name))
    if not distances:
        return []
    (length, _), *_ = distances.most_common(1)
    by_mark = [
        [range(before, after) for before, after in pairwise(of_name) if after - before == length]
        for of_name in places.values()
    ]
    return max(by_mark, key=len)


def mean_step(steps: Sequence[Sequence[DeviceEvent]]) -> tuple[KernelTime, ...]:
    """What a step launches by name, in the mean over steps, the longest first."""
    launches: Counter[str] = Counter()
    ms: dict[str, float] = {}
    for event in (event for step in steps for event in step):
        name = event.name[:LONGEST_NAME]
        launches[name] += 1
        ms[name] = ms.get(name, 0.0) + (event.end - event.start) / 1e3
    return tuple(
        KernelTime(name=name, launches=launches[name] / len(steps), ms=ms[name] / len(steps))
        for name in sorted(ms, key=lambda name: -ms[name])
    )


def busy_us(events: Sequence[DeviceEvent]) -> float:
    """How long at least one of the events ran, given in the order of their starts."""
    busy, until = 0.0, float("-inf")
    for event in events:
        busy += max(event.end - max(event.start, until), 0.0)
        until = max(until, event.end)
    return busy

"""A Chrome trace of torch's profiler, read: which work ran in which ranges, and what a step takes by class.

Events are those that `export_chrome_trace` writes: "X" with ts and dur in microseconds. Work of a device belongs
to the ranges that were open on the host when it was launched; the event of the launch has the same correlation id.
On a CPU work is nested in its ranges.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from ..measure.folders import RunError
from ..step.class_times import ClassTime
from ..step.classes import CLASSES, OperatorClass, class_of, is_operator
from ..step.groups import OTHER, Other
from .places import SAMPLER
from .ranges import step_number
from .trace import LONGEST_NAME

Clock = Literal["device", "host"]

# Kineto's categories, of what nests on the host in the order of nesting where two begin and end together.
_RANGE, _OPERATOR = "user_annotation", "cpu_op"
# The operator that torch names a call of `__torch_dispatch__` by.
_MODE = "PythonDispatchMode"
_LAUNCHES = ("cuda_runtime", "cuda_driver")
_ON_HOST = (_RANGE, _OPERATOR, *_LAUNCHES)
_ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")


class PlacedWork(NamedTuple):
    """A kernel, copy or fill on a device; an operator of torch on a CPU, without those that it calls.

    places: the names of the ranges around it, outermost first. launches: 1; on a CPU 0 of an operator that another
    one called, or that no range is of.
    """

    name: str
    us: float
    places: tuple[str, ...]
    launches: int = 1

    @property
    def step(self) -> int | None:
        return next((n for n in map(step_number, self.places) if n is not None), None)

    @property
    def operator_class(self) -> OperatorClass | Other:
        operator = self.places[-1] if self.places else ""
        return class_of(operator, in_network=SAMPLER not in self.places) if is_operator(operator) else OTHER


class TopKernel(NamedTuple):
    """What all work of one name and class takes in the mean step."""

    name: str
    operator_class: OperatorClass | Other
    launches: float
    ms: float


@dataclass(frozen=True)
class AttributedStep:
    """The mean step: by class, whose times and `other` add up to `step_ms`, and by kernel, the longest first."""

    clock: Clock
    steps: int
    step_ms: float
    classes: Mapping[OperatorClass, ClassTime]
    other: ClassTime
    kernels: tuple[TopKernel, ...]


def step_times(events: Sequence[Mapping[str, Any]], clock: Clock) -> AttributedStep:
    """The mean over the steps of a trace. Raises RunError where it has no step, or no work in one."""
    whole = [event for event in events if event.get("ph") == "X"]
    found = (work_on_device if clock == "device" else work_on_host)(whole)
    # A kernel of which no launch is known may be of any step: it is in `other`, and not left out.
    work = [one for one in found if one.step is not None or (clock == "device" and not one.places)]
    spans = [event for event in whole if event.get("cat") == _RANGE and step_number(event["name"]) is not None]
    if not spans or not work:
        raise RunError(
            f"the profiler saw {len(spans)} steps and {len(work)} pieces of work in them, so there is nothing to "
            "attribute; see that no other profiler (nsys, ncu) holds the device"
        )
    count = len(spans)
    ms: dict[OperatorClass | Other, float] = dict.fromkeys((*CLASSES, OTHER), 0.0)
    launches: dict[OperatorClass | Other, int] = dict.fromkeys((*CLASSES, OTHER), 0)
    kernels: dict[tuple[str, OperatorClass | Other], tuple[int, float]] = {}
    for one in work:
        kind = one.operator_class
        ms[kind] += one.us / 1e3 / count
        launches[kind] += one.launches
        name = one.name[:LONGEST_NAME]
        calls, us = kernels.get((name, kind), (0, 0.0))
        kernels[name, kind] = calls + 1, us + one.us
    total = sum(ms.values())
    if clock == "host":
        # Between torch's operators the host runs python, and the profiler.
        step_ms = sum(span["dur"] for span in spans) / 1e3 / count
        ms[OTHER] += max(step_ms - total, 0.0)
        total = sum(ms.values())
    by_class = {kind: ClassTime(ms=max(ms[kind], 0.0), launches=launches[kind] / count) for kind in ms}
    other = by_class.pop(OTHER)
    return AttributedStep(
        clock=clock,
        steps=count,
        step_ms=total,
        classes={kind: by_class[kind] for kind in CLASSES},
        other=other,
        kernels=tuple(
            TopKernel(name, kind, calls / count, us / 1e3 / count)
            for (name, kind), (calls, us) in sorted(kernels.items(), key=lambda item: -item[1][1])
        ),
    )


def work_on_device(events: Iterable[Mapping[str, Any]]) -> list[PlacedWork]:
    """The kernels, copies and fills, each in the ranges that were open on the host at its launch.

    Without the event of its launch it is in those around the operator that torch links it to ("External id"), and
    in none without that.
    """
    by_launch: dict[object, tuple[str, ...]] = {}
    by_operator: dict[object, tuple[str, ...]] = {}
    on_device: list[Mapping[str, Any]] = []
    host: list[Mapping[str, Any]] = []
    for event in events:
        (on_device if event.get("cat") in _ON_DEVICE else host).append(event)
    for event, around in _nested(host):
        arguments = event.get("args", {})
        if event["cat"] not in _LAUNCHES and "External id" in arguments:
            by_operator[arguments["External id"]] = around.places
        elif "correlation" in arguments:
            by_launch[arguments["correlation"]] = around.places
    found = []
    for event in on_device:
        arguments = event.get("args", {})
        places = by_launch.get(arguments.get("correlation")) or by_operator.get(arguments.get("External id"))
        found.append(PlacedWork(event["name"], event["dur"], places or ()))
    return found


def work_on_host(events: Iterable[Mapping[str, Any]]) -> list[PlacedWork]:
    """The operators that torch ran, each without the time of those inside it."""
    found = []
    for event, around in _nested(events):
        if event["cat"] == _OPERATOR:
            is_outermost = bool(around.places) and is_operator(around.places[-1]) and not around.is_in_operator
            found.append(
                PlacedWork(event["name"], event["dur"] - around.inner_us, around.places, int(is_outermost))
            )
    return found


def without_shells(events: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The events without those that `OperatorRanges` adds.

    These are of each operator the call that reaches the mode, and the mode itself. The call that the mode makes is
    the operator's own, and stays.
    """
    shells = {id(event) for event, around in _nested(e for e in events if e.get("ph") == "X") if around.is_shell}
    return [event for event in events if id(event) not in shells]


@dataclass
class _Around:
    """An open event: the ranges that it is in (its own name among them, if it is one), and what runs inside it.

    is_in_operator  whether an operator is open between it and its innermost range
    is_shell        whether it is torch's event of a dispatch mode, or has one directly inside it
    """

    end: float
    places: tuple[str, ...]
    is_operator: bool
    is_in_operator: bool
    is_shell: bool = False
    inner_us: float = 0.0


def _nested(events: Iterable[Mapping[str, Any]]) -> Iterator[tuple[Mapping[str, Any], _Around]]:
    """The host's events with what is around each, when they end; each thread by itself."""
    threads: dict[tuple[Any, Any], list[Mapping[str, Any]]] = {}
    for event in events:
        if event.get("cat") in _ON_HOST:
            threads.setdefault((event["pid"], event["tid"]), []).append(event)
    for of_thread in threads.values():
        of_thread.sort(key=lambda event: (event["ts"], -event["dur"], _ON_HOST.index(event["cat"])))
        open_: list[tuple[Mapping[str, Any], _Around]] = []
        for event in of_thread:
            while open_ and open_[-1][1].end <= event["ts"]:
                yield open_.pop()
            outer = open_[-1][1] if open_ else _Around(0.0, (), False, False)
            is_range, is_operation = event["cat"] == _RANGE, event["cat"] == _OPERATOR
            if is_operation:
                for _, parent in reversed(open_):
                    if parent.is_operator:
                        parent.inner_us += event["dur"]
                        break
            name = event["name"]
            is_mode = is_operation and name == _MODE
            outer.is_shell |= is_mode and outer.is_operator
            places = (*outer.places, name) if is_range else outer.places
            inside = not is_range and (outer.is_operator or outer.is_in_operator)
            around = _Around(event["ts"] + event["dur"], places, is_operation, inside, is_mode)
            open_.append((event, around))
        while open_:
            yield open_.pop()


def shared(trace: Mapping[str, Any], about: Mapping[str, Any]) -> dict[str, Any]:
    """The trace as it is written: without the host's name and paths, with `about` beside its events.

    Names of processes and threads come first, then all events in the order of time, an outer one before those that
    begin with it: readers that take a trace in pieces need no sorting.
    """
    kept = ("schemaVersion", "deviceProperties", "displayTimeUnit", "baseTimeNanoseconds")
    events = sorted(
        trace["traceEvents"],
        key=lambda event: (event.get("ph") != "M", event.get("ts", 0.0), -event.get("dur", 0.0)),
    )
    return {name: trace[name] for name in kept if name in trace} | {"traceEvents": events, "ldmperf": dict(about)}

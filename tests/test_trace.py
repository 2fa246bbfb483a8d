"""What is read off a device's events, on events made by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ldmperf.profiling.trace import DeviceEvent, busy_us, launches_per_step, trace_of, traced


def test_overlapping_events_are_counted_once() -> None:
    events = [
        DeviceEvent("a", 0.0, 10.0),
        DeviceEvent("b", 5.0, 12.0),
        DeviceEvent("inside", 6.0, 7.0),
        DeviceEvent("c", 20.0, 21.5),
    ]
    assert busy_us(events) == 13.5
    trace = trace_of(reversed(events), 1)
    assert trace is not None
    assert (trace.launches, trace.busy_ms) == (4, 0.0135)


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 20)), min_size=1, max_size=30))
def test_busy_time_is_the_length_of_the_union(spans: list[tuple[int, int]]) -> None:
    events = sorted(DeviceEvent("", float(start), float(start + length)) for start, length in spans)
    covered = {tick for start, length in spans for tick in range(start, start + length)}
    assert busy_us(sorted(events, key=lambda event: event.start)) == len(covered)


def test_a_step_is_from_a_mark_to_the_next() -> None:
    step = ["conv", "norm", "conv", "linear", "norm", "update"]
    names = ["setup", "conv", "copy"] + step * 5 + ["clone"]
    # "update" and "linear" run once an evaluation; "conv" and "norm" do more often.
    assert launches_per_step(names, 5) == 6
    # A multistep solver's first step is shorter, its last one longer.
    uneven = ["setup", *step[:-1], *step * 4, "more", "update"]
    assert launches_per_step(uneven, 5) == 6
    assert launches_per_step(["setup", *step], 1) is None
    assert launches_per_step(["a", "a", "b"], 5) is None
    assert launches_per_step([], 3) is None


@given(st.data())
def test_any_step_with_a_mark_of_its_own_is_counted(data: st.DataObject) -> None:
    kinds = st.sampled_from(["a", "b", "c"])
    step = [*data.draw(st.lists(kinds, max_size=20)), "mark"]
    before, after = data.draw(st.lists(kinds, max_size=9)), data.draw(st.lists(kinds, max_size=9))
    evaluations = data.draw(st.integers(3, 6))
    names = [*before, *step * evaluations, *after]
    counts = {name: names.count(name) for name in "abc"}
    if evaluations not in counts.values():
        assert launches_per_step(names, evaluations) == len(step)


def test_there_is_no_trace_without_events_or_without_a_gpu() -> None:
    assert trace_of([], 3) is None
    assert traced(lambda: pytest.fail("nothing is run"), torch.device("cpu"), 3) is None

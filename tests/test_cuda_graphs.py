"""`CudaGraphs.turn` without a GPU: streams and events that do what CUDA's do, in any order that these allow."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ldmperf.profiling.kernel_bench.device import GraphCalls
from ldmperf.samplers import CudaGraphs

DEVICE = torch.device("cuda", 0)


class Stream:
    """Work in order; an item is what is noted when it runs, or an event to mark or to wait for."""

    def __init__(self) -> None:
        self.queue: list[tuple[str, Any]] = []

    def wait_event(self, event: Event) -> None:
        # As in CUDA: for what was recorded last, up to now.
        self.queue.append(("wait", event.marks[-1]))

    def wait_stream(self, other: Stream) -> None:
        event = Event()
        event.record(other)
        self.wait_event(event)


class Event:
    def __init__(self) -> None:
        self.marks: list[dict[str, bool]] = []

    def record(self, stream: Stream) -> None:
        self.marks.append({"reached": False})
        stream.queue.append(("mark", self.marks[-1]))

    def synchronize(self) -> None:
        SYNCHRONIZED.append(self.marks[-1])


SYNCHRONIZED: list[dict[str, bool]] = []


class Machine:
    """A device that takes from any stream whose next item may run."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, streams: int) -> None:
        self.streams = [Stream() for _ in range(streams)]
        self.current = self.streams[0]
        SYNCHRONIZED.clear()
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self.current)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
        monkeypatch.setattr(torch.cuda, "Event", Event)

    def run(self, data: st.DataObject) -> list[Any]:
        done = []
        while True:
            ready = [
                s
                for s in self.streams
                if s.queue and not (s.queue[0][0] == "wait" and not s.queue[0][1]["reached"])
            ]
            if not ready:
                assert not any(s.queue for s in self.streams), "a deadlock"
                return done
            kind, value = data.draw(st.sampled_from(ready)).queue.pop(0)
            if kind == "mark":
                value["reached"] = True
            elif kind == "work":
                done.append(value)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(data=st.data())
def test_work_of_a_turn_begins_after_that_of_the_turn_before(data: st.DataObject) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        machine = Machine(monkeypatch, 3)
        graphs = CudaGraphs()
        turns = data.draw(st.lists(st.tuples(st.integers(0, 2), st.booleans()), min_size=2, max_size=7))
        for number, (stream, fails) in enumerate(turns):
            machine.current = machine.streams[stream]
            try:
                # A device without a number is the current one.
                with graphs.turn(DEVICE if data.draw(st.booleans()) else torch.device("cuda")):
                    for item in range(2):
                        machine.current.queue.append(("work", (number, item)))
                    if fails:
                        raise KeyboardInterrupt
            except KeyboardInterrupt:
                assert fails
        assert machine.run(data) == [(number, item) for number in range(len(turns)) for item in range(2)]


def test_settling_waits_for_the_end_of_the_last_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, 2)
    graphs = CudaGraphs()
    graphs.settle()
    assert SYNCHRONIZED == []
    for stream in machine.streams:
        machine.current = stream
        with graphs.turn(DEVICE):
            stream.queue.append(("work", None))
    graphs.settle()
    assert [mark is machine.streams[1].queue[-1][1] for mark in SYNCHRONIZED] == [True]


@settings(max_examples=30, deadline=None, derandomize=True)
@given(data=st.data())
def test_a_warm_up_is_between_the_callers_work_before_and_after(data: st.DataObject) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        machine = Machine(monkeypatch, 1)
        done, side = [], Stream()
        machine.streams.append(side)

        @contextmanager
        def on(stream: Stream) -> Iterator[None]:
            before, machine.current = machine.current, stream
            yield
            machine.current = before

        monkeypatch.setattr(torch.cuda, "Stream", lambda device: side)
        monkeypatch.setattr(torch.cuda, "stream", on)
        # The host waits: by then the device has done all.
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: done.extend(machine.run(data)))
        machine.current.queue.append(("work", "before"))
        CudaGraphs().warm_up(lambda: machine.current.queue.append(("work", "warm-up")), DEVICE)
        assert done == ["before", "warm-up"]
        machine.current.queue.append(("work", "after"))
        assert machine.current is machine.streams[0]
        assert machine.run(data) == ["after"]


def by_sampler(work: Callable[[], None]) -> None:
    graphs = CudaGraphs()
    graphs.warm_up(work, DEVICE)
    graphs.capture(work, DEVICE)()


def by_bench(work: Callable[[], None]) -> None:
    GraphCalls([work], DEVICE).run(1)


@pytest.mark.parametrize("capture", [by_sampler, by_bench])
@pytest.mark.parametrize("fails", [False, True])
def test_the_workspace_of_a_capture_is_neither_the_warm_ups_nor_kept_for_others(
    monkeypatch: pytest.MonkeyPatch, capture: Callable[[Callable[[], None]], None], fails: bool
) -> None:
    """A workspace as torch keeps it: made by the first product, in the memory of that moment, until cleared."""
    log: list[str] = []
    pools, workspaces = ["ordinary"], []

    def product() -> None:
        if not workspaces:
            workspaces.append(pools[-1])
        log.append(f"writes {workspaces[0]}")
        if fails and pools[-1] == "graph":
            raise RuntimeError("not while capturing")

    class Graph:
        def replay(self) -> None:
            log.append("replay")

        def pool(self) -> tuple[int, int]:
            return (0, 1)

    @contextmanager
    def graph(*args: Any, **options: Any) -> Iterator[None]:
        pools.append("graph")
        try:
            yield
        finally:
            pools.pop()

    Machine(monkeypatch, 1)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", workspaces.clear, raising=False)
    if fails:
        with pytest.raises(RuntimeError, match="capturing"):
            capture(product)
        assert log == ["writes ordinary", "writes graph"]
    else:
        capture(product)
        assert log == ["writes ordinary", "writes graph", "replay"]
    # What comes next in that stream does not write to the graph's memory.
    product()
    assert log[-1] == "writes ordinary"

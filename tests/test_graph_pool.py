"""The memory pool of `CudaGraphs` without a GPU: graphs and pools that follow the rules of torch's allocator."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ldmperf.samplers import CudaGraphs

DEVICES = [torch.device("cuda", index) for index in range(2)]


class Allocator:
    """Of c10/cuda/CUDACachingAllocator.cpp: `create_or_incref_pool`, `beginAllocateToPool`, `endAllocateToPool`,
    `releasePool`; of aten/src/ATen/cuda/CUDAGraph.cpp: `capture_end` and `reset`."""

    def __init__(self) -> None:
        self.handles = 0
        self.uses: dict[tuple[int, tuple[int, int]], int] = {}
        self.sizes: dict[tuple[int, tuple[int, int]], int] = {}
        self.underway: list[tuple[int, tuple[int, int]]] = []

    def handle(self) -> tuple[int, int]:
        self.handles += 1
        return (0, self.handles)

    def begin(self, index: int, pool: tuple[int, int]) -> None:
        # torch's assertions: a pool that no graph uses any more cannot be used again.
        assert self.uses.get((index, pool), 1) > 0
        self.uses[index, pool] = self.uses.get((index, pool), 0) + 1
        assert (index, pool) not in self.underway, "beginAllocateToPool: already recording to mempool_id"
        self.underway.append((index, pool))

    def end(self, index: int, pool: tuple[int, int]) -> None:
        if (index, pool) not in self.underway:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.underway.remove((index, pool))

    def release(self, index: int, pool: tuple[int, int]) -> None:
        self.uses[index, pool] -= 1
        assert self.uses[index, pool] >= 0
        if not self.uses[index, pool]:
            self.sizes.pop((index, pool), None)

    def snapshot(self) -> list[dict[str, Any]]:
        ordinary = {"device": 0, "segment_pool_id": (0, 0), "total_size": 1000, "allocated_size": 10}
        return [ordinary] + [
            {"device": index, "segment_pool_id": pool, "total_size": size, "allocated_size": 0}
            for (index, pool), size in self.sizes.items()
        ]


class Machine:
    """torch.cuda as far as captures use it. `needs` is what the next capture takes, `breaks` where it fails."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.allocator = Allocator()
        self.needs, self.breaks = 100, ""
        allocator, machine = self.allocator, self

        class Graph:
            used: tuple[int, tuple[int, int]] | None = None

            def pool(self) -> tuple[int, int]:
                if self.used is None:
                    raise RuntimeError("Called CUDAGraph::pool() without a preceding successful capture.")
                return self.used[1]

            def replay(self) -> None:
                pass

            def __del__(self) -> None:
                if self.used is not None:
                    allocator.release(*self.used)

        @contextmanager
        def graph(graph: Graph, pool: tuple[int, int], stream: int, capture_error_mode: str) -> Iterator[None]:
            if machine.breaks == "begin":
                raise RuntimeError("operation not permitted")
            allocator.begin(stream, pool)
            try:
                yield
            finally:
                if machine.breaks == "end":
                    raise RuntimeError("operation failed due to a previous error during capture")
                allocator.end(stream, pool)
                graph.used = (stream, pool)

        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(torch.cuda, "graph", graph)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", allocator.handle)
        monkeypatch.setattr(torch.cuda, "memory_snapshot", allocator.snapshot)
        monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "native")
        # A stream is the number of its device.
        monkeypatch.setattr(torch.cuda, "Stream", lambda index: index)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
        monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", allocator.end, raising=False)
        monkeypatch.setattr(torch._C, "_cuda_releasePool", allocator.release, raising=False)

    def capture(self, graphs: CudaGraphs, device: torch.device, shares: bool = True) -> Callable[[], None]:
        def work() -> None:
            place = self.allocator.underway[-1]
            self.allocator.sizes[place] = max(self.needs, self.allocator.sizes.get(place, 0))
            if self.breaks == "work":
                raise torch.OutOfMemoryError("CUDA out of memory")

        return graphs.capture(work, device, shares=shares)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from(["capture", "capture", "apart", "drop", "begin", "work", "end"]),
            st.integers(0, 1),
            st.integers(0, 9),
        ),
        max_size=25,
    )
)
def test_any_row_of_captures_failures_and_drops(steps: list[tuple[str, int, int]]) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        machine = Machine(monkeypatch)
        graphs = CudaGraphs()
        kept: list[tuple[int, Callable[[], None]]] = []
        for kind, index, number in steps:
            device = DEVICES[index]
            if kind == "drop":
                if kept:
                    kept.pop(number % len(kept))
                continue
            machine.needs = 100 * number
            if kind in ("capture", "apart"):
                kept.append((index, machine.capture(graphs, device, kind == "capture")))
            else:
                machine.breaks = kind
                with pytest.raises(RuntimeError):
                    machine.capture(graphs, device)
                machine.breaks = ""
        # No allocation goes on into a pool; every pool's users are the captures that are kept.
        assert not machine.allocator.underway
        for index, device in enumerate(DEVICES):
            here = [replay.__self__.pool() for place, replay in kept if place == index]  # type: ignore[attr-defined]
            uses = {pool: count for (place, pool), count in machine.allocator.uses.items() if place == index}
            assert {pool: count for pool, count in uses.items() if count} == {p: here.count(p) for p in here}
            sizes = {pool: size for (place, pool), size in machine.allocator.sizes.items() if place == index}
            assert graphs.memory(device) == sum(sizes.values())
        kept.clear()
        assert not machine.allocator.sizes


def test_captures_of_a_device_share_one_pool_whose_size_is_the_largests(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch)
    graphs = CudaGraphs()
    kept = []
    for machine.needs in (300, 100, 200):
        kept.append(machine.capture(graphs, DEVICES[0]))
    assert graphs.memory(DEVICES[0]) == 300
    assert graphs.memory(DEVICES[1]) == 0
    machine.needs = 50
    other = machine.capture(graphs, DEVICES[1])
    assert graphs.memory(DEVICES[1]) == 50
    apart = machine.capture(graphs, DEVICES[0], shares=False)
    assert graphs.memory(DEVICES[0]) == 350
    # What is left of a pool is its whole memory: the device gets it back with the last.
    del kept[0], apart
    assert graphs.memory(DEVICES[0]) == 300
    kept.clear()
    assert graphs.memory(DEVICES[0]) == 0
    kept.append(machine.capture(graphs, DEVICES[0]))
    assert graphs.memory(DEVICES[0]) == 50
    del other


def test_a_capture_that_ran_out_of_memory_leaves_the_pool_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """It ended. One that did not end leaves a pool that torch refuses: the next capture takes another."""
    machine = Machine(monkeypatch)
    graphs = CudaGraphs()
    first = machine.capture(graphs, DEVICES[0])
    pools = []
    for machine.breaks in ("work", "end"):
        with pytest.raises(RuntimeError):
            machine.capture(graphs, DEVICES[0])
        machine.breaks = ""
        pools.append(machine.capture(graphs, DEVICES[0]).__self__.pool())  # type: ignore[attr-defined]
    assert [pool == first.__self__.pool() for pool in pools] == [True, False]  # type: ignore[attr-defined]


def test_an_allocator_that_tells_nothing_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch)
    graphs = CudaGraphs()
    kept = machine.capture(graphs, DEVICES[0])
    assert graphs.memory(DEVICES[0]) == 100
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "cudaMallocAsync")
    assert graphs.memory(DEVICES[0]) == 0
    del kept


def test_times_are_told_once_the_device_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    done = False

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self, stream: str) -> None:
            log.append(f"event in {stream}")

        def query(self) -> bool:
            return done

        def elapsed_time(self, end: Event) -> float:
            return 2.5

    Machine(monkeypatch)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "the caller's")
    ms = CudaGraphs().timed(lambda: log.append("work"), DEVICES[0])
    assert log == ["event in the caller's", "work", "event in the caller's"]
    assert ms() is None
    done = True
    assert ms() == 2.5

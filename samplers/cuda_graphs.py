"""The interface `Graphs`, by which a step is captured, and `CudaGraphs`, which implements it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Protocol
from weakref import WeakSet

import torch


class CaptureError(RuntimeError):
    """A step could not be captured; the message is one line that says why. The sampler stays usable."""


class Graphs(Protocol):
    """How a step is captured: `CudaGraphs`, or a stand-in where there is no GPU."""

    def check(self, device: torch.device) -> None:
        """Raises CaptureError for a device that it cannot capture on."""

    def turn(self, device: torch.device) -> AbstractContextManager[None]:
        """Orders runs: device work queued inside begins after the device work of earlier turns, on any stream."""

    def settle(self) -> None:
        """Waits on the host for the device work of all turns; afterwards their memory may be freed."""

    def warm_up(self, work: Callable[[], None], device: torch.device) -> None:
        """Runs `work` as it will be captured, outside a capture, and waits for it."""

    def capture(
        self, work: Callable[[], None], device: torch.device, *, shares: bool = True
    ) -> Callable[[], None]:
        """Records the launches of `work` without running them; returns their replay. May raise anything.

        shares: its memory may be that of other captures, because nothing in it is read after the replay
        """

    def memory(self, device: torch.device) -> int:
        """Bytes of the device that are set aside for all captures."""

    def timed(self, work: Callable[[], None], device: torch.device) -> Callable[[], float | None]:
        """Runs `work`; returns a function that tells its milliseconds, or None while the device is not done."""


@contextmanager
def own_workspaces() -> Iterator[None]:
    """A capture inside allocates the workspaces of cuBLAS from the graph's own memory, which lives as long as it.

    torch keeps one workspace for each handle and stream, allocated at the first matmul. A workspace of a warm-up
    is ordinary memory: `torch._C._cuda_clearCublasWorkspaces` frees it while the graph still writes to it, and
    the CUDA graphs of torch.compile call that function at every recording. Here it is called before and after a
    capture, as in torch/_inductor/cudagraph_trees.py, `clear_cublas_manager`. So a foreign graph that writes to a
    workspace of its warm-up is not safe after this.
    """
    _clear_workspaces()
    try:
        yield
    finally:
        _clear_workspaces()


def _clear_workspaces() -> None:
    # Builds without CUDA do not have this function.
    clear: Callable[[], None] | None = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)
    if clear is not None:
        clear()


class CudaGraphs:
    """Captures by `torch.cuda.CUDAGraph`, which share one memory pool per device; several samplers may share this.

    The pool holds what a step makes and drops again. That is safe, although any graph writes over it, because

    - replays of all captures are in turns, one after another on the device;
    - a replay writes what it reads there before it reads it, as no launch outside the capture made it;
    - what is read after a replay (state, outputs, conditionings) was allocated before the capture, elsewhere;
    - a call that leaves tensors behind for the next gets memory of its own (`capture(shares=False)`).

    So the pool grows to about what the largest capture needs, if that comes first. A dropped capture's part serves
    the next ones, and the device gets the memory back when the last capture of the pool is dropped.

    Warm-up and capture run on one stream per device: a pool's block serves only the stream that it was made for,
    and torch's own stream for captures is of the device that captured first. The workspace of cuBLAS belongs to a
    capture (`own_workspaces`). Other libraries may keep memory for a stream, which all captures of a device share.
    torch.compile's CUDA graphs have a pool of their own.
    """

    def __init__(self) -> None:
        self._streams: dict[int, torch.cuda.Stream] = {}
        self._ends: dict[int, torch.cuda.Event] = {}
        self._pools: dict[int, torch.cuda._POOL_HANDLE] = {}
        self._made: dict[int, WeakSet[torch.cuda.CUDAGraph]] = {}

    def _stream(self, device: torch.device) -> torch.cuda.Stream:
        index = _index(device)
        if index not in self._streams:
            self._streams[index] = torch.cuda.Stream(index)
        return self._streams[index]

    def check(self, device: torch.device) -> None:
        if device.type != "cuda":
            raise CaptureError(
                f"CUDA graphs need a CUDA device, and the noise is on {device}; use sample(), which takes any"
            )

    @contextmanager
    def turn(self, device: torch.device) -> Iterator[None]:
        index = _index(device)
        stream = torch.cuda.current_stream(device)
        if index in self._ends:
            stream.wait_event(self._ends[index])
        try:
            yield
        finally:
            # Also after an error: the run may have queued replays.
            with torch.cuda.device(device):
                self._ends.setdefault(index, torch.cuda.Event()).record(stream)

    def settle(self) -> None:
        for end in self._ends.values():
            end.synchronize()

    def warm_up(self, work: Callable[[], None], device: torch.device) -> None:
        # On a side stream, as torch's documentation of graphs requires.
        side = self._stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            work()
        torch.cuda.current_stream(device).wait_stream(side)
        torch.cuda.synchronize(device)

    def capture(
        self, work: Callable[[], None], device: torch.device, *, shares: bool = True
    ) -> Callable[[], None]:
        index = _index(device)
        graph = torch.cuda.CUDAGraph()
        stream = self._stream(device)
        pool = self._pool(index) if shares else torch.cuda.graph_pool_handle()
        try:
            # The outer `stream` restores the caller's stream where torch's own does not: if ending the capture
            # fails. thread_local: other threads, such as a data loader's, may call what a capture forbids.
            with (
                torch.cuda.device(device),
                torch.cuda.stream(stream),
                own_workspaces(),
                torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"),
            ):
                work()
        except BaseException:
            # torch refuses a pool whose last capture did not end: the next capture gets another.
            self._pools.pop(index, None)
            _end_allocation(graph, index, pool)
            raise
        self._made.setdefault(index, WeakSet()).add(graph)
        replay: Callable[[], None] = graph.replay
        return replay

    def _pool(self, index: int) -> torch.cuda._POOL_HANDLE:
        """The device's pool; a new one where no capture of the last is left, which torch would refuse to use."""
        pool = self._pools.get(index)
        if pool is None or all(graph.pool() != pool for graph in self._made.get(index, ())):
            pool = self._pools[index] = torch.cuda.graph_pool_handle()
        return pool

    def memory(self, device: torch.device) -> int:
        # cudaMallocAsync tells nothing of its pools.
        if torch.cuda.get_allocator_backend() != "native":
            return 0
        index = _index(device)
        pools = {tuple(graph.pool()) for graph in self._made.get(index, ())}
        return sum(
            segment["total_size"]
            for segment in torch.cuda.memory_snapshot()
            if segment["device"] == index and tuple(segment["segment_pool_id"]) in pools
        )

    def timed(self, work: Callable[[], None], device: torch.device) -> Callable[[], float | None]:
        stream = torch.cuda.current_stream(device)
        with torch.cuda.device(device):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record(stream)
            work()
            end.record(stream)
        return lambda: start.elapsed_time(end) if end.query() else None


def _end_allocation(graph: torch.cuda.CUDAGraph, index: int, pool: torch.cuda._POOL_HANDLE) -> None:
    """After a capture that could not be ended: allocations no longer go to its pool, which it no longer uses.

    `CUDAGraph.capture_end` raises before it does this, and `reset` does it only after a capture that ended; the
    pool's memory would never be freed.
    """
    try:
        graph.pool()
    except RuntimeError:
        # The first raises where the capture did not begin.
        with suppress(AttributeError, RuntimeError):
            torch._C._cuda_endAllocateToPool(index, pool)
            torch._C._cuda_releasePool(index, pool)


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index

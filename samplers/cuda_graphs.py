"""The interface `Graphs`, by which a step is captured, and `CudaGraphs`, which implements it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

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

    def capture(self, work: Callable[[], None], device: torch.device) -> Callable[[], None]:
        """Records the launches of `work` without running them; returns their replay. May raise anything."""


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
    """Captures by `torch.cuda.CUDAGraph`, each with memory of its own, freed with the capture.

    Warm-up and capture run on one stream per device: torch's own stream for captures is of the device that
    captured first. The workspace of cuBLAS belongs to a capture (`own_workspaces`). Other libraries may keep
    memory for a stream, which all captures of a device then share; so turns are ordered among all captures.
    """

    def __init__(self) -> None:
        self._streams: dict[int, torch.cuda.Stream] = {}
        self._ends: dict[int, torch.cuda.Event] = {}

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

    def capture(self, work: Callable[[], None], device: torch.device) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        stream = self._stream(device)
        # The outer `stream` restores the caller's stream where torch's own does not: if ending the capture fails.
        # thread_local: other threads, such as a data loader's, may call what a capture forbids.
        with (
            torch.cuda.device(device),
            torch.cuda.stream(stream),
            own_workspaces(),
            torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"),
        ):
            work()
        replay: Callable[[], None] = graph.replay
        return replay


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index

"""`Captures`: calls captured as CUDA graphs, kept by key, never stale, bounded in number."""

from __future__ import annotations

import gc
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from ldmperf.kernels import dependent_launches_enabled

from .cuda_graphs import CaptureError, Graphs
from .reads import Reads, Watch, modules_of
from .tree import leaves
from .values import plain, shown
from .worth import Capture, Worth

M = TypeVar("M")

# The first replay of a graph also uploads it.
_TIMED_REPLAYS = range(1, 5)


@dataclass(frozen=True)
class Capturable(Generic[M]):
    """What to capture: a call without arguments on the tensors in `memory`, which are there before it."""

    memory: M
    tensors: Callable[[], list[Tensor]]
    call: Callable[[], None]


@dataclass(eq=False)
class Captured(Generic[M]):
    """A captured call and the memory that it works on."""

    memory: M
    device: torch.device
    _graphs: Graphs
    _replay: Callable[[], None]
    # What the graph reads: a graph itself keeps none of it alive.
    _reads: list[torch.UntypedStorage]
    _report: Capture
    _timings: list[Callable[[], float | None]] = field(default_factory=list)
    _uses: int = 0

    def replay(self) -> None:
        if self._uses in _TIMED_REPLAYS:
            self._timings.append(self._graphs.timed(self._replay, self.device))
        else:
            self._replay()
        self._uses += 1

    @property
    def report(self) -> Capture:
        """What is known of the capture now; does not wait for replays that the device has not finished."""
        times = [timing() for timing in self._timings]
        self._timings = [timing for timing, ms in zip(self._timings, times, strict=True) if ms is None]
        known = [ms for ms in (*times, self._report.replay_ms) if ms is not None]
        self._report = replace(self._report, uses=self._uses, replay_ms=min(known, default=None))
        return self._report

    @property
    def is_slower(self) -> bool:
        """Whether all replays that are timed have been, and none was faster than the eager call."""
        if self._uses < _TIMED_REPLAYS.stop or not (self._timings or self._report.is_slower):
            return False
        return self.report.is_slower and not self._timings


class Captures(Generic[M]):
    """Captured calls by key; one more than `max_captures` drops the least recently used.

    call      whose modules are found and watched, unless `modules` are given; `name` is its owner's, for errors
    worth     whether a shape runs eagerly where a graph does not pay (`Worth`); `find` then returns None

    Every `find` checks the modules: what is no longer the same there drops all captures. The bound holds before
    a capture, so that the memory of the dropped is free for it. Out of memory beside others drops these and tries
    again; then it is a CaptureError that is an OutOfMemoryError too, or, with `worth`, a shape that runs eagerly.
    """

    def __init__(
        self,
        name: str,
        call: Callable[..., Any],
        modules: nn.Module | Sequence[nn.Module] | None,
        *,
        max_captures: int,
        graphs: Graphs,
        worth: bool = False,
    ) -> None:
        max_captures = plain(max_captures)
        if type(max_captures) is not int or max_captures < 1:
            raise ValueError(f"max_captures must be at least 1, an integer, not {shown(max_captures)}")
        self._name = name
        self._call = call
        self._given_modules = [modules] if isinstance(modules, nn.Module) else modules
        self._watch: Watch | None = None
        self._max_captures = max_captures
        self._graphs = graphs
        self._worth = worth
        self._decisions = Worth(worth)
        self._kept: OrderedDict[Hashable, Captured[M]] = OrderedDict()

    @property
    def reports(self) -> tuple[Capture, ...]:
        """The captures that are kept; the last used is at the end."""
        return tuple(captured.report for captured in self._kept.values())

    @property
    def decisions(self) -> tuple[str, ...]:
        """The last decisions in words: captures that were dropped, shapes that run eagerly, and why."""
        return self._decisions.lines

    def clear(self) -> None:
        """Waits until the device is done with all captures, drops them and releases their memory."""
        self._drop_all()
        self._decisions.forget()

    def find(
        self, key: Hashable, device: torch.device, description: str, build: Callable[[], Capturable[M]]
    ) -> Captured[M] | None:
        """The capture under this key, kept or new; None where the call is to run eagerly. Inside a turn."""
        key = (key, _autocast(device), dependent_launches_enabled())
        if self._watch is not None and not self._watch.is_same(self._modules()):
            self._drop_all("because modules changed")
        if self._worth and key in self._kept and self._kept[key].is_slower:
            self._drop_slower(key)
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        if not self._decisions.takes(key):
            return None
        self._make_room()
        while key not in self._kept:
            try:
                self._kept[key] = self._capture(device, description, build)
                continue
            except torch.OutOfMemoryError as error:
                if not self._kept and not self._worth:
                    raise
                reason = " ".join(str(error).removeprefix(_failed(description)).split())
            # Not in the handler, whose frames hold the memory of what failed.
            if not self._kept:
                _release_memory()
                self._decisions.refuse(key, description, reason)
                return None
            self._drop_all("because memory ran out")
        # Not renewed: parameters that the call itself replaced in this capture make the earlier captures stale.
        self._watch = self._watch or Watch(self._modules())
        self._decisions.say(f"{description} was captured")
        return self._kept[key]

    def _modules(self) -> Sequence[nn.Module]:
        return modules_of(self._call) if self._given_modules is None else self._given_modules

    def _make_room(self) -> None:
        if len(self._kept) >= self._max_captures:
            self._graphs.settle()
        while len(self._kept) >= self._max_captures:
            key, captured = self._kept.popitem(last=False)
            self._decisions.dropped(key, captured.report, f"because at most {self._max_captures} are kept")
        if not self._kept:
            self._watch = None

    def _drop_all(self, why: str = "") -> None:
        self._graphs.settle()
        reports = {key: captured.report for key, captured in self._kept.items()}
        self._kept.clear()
        self._watch = None
        _release_memory()
        for key, report in reports.items():
            if why:
                self._decisions.dropped(key, report, why)

    def _drop_slower(self, key: Hashable) -> None:
        self._graphs.settle()
        report = self._kept.pop(key).report
        if not self._kept:
            self._watch = None
        _release_memory()
        self._decisions.refuse_slower(key, report)

    def _capture(self, device: torch.device, description: str, build: Callable[[], Capturable[M]]) -> Captured[M]:
        work = build()
        reads = Reads()

        def noted() -> None:
            with reads:
                work.call()

        timings: list[Callable[[], float | None]] = []

        def timed() -> None:
            timings.append(self._graphs.timed(work.call, device))

        start = time.perf_counter()
        # The first call tunes cuDNN and compiles Triton's kernels. The last is under a dispatch mode, in which
        # compiled functions run uncompiled.
        with _no_cached_casts():
            for call in (work.call, timed, noted):
                self._graphs.warm_up(call, device)
        warm = time.perf_counter()
        found = {parameter for module in self._modules() for parameter in module.parameters()}
        if unseen := len({*reads.parameters} - found):
            raise ValueError(
                f"denoise reads {unseen} parameters of modules that it does not show: pass these to "
                f"{self._name} as modules=, so that it notices weights that were replaced"
            )
        before = self._graphs.memory(device)
        try:
            # A tensor that the call leaves for the next one must not lie where other captures write.
            with _no_cached_casts():
                replay_graph = self._graphs.capture(work.call, device, shares=not reads.left)
        except Exception as error:
            # Ending the capture fails too; its error would hide the cause, which is in the chain before it.
            chain = _chain(error)
            cause = next((one for one in chain if "captur" not in str(one)), chain[-1])
            reason = next((line.strip() for line in str(cause).splitlines() if line.strip()), "no message")
            out_of_memory = isinstance(cause, torch.OutOfMemoryError)
            # The frames of the failed capture hold what it allocated.
            for one in chain:
                one.__traceback__ = None
            del error, chain, cause, one
            _release_memory()
            kind: type[RuntimeError] = _CaptureOutOfMemory if out_of_memory else CaptureError
            raise kind(f"{_failed(description)}{reason}") from None
        report = Capture(
            description,
            warm_up_ms=1e3 * (warm - start),
            capture_ms=1e3 * (time.perf_counter() - warm),
            memory_bytes=max(self._graphs.memory(device) - before, 0),
            buffer_bytes=_bytes(work.tensors()),
            # The warm-up has waited for it.
            eager_ms=sum(timing() or 0.0 for timing in timings),
        )
        return Captured(work.memory, device, self._graphs, replay_graph, list(reads.memory.values()), report)


class Graphed(Generic[M]):
    """What works by captures: tells of them, drops them, and is neither copied nor pickled."""

    _captures: Captures[M]

    def __reduce__(self) -> str:
        name = type(self).__name__
        raise TypeError(
            f"a {name} cannot be copied or pickled, because its captures work on its own memory: make another "
            f"with {name}(denoise)"
        )

    @property
    def captures(self) -> tuple[Capture, ...]:
        """The captures that are kept; the last used is at the end."""
        return self._captures.reports

    @property
    def decisions(self) -> tuple[str, ...]:
        """The last decisions in words: captures that were dropped, shapes that run eagerly, and why."""
        return self._captures.decisions

    def clear(self) -> None:
        """Waits until the device is done with all captures, drops them and releases their memory."""
        self._captures.clear()


class _CaptureOutOfMemory(CaptureError, torch.OutOfMemoryError):
    """A capture that ran out of memory, which is both errors."""


def _failed(description: str) -> str:
    return f"{description} could not be captured: "


def _autocast(device: torch.device) -> tuple[bool, torch.dtype] | None:
    """What launches depend on besides tensors and modules."""
    if not torch.amp.is_autocast_available(device.type):
        return None
    return torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)


@contextmanager
def _no_cached_casts() -> Iterator[None]:
    """A capture casts weights itself: autocast keeps casts, which later writes to the weights do not reach."""
    caches = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(caches)


def _bytes(tree: Any) -> int:
    """Bytes of a tree's tensors, memory that several share counted once."""
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in leaves(tree)}
    return sum(storages.values())


def _release_memory() -> None:
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _chain(error: BaseException) -> list[BaseException]:
    """An error and its contexts, back to the first."""
    chain = [error]
    while chain[-1].__context__ is not None:
        chain.append(chain[-1].__context__)
    return chain

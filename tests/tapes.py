"""A stand-in for CUDA graphs: a tape of operators on the very memory of the capture.

As a CUDA graph does, it keeps nothing of what was there before it; unlike one it fails where it reads memory that
was freed. Captures that share a pool write over each other: before each replay, what such captures made is NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from ldmperf.samplers import GraphedSampler


class FreedMemory(Exception):
    pass


class Outside:
    """A tensor that was there before the capture: where it lies, and not what keeps it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.storage = StorageWeakRef(tensor.untyped_storage())
        self.layout = (tensor.storage_offset(), tensor.shape, tensor.stride())
        self.dtype = tensor.dtype

    def tensor(self) -> torch.Tensor:
        storage = torch.UntypedStorage._new_with_weak_ptr(self.storage.cdata)
        if storage is None:
            raise FreedMemory("a replay reads memory that was freed")
        return torch.empty(0, dtype=self.dtype).set_(storage, *self.layout)


class Tape(TorchDispatchMode):
    def __init__(self, shares: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.shares = shares
        self.made: set[int] = set()
        self.bytes = 0
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def held(leaf: Any) -> Any:
            if not isinstance(leaf, torch.Tensor) or leaf.untyped_storage()._cdata in self.made:
                return leaf
            return Outside(leaf)

        kept = tree_map(held, (args, kwargs or {}))
        # Views too are made anew at each replay only as far as their memory is; a view's call does nothing.
        out = func(*args, **(kwargs or {}))
        is_view = any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)
        if not is_view:
            results = () if func._schema.is_mutable else tuple(tree_leaves(out))
            self.calls.append((func, *kept, results))
            self.bytes += sum(
                r.untyped_storage().nbytes()
                for r in results
                if isinstance(r, torch.Tensor) and r.untyped_storage()._cdata not in self.made
            )
            self.made |= {r.untyped_storage()._cdata for r in results if isinstance(r, torch.Tensor)}
        return out

    def replay(self) -> None:
        def real(leaf: Any) -> Any:
            return leaf.tensor() if isinstance(leaf, Outside) else leaf

        # What autocast casts was captured.
        with torch.autocast("cpu", enabled=False):
            for func, args, kwargs, results in self.calls:
                out = func(*tree_map(real, args), **tree_map(real, kwargs))
                for result, new in zip(results, tree_leaves(out), strict=bool(results)):
                    # Some of attention's results are numbers.
                    if isinstance(result, torch.Tensor):
                        result.copy_(new)

    def overwrite(self) -> None:
        for *_, results in self.calls:
            for result in results:
                if isinstance(result, torch.Tensor) and result.is_floating_point():
                    result.fill_(torch.nan)


class Tapes:
    """Stands for CUDA graphs. `log` holds turns, captures and replays as they come.

    Time and memory are told, not measured: `eager_ms` and `replay_ms` of a call, `busy` while the device has not
    finished. Captures that share take of one pool, which grows to the largest and empties with the last, as
    torch's does. `failures` are raised by the captures to come, None by none.
    """

    def __init__(self) -> None:
        self.log: list[str] = []
        self.in_turn = False
        self.eager_ms, self.replay_ms, self.busy = 10.0, 4.0, False
        self.failures: list[Exception | None] = []
        self.tapes: WeakSet[Tape] = WeakSet()
        self.pool = 0

    def check(self, device: torch.device) -> None:
        pass

    @contextmanager
    def turn(self, device: torch.device) -> Iterator[None]:
        self.log.append("begin")
        self.in_turn = True
        try:
            yield
        finally:
            self.in_turn = False
            self.log.append("end")

    def settle(self) -> None:
        self.log.append("settle")

    def warm_up(self, work: Callable[[], None], device: torch.device) -> None:
        assert self.in_turn
        work()

    def capture(
        self, work: Callable[[], None], device: torch.device, *, shares: bool = True
    ) -> Callable[[], None]:
        failure = self.failures.pop(0) if self.failures else None
        if failure is not None:
            self.log.append("failure")
            raise failure
        self.log.append("capture" if shares else "capture apart")
        with Tape(shares) as tape:
            work()
        if not self.tapes:
            self.pool = 0
        self.pool = max(self.pool, tape.bytes) if shares else self.pool + tape.bytes
        self.tapes.add(tape)

        def replay() -> None:
            assert self.in_turn
            self.log.append("replay")
            for other in self.tapes if shares else ():
                if other.shares:
                    other.overwrite()
            tape.replay()

        return replay

    def memory(self, device: torch.device) -> int:
        return self.pool if self.tapes else 0

    def timed(self, work: Callable[[], None], device: torch.device) -> Callable[[], float | None]:
        replays = self.log.count("replay")
        work()
        ms = self.eager_ms if self.log.count("replay") == replays else self.replay_ms
        return lambda: None if self.busy else ms

    @property
    def captured(self) -> int:
        return self.log.count("capture") + self.log.count("capture apart")


def graphed(denoise: Any, **options: Any) -> tuple[GraphedSampler[Any], Tapes]:
    graphs = Tapes()
    return GraphedSampler(denoise, backend="torch", graphs=graphs, **options), graphs

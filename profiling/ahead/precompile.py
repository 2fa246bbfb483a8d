"""Kernels compiled ahead, in parallel, into triton's own cache: what finds them there starts at once."""

from __future__ import annotations

import functools
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal

from ..machines import Machine
from ..measure.settings import pinned_ptxas
from ..static.compile import target
from ..static.forked import Lost, map_forked, usable_cores
from .stubs import Stub, build, is_there
from .work import Kernel, Work, about_to_fork, in_cache

Status = Literal["compiled", "there", "unfit", "failed"]


@dataclass(frozen=True)
class Done:
    """How one kernel or stub went. `unfit`: it compiles, and needs more shared memory than a program can have."""

    name: str
    digest: str
    status: Status
    is_stub: bool = False
    candidate: bool = False
    message: str = ""


@dataclass(frozen=True)
class Precompilation:
    """What was done; `left`: how many were not begun in the time given."""

    done: tuple[Done, ...]
    seconds: float
    left: int = 0

    def count(self, status: Status, *, stubs: bool = False) -> int:
        return Counter((one.status, one.is_stub) for one in self.done)[status, stubs]

    @property
    def failures(self) -> list[Done]:
        """Those that should have compiled: no candidates."""
        return [one for one in self.done if not one.candidate and one.status in ("failed", "unfit")]

    @property
    def useless(self) -> Mapping[str, str]:
        """Digest and message of the candidates that cannot be launched."""
        return {one.digest: one.message for one in self.done if one.status in ("failed", "unfit")}


def compile_work(
    work: Work,
    *,
    processes: int | None = None,
    seconds: float | None = None,
    told: Callable[[Done], None] = lambda done: None,
) -> Precompilation:
    """Compiles what triton's cache does not have yet; `told` of each as it is done.

    After `seconds` nothing more is begun and what runs is ended. KeyboardInterrupt ends it too; what was compiled
    is kept.
    """
    start = time.monotonic()
    done: list[Done] = []
    with ExitStack() as stack:
        stack.enter_context(pinned_ptxas())
        stack.enter_context(about_to_fork(work.machine))
        items: list[Kernel | Stub] = [*work.stubs, *work.launches]
        results = map_forked(functools.partial(_compile, work.machine), items, processes or usable_cores())
        stack.callback(results.close)
        for item, result in results:
            is_stub = isinstance(item, Stub)
            name = item.name if isinstance(item, Stub) else item.label
            candidate = isinstance(item, Kernel) and item.candidate
            outcome: tuple[Status, str] = ("failed", result.reason) if isinstance(result, Lost) else result
            done.append(Done(name, item.digest, outcome[0], is_stub, candidate, outcome[1]))
            told(done[-1])
            if seconds is not None and time.monotonic() - start > seconds:
                break
    return Precompilation(tuple(done), time.monotonic() - start, len(items) - len(done))


def _compile(machine: Machine, item: Kernel | Stub) -> tuple[Status, str]:
    """Its status and, where it is of no use, why."""
    import triton

    if isinstance(item, Stub):
        was_there = is_there(item)
        build(item)
        return ("there" if was_there else "compiled"), ""
    was_there = in_cache(item.digest, item.name)
    compiled = triton.compile(item.source, target=target(machine), options=item.options)
    if compiled.hash != item.digest:
        return "failed", f"triton's key of it is {compiled.hash}, not {item.digest}"
    shared = int(compiled.metadata.shared)
    if shared > machine.shared_per_block:
        return "unfit", f"{shared} bytes of shared memory, of {machine.shared_per_block}"
    return ("there" if was_there else "compiled"), ""

"""What a backend does to its process while it is called: to the functions that tell time, and by threads.

All of it is looked at before the clock starts or after it has stopped. A backend runs in this process and could
rewrite anything in it: this finds what is known from public contests, and is no sandbox.
"""

from __future__ import annotations

import inspect
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .integrity import impossible
from .outcomes import Untrusted
from .timing import Timed

# How long a thread that a call left behind is watched, and how much it may compute meanwhile.
_WATCHED_S, _IDLE_S = 0.02, 0.002


@dataclass(frozen=True)
class _Function:
    """A function that tells time, as it was when this module was imported."""

    owner: object
    attribute: str
    name: str
    found: object

    @classmethod
    def of(cls, owner: object, attribute: str) -> _Function:
        where = getattr(owner, "__module__", None) if inspect.isclass(owner) else None
        prefix = f"{where.rpartition('.streams')[0] or where}.{owner.__name__}" if where else owner.__name__  # type: ignore[attr-defined]
        return cls(owner, attribute, f"{prefix}.{attribute}", getattr(owner, attribute, None))

    @property
    def is_replaced(self) -> bool:
        return getattr(self.owner, self.attribute, None) is not self.found

    @property
    def is_original(self) -> bool:
        """Whether it was the standard library's or torch's own already then."""
        found = self.found
        if not inspect.isroutine(found) or inspect.isbuiltin(found):
            return True
        module = getattr(found, "__globals__", {}).get("__name__", "")
        return str(module).partition(".")[0] == "torch"

    def put_back(self) -> None:
        setattr(self.owner, self.attribute, self.found)


_FUNCTIONS = tuple(
    _Function.of(owner, attribute)
    for owner, attributes in (
        (time, ("perf_counter", "perf_counter_ns", "monotonic", "monotonic_ns", "time", "clock_gettime")),
        (torch.cuda, ("synchronize", "Event", "current_stream")),
        # The class as it was: one in its place is seen above.
        (torch.cuda.Event, ("record", "elapsed_time", "synchronize", "query")),
        (torch._C, ("_cuda_synchronize",)),
    )
    for attribute in attributes
)


def replaced_clocks() -> tuple[str, ...]:
    """Names of the functions that tell time and are others than when this module was imported."""
    return tuple(function.name for function in _FUNCTIONS if function.is_replaced)


def foreign_clocks() -> tuple[str, ...]:
    """Names of those that were neither the standard library's nor torch's even then."""
    return tuple(function.name for function in _FUNCTIONS if not function.is_original)


def put_clocks_back() -> None:
    """Undoes all replacements since this module was imported."""
    for function in _FUNCTIONS:
        if function.is_replaced:
            function.put_back()


@dataclass
class CallWatch:
    """Watches the calls of one backend. `times`: what they took, for `judge`; `threads`: started by them."""

    times: list[Timed[None]] = field(default_factory=list)
    threads: set[threading.Thread] = field(default_factory=set)
    # As the last call returned: the threads that it started, and what each one that was alive had computed.
    _started: set[threading.Thread] = field(default_factory=set)
    _computed: dict[threading.Thread, float | None] = field(default_factory=dict)

    @contextmanager
    def around(self) -> Iterator[None]:
        """Around calls of the backend. Raises Untrusted where they replaced a clock.

        Clocks that were replaced before are put back with a warning: that was not this backend.
        """
        if foreign := foreign_clocks():
            raise Untrusted("impossible", f"patched timers: {_are(foreign)} replaced before ldmperf was loaded")
        if before := replaced_clocks():
            put_clocks_back()
            warnings.warn(f"{_are(before)} replaced by something else in this process; put back", stacklevel=3)
        threads = set(threading.enumerate())
        try:
            yield
        finally:
            alive = set(threading.enumerate())
            self._started = alive - threads
            self.threads |= self._started
            self.threads &= alive
            self._computed = {thread: _computed_s(thread) for thread in self.threads}
            replaced = replaced_clocks()
            put_clocks_back()
        if replaced:
            raise Untrusted("impossible", f"patched timers: {_are(replaced)} replaced by the backend")

    def settle(self) -> None:
        """Once what the last call returned is kept: raises Untrusted where a thread of it had not finished.

        It computes now, or was started by that call and has ended only now. One that waits is none.
        """
        if not self._computed:
            return
        time.sleep(_WATCHED_S)
        for thread, start in self._computed.items():
            has_ended = thread in self._started and not thread.is_alive()
            computed = _computed_s(thread)
            if has_ended or (start is not None and computed is not None and computed - start > _IDLE_S):
                raise Untrusted(
                    "impossible",
                    f"work after the call: the thread {thread.name!r} of it worked on when it had returned",
                )

    def note(self, result: Timed[Any]) -> None:
        """Keeps what a call took."""
        self.times.append(Timed(None, result.wall_ms, result.gpu_ms, result.second_ms))

    def judge(self, least_ms: float | None, what: str) -> None:
        """Raises Untrusted where the times so far are not those of the work, see `integrity.impossible`."""
        if (reason := impossible(self.times, least_ms, what)) is not None:
            raise Untrusted("impossible", reason)


def _computed_s(thread: threading.Thread) -> float | None:
    """Seconds that a thread has spent on a processor; None where the system does not tell, or it has ended."""
    try:
        # proc(5), schedstats: the first number is nanoseconds on a processor.
        return 1e-9 * int(Path(f"/proc/self/task/{thread.native_id}/schedstat").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return None


def _are(names: tuple[str, ...]) -> str:
    return f"{', '.join(names)} {'was' if len(names) == 1 else 'were'}"

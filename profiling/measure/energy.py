"""Joules of repeated calls, by a counter that moves in steps.

NVML updates its energy counter every 20 to 100 ms, so the difference of two readings may be off by an update at
either end. Here a thread reads the counter every few milliseconds while calls run back to back. The mean power is
taken from the first to the last update that came while they ran,

    power = (C_last - C_first) / (t_last - t_first),        joules = power (end - start),

so both ends of what is counted are updates under load. What stays unknown is when between two readings each update
came; `relative_error` bounds what that changes. No idle power is subtracted.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Self

from ..terminal.visible import counted as plural
from .timing import Clock

# From the first update to the last one, in seconds.
LEAST_COUNTED_S = 2.0
# After so many seconds a counter that has not moved for long enough is given up.
LONGEST_S = 6.0
# A whole window in the mean: what is counted, and up to an update of 100 ms at either end.
USUAL_S = LEAST_COUNTED_S + 0.2
_POLL_S = 0.005


class NoEnergy(Exception):
    """The counter cannot tell; the text is one line that says why."""


@dataclass(frozen=True)
class Update:
    """The counter became `millijoules` later than `after` and no later than `by` (seconds of one clock)."""

    after: float
    by: float
    millijoules: int

    @property
    def at(self) -> float:
        return (self.after + self.by) / 2


@dataclass(frozen=True)
class CountedEnergy:
    """The energy of `calls` whole calls.

    joules          of all of them: the mean power over the counted part, for the whole window
    window_s        from the first call's start to the last one's end
    counted_s       from the first to the last update of the counter within it
    relative_error  the most by which the unknown moments of these two updates change the joules; the sensor's own
                    error comes on top
    """

    joules: float
    window_s: float
    calls: int
    counted_s: float
    relative_error: float


@dataclass
class CounterWatch:
    """Reads a counter again and again in a thread, from `with` to its end, and keeps its updates.

    on_update: called in the thread after each update, while the calls run.
    """

    read: Callable[[], int]
    on_update: Callable[[], None] | None = None
    clock: Clock = time.perf_counter
    updates: list[Update] = field(default_factory=list)
    failure: Exception | None = None
    _last: tuple[float, int] | None = None
    _done: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._look_on, name="energy counter", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        if self._thread is not None:
            self._thread.join()

    def look(self) -> None:
        """One reading."""
        began = self.clock()
        value = self.read()
        by = self.clock()
        if self._last is not None and value != self._last[1]:
            self.updates.append(Update(self._last[0], by, value))
            if self.on_update is not None:
                self.on_update()
        self._last = began, value

    def _look_on(self) -> None:
        try:
            while not self._done.is_set():
                self.look()
                self._done.wait(_POLL_S)
        except Exception as error:
            self.failure = error


def count_energy(call: Callable[[], object], watch: CounterWatch) -> CountedEnergy:
    """Repeats `call`, which returns when the device is done, until the counter was seen for long enough.

    At least LEAST_COUNTED_S from the first to the last update; one call where that takes longer. `watch` is not
    entered yet. Raises NoEnergy, and whatever the call raises.
    """
    clock = watch.clock
    with watch:
        start = clock()
        calls = 0
        while True:
            call()
            calls += 1
            end = clock()
            if watch.failure is not None:
                raise NoEnergy(f"NVML's energy counter failed ({watch.failure})") from watch.failure
            inside = _within(watch.updates, start, end)
            if len(inside) > 1 and inside[-1].after - inside[0].by >= LEAST_COUNTED_S:
                return energy_between(inside, start, end, calls)
            if end - start >= LONGEST_S:
                raise NoEnergy(_unmoved(inside, end - start))


def energy_between(updates: Sequence[Update], start: float, end: float, calls: int) -> CountedEnergy:
    """The energy of calls from `start` to `end`, of two updates or more within that time."""
    if any(later.millijoules < earlier.millijoules for earlier, later in pairwise(updates)):
        raise NoEnergy("NVML's energy counter ran backwards: its driver was loaded again")
    first, last = updates[0], updates[-1]
    counted = last.at - first.at
    slack = (first.by - first.after + last.by - last.after) / 2
    power_w = (last.millijoules - first.millijoules) / 1e3 / counted
    # The true time between the two lies within `slack` of `counted`.
    return CountedEnergy(power_w * (end - start), end - start, calls, counted, slack / (counted - slack))


def _within(updates: Sequence[Update], start: float, end: float) -> list[Update]:
    """The updates that surely came while the calls ran. The thread may add some meanwhile."""
    return [update for update in tuple(updates) if start <= update.after and update.by <= end]


def _unmoved(updates: Sequence[Update], seconds: float) -> str:
    if not updates:
        return f"NVML's energy counter did not move in {seconds:.1f} s"
    counted = updates[-1].at - updates[0].at
    return (
        f"NVML's energy counter moved {plural(len(updates), 'time')} in {seconds:.1f} s, over {counted:.1f} s; "
        f"{LEAST_COUNTED_S:g} s are needed"
    )

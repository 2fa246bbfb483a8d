"""Two clocks, a repetition rule and order statistics.

`wall` is the host's monotonic clock between two device synchronizations around a whole call: what a user waits.
`gpu` is the time between two CUDA events recorded at the same places: what the device took. Their gap is launch
overhead, and a finding. Nothing is trimmed: every timed call becomes a sample.
"""

from __future__ import annotations

import functools
import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from .turn import TURNS, own_time

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
Clock = Callable[[], float]


def _clock_beside(read: Callable[[int], float] | None) -> Clock:
    """Seconds of the host's clock that nothing adjusts, where there is one, bound to its function now."""
    identity = getattr(time, "CLOCK_MONOTONIC_RAW", None)
    return time.monotonic if read is None or identity is None else functools.partial(read, identity)


_second_clock = _clock_beside(getattr(time, "clock_gettime", None))


def quantile(samples: Sequence[float], q: float) -> float:
    """The q-quantile by linear interpolation between order statistics (numpy's `linear`, type 7).

    The sorted samples sit at 0, 1/(n-1), ..., 1. Raises ValueError without samples or with q outside [0, 1].
    """
    if not samples:
        raise ValueError("a quantile needs at least one sample")
    if not 0.0 <= q <= 1.0:
        raise ValueError(f"q must lie in [0, 1], got {q}")
    ordered = sorted(samples)
    position = q * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


@dataclass(frozen=True)
class RepetitionRule:
    """Repeat until at least `min_count` samples and at least `min_seconds` of timed wall clock are there.

    The rule holds for each backend of a group by itself: one that has its samples leaves, the others go on. There
    is no upper bound: one would break the promise of the lower two.
    """

    min_count: int = 3
    min_seconds: float = 0.0

    def __post_init__(self) -> None:
        if self.min_count < 1:
            raise ValueError(f"min_count must be at least 1, got {self.min_count}")
        if not (math.isfinite(self.min_seconds) and self.min_seconds >= 0):
            raise ValueError(f"min_seconds must be a finite number of at least 0, got {self.min_seconds}")

    def done(self, wall_ms: Sequence[float], to_come: int = 0) -> bool:
        """Whether these samples (milliseconds) are enough, when `to_come` more are sure to follow."""
        return len(wall_ms) + to_come >= self.min_count and sum(wall_ms) >= 1e3 * self.min_seconds


class Deadline:
    """A time bound on what is begun: what runs when it passes is not stopped. None is no bound.

    The time in which other sides of a comparison have their turns does not count.
    """

    def __init__(self, seconds: float | None, clock: Clock = own_time) -> None:
        self._clock = clock
        self._start = clock()
        self._seconds = seconds

    @classmethod
    def begun(cls, seconds: float, ago: float, clock: Clock = own_time) -> Deadline:
        """The deadline of so many seconds (infinite: none) that began so many seconds ago, in another process."""
        deadline = cls(None if math.isinf(seconds) else seconds, clock)
        deadline._start -= ago
        return deadline

    @property
    def elapsed(self) -> float:
        """Seconds since its start."""
        return self._clock() - self._start

    @property
    def left(self) -> float:
        """Seconds that are left; zero when it has passed."""
        return math.inf if self._seconds is None else max(self._start + self._seconds - self._clock(), 0.0)

    @property
    def passed(self) -> bool:
        return self.left == 0.0

    @property
    def seconds(self) -> float:
        """From the start to its passing; infinite where it is no bound."""
        return math.inf if self._seconds is None else self._seconds

    def now(self) -> float:
        """The time of its clock, in seconds."""
        return self._clock()

    def put_off(self, seconds: float) -> None:
        """Lets it pass so much later."""
        if self._seconds is not None:
            self._seconds += seconds

    def after(self, share: float) -> Deadline:
        """The deadline that passes when this share (0 to 1) of the seconds, from the same start, is over."""
        earlier = Deadline(self._seconds, self._clock)
        earlier._start = self._start
        if self._seconds is not None:
            earlier._seconds = share * self._seconds
        return earlier


@dataclass(frozen=True)
class Timed(Generic[T]):
    """What a call returned and what it took; `gpu_ms` is None where there is no GPU.

    `second_ms` is what a second clock of the host says, read just before the first starts and after it has
    stopped: never less, and hardly more. None where the time was not taken by `timed`.
    """

    value: T
    wall_ms: float
    gpu_ms: float | None
    second_ms: float | None = field(default=None, compare=False)


def timed(
    call: Callable[[], T], device: torch.device, clock: Clock = time.perf_counter, *, delay_cycles: int = 0
) -> Timed[T]:
    """Runs `call` once and times it on both clocks; `clock` returns seconds.

    With `delay_cycles` the device first waits for that many of its cycles, before its clock starts. Meanwhile the
    host launches, so that `gpu_ms` holds no launch overhead; `wall_ms` holds both. What a user waits for is timed
    without a delay.
    """
    import torch

    if device.type != "cuda":
        second = _second_clock()
        start = clock()
        value = call()
        wall_ms = 1e3 * (clock() - start)
        return Timed(value, wall_ms, None, 1e3 * (_second_clock() - second))
    with torch.cuda.device(device):
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # All that ends the time is looked up before the call, which could put something else in its place: both
        # events on this stream, whichever is current then, and the end of all work on the device.
        stream = torch.cuda.current_stream(device)
        record_end, synchronize, elapsed_ms = after.record, torch.cuda.synchronize, before.elapsed_time
        synchronize(device)
        second = _second_clock()
        start = clock()
        if delay_cycles:
            torch.cuda._sleep(delay_cycles)
        before.record(stream)
        value = call()
        record_end(stream)
        synchronize(device)
        wall_ms = 1e3 * (clock() - start)
        second_ms = 1e3 * (_second_clock() - second)
        return Timed(value, wall_ms, elapsed_ms(after), second_ms)


@contextmanager
def garbage_collection_paused() -> Iterator[None]:
    """Collects garbage now and not again until the end, so that no sample holds a collection (as timeit does).

    Reference counting still frees tensors at once; only cycles wait.
    """
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@dataclass
class Times:
    """The samples of one backend so far, in milliseconds, and for each who ran in its round, in order."""

    wall_ms: list[float] = field(default_factory=list)
    gpu_ms: list[float] = field(default_factory=list)
    order: list[tuple[str, ...]] = field(default_factory=list)

    def add(self, sample: Timed[Any]) -> None:
        self.wall_ms.append(sample.wall_ms)
        if sample.gpu_ms is not None:
            self.gpu_ms.append(sample.gpu_ms)


# A sample of backend `name`: called with the number of the round, and whether this is its last sample.
Sampler = Callable[[int, bool], Timed[object]]


def round_order(queue: Sequence[str], mirrored: bool) -> tuple[str, ...]:
    """One round's order: the head of the queue, then its back and its front by turns (`mirrored`: front first).

    Over rounds whose queue is rotated by one this is a row-complete Latin square (Williams, Experimental designs
    balanced for the estimation of residual effects of treatments, 1949): every backend has every place equally
    often and follows every other equally often, with an odd number of backends once both forms had their turn.
    Rounds that are only rotated would leave each backend behind the same other one, busy or idle, nearly always.
    """
    rest = list(queue)
    order = [rest.pop(0)] if rest else []
    from_front = mirrored
    while rest:
        order.append(rest.pop(0 if from_front else -1))
        from_front = not from_front
    return tuple(order)


def interleave(
    run_once: Mapping[str, Sampler],
    rule: RepetitionRule,
    on_failure: Callable[[str, Exception], None],
    *,
    closing: bool = False,
    on_done: Callable[[Mapping[str, Times]], None] | None = None,
    deadline: Deadline | None = None,
) -> dict[str, Times]:
    """Times backends in turn, so that a drifting clock or a busy neighbour meets all alike.

    Each round runs every backend of the rotation once, in the order of `round_order`; who is first rotates. A
    backend that has its samples by `rule` leaves the rotation. `run_once[name](round, is_last)` takes one sample.
    With `closing` every backend ends with a sample of which it knows that it is the last: the first one for which
    the count is reached by it and the time by those before it. Without, `is_last` is False.

    A backend that raises goes to `on_failure(name, exception)` and takes no further part. Between rounds, never
    inside one, `on_done` gets the samples of the backends that have left, by name. No sample is begun once
    `deadline` has passed: the backends still in the rotation then have fewer. Returns the samples of all backends
    but those that failed.

    Before each round the other sides of a comparison have their turns, if there are any.
    """
    times = {name: Times() for name in run_once}
    queue = list(run_once)
    led = dict.fromkeys(queue, 0)
    number = 0
    while queue:
        TURNS.end()
        head = queue[0]
        order = round_order(queue, mirrored=bool(led[head] % 2))
        led[head] += 1
        ran: list[str] = []
        done: list[str] = []
        for name in order:
            if deadline is not None and deadline.passed:
                break
            ran.append(name)
            is_last = closing and rule.done(times[name].wall_ms, to_come=1)
            try:
                sample = run_once[name](number, is_last)
            except Exception as failure:
                del times[name]
                queue.remove(name)
                on_failure(name, failure)
                continue
            times[name].add(sample)
            if is_last or (not closing and rule.done(times[name].wall_ms)):
                done.append(name)
        for name in ran:
            if name in times:
                times[name].order.append(tuple(ran))
        # The leader goes to the back; where it has left, the next one leads already.
        if queue and queue[0] == head:
            queue.append(queue.pop(0))
        queue = [name for name in queue if name not in done]
        if done and on_done is not None:
            on_done({name: times[name] for name in run_once if name in done})
        if deadline is not None and deadline.passed:
            break
        number += 1
    return times

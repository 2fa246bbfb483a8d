"""Two clocks, a repetition rule and order statistics.

`wall` is the host's monotonic clock between two device synchronizations around a whole call: what a user waits.
`gpu` is the time between two CUDA events recorded at the same places: what the device took. Their gap is launch
overhead, and a finding. Nothing is trimmed: every timed call becomes a sample.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
Clock = Callable[[], float]


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

    Both hold for each backend of a group: a group goes on until its last backend has enough, so that every one
    has the same number of samples. There is no upper bound: one would break the promise of the lower two.
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
    """A time bound on what is begun: what runs when it passes is not stopped. None is no bound."""

    def __init__(self, seconds: float | None, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._end = None if seconds is None else clock() + seconds

    @property
    def left(self) -> float:
        """Seconds that are left; zero when it has passed."""
        return math.inf if self._end is None else max(self._end - self._clock(), 0.0)

    @property
    def passed(self) -> bool:
        return self.left == 0.0


@dataclass(frozen=True)
class Timed(Generic[T]):
    """What a call returned and what it took; `gpu_ms` is None where there is no GPU."""

    value: T
    wall_ms: float
    gpu_ms: float | None


def synchronize(device: torch.device) -> None:
    """Waits until the device has done all it was given; at once on the CPU."""
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)


def timed(
    call: Callable[[], T], device: torch.device, clock: Clock = time.perf_counter, *, delay_cycles: int = 0
) -> Timed[T]:
    """Runs `call` once and times it on both clocks; `clock` returns seconds.

    With `delay_cycles` the device first waits for so many of its cycles, before its clock starts: meanwhile the
    host hands over what `call` launches, and its way there is in `wall_ms` only, as the wait is. What a user waits
    for is timed without.
    """
    import torch

    if device.type != "cuda":
        start = clock()
        value = call()
        return Timed(value, 1e3 * (clock() - start), None)
    with torch.cuda.device(device):
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start = clock()
        if delay_cycles:
            torch.cuda._sleep(delay_cycles)
        before.record()
        value = call()
        after.record()
        torch.cuda.synchronize(device)
        wall_ms = 1e3 * (clock() - start)
        return Timed(value, wall_ms, before.elapsed_time(after))


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
    """The samples of one backend so far, in milliseconds."""

    wall_ms: list[float] = field(default_factory=list)
    gpu_ms: list[float] = field(default_factory=list)

    def add(self, sample: Timed[Any]) -> None:
        self.wall_ms.append(sample.wall_ms)
        if sample.gpu_ms is not None:
            self.gpu_ms.append(sample.gpu_ms)


def interleave(
    run_once: Mapping[str, Callable[[int], Timed[object]]],
    rule: RepetitionRule,
    on_failure: Callable[[str, Exception], None],
    to_come: int = 0,
) -> dict[str, Times]:
    """Times backends round robin (A B A B ...), so that a drifting clock or a busy neighbour meets all alike.

    `run_once[name](round)` does one timed call. A backend that raises goes to `on_failure(name, exception)` and
    takes no further part; the others go on. `to_come` samples of each will follow, and count as there. Returns the
    samples of those that stayed.
    """
    times = {name: Times() for name in run_once}
    number = 0
    while times and not all(rule.done(t.wall_ms, to_come) for t in times.values()):
        for name in list(times):
            try:
                sample = run_once[name](number)
            except Exception as failure:
                del times[name]
                on_failure(name, failure)
            else:
                times[name].add(sample)
        number += 1
    return times

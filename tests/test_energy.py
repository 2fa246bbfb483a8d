"""The energy of calls by a counter that moves in steps, against loads whose energy is known."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from itertools import cycle, islice
from typing import Self

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ldmperf.profiling.measure.energy import (
    LEAST_COUNTED_S,
    LONGEST_S,
    CountedEnergy,
    CounterWatch,
    NoEnergy,
    Update,
    _within,
    count_energy,
    energy_between,
)

IDLE_W = 80


class SteppingGpu:
    """A GPU on a clock of its own, in microseconds, idle or busy; its counter moves every `period`."""

    def __init__(self, watts: int, period: int = 50_000, phase: int = 0) -> None:
        self.watts, self.period, self.now, self.load = watts, period, phase, IDLE_W
        self.microjoules, self.shown = 0, 0

    def pass_time(self, microseconds: int) -> None:
        """Moves the clock on, update by update."""
        while microseconds:
            step = min(microseconds, self.period - self.now % self.period)
            self.now += step
            microseconds -= step
            self.microjoules += self.load * step
            if self.now % self.period == 0:
                self.shown = self.microjoules // 1000

    def seconds(self) -> float:
        return self.now / 1e6


class Watched(CounterWatch):
    """A watch without a thread: the calls read it while they pass the time."""

    def __enter__(self) -> Self:
        self.look()
        return self

    def __exit__(self, *_: object) -> None: ...


def counted(
    gpu: SteppingGpu,
    call_us: int,
    polls_us: Iterator[int],
    read: Callable[[], int] | None = None,
    kind: type[Watched] = Watched,
) -> tuple[CountedEnergy, float]:
    """What `count_energy` says of calls of that length, and what they took on the GPU, in joules."""
    watch = kind(read or (lambda: gpu.shown), clock=gpu.seconds)
    used = 0
    next_poll = 0

    def call() -> None:
        nonlocal used, next_poll
        if not used:
            next_poll = gpu.now + next(polls_us)
        gpu.load, before, end = gpu.watts, gpu.microjoules, gpu.now + call_us
        while gpu.now < end:
            gpu.pass_time(min(end, next_poll) - gpu.now)
            if gpu.now == next_poll:
                watch.look()
                next_poll += next(polls_us)
        used += gpu.microjoules - before
        gpu.load = IDLE_W

    return count_energy(call, watch), used / 1e6


@pytest.mark.parametrize("call_us", [300, 37_000, 123_457, 3_500_000])
def test_a_steady_load_is_counted_exactly(call_us: int) -> None:
    """300 W for 50 ms are whole millijoules, and reading every millisecond dates both updates alike."""
    energy, used = counted(SteppingGpu(300, phase=12_000), call_us, cycle([1_000]))
    assert energy.joules == pytest.approx(used, rel=1e-9)
    assert energy.joules / energy.window_s == pytest.approx(300.0, rel=1e-9)
    assert energy.window_s == pytest.approx(energy.calls * call_us / 1e6)
    assert LEAST_COUNTED_S <= energy.counted_s <= energy.window_s
    assert energy.calls == 1 if call_us > 2e6 else energy.window_s < LEAST_COUNTED_S + 0.2 + 2 * call_us / 1e6
    # Two readings a millisecond apart date each update.
    assert energy.relative_error == pytest.approx(1e-3 / energy.counted_s, rel=1e-2)


@settings(max_examples=100, deadline=None)
@example(watts=700, period=100_000, phase=99_999, call_us=10_000, polls=[5_000])
@given(
    watts=st.integers(50, 1200),
    period=st.integers(20_000, 100_000),
    phase=st.integers(0, 100_000),
    call_us=st.integers(2_000, 3_000_000),
    polls=st.lists(st.integers(500, 15_000), min_size=1, max_size=5),
)
def test_the_error_is_within_its_bound(
    watts: int, period: int, phase: int, call_us: int, polls: list[int]
) -> None:
    energy, used = counted(SteppingGpu(watts, period, phase), call_us, cycle(polls))
    # The counter shows whole millijoules.
    rounding = 2e-3 / (watts * energy.counted_s)
    assert abs(energy.joules - used) <= used * (energy.relative_error + rounding + 1e-9)
    assert energy.relative_error <= max(polls) / 1e6 / LEAST_COUNTED_S + 1e-9
    assert energy.counted_s >= LEAST_COUNTED_S


def test_what_the_gpu_takes_before_the_calls_is_not_counted() -> None:
    """The counter moved before the first call, and is read only in it: that update holds 88 ms of idling."""
    gpu = SteppingGpu(700, period=100_000, phase=90_000)

    class Late(Watched):
        def __enter__(self) -> Self:
            super().__enter__()
            gpu.pass_time(98_000)
            return self

    energy, used = counted(gpu, 10_000, cycle([1_000]), kind=Late)
    assert energy.joules == pytest.approx(used, rel=1e-3)
    assert energy.relative_error < 1e-3


def test_only_updates_within_the_calls_count() -> None:
    times = [(0.9, 1.1), (1.0, 1.1), (2.0, 3.0), (2.9, 3.1), (4.0, 4.1)]
    updates = [Update(after, by, 7) for after, by in times]
    assert _within(updates, 1.0, 3.0) == updates[1:3]


def test_a_counter_that_does_not_move_is_given_up() -> None:
    gpu = SteppingGpu(300)
    with pytest.raises(NoEnergy, match=rf"did not move in {LONGEST_S:.1f} s$"):
        counted(gpu, 10_000, cycle([5_000]), read=lambda: 12345)
    # It was not waited for longer than that.
    assert gpu.seconds() == pytest.approx(LONGEST_S, abs=0.02)


def test_a_counter_that_moves_seldom_is_waited_for_or_told() -> None:
    energy, used = counted(SteppingGpu(300, 2_900_000), 10_000, cycle([5_000]))
    assert energy.joules == pytest.approx(used, rel=0.01)
    with pytest.raises(NoEnergy, match=r"moved 1 time in 6.0 s, over 0.0 s; 2 s are needed$"):
        counted(SteppingGpu(300, 5_000_000), 10_000, cycle([5_000]))


def test_a_counter_that_runs_backwards_is_told() -> None:
    updates = [Update(0.0, 0.01, 5_000), Update(1.0, 1.01, 100), Update(3.0, 3.01, 9_000)]
    with pytest.raises(NoEnergy, match="backwards"):
        energy_between(updates, 0.0, 4.0, 1)


def test_a_failing_counter_and_a_failing_call_are_told() -> None:
    def broken() -> int:
        raise RuntimeError("GPU is lost")

    watch = CounterWatch(broken)
    with pytest.raises(NoEnergy, match=r"failed \(GPU is lost\)$"):
        count_energy(lambda: threading.Event().wait(0.01), watch)
    watch = CounterWatch(lambda: 1)
    with pytest.raises(ZeroDivisionError):
        count_energy(lambda: 1 // 0, watch)
    assert not [thread for thread in threading.enumerate() if thread.name == "energy counter"]


def test_the_thread_dates_updates_by_its_readings_and_stops() -> None:
    values = [*islice(cycle([7]), 3), 9, 9, 12]
    enough = threading.Event()
    seen: list[int] = []

    def read() -> int:
        if len(values) == 1:
            enough.set()
            return values[0]
        return values.pop(0)

    watch = CounterWatch(read, on_update=lambda: seen.append(1))
    with watch:
        assert enough.wait(30)
        while len(watch.updates) < 2:
            enough.wait(0.001)
    assert [update.millijoules for update in watch.updates] == [9, 12]
    assert len(seen) == 2
    first, second = watch.updates
    assert first.after < first.by <= second.by
    assert first.after < first.at < first.by
    assert not [thread for thread in threading.enumerate() if thread.name == "energy counter"]

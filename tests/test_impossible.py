"""Times that are not of the work and results that are not of the call, judged on figures and on a fake device."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ldmperf.profiling.measure.integrity import Returned, impossible, is_poisoned, poison
from ldmperf.profiling.measure.outcomes import Untrusted
from ldmperf.profiling.measure.timing import Timed, timed

WHAT = "a call"


def times(
    *wall: float, gpu: tuple[float, ...] | None = None, second: tuple[float, ...] | None = None
) -> list[Timed[None]]:
    return [
        Timed(None, ms, None if gpu is None else gpu[n], None if second is None else second[n])
        for n, ms in enumerate(wall)
    ]


def test_times_that_are_not_of_the_work_are_named() -> None:
    assert impossible([], 1.0, WHAT) is None
    assert "no time passed: a call" in str(impossible(times(3.0, 0.0), None, WHAT))
    below = str(impossible(times(30.0, 4.9, 30.0), 5.0, WHAT))
    assert "4.9 ms" in below
    assert "at least 5 ms" in below
    assert impossible(times(30.0, 5.0), 5.0, WHAT) is None
    # The device's clock counts for the floor too.
    assert "below the floor" in str(impossible(times(30.0, 31.0, gpu=(29.9, 4.0)), 5.0, WHAT))
    assert "side stream" in str(impossible(times(30.0, 31.0, gpu=(20.0, 25.0)), None, WHAT))
    assert "5.0" not in str(impossible(times(30.0, 31.0, gpu=(20.0, 29.5)), None, WHAT))
    assert "1.5 ms" in str(impossible(times(30.0, 31.0, gpu=(20.0, 29.5)), None, WHAT))
    assert "device's clock that is wrong" in str(impossible(times(1.0, 1.0, gpu=(2.0, 3.0)), None, WHAT))
    assert "second one says 999 ms" in str(impossible(times(1.0, 2.0, second=(1000.0, 3000.0)), None, WHAT))


@given(
    st.lists(st.tuples(st.floats(1e-3, 1e6), st.floats(0, 0.015), st.floats(0, 1e4)), min_size=1, max_size=9),
    st.integers(0, 8),
)
def test_interruptions_and_a_wake_up_are_no_cheat(drawn: list[tuple[float, float, float]], quiet: int) -> None:
    """The host may be interrupted between two clocks for any time, in all calls but one."""
    quiet %= len(drawn)
    seen = []
    for number, (gpu, share, interrupted) in enumerate(drawn):
        pause = 0.0 if number == quiet else interrupted
        wall = gpu * (1 + share) + 0.15 + pause
        seen.append(Timed(None, wall, gpu, wall + 1.0 + pause))
    assert impossible(seen, min(gpu for gpu, *_ in drawn), WHAT) is None


@given(
    st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]), st.integers(1, 9), st.data()
)
def test_poison_is_nan_and_is_known_again(dtype: torch.dtype, size: int, data: st.DataObject) -> None:
    tensor = torch.randn(size, 2).to(dtype)
    assert not is_poisoned(tensor)
    poison(tensor)
    assert tensor.isnan().all()
    assert is_poisoned(tensor)
    assert is_poisoned(tensor.clone())
    # No NaN of arithmetic is taken for it, nor a result of which a part was written.
    assert not is_poisoned(torch.zeros(size, dtype=dtype) / 0)
    assert not is_poisoned(torch.full((size,), math.nan, dtype=dtype))
    assert not is_poisoned((torch.full((size,), math.inf) - torch.inf).to(dtype))
    tensor.view(-1)[data.draw(st.integers(0, 2 * size - 1))] = 0.0
    assert not is_poisoned(tensor)


def test_what_cannot_be_poisoned_is_left_alone() -> None:
    for tensor in (torch.arange(3), torch.empty(0), torch.zeros(2, dtype=torch.complex64)):
        before = tensor.clone()
        poison(tensor)
        assert torch.equal(tensor, before)
        assert not is_poisoned(tensor)
    wide = torch.zeros(1).expand(4)
    poison(wide)
    assert is_poisoned(wide)
    leaf = torch.zeros(3, requires_grad=True)
    poison(leaf)
    assert is_poisoned(leaf)


def test_results_are_taken_as_they_were() -> None:
    returned, result = Returned(), torch.ones(2, 3, dtype=torch.float64)
    taken = returned.take(result, "its first call")
    returned.let_go()
    assert taken.eq(1).all()
    assert is_poisoned(result)
    # The same numbers in another shape are another result.
    returned.take(torch.ones(3, 2), "round 1")
    returned.take(torch.ones(2, 3), "its last sample", may_repeat="its first call")
    with pytest.raises(Untrusted, match="in round 2 it returned the result of round 1") as raised:
        returned.take(torch.ones(3, 2), "round 2")
    assert raised.value.status == "incorrect"


# The device, with a clock of its own.
class Device:
    """A CUDA device in fake seconds: two streams; the host waits for one of them or for both."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.busy_until = {"main": 0.0, "side": 0.0}
        device = self

        class Event:
            def __init__(self, enable_timing: bool) -> None: ...

            def record(self, stream: str) -> None:
                self.at = max(device.now, device.busy_until[stream])

            def elapsed_time(self, end: Event) -> float:
                return 1e3 * (end.at - self.at)

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _: "main")
        monkeypatch.setattr(torch.cuda, "synchronize", self.synchronize)

    def launch(self, seconds: float, stream: str = "main") -> None:
        self.now += 1e-5
        self.busy_until[stream] = max(self.now, self.busy_until[stream]) + seconds

    def synchronize(self, _: object) -> None:
        self.now = max(self.now, *self.busy_until.values()) + 2e-5

    def timed(self, call: Callable[[], object]) -> Timed[object]:
        result = timed(call, torch.device("cuda"), lambda: self.now)
        return Timed(None, result.wall_ms, result.gpu_ms)


def test_work_on_a_side_stream_is_seen_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(monkeypatch)
    honest = device.timed(lambda: device.launch(0.010))
    assert honest.gpu_ms == pytest.approx(10.01)
    assert impossible([honest], 10.0, WHAT) is None
    # The host waits for the device: its clock has all of it.
    hidden = device.timed(lambda: device.launch(0.010, "side"))
    assert hidden.wall_ms > 10.0
    assert "work on a side stream: a call kept the device" in str(impossible([hidden], None, WHAT))

    # A stream that the timed one waits for is honest.
    def joined() -> None:
        device.launch(0.010, "side")
        device.busy_until["main"] = device.busy_until["side"]

    assert impossible([device.timed(joined)], 10.0, WHAT) is None


def test_what_a_call_puts_in_place_of_the_clock_does_not_end_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even what puts itself back at its first use, so that nobody sees it afterwards."""
    device = Device(monkeypatch)

    def cheat() -> None:
        device.launch(0.010)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
        monkeypatch.setattr(torch.cuda.Event, "record", lambda event, stream: setattr(event, "at", 0.0))
        monkeypatch.setattr(torch.cuda.Event, "elapsed_time", lambda event, end: 1e-3)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _: "side")

    found = device.timed(cheat)
    assert found.gpu_ms == pytest.approx(10.01)
    assert found.wall_ms > 10.0


def test_a_function_that_sleeps_is_timed_as_long_as_it_sleeps() -> None:
    """On a clock that passes only in sleep, exactly; bench/timer_honesty.py does it on this machine's clocks."""
    now = 5.0

    def sleep() -> None:
        nonlocal now
        now += 0.010

    assert timed(sleep, torch.device("cpu"), lambda: now).wall_ms == pytest.approx(10.0, rel=1e-9)
    # On the real one: at least as long, by the promise of time.sleep, and within what the second clock saw.
    real = timed(lambda: time.sleep(0.010), torch.device("cpu"))
    assert real.second_ms is not None
    assert real.wall_ms >= 10.0
    assert impossible([Timed(None, real.wall_ms, None, real.second_ms)], 10.0, WHAT) is None

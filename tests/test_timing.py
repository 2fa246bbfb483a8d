"""Timing: statistics against other people's, the repetition rule on a fake clock, the order of interleaving."""

from __future__ import annotations

import contextlib
import gc
import statistics

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ldmperf.profiling.timing import (
    RepetitionRule,
    Timed,
    garbage_collection_paused,
    interleave,
    quantile,
    timed,
)

CPU = torch.device("cpu")


@given(st.lists(st.floats(0, 1e9), min_size=1, max_size=30), st.floats(0, 1))
def test_quantiles_are_numpys_linear_ones(samples: list[float], q: float) -> None:
    assert quantile(samples, q) == pytest.approx(float(np.quantile(samples, q)), rel=1e-9, abs=1e-6)


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=30))
def test_the_median_is_the_standard_librarys(samples: list[float]) -> None:
    assert quantile(samples, 0.5) == pytest.approx(statistics.median(samples), rel=1e-12, abs=1e-9)
    assert quantile(samples, 0.0) == min(samples)
    assert quantile(samples, 1.0) == max(samples)


def test_quantiles_refuse_nonsense() -> None:
    with pytest.raises(ValueError, match="at least one sample"):
        quantile([], 0.5)
    with pytest.raises(ValueError, match="must lie in"):
        quantile([1.0], 1.5)


class FakeClock:
    """Seconds that pass only when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_timed_reads_the_clock_around_the_call_alone() -> None:
    clock = FakeClock()

    def call() -> str:
        clock.now += 0.25
        return "done"

    assert timed(call, CPU, clock) == Timed("done", 250.0, None)


def repeat(rule: RepetitionRule, ms: dict[str, list[float]], to_come: int = 0) -> tuple[list[str], dict[str, int]]:
    """The order in which backends ran, taking those times (the last for ever), and how many samples each has."""
    order: list[str] = []

    def run(name: str, number: int) -> Timed[None]:
        order.append(name)
        return Timed(None, ms[name][min(number, len(ms[name]) - 1)], None)

    def refuse(name: str, error: Exception) -> None:
        raise error

    runs = {name: (lambda number, name=name: run(name, number)) for name in ms}
    times = interleave(runs, rule, refuse, to_come)
    return order, {name: len(samples.wall_ms) for name, samples in times.items()}


def test_the_minimum_count_holds_when_time_is_reached_early() -> None:
    assert repeat(RepetitionRule(4, 0.001), {"a": [5000.0]})[1] == {"a": 4}


def test_the_minimum_time_holds_when_the_count_is_reached_early() -> None:
    # 10 samples of 100 ms are one second; nine are not.
    assert repeat(RepetitionRule(2, 1.0), {"a": [100.0]})[1] == {"a": 10}


def test_the_slowest_to_have_enough_time_decides_for_all() -> None:
    order, counts = repeat(RepetitionRule(1, 1.0), {"a": [500.0], "b": [250.0]})
    assert counts == {"a": 4, "b": 4}
    assert order == ["a", "b"] * 4


def test_samples_to_come_count_but_their_time_does_not() -> None:
    assert repeat(RepetitionRule(3, 0.0), {"a": [1.0]}, to_come=1)[1] == {"a": 2}
    assert repeat(RepetitionRule(1, 0.0), {"a": [1.0]}, to_come=1)[1] == {"a": 0}
    assert repeat(RepetitionRule(1, 1.0), {"a": [500.0]}, to_come=1)[1] == {"a": 2}


def test_every_sample_is_kept_in_order() -> None:
    samples = [5.0, 1000.0, 1.0]
    times = interleave(
        {"a": lambda number: Timed(None, samples[number], samples[number] / 2)},
        RepetitionRule(3, 0.0),
        lambda name, error: None,
    )
    assert times["a"].wall_ms == samples
    assert times["a"].gpu_ms == [2.5, 500.0, 0.5]


def test_a_backend_that_raises_leaves_and_the_others_go_on() -> None:
    failures: list[tuple[str, str]] = []

    def broken(number: int) -> Timed[None]:
        if number == 1:
            raise RuntimeError("second round")
        return Timed(None, 1.0, None)

    times = interleave(
        {"broken": broken, "sound": lambda number: Timed(None, 1.0, None)},
        RepetitionRule(3, 0.0),
        lambda name, error: failures.append((name, str(error))),
    )
    assert {name: len(samples.wall_ms) for name, samples in times.items()} == {"sound": 3}
    assert failures == [("broken", "second round")]


def test_an_interrupt_passes_through() -> None:
    def interrupted(number: int) -> Timed[None]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interleave({"a": interrupted}, RepetitionRule(), lambda name, error: None)


@pytest.mark.parametrize(("count", "seconds"), [(0, 0.0), (1, -1.0), (1, float("nan")), (1, float("inf"))])
def test_rules_that_never_end_or_never_begin_are_refused(count: int, seconds: float) -> None:
    with pytest.raises(ValueError, match="min_"):
        RepetitionRule(count, seconds)


def test_no_collection_inside_and_the_setting_is_put_back() -> None:
    assert gc.isenabled()
    with contextlib.suppress(RuntimeError), garbage_collection_paused():
        assert not gc.isenabled()
        raise RuntimeError
    assert gc.isenabled()
    gc.disable()
    try:
        with garbage_collection_paused():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()

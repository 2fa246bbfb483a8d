"""Timing: statistics against other people's, the repetition rule on a fake clock, the order of interleaving."""

from __future__ import annotations

import contextlib
import functools
import gc
import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ldmperf.profiling.measure.timing import (
    Deadline,
    RepetitionRule,
    Timed,
    Times,
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


class FakeLanes:
    """Backends that take the given milliseconds (the last for ever) and note who ran when; None is a failure."""

    def __init__(self, ms: Mapping[str, Sequence[float | None]], clock: FakeClock | None = None) -> None:
        self.ms = ms
        self.clock = clock or FakeClock()
        self.log: list[tuple[str, int, bool]] = []
        self.taken = dict.fromkeys(ms, 0)
        self.failed: list[str] = []
        self.done: list[tuple[str, int]] = []

    def run(self, name: str, number: int, is_last: bool) -> Timed[object]:
        self.log.append((name, number, is_last))
        sample = self.ms[name][min(self.taken[name], len(self.ms[name]) - 1)]
        self.taken[name] += 1
        if sample is None:
            raise RuntimeError(name)
        self.clock.now += sample / 1e3
        return Timed(None, sample, None)

    def interleave(
        self, rule: RepetitionRule, closing: bool = False, deadline: Deadline | None = None
    ) -> dict[str, Times]:
        return interleave(
            {name: functools.partial(self.run, name) for name in self.ms},
            rule,
            lambda name, error: self.failed.append(name),
            closing=closing,
            on_done=lambda names: self.done.extend((name, len(self.log)) for name in names),
            deadline=deadline,
        )

    @property
    def rounds(self) -> list[list[str]]:
        """Who ran in each round, in order."""
        numbers = [number for _, number, _ in self.log]
        assert numbers == sorted(numbers)
        return [[name for name, number, _ in self.log if number == n] for n in range(max(numbers, default=-1) + 1)]


def counts(rule: RepetitionRule, ms: dict[str, list[float | None]], closing: bool = False) -> dict[str, int]:
    return {name: len(t.wall_ms) for name, t in FakeLanes(ms).interleave(rule, closing).items()}


def test_the_minimum_count_holds_when_time_is_reached_early() -> None:
    assert counts(RepetitionRule(4, 0.001), {"a": [5000.0]}) == {"a": 4}


def test_the_minimum_time_holds_when_the_count_is_reached_early() -> None:
    # 10 samples of 100 ms are one second; nine are not.
    assert counts(RepetitionRule(2, 1.0), {"a": [100.0]}) == {"a": 10}


def test_who_has_its_samples_leaves_and_the_others_go_on() -> None:
    """At 39M `graph` needs tens of trajectories for its two seconds; the eager ones do not wait for it."""
    lanes = FakeLanes({"slow": [500.0], "fast": [100.0]})
    times = lanes.interleave(RepetitionRule(2, 1.0))
    assert {name: len(t.wall_ms) for name, t in times.items()} == {"slow": 2, "fast": 10}
    assert lanes.rounds == [["slow", "fast"], ["fast", "slow"], *[["fast"]] * 8]
    assert times["slow"].order == [("slow", "fast"), ("fast", "slow")]
    assert times["fast"].order == [("slow", "fast"), ("fast", "slow"), *[("fast",)] * 8]


def test_a_closing_sample_is_known_as_the_last_before_it_is_taken() -> None:
    """By it the count is reached; the time is by those before it."""
    assert counts(RepetitionRule(3, 0.0), {"a": [1.0]}, closing=True) == {"a": 3}
    assert counts(RepetitionRule(1, 0.0), {"a": [1.0]}, closing=True) == {"a": 1}
    assert counts(RepetitionRule(1, 1.0), {"a": [500.0]}, closing=True) == {"a": 3}
    lanes = FakeLanes({"a": [1.0], "b": [1.0]})
    lanes.interleave(RepetitionRule(2, 0.0), closing=True)
    assert lanes.log == [("a", 0, False), ("b", 0, False), ("b", 1, True), ("a", 1, True)]


SAMPLES = st.lists(st.sampled_from([0.5, 7.0, 40.0, 300.0, None]), min_size=1, max_size=6).filter(
    # One that takes half a millisecond for ever would need thousands of rounds.
    lambda samples: samples[-1] not in (0.5, 7.0)
)


@settings(deadline=None)
@given(
    st.lists(SAMPLES, min_size=1, max_size=6),
    st.integers(1, 5),
    st.sampled_from([0.0, 0.1, 0.5]),
    st.booleans(),
)
def test_each_has_its_samples_and_no_more_and_who_is_first_rotates(
    samples: list[list[float | None]], count: int, seconds: float, closing: bool
) -> None:
    names = "abcdef"[: len(samples)]
    lanes = FakeLanes(dict(zip(names, samples, strict=True)))
    times = lanes.interleave(RepetitionRule(count, seconds), closing)
    assert set(times) | set(lanes.failed) == set(names)
    assert not set(times) & set(lanes.failed)
    # Each ran in the rounds 0, 1, ... without a gap, once in each, and in none after it had its samples.
    for name in names:
        mine = [(number, is_last) for who, number, is_last in lanes.log if who == name]
        assert [number for number, _ in mine] == list(range(len(mine)))
        if name in times:
            wall = times[name].wall_ms
            assert len(wall) == len(mine)
            before = wall[:-1]
            enough = [
                n for n in range(1, len(wall) + 1) if n >= count and sum(wall[: n - closing]) >= 1e3 * seconds
            ]
            assert enough == [len(wall)], (before, wall)
            assert [is_last for _, is_last in mine] == [False] * len(before) + [closing]
    # Who leads: of those that are still there, nobody has led two rounds more often than another.
    rounds = lanes.rounds
    for n in range(len(rounds)):
        led = [sum(order[0] == name for order in rounds[: n + 1]) for name in rounds[n]]
        assert max(led) - min(led) <= 1
    # What is recorded is what was, and those that are done hear of it between rounds.
    for name, found in times.items():
        assert found.order == [tuple(order) for order in rounds if name in order]
    ends = [sum(len(order) for order in rounds[: n + 1]) for n in range(len(rounds))]
    assert [name for name, _ in lanes.done] == sorted(times, key=lambda name: (len(times[name].wall_ms), name))
    for name, at in lanes.done:
        assert at == ends[len(times[name].wall_ms) - 1]


@pytest.mark.parametrize("number", range(1, 8))
def test_each_follows_every_other_equally_often(number: int) -> None:
    """Who runs behind an idle eager backend and who behind a busy one evens out: a row-complete Latin square."""
    names = "abcdefg"[:number]
    # With an odd number it takes the square and its mirror image.
    size = number if number % 2 == 0 else 2 * number
    lanes = FakeLanes({name: [1.0] for name in names})
    lanes.interleave(RepetitionRule(size, 0.0))
    rounds = lanes.rounds
    assert len(rounds) == size
    for place in range(number):
        assert Counter(order[place] for order in rounds) == dict.fromkeys(names, size // number)
    followed = Counter(pair for order in rounds for pair in pairwise(order))
    every = {(a, b) for a in names for b in names if a != b}
    assert followed == dict.fromkeys(every, size // number)


def test_no_sample_is_begun_after_the_deadline() -> None:
    clock = FakeClock()
    lanes = FakeLanes({"a": [400.0], "b": [400.0], "c": [400.0]}, clock)
    times = lanes.interleave(RepetitionRule(9, 0.0), deadline=Deadline(1.5, clock))
    # Begun at 0, 400, 800 and 1200 ms; none at 1600.
    assert [name for name, _, _ in lanes.log] == ["a", "c", "b", "b"]
    assert {name: len(t.wall_ms) for name, t in times.items()} == {"a": 1, "b": 2, "c": 1}
    assert times["b"].order == [("a", "c", "b"), ("b",)]
    assert lanes.done == []
    nothing = FakeLanes({"a": [1.0]}, clock).interleave(RepetitionRule(), deadline=Deadline(0.0, clock))
    assert nothing["a"].wall_ms == []


def test_a_share_of_a_deadline_counts_from_its_start() -> None:
    clock = FakeClock()
    whole = Deadline(10.0, clock)
    clock.now += 3.0
    share = whole.after(0.75)
    assert (share.left, whole.left) == (4.5, 7.0)
    clock.now += 5.0
    assert (share.passed, whole.passed) == (True, False)
    assert math.isinf(Deadline(None, clock).after(0.5).left)


def test_every_sample_is_kept_in_order() -> None:
    samples = [5.0, 1000.0, 1.0]
    times = interleave(
        {"a": lambda number, is_last: Timed(None, samples[number], samples[number] / 2)},
        RepetitionRule(3, 0.0),
        lambda name, error: None,
    )
    assert times["a"].wall_ms == samples
    assert times["a"].gpu_ms == [2.5, 500.0, 0.5]


def test_a_backend_that_raises_leaves_and_the_others_go_on() -> None:
    failures: list[tuple[str, str]] = []

    def broken(number: int, is_last: bool) -> Timed[object]:
        if number == 1:
            raise RuntimeError("second round")
        return Timed(None, 1.0, None)

    times = interleave(
        {"broken": broken, "sound": lambda number, is_last: Timed(None, 1.0, None)},
        RepetitionRule(3, 0.0),
        lambda name, error: failures.append((name, str(error))),
    )
    assert {name: len(samples.wall_ms) for name, samples in times.items()} == {"sound": 3}
    assert failures == [("broken", "second round")]


def test_an_interrupt_passes_through() -> None:
    def interrupted(number: int, is_last: bool) -> Timed[object]:
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

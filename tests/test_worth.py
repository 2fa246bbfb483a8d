"""What a capture costs, whether it pays, and shapes that run eagerly because it does not."""

from __future__ import annotations

import logging
from itertools import count
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ldmperf.samplers import (
    Capture,
    CaptureError,
    GraphedDenoiser,
    GraphedSampler,
    NoiseSchedule,
    initial_noise,
    make_plan,
)
from ldmperf.samplers.worth import Worth

from .tapes import Tapes

OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")


def denoise(x: Tensor, conditioning: Tensor, step: Tensor) -> Tensor:
    return torch.tanh(x * conditioning + step)


def exact(x: Tensor, step: int = 0) -> Tensor:
    return torch.tanh(x * CONDITIONING + step)


CONDITIONING = torch.tensor(0.5)
SMALL, LARGE = torch.linspace(-1, 1, 6).reshape(1, 6), torch.linspace(-1, 1, 12).reshape(2, 6)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Tapes:
    """Tapes, and a clock by which a warm-up takes 30 ms and a capture 30 ms."""
    ticks = count()
    monkeypatch.setattr("time.perf_counter", lambda: 0.03 * next(ticks))
    return Tapes()


def asking(graphs: Tapes, **options: Any) -> GraphedDenoiser[Tensor]:
    return GraphedDenoiser(denoise, graphs=graphs, eager_unless_worth=True, **options)


def test_what_a_capture_tells(graphs: Tapes) -> None:
    denoiser: GraphedDenoiser[Tensor] = GraphedDenoiser(denoise, graphs=graphs)
    denoiser(SMALL, CONDITIONING, 0)
    (capture,) = denoiser.captures
    assert (capture.warm_up_ms, capture.capture_ms) == pytest.approx((30.0, 30.0))
    assert (capture.eager_ms, capture.replay_ms, capture.uses) == (10.0, None, 1)
    assert (capture.breakeven, capture.runs_to_pay(20)) == (None, None)
    # The multiplication, the sum and the tangent of six numbers; input, output, step and conditioning.
    assert capture.memory_bytes == 3 * 6 * 4
    assert capture.buffer_bytes == 2 * 6 * 4 + 8 + 4
    assert str(capture) == (
        "the network for [1, 6] float32: 1 replays; captured in 60 ms, an eager call 10 ms, a replay not measured "
        "yet; 0.0 MiB in the pool, 0.0 MiB of buffers"
    )
    # Of many replays the fastest counts; the first, which uploads the graph, is not timed.
    for graphs.replay_ms in (7.0, 4.0, 5.0, 6.0, 1.0):
        denoiser(SMALL, CONDITIONING, 0)
    (capture,) = denoiser.captures
    assert (capture.replay_ms, capture.uses, capture.breakeven) == (4.0, 6, 10)
    assert [capture.runs_to_pay(steps) for steps in (1, 4, 10, 50)] == [10, 3, 1, 1]
    assert "a replay 4 ms, pays after 10 replays" in str(capture)
    paid = [Capture("", 30.0, 30.0, eager_ms=10.0, replay_ms=4.0, uses=uses).has_paid for uses in (9, 10, 11)]
    assert paid == [False, True, True]
    slower = Capture("", 1.0, 1.0, eager_ms=4.0, replay_ms=4.0, uses=10)
    assert (slower.breakeven, slower.runs_to_pay(20), slower.has_paid) == (None, None, False)
    assert "never pays" in str(slower)


def test_an_eager_call_has_the_layout_of_a_capture(graphs: Tapes) -> None:
    layouts = []

    def noted(x: Tensor, conditioning: Tensor, step: Tensor) -> Tensor:
        layouts.append(x.is_contiguous(memory_format=torch.channels_last))
        return denoise(x, conditioning, step)

    denoiser: GraphedDenoiser[Tensor] = GraphedDenoiser(noted, graphs=graphs, eager_unless_worth=True)
    graphs.failures = [OUT_OF_MEMORY]
    for x in (torch.rand(1, 3, 4, 5), torch.rand(2, 3, 4, 5)):
        denoiser(x, CONDITIONING, 0)
    assert layouts == [True] * (3 + 1 + 4)


def test_times_are_not_waited_for(graphs: Tapes) -> None:
    denoiser = asking(graphs)
    graphs.busy, graphs.replay_ms = True, 12.0
    for _ in range(8):
        denoiser(SMALL, CONDITIONING, 0)
    # The eager call was timed in the warm-up; the stand-in tells nothing before the device is done.
    assert [capture.replay_ms for capture in denoiser.captures] == [None]
    graphs.busy = False
    assert [capture.replay_ms for capture in denoiser.captures] == [12.0]


@pytest.mark.parametrize("replay_ms", [10.0, 12.0])
def test_a_shape_whose_replay_is_not_faster_runs_eagerly(
    replay_ms: float, graphs: Tapes, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    denoiser, settled = asking(graphs), list[int]()
    monkeypatch.setattr(graphs, "settle", lambda: settled.append(len(denoiser.captures)))
    graphs.replay_ms = replay_ms
    denoiser(LARGE, CONDITIONING, 0)
    with caplog.at_level(logging.INFO, "ldmperf.samplers"):
        for step in range(9):
            assert torch.equal(denoiser(SMALL, CONDITIONING, step), exact(SMALL, step))
    assert graphs.log.count("replay") == 1 + 5
    # The device was done with the last replay before the capture was dropped.
    assert settled == [2]
    assert [capture.description for capture in denoiser.captures] == ["the network for [2, 6] float32"]
    assert len(graphs.tapes) == 1
    told = (
        f"the network for [1, 6] float32 runs eagerly until clear(): a replay took {replay_ms:.3g} ms, an eager "
        "call 10 ms"
    )
    assert [line for line in denoiser.decisions if "eager" in line] == [told]
    assert [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING] == [told]
    denoiser.clear()
    graphs.replay_ms = 4.0
    for step in range(9):
        assert torch.equal(denoiser(SMALL, CONDITIONING, step), exact(SMALL, step))
    assert graphs.log.count("replay") == 1 + 5 + 9


def test_without_asking_every_shape_is_captured(graphs: Tapes) -> None:
    denoiser: GraphedDenoiser[Tensor] = GraphedDenoiser(denoise, graphs=graphs, max_captures=1)
    graphs.replay_ms = 12.0
    for x in (SMALL, LARGE) * 5:
        denoiser(x, CONDITIONING, 0)
    assert graphs.captured == graphs.log.count("replay") == 10
    graphs.failures = [OUT_OF_MEMORY] * 2
    with pytest.raises(CaptureError, match=r"\[1, 6\] float32 could not be captured: CUDA out of memory"):
        denoiser(SMALL, CONDITIONING, 0)


def test_shapes_that_alternate_beyond_the_bound_do_not_thrash(graphs: Tapes) -> None:
    """A price of 60 ms and 10 ms a call: six eager calls of a shape before its next capture."""
    denoiser = asking(graphs, max_captures=1)
    captured = []
    for number in range(40):
        x = (SMALL, LARGE)[number % 2]
        assert torch.equal(denoiser(x, CONDITIONING, number), exact(x, number))
        captured.append(graphs.captured)
    # The replay of the first SMALL was not measured: 6 eager calls, 2 to 12. Of the first LARGE it was, 4 ms: 10
    # eager calls, 15 to 33. By then SMALL has been replayed 11 times, which pays for a capture at once.
    assert [i for i in range(40) if captured[i] > ([0, *captured])[i]] == [0, 1, 14, 35, 36]
    waits = [line for line in denoiser.decisions if "eagerly before" in line]
    assert waits[0] == (
        "the network for [1, 6] float32: the capture was dropped after 1 replays, because at most 1 are kept; it "
        "had not paid, so 6 calls run eagerly before the next capture"
    )


def test_memory_that_runs_out(graphs: Tapes, caplog: pytest.LogCaptureFixture) -> None:
    denoiser = asking(graphs)
    denoiser(SMALL, CONDITIONING, 0)
    # Beside the other, then also alone.
    graphs.failures = [OUT_OF_MEMORY, OUT_OF_MEMORY]
    for step in range(3):
        assert torch.equal(denoiser(LARGE, CONDITIONING, step), exact(LARGE, step))
    assert graphs.log.count("failure") == 2
    assert denoiser.captures == ()
    told = "the network for [2, 6] float32 runs eagerly until clear(): CUDA out of memory. Tried to allocate 1 GiB"
    assert [record.getMessage() for record in caplog.records] == [told]
    assert denoiser.decisions[-1] == told
    assert "because memory ran out; it had not paid" in denoiser.decisions[-2]
    denoiser.clear()
    assert torch.equal(denoiser(LARGE, CONDITIONING, 0), exact(LARGE))
    assert len(denoiser.captures) == 1


def test_memory_that_runs_out_in_the_warm_up(graphs: Tapes) -> None:
    fails = True

    def full(x: Tensor, conditioning: Tensor, step: Tensor) -> Tensor:
        if fails:
            raise torch.OutOfMemoryError("CUDA out of memory\nin two lines")
        return denoise(x, conditioning, step)

    denoiser: GraphedDenoiser[Tensor] = GraphedDenoiser(full, graphs=graphs, eager_unless_worth=True)
    with pytest.raises(torch.OutOfMemoryError, match="in two lines"):
        denoiser(SMALL, CONDITIONING, 0)
    fails = False
    assert torch.equal(denoiser(SMALL, CONDITIONING, 0), exact(SMALL))
    assert graphs.captured == 0
    assert denoiser.decisions == (
        "the network for [1, 6] float32 runs eagerly until clear(): CUDA out of memory in two lines",
    )


def test_what_cannot_be_captured_is_an_error_for_those_who_ask_too(graphs: Tapes) -> None:
    denoiser = asking(graphs)
    graphs.failures = [RuntimeError("operation not permitted")]
    with pytest.raises(CaptureError, match="could not be captured: operation not permitted"):
        denoiser(SMALL, CONDITIONING, 0)
    assert torch.equal(denoiser(SMALL, CONDITIONING, 0), exact(SMALL))


def test_several_samplers_share_one_pool(graphs: Tapes) -> None:
    first, second = (asking(graphs) for _ in range(2))
    for denoiser, x in ((first, LARGE), (second, SMALL), (second, LARGE)):
        denoiser(x, CONDITIONING, 0)
    here = torch.device("cpu")
    assert graphs.memory(here) == 3 * 12 * 4
    assert [capture.memory_bytes for capture in (*first.captures, *second.captures)] == [3 * 12 * 4, 0, 0]
    sampler: GraphedSampler[Any] = GraphedSampler(denoise, backend="torch", graphs=graphs)
    plan = make_plan("ddim", NoiseSchedule.from_diffusers({"beta_schedule": "linear"}), 2)
    noise = initial_noise([1], (6,))
    result = sampler(CONDITIONING, plan, noise)
    assert torch.equal(second(SMALL, CONDITIONING, 3), exact(SMALL, 3))
    assert torch.equal(sampler(CONDITIONING, plan, noise), result)
    second.clear()
    assert torch.equal(first(LARGE, CONDITIONING, 1), exact(LARGE, 1))
    first.clear()
    sampler.clear()
    assert graphs.memory(here) == 0


def test_what_a_call_leaves_for_the_next_is_not_in_the_pool(graphs: Tapes) -> None:
    left = [torch.zeros(())]

    def leaves(x: Tensor, conditioning: Tensor, step: Tensor) -> Tensor:
        out = torch.tanh(x + left[0])
        left[0] = left[0] * 0.5 + 1.0
        return out

    denoiser: GraphedDenoiser[Tensor] = GraphedDenoiser(leaves, graphs=graphs)
    denoiser(SMALL, CONDITIONING, 0)
    asking(graphs)(SMALL, CONDITIONING, 0)
    assert [line for line in graphs.log if "capture" in line] == ["capture apart", "capture"]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    price=st.floats(0.5, 500),
    eager=st.floats(1, 20),
    share=st.floats(0.05, 0.95),
    runs=st.lists(st.integers(1, 120), min_size=1, max_size=20),
)
def test_the_rule_costs_at_most_twice_the_better_plan(
    price: float, eager: float, share: float, runs: list[int]
) -> None:
    """A run: calls of one shape up to the moment when a capture, if there is one, is dropped for others."""
    saved = eager - share * eager
    worth = Worth(is_asked=True)
    calls_so_far, drops, uses, cost = 0, 0, 0, 0.0
    for calls in runs:
        for _ in range(calls):
            calls_so_far += 1
            if uses or worth.takes("shape"):
                cost += 0.0 if uses else price
                uses += 1
            else:
                cost += saved
            best = min(calls_so_far * saved, (1 + drops) * price)
            # Of the first capture nothing is known before it. Calls are whole.
            assert cost <= (price + 2 * best + (1 + drops) * saved) * (1 + 1e-9)
        if uses:
            dropped = Capture("it", price, 0.0, eager_ms=eager, replay_ms=share * eager, uses=uses)
            worth.dropped("shape", dropped, "")
            drops, uses = drops + 1, 0


def test_shapes_and_lines_are_bounded() -> None:
    worth = Worth(is_asked=True)
    for number in range(1000):
        worth.dropped(number, Capture("it", 1.0, 1.0, eager_ms=2.0, replay_ms=1.0), "")
    assert len(worth.lines) == len(worth._shapes) == 256
    assert worth.takes(0)
    assert not worth.takes(999)
    # The shape that was asked for last is remembered longest.
    worth = Worth(is_asked=True)
    for number in range(256):
        worth.dropped(number, Capture("it", 9.0, 9.0, eager_ms=2.0, replay_ms=1.0), "")
    assert not worth.takes(0)
    worth.dropped(256, Capture("it", 9.0, 9.0, eager_ms=2.0, replay_ms=1.0), "")
    assert not worth.takes(0)
    assert worth.takes(1)

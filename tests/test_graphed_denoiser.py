"""`GraphedDenoiser` on tapes: the bits of the eager call, whatever is asked, changed or missing between."""

from __future__ import annotations

import gc
import logging
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor, nn

from ldmperf.model import UNet, UNetConfig
from ldmperf.samplers import CaptureError, GraphedDenoiser

from .adapters import CONTEXT_DIM, lora, tiny_unet
from .tapes import Tapes

pytestmark = pytest.mark.usefixtures("_one_thread")

TINY = UNetConfig((8, 16), (2, 4), (True, False), layers_per_block=1, context_dim=12, norm_groups=4)
OUT_OF_MEMORY = "CUDA out of memory. Tried to allocate 1 GiB"


def graphed(denoise: Any, **options: Any) -> tuple[GraphedDenoiser[Any], Tapes]:
    graphs = Tapes()
    return GraphedDenoiser(denoise, graphs=graphs, **options), graphs


@dataclass(frozen=True)
class Prompt:
    """As `ldmperf.model.Conditioning`: a table over the steps and a value for the images."""

    times: Tensor
    text: tuple[Tensor, ...]

    @property
    def num_steps(self) -> int:
        return len(self.times)

    def padded(self, steps: int) -> Prompt:
        return replace(self, times=F.pad(self.times, (0, steps - len(self.times)), value=torch.nan))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.mix = nn.Linear(3, 3, bias=False)
        self.scale = 0.5
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.5, generator=generator)

    def denoise(self, x: Tensor, found: Prompt, step: Tensor) -> Tensor:
        time = found.times.index_select(0, step)
        hidden = self.mix(self.conv(x).movedim(1, -1)).movedim(-1, 1)
        return torch.tanh(hidden * self.scale + 1e-3 * time + found.text[0].mean())


class Calls(RuleBasedStateMachine):
    """Any row of calls and changes; every result is compared with the eager call's, bit by bit."""

    @initialize(bound=st.integers(1, 3), asks=st.booleans())
    def start(self, bound: int, asks: bool) -> None:
        self.net = Net()
        self.bound, self.asks = bound, asks
        self.denoiser, self.graphs = graphed(
            self.net.denoise, max_captures=bound, eager_unless_worth=asks
        )
        self.prompts = [self.prompt(4, 0.25), self.prompt(4, -0.5), self.prompt(200, 0.125)]
        self.kept: list[tuple[Tensor, Tensor]] = []
        self.said: list[str] = []

    def prompt(self, steps: int, value: float) -> Prompt:
        return Prompt(torch.arange(steps) + 1.0, (torch.full((2, 2), value),))

    @rule(
        batch=st.integers(1, 2),
        width=st.integers(3, 4),
        which=st.integers(0, 2),
        step=st.integers(0, 3),
        number=st.sampled_from(["int", "0-d", "[1]"]),
        mode=st.sampled_from(["no_grad", "inference", "grad", "autocast"]),
        channels_last=st.booleans(),
    )
    def call(
        self, batch: int, width: int, which: int, step: int, number: str, mode: str, channels_last: bool
    ) -> None:
        x = torch.randn(batch, 3, 4, width, generator=torch.Generator().manual_seed(width + 7 * len(self.kept)))
        if channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        before = x.clone()
        given = {"int": step, "0-d": torch.tensor(step), "[1]": torch.tensor([step])}[number]
        modes: dict[str, Any] = {
            "no_grad": torch.no_grad(), "inference": torch.inference_mode(), "grad": nullcontext(),
            "autocast": torch.autocast("cpu", torch.bfloat16),
        }  # fmt: skip
        replays = self.graphs.log.count("replay")
        with modes[mode]:
            try:
                result = self.denoiser(x, self.prompts[which], given)
            except CaptureError as error:
                assert OUT_OF_MEMORY in str(error)
                assert not self.asks
                assert not self.denoiser.captures
                return
            like = x.contiguous(memory_format=torch.channels_last)
            with torch.no_grad():
                expected = self.net.denoise(like, self.prompts[which], torch.tensor([step]))
        assert torch.equal(result, expected)
        assert result.dtype == expected.dtype
        assert torch.equal(x, before)
        assert not result.requires_grad
        assert not result.is_inference()
        assert self.asks or self.graphs.log.count("replay") == replays + 1
        self.kept.append((result, expected))

    @rule(which=st.integers(0, 1), value=st.floats(-1, 1, width=32))
    def write_a_prompt(self, which: int, value: float) -> None:
        text = self.prompts[which].text[0]
        with torch.inference_mode(text.is_inference()):
            text.fill_(value)

    @rule(which=st.integers(0, 1), value=st.floats(-1, 1, width=32))
    def make_a_prompt(self, which: int, value: float) -> None:
        self.prompts[which] = self.prompt(4, value)
        gc.collect()

    @rule()
    def make_a_prompt_in_inference_mode(self) -> None:
        with torch.inference_mode():
            self.prompts[0] = self.prompt(4, 0.75)

    @rule(factor=st.sampled_from([0.5, 1.5]))
    def write_weights(self, factor: float) -> None:
        with torch.no_grad():
            self.net.conv.weight.mul_(factor)

    @rule(factor=st.sampled_from([0.5, 1.5]))
    def replace_weights(self, factor: float) -> None:
        state = {name: factor * value for name, value in self.net.state_dict().items()}
        self.net.load_state_dict(state, assign=True)
        gc.collect()

    @rule(scale=st.sampled_from([0.25, 0.5]))
    def set_a_scale(self, scale: float) -> None:
        self.net.scale = scale

    @rule(failures=st.lists(st.booleans(), max_size=3))
    def run_out_of_memory(self, failures: list[bool]) -> None:
        self.graphs.failures = [torch.OutOfMemoryError(OUT_OF_MEMORY) if fails else None for fails in failures]

    @rule(replay_ms=st.sampled_from([4.0, 9.99, 10.0, 12.0]), busy=st.booleans())
    def change_the_speed(self, replay_ms: float, busy: bool) -> None:
        self.graphs.replay_ms, self.graphs.busy = replay_ms, busy

    @rule()
    def clear(self) -> None:
        self.denoiser.clear()
        assert self.denoiser.captures == ()
        assert self.graphs.memory(torch.device("cpu")) == 0

    @invariant()
    @precondition(lambda self: hasattr(self, "denoiser"))
    def the_reports_tell_what_is(self) -> None:
        captures = self.denoiser.captures
        assert len(captures) <= self.bound
        # Nothing else holds a capture.
        assert len(self.graphs.tapes) == len(captures)
        assert all(capture.buffer_bytes > 0 for capture in captures)
        assert sum(capture.memory_bytes for capture in captures) <= self.graphs.memory(torch.device("cpu"))
        lines = self.denoiser.decisions
        captured, dropped = (sum(word in line for line in lines) for word in ("was captured", "was dropped"))
        assert captured == self.graphs.captured
        assert dropped <= captured - len(captures)
        # Callers keep results.
        assert all(torch.equal(*pair) for pair in self.kept)


Calls.TestCase.settings = settings(max_examples=40, stateful_step_count=30, deadline=None, derandomize=True)
TestAnyRowOfCallsAndChanges = Calls.TestCase

"""`GraphedDenoiser` on tapes: the bits of the eager call, whatever is asked, changed or missing between."""

from __future__ import annotations

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


CHANGES = (
    "a prompt written", "a prompt made", "a prompt made in inference mode", "weights written", "weights replaced",
    "a scale", "memory runs out", "memory runs out twice", "speed", "clear",
)  # fmt: skip


class Calls(RuleBasedStateMachine):
    """Any row of calls and changes; every result is compared with the eager call's, bit by bit."""

    @initialize(bound=st.integers(1, 3), asks=st.booleans())
    def start(self, bound: int, asks: bool) -> None:
        self.net = Net()
        self.bound, self.asks = bound, asks
        self.denoiser, self.graphs = graphed(self.net.denoise, max_captures=bound, eager_unless_worth=asks)
        self.prompts = [self.prompt(4, 0.25), self.prompt(200, 0.125)]
        self.kept: list[tuple[Tensor, Tensor]] = []
        self.last: tuple[Any, ...] = (1, 3, 0, "no_grad")

    def prompt(self, steps: int, value: float) -> Prompt:
        return Prompt(torch.arange(steps) + 1.0, (torch.full((2, 2), value),))

    @rule(
        batch=st.integers(1, 2),
        width=st.integers(3, 4),
        which=st.integers(0, 1),
        mode=st.sampled_from(["no_grad", "inference", "grad", "autocast"]),
        steps=st.integers(1, 8),
    )
    def run(self, batch: int, width: int, which: int, mode: str, steps: int) -> None:
        self.last = (batch, width, which, mode)
        for step in range(steps):
            self.call(*self.last, step)

    @rule(step=st.integers(0, 3))
    def again(self, step: int) -> None:
        self.call(*self.last, step)

    def call(self, batch: int, width: int, which: int, mode: str, step: int) -> None:
        x = torch.randn(batch, 3, 4, width, generator=torch.Generator().manual_seed(width + 7 * len(self.kept)))
        if step % 2:
            x = x.contiguous(memory_format=torch.channels_last)
        step %= self.prompts[which].num_steps
        before = x.clone()
        given = (step, torch.tensor(step), torch.tensor([step]))[step % 3]
        modes: dict[str, Any] = {
            "no_grad": torch.no_grad(), "inference": torch.inference_mode(), "grad": nullcontext(),
            "autocast": torch.autocast("cpu", torch.bfloat16),
        }  # fmt: skip
        replays = self.graphs.log.count("replay")
        with modes[mode]:
            like = x.contiguous(memory_format=torch.channels_last)
            # First, as a user's own call: autocast may keep casts.
            with torch.no_grad():
                expected = self.net.denoise(like, self.prompts[which], torch.tensor([step]))
            try:
                result = self.denoiser(x, self.prompts[which], given)
            except CaptureError as error:
                assert OUT_OF_MEMORY in str(error)
                assert not self.asks
                assert not self.denoiser.captures
                return
        assert torch.equal(result, expected)
        assert result.dtype == expected.dtype
        assert torch.equal(x, before)
        assert not result.requires_grad
        assert not result.is_inference()
        assert self.asks or self.graphs.log.count("replay") == replays + 1
        self.kept.append((result, expected))

    @rule(kind=st.sampled_from(CHANGES), value=st.sampled_from([-0.5, 0.25, 0.75]), which=st.integers(0, 1))
    @torch.no_grad()
    def change(self, kind: str, value: float, which: int) -> None:
        if kind == "a prompt written":
            text = self.prompts[which].text[0]
            with torch.inference_mode(text.is_inference()):
                text.fill_(value)
        elif kind.startswith("a prompt made"):
            with torch.inference_mode(kind.endswith("mode")):
                self.prompts[which] = self.prompt(self.prompts[which].num_steps, value)
        elif kind == "weights written":
            self.net.conv.weight.mul_(value)
        elif kind == "weights replaced":
            state = {name: tensor * value for name, tensor in self.net.state_dict().items()}
            self.net.load_state_dict(state, assign=True)
        elif kind == "a scale":
            self.net.scale = value
        elif kind.startswith("memory"):
            self.graphs.failures = [torch.OutOfMemoryError(OUT_OF_MEMORY)] * (1 + kind.endswith("twice"))
        elif kind == "speed":
            self.graphs.replay_ms = 10.0 + 8 * value
            self.graphs.busy = bool(which)
        else:
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


Calls.TestCase.settings = settings(max_examples=60, stateful_step_count=20, deadline=None, derandomize=True)
TestAnyRowOfCallsAndChanges = Calls.TestCase

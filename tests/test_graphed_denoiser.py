"""`GraphedDenoiser` on tapes: the bits of the eager call, whatever is asked, changed or missing between."""

from __future__ import annotations

import copy
import gc
import itertools
import weakref
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
from torch.utils._python_dispatch import TorchDispatchMode

from ldmperf.model import UNet, UNetConfig
from ldmperf.samplers import CaptureError, GraphedDenoiser

from .adapters import CONTEXT_DIM, lora, tiny_unet
from .tapes import Tapes

pytestmark = [
    pytest.mark.usefixtures("_one_thread"),
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning"),
]

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
        assert steps >= self.num_steps
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
        self.last = (1, 3, 0, "no_grad")

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
            self.call(step)

    @rule(step=st.integers(0, 3))
    def again(self, step: int) -> None:
        self.call(step)

    def call(self, step: int) -> None:
        batch, width, which, mode = self.last
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
            result = self.result(x, self.prompts[which], given)
        if result is None:
            return
        assert torch.equal(result, expected)
        assert result.dtype == expected.dtype
        assert torch.equal(x, before)
        assert not result.requires_grad
        assert not result.is_inference()
        assert self.asks or self.graphs.log.count("replay") == replays + 1
        self.kept.append((result, expected))

    def result(self, x: Tensor, prompt: Prompt, step: int | Tensor) -> Tensor | None:
        """None where memory ran out, of captures that nobody asked to be worth it."""
        try:
            return self.denoiser(x, prompt, step)
        except CaptureError as error:
            told = str(error)
        assert OUT_OF_MEMORY in told
        assert not self.asks
        assert not self.denoiser.captures
        return None

    @rule(kind=st.sampled_from(CHANGES), value=st.sampled_from([-0.5, 0.25, 0.75]), which=st.integers(0, 1))
    @torch.no_grad()
    def change(self, kind: str, value: float, which: int) -> None:
        if kind == "a prompt written":
            prompt = self.prompts[which]
            with torch.inference_mode(prompt.times.is_inference()):
                (prompt.text[0] if value > 0.5 else prompt.times).fill_(value * 100)
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


Calls.TestCase.settings = settings(max_examples=25, stateful_step_count=20, deadline=None, derandomize=True)
TestAnyRowOfCallsAndChanges = Calls.TestCase


@pytest.mark.parametrize("mode", ["no_grad", "inference", "autocast"])
@pytest.mark.parametrize("kind", CHANGES)
def test_each_change_between_calls_of_one_shape(kind: str, mode: str) -> None:
    calls = Calls()
    calls.start(bound=2, asks=False)
    for value in (0.75, -0.5):
        calls.run(1, 3, 0, mode, 2)
        calls.change(kind, value, 0)
        calls.again(1)
        calls.change("a prompt written", value / 2, 0)
        calls.again(3)
        calls.the_reports_tell_what_is()


class Copies(TorchDispatchMode):
    """Notes operators that write many tensors at once, and what pads."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names += [func.__name__] if "foreach" in func.__name__ or "pad" in func.__name__ else []
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def test_a_conditioning_is_copied_once_a_run() -> None:
    net = Net()
    denoiser, _ = graphed(net.denoise)
    x = torch.randn(1, 3, 4, 4)
    prompts = [Prompt(torch.arange(3.0), (torch.tensor([value]),)) for value in (0.5, 0.25)]
    seen = []
    for prompt in (*prompts, *prompts):
        for step in range(3):
            with Copies() as copies:
                denoiser(x, prompt, step)
            seen.append(len(copies.names))
    # With room for more steps, two are kept.
    assert seen[3:] == [2, 0, 0, 1, 0, 0, 1, 0, 0]


@torch.no_grad()
def test_each_dtype_of_autocast_has_a_capture_of_its_own() -> None:
    net = Net()
    denoiser, graphs = graphed(net.denoise)
    x, prompt = torch.randn(1, 3, 4, 4), Prompt(torch.arange(3.0), (torch.tensor([0.5]),))
    seen = []
    for dtype in (torch.bfloat16, torch.float16, torch.bfloat16):
        with torch.autocast("cpu", dtype):
            seen.append(denoiser(x, prompt, 1))
            assert torch.equal(seen[-1], net.denoise(x, prompt, torch.tensor([1])))
    assert graphs.captured == 2
    assert not torch.equal(seen[0].float(), seen[1].float())


@torch.no_grad()
def test_inputs_of_another_dtype_are_another_shape() -> None:
    denoiser, graphs = graphed(lambda x, found, step: torch.tanh(x) * found)
    x = torch.linspace(-1, 1, 6, dtype=torch.float64).reshape(1, 6)
    for dtype in (torch.float32, torch.float64, torch.float32, torch.bfloat16):
        found = denoiser(x.to(dtype), torch.tensor(0.5), 0)
        assert found.dtype == dtype
        assert torch.equal(found, torch.tanh(x.to(dtype)) * torch.tensor(0.5))
    assert graphs.captured == 3


@torch.no_grad()
def test_the_same_tensors_in_another_tree_are_another_conditioning() -> None:
    denoiser, _ = graphed(lambda x, found, step: x * found.get("a", 2.0) + found.get("b", 0.0))
    x, value = torch.ones(1, 3), torch.tensor(3.0)
    for name, expected in (("a", 3.0), ("b", 5.0), ("a", 3.0)):
        assert torch.equal(denoiser(x, {name: value}, 0), torch.full((1, 3), expected))


@torch.no_grad()
def test_a_conditioning_that_was_copied_in_part_is_not_taken_for_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    denoiser, _ = graphed(lambda x, found, step: x * found[0] + found[1])
    x = torch.ones(1, 3)
    first, second = ((torch.tensor(value), torch.tensor(0.0)) for value in (3.0, 5.0))
    assert torch.equal(denoiser(x, first, 0), 3 * x)
    copy_all = torch._foreach_copy_

    def interrupted(targets: list[Tensor], sources: list[Tensor]) -> None:
        copy_all(targets[:1], sources[:1])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch, "_foreach_copy_", interrupted)
        with pytest.raises(KeyboardInterrupt):
            denoiser(x, second, 0)
    assert torch.equal(denoiser(x, first, 0), 3 * x)


@torch.no_grad()
def test_an_eager_result_is_the_callers_own() -> None:
    """Also where denoise returns the memory that it writes at each call."""
    kept = torch.empty(1, 3)
    denoiser, graphs = graphed(lambda x, found, step: torch.mul(x, found, out=kept), eager_unless_worth=True)
    graphs.failures = [torch.OutOfMemoryError(OUT_OF_MEMORY)]
    x = torch.ones(1, 3)
    results = [denoiser(x, torch.tensor(value), 0) for value in (1.0, 2.0, 3.0)]
    assert [result.tolist() for result in results] == [[[1.0] * 3], [[2.0] * 3], [[3.0] * 3]]
    assert denoiser.captures == ()


@torch.no_grad()
def test_what_was_cleared_keeps_no_conditioning() -> None:
    denoiser, _ = graphed(Net().denoise)
    prompt = Prompt(torch.arange(3.0), (torch.tensor([0.5]),))
    denoiser(torch.randn(1, 3, 4, 4), prompt, 1)
    kept = weakref.ref(prompt.times)
    del prompt
    denoiser.clear()
    gc.collect()
    assert kept() is None


@pytest.mark.parametrize("bound", [1, 3])
@torch.no_grad()
def test_a_unet_of_ours(bound: int) -> None:
    torch.manual_seed(0)
    unet = UNet(TINY, backend="torch").eval().requires_grad_(False)
    denoiser, graphs = graphed(unet.denoise, max_captures=bound)
    for steps in (3, 5):
        texts = [torch.randn(batch, 5, TINY.context_dim) for batch in (2, 1)]
        conditionings = [unet.condition(range(1, 1 + steps), text) for text in texts]
        for step in (0, torch.tensor([2])):
            for conditioning, text in zip(conditionings, texts, strict=True):
                x = torch.randn(len(text), 4, 8, 8)
                expected = unet.denoise(x, conditioning, int(step))
                assert torch.equal(denoiser(x, conditioning, step), expected)
    assert graphs.captured == (8 if bound == 1 else 2)
    with pytest.raises(ValueError, match="step must be a number from 0 to 4, the conditioning's last, not 5"):
        denoiser(x, conditioning, 5)
    unet.conv_in.weight.mul_(1.5)
    assert torch.equal(denoiser(x, conditioning, 1), unet.denoise(x, conditioning, 1))
    unet.get_parameter("conv_in.bias").add_(1.0)
    with pytest.raises(ValueError, match=r"make it anew with UNet\.condition"):
        denoiser(x, conditioning, 0)
    conditioning = unet.condition(range(1, 6), texts[1])
    assert torch.equal(denoiser(x, conditioning, 0), unet.denoise(x, conditioning, 0))
    assert graphs.captured == (8 if bound == 1 else 2)


@torch.no_grad()
def test_adapters_of_a_diffusers_unet_are_swapped() -> None:
    unet = tiny_unet()

    def denoise(x: Tensor, found: Prompt, step: Tensor) -> Tensor:
        output: Tensor = unet(x, found.times.index_select(0, step), found.text[0], return_dict=False)[0]
        return output

    denoiser, graphs = graphed(denoise, eager_unless_worth=True)
    text = torch.linspace(-1, 1, 3 * CONTEXT_DIM, dtype=torch.float64).reshape(1, 3, -1)
    prompt = Prompt(torch.tensor([800.0, 400.0, 1.0]), (text,))
    x = torch.linspace(-1, 1, 4 * 8 * 8, dtype=torch.float64).reshape(1, 4, 8, 8)
    few = ("to_q", "conv1")
    first, second = lora(unet, 1, few), lora(unet, 2, few)

    def load(weights: dict[str, Tensor], name: str, hotswap: bool = False) -> None:
        unet.load_lora_adapter(dict(weights), prefix=None, adapter_name=name, hotswap=hotswap)

    changes: list[Any] = [
        lambda: None,
        lambda: load(first, "a"),
        lambda: load(second, "a", hotswap=True),
        lambda: unet.set_adapters("a", 0.5),
        lambda: load(first, "b"),
        lambda: unet.set_adapters(["a", "b"], [0.5, 0.7]),
        unet.disable_lora,
        unet.unload_lora,
    ]
    results: list[Tensor] = []
    for change in changes:
        change()
        for step in range(2):
            results.append(denoiser(x, prompt, step))
            like = x.contiguous(memory_format=torch.channels_last)
            assert torch.equal(results[-1], denoise(like, prompt, torch.tensor([step])))
    assert not any(torch.equal(*pair) for pair in itertools.pairwise(results[:-2:2]))
    assert len(denoiser.captures) <= 1
    assert any("because modules changed" in line for line in denoiser.decisions)
    assert graphs.captured < len(changes)


def test_a_wrong_call_is_told_in_one_line() -> None:
    net = Net()
    denoiser, graphs = graphed(net.denoise)
    x, prompt = torch.randn(1, 3, 4, 4), Prompt(torch.arange(3.0), (torch.tensor([0.5]),))
    calls: list[tuple[Any, Any, Any, str]] = [
        (x.int(), prompt, 0, r"model_input must be a float tensor \[B, ...\], not tensor"),
        (None, prompt, 0, "model_input must be a float tensor"),
        (x, (prompt, 3), 0, "it holds a int"),
        (x, prompt, 3, "step must be a number from 0 to 2, the conditioning's last, not 3"),
        (x, prompt, -1, "step must be a number from 0 to 2"),
        (x, prompt, 1.0, "not 1.0"),
        (x, (torch.zeros(1),), -1, "step must be a number from 0 on, not -1"),
        (x, prompt, torch.zeros(2, dtype=torch.int64), r"an int64 tensor of one element, not torch.int64 \[2\]"),
        (x, prompt, torch.zeros(1), "an int64 tensor of one element, not torch.float32"),
        (x, replace(prompt, text=(torch.empty(1, device="meta"),)), 0, "on cpu as the model input is; .* on meta"),
        (x.clone().requires_grad_(), prompt, 0, "a captured graph computes no gradients: call the network itself"),
        (x, replace(prompt, text=(torch.ones(1).requires_grad_(),)), 0, "computes no gradients"),
    ]
    for given, conditioning, step, message in calls:
        with pytest.raises(ValueError, match=message) as raised:
            denoiser(given, conditioning, step)
        assert "\n" not in str(raised.value)
    assert graphs.captured == 0
    with torch.no_grad():
        denoiser(x.clone().requires_grad_(), prompt, 0)
    with pytest.raises(ValueError, match="denoise must return a tensor, not"):
        graphed(lambda x, found, step: (x,))[0](x, prompt, 0)
    with pytest.raises(ValueError, match="pass these to GraphedDenoiser as modules="):
        graphed(lambda x, found, step, nets=[net]: nets[0].denoise(x, found, step))[0](x, prompt, 0)
    with pytest.raises(CaptureError, match="CUDA graphs need a CUDA device"):
        GraphedDenoiser(net.denoise)(x, prompt, 0)
    with pytest.raises(ValueError, match="max_captures must be at least 1"):
        GraphedDenoiser(net.denoise, max_captures=0)
    with pytest.raises(TypeError, match=r"make another with GraphedDenoiser\(denoise\)"):
        copy.copy(denoiser)

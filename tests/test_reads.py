"""Weights under a captured step: replaced, moved, written in place, freed."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from ldmperf.model import UNet, UNetConfig
from ldmperf.samplers import GraphedSampler, NoiseSchedule, initial_noise, make_plan, sample

from .tapes import Tapes, graphed

pytestmark = pytest.mark.usefixtures("_one_thread")

SCHEDULE = NoiseSchedule.from_diffusers({"beta_schedule": "scaled_linear"})
PLAN = make_plan("dpmpp_2m", SCHEDULE, 3)
NOISE = initial_noise([1, 2], (4, 5, 6))
TINY = UNetConfig((16, 32), (2, 4), (True, False), layers_per_block=1, context_dim=12, norm_groups=4)


class Net(nn.Module):
    """Parameters, a buffer and a module with parameters, all of which its output shows."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.mix = nn.Conv2d(4, 4, 1)
        self.gain = nn.Parameter(torch.rand(4, 1, 1) + 0.5)
        self.register_buffer("offset", torch.rand(()))
        self.after = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Tanh())
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor, conditioning: Any, step: torch.Tensor) -> torch.Tensor:
        table = conditioning[0].to(x.dtype)
        x = x.to(self.gain.dtype)
        return self.after(self.mix(x) * self.gain + self.offset + table.index_select(0, step)[0])

    def denoise(self, x: torch.Tensor, conditioning: Any, step: torch.Tensor) -> torch.Tensor:
        return self(x, conditioning, step)


CONDITIONING = (torch.linspace(-0.3, 0.4, 128),)


def eager(net: Any, noise: torch.Tensor = NOISE) -> torch.Tensor:
    return sample(lambda x, step: net(x, CONDITIONING, torch.tensor([step.index])), PLAN, noise, backend="torch")


def written(net: Net, seed: int) -> None:
    torch.manual_seed(seed)
    for tensor in (*net.parameters(), *net.buffers()):
        tensor.add_(0.1 * torch.randn_like(tensor))


def assigned(net: Net, seed: int) -> None:
    net.load_state_dict(Net(seed).state_dict(), assign=True)


def one_parameter(net: Net, seed: int) -> None:
    net.gain = nn.Parameter(torch.full_like(net.gain, 1.0 + seed), requires_grad=False)


def a_buffer(net: Net, seed: int) -> None:
    net.offset = torch.full_like(net.offset, 0.1 * seed)


def moved(net: Net, seed: int) -> None:
    net.to(torch.float64 if net.gain.dtype == torch.float32 else torch.float32)


def given_data(net: Net, seed: int) -> None:
    """What `.to()` does to parameters: the same one has other memory."""
    net.gain.data = torch.full_like(net.gain, 1.5 + seed)


def adapted(net: Net, seed: int) -> None:
    torch.manual_seed(seed)
    net.after[0] = nn.Sequential(net.after[0], nn.Conv2d(4, 4, 1)).to(net.gain.dtype).requires_grad_(False)


def hooked(net: Net, seed: int) -> None:
    net.mix.register_forward_hook(lambda module, args, out: out * (1.0 + seed / 10))


def parametrized(net: Net, seed: int) -> None:
    class Scaled(nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return weight * (1 + seed)

    nn.utils.parametrize.register_parametrization(net.mix, "weight", Scaled())


CHANGES = {
    change.__name__: (change, captures)
    for change, captures in (
        (written, 0), (assigned, 1), (one_parameter, 1), (a_buffer, 1), (moved, 1), (given_data, 1), (adapted, 1),
        (hooked, 1), (parametrized, 1),
    )
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
@torch.no_grad()
def test_a_run_is_of_the_weights_as_they_are(name: str) -> None:
    change, captures = CHANGES[name]
    net = Net()
    sampler, graphs = graphed(net.denoise)
    before = sampler(CONDITIONING, PLAN, NOISE)
    assert torch.equal(before, eager(net))
    change(net, 3)
    gc.collect()
    after = sampler(CONDITIONING, PLAN, NOISE)
    assert torch.equal(after, eager(net))
    assert not torch.equal(before, after)
    assert graphs.captured == 1 + captures


@settings(max_examples=15, deadline=None, derandomize=True)
@given(names=st.lists(st.sampled_from([*CHANGES, "nothing"]), min_size=2, max_size=6), data=st.data())
@torch.no_grad()
def test_any_row_of_changes(names: list[str], data: st.DataObject) -> None:
    net = Net()
    sampler, graphs = graphed(net.denoise)
    captures = 0
    stale = True
    seen: set[int] = set()
    for seed, name in enumerate(names):
        if name != "nothing" and not (name == "parametrized" and hasattr(net.mix, "parametrizations")):
            if name == "assigned" and net.state_dict().keys() != Net().state_dict().keys():
                name = "one_parameter"
            change, _ = CHANGES[name]
            change(net, seed)
            gc.collect()
            if name != "written":
                stale = True
        batch = data.draw(st.integers(1, 2))
        if stale:
            seen.clear()
        captures += batch not in seen
        seen.add(batch)
        stale = False
        noise = NOISE[:batch]
        assert torch.equal(sampler(CONDITIONING, PLAN, noise), eager(net, noise)), (names, seed)
        assert graphs.captured == captures
        assert len(sampler.captures) == len(seen)


class Holder:
    def __init__(self, net: Net) -> None:
        self.net = net

    def method(self, x: torch.Tensor, conditioning: Any, step: torch.Tensor) -> torch.Tensor:
        return self.net.denoise(x, conditioning, step)

    def __call__(self, x: torch.Tensor, conditioning: Any, step: torch.Tensor) -> torch.Tensor:
        return self.net.denoise(x, conditioning, step)


GLOBAL = Net()


def from_global(x: torch.Tensor, conditioning: Any, step: torch.Tensor) -> torch.Tensor:
    return GLOBAL.denoise(x, conditioning, step)


def closure(net: Net) -> Callable[..., torch.Tensor]:
    return lambda x, conditioning, step: net.denoise(x, conditioning, step)


def closure_over_a_method(net: Net) -> Callable[..., torch.Tensor]:
    method = net.denoise
    return lambda x, conditioning, step: method(x, conditioning, step)


def swapped(x: torch.Tensor, conditioning: Any, step: torch.Tensor, net: Net) -> torch.Tensor:
    return net.denoise(x, conditioning, step)


FORMS: dict[str, Callable[[Net], Any]] = {
    "module": lambda net: net,
    "method": lambda net: net.denoise,
    "partial": lambda net: functools.partial(swapped, net=net),
    "partial of a method": lambda net: functools.partial(net.denoise),
    "method of a holder": lambda net: Holder(net).method,
    "holder": Holder,
    "closure": closure,
    "closure over a method": closure_over_a_method,
    "global": lambda net: from_global,
}


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_the_modules_are_found_in(form: str) -> None:
    net = GLOBAL if form == "global" else Net()
    sampler, graphs = graphed(FORMS[form](net))
    for _ in range(2):
        assert torch.equal(sampler(CONDITIONING, PLAN, NOISE), eager(net))
    assert graphs.captured == 1
    assigned(net, 5)
    gc.collect()
    assert torch.equal(sampler(CONDITIONING, PLAN, NOISE), eager(net))
    assert graphs.captured == 2


@torch.no_grad()
def test_another_module_in_a_closures_variable_is_another_network() -> None:
    net = Net()

    def denoise(x: torch.Tensor, conditioning: Any, step: torch.Tensor) -> torch.Tensor:
        return net.denoise(x, conditioning, step)

    sampler, graphs = graphed(denoise)
    sampler(CONDITIONING, PLAN, NOISE)
    net = Net(9)
    gc.collect()
    assert torch.equal(sampler(CONDITIONING, PLAN, NOISE), eager(net))
    assert graphs.captured == 2


@torch.no_grad()
def test_modules_that_are_not_shown_are_asked_for() -> None:
    nets = [Net()]

    def denoise(x: torch.Tensor, conditioning: Any, step: torch.Tensor) -> torch.Tensor:
        return nets[0].denoise(x, conditioning, step)

    sampler, _ = graphed(denoise)
    with pytest.raises(
        ValueError, match=r"denoise reads 5 parameters .* pass these to GraphedSampler as modules="
    ) as e:
        sampler(CONDITIONING, PLAN, NOISE)
    assert "\n" not in str(e.value)
    for modules in (nets, nets[0]):
        sampler, graphs = graphed(denoise, modules=modules)
        sampler(CONDITIONING, PLAN, NOISE)
        assigned(nets[0], 4)
        gc.collect()
        assert torch.equal(sampler(CONDITIONING, PLAN, NOISE), eager(nets[0]))
        assert graphs.captured == 2


@torch.no_grad()
def test_other_tensors_stay_as_long_as_the_capture() -> None:
    held = {"weight": torch.rand(4, 1, 1) + 0.5}
    memory = StorageWeakRef(held["weight"].untyped_storage())

    def denoise(x: torch.Tensor, conditioning: Any, step: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x * held["weight"])

    sampler, _ = graphed(denoise)
    first = sampler(CONDITIONING, PLAN, NOISE)
    held["weight"].mul_(1.5)
    second = sampler(CONDITIONING, PLAN, NOISE)
    assert not torch.equal(first, second)
    held["weight"] = torch.zeros(4, 1, 1)
    gc.collect()
    # Nothing shows that it was replaced: it is read where it was.
    assert torch.equal(sampler(CONDITIONING, PLAN, NOISE), second)
    assert not memory.expired()
    sampler.clear()
    assert memory.expired()


@torch.no_grad()
def test_the_memory_of_replaced_weights_goes_with_the_next_run() -> None:
    net = Net()
    old = [StorageWeakRef(tensor.untyped_storage()) for tensor in net.state_dict().values()]
    sampler, _ = graphed(net.denoise)
    sampler(CONDITIONING, PLAN, NOISE)
    sampler(CONDITIONING, PLAN, NOISE[:1])
    net.to(torch.float64)
    gc.collect()
    assert not any(ref.expired() for ref in old)
    sampler(CONDITIONING, PLAN, NOISE)
    assert all(ref.expired() for ref in old)


@torch.no_grad()
def test_a_steps_activations_are_not_kept() -> None:
    net = Net()
    made: list[StorageWeakRef] = []
    gone: list[bool] = []

    def denoise(x: torch.Tensor, conditioning: Any, step: torch.Tensor) -> torch.Tensor:
        gone[:] = [ref.expired() for ref in made]
        hidden = net.denoise(x, conditioning, step)
        made.append(StorageWeakRef(hidden.untyped_storage()))
        return hidden * 2

    sampler, _ = graphed(denoise)
    sampler(CONDITIONING, PLAN, NOISE)
    # At the capture, those of all calls of the warm-up.
    assert gone == [True, True, True]


@torch.no_grad()
def test_a_unet_whose_weights_are_replaced() -> None:
    torch.manual_seed(0)
    unet, other = (UNet(TINY, backend="torch").eval().requires_grad_(False) for _ in range(2))
    sampler, graphs = graphed(unet.denoise)
    context, noise = torch.randn(2, 5, TINY.context_dim), initial_noise([1], (4, 8, 8))

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        conditioning = unet.condition(PLAN.timesteps, context)
        options: dict[str, Any] = {"guidance_scale": 3.0}
        expected = sample(
            lambda x, step: unet.denoise(x, conditioning, step.index), PLAN, noise, backend="torch", **options
        )
        return sampler(conditioning, PLAN, noise, **options), expected

    results = []
    for number in range(4):
        if number == 1:
            unet.load_state_dict(other.state_dict())
        elif number == 2:
            unet.load_state_dict({name: 1.1 * value for name, value in other.state_dict().items()}, assign=True)
        elif number == 3:
            unet.down[0].transformers[0].proj_out = nn.Linear(16, 16).requires_grad_(False)
        gc.collect()
        result, expected = run()
        assert torch.equal(result, expected), number
        results.append(result)
        assert graphs.captured == (1, 1, 2, 3)[number]
    assert all(not torch.equal(a, b) for a, b in pairwise(results))


@torch.no_grad()
def test_a_conditioning_of_older_weights_is_refused() -> None:
    unet = UNet(TINY, backend="torch").eval().requires_grad_(False)
    sampler, graphs = graphed(unet.denoise)
    context, noise = torch.randn(1, 5, TINY.context_dim), initial_noise([1], (4, 8, 8))
    conditioning = unet.condition(PLAN.timesteps, context)
    nested, _ = graphed(lambda x, held, step: unet.denoise(x, held["of"][0], step))
    assert torch.equal(sampler(conditioning, PLAN, noise), nested({"of": [conditioning, None]}, PLAN, noise))
    unet.conv_in.bias.add_(1.0)
    for call, held in ((sampler, conditioning), (nested, {"of": [conditioning, None]})):
        with pytest.raises(ValueError, match=r"conv_in\.bias was written\): make it anew with UNet\.condition"):
            call(held, PLAN, noise)
    fresh = unet.condition(PLAN.timesteps, context)
    expected = sample(lambda x, step: unet.denoise(x, fresh, step.index), PLAN, noise, backend="torch")
    assert torch.equal(sampler(fresh, PLAN, noise), expected)
    assert torch.equal(nested({"of": [fresh, None]}, PLAN, noise), expected)
    assert graphs.captured == 1


@torch.no_grad()
def test_a_capture_that_replaces_a_buffer_makes_those_before_it_stale() -> None:
    net = Net()

    def denoise(x: torch.Tensor, conditioning: Any, step: torch.Tensor) -> torch.Tensor:
        out = net.denoise(x, conditioning, step)
        if x.shape[0] == 1:
            net.offset = net.offset.clone()
        return out

    sampler, graphs = graphed(denoise)
    sampler(CONDITIONING, PLAN, NOISE)
    sampler(CONDITIONING, PLAN, NOISE)
    sampler(CONDITIONING, PLAN, NOISE[:1])
    assert graphs.captured == 2
    sampler(CONDITIONING, PLAN, NOISE)
    assert graphs.captured == 3


@torch.no_grad()
def test_what_a_call_leaves_for_the_next_is_kept() -> None:
    """As caches of features do: the capture reads what the warm-up made, and then drops it."""
    left = [torch.zeros(())]

    def denoise(x: torch.Tensor, conditioning: Any, step: torch.Tensor) -> torch.Tensor:
        out = torch.tanh(x + left[0])
        left[0] = left[0] * 0.5 + 1.0
        return out

    sampler, _ = graphed(denoise)
    # 0, 1, 1.5, 1.75: what the fourth call, the capture, reads.
    expected = sample(lambda x, step: torch.tanh(x + 1.75), PLAN, NOISE, backend="torch")
    assert torch.equal(sampler(CONDITIONING, PLAN, NOISE), expected)
    gc.collect()
    assert torch.equal(sampler(CONDITIONING, PLAN, NOISE), expected)


@torch.no_grad()
def test_every_write_to_a_captures_memory_is_in_a_turn() -> None:
    net = Net()
    sampler, graphs = graphed(net.denoise)
    count = 0

    class Writes(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal count
            if func._schema.is_mutable:
                count += 1
                assert graphs.in_turn, func
            return func(*args, **(kwargs or {}))

    for _ in range(2):
        with Writes():
            sampler(CONDITIONING, PLAN, NOISE)
    assert count > 10
    assert graphs.log == ["begin", "capture", *["replay"] * 3, "end", "begin", *["replay"] * 3, "end"]

    class Stop(Exception):
        pass

    def stop(step: Any, x: torch.Tensor) -> None:
        raise Stop

    with pytest.raises(Stop):
        sampler(CONDITIONING, PLAN, NOISE, callback=stop)
    assert graphs.log[-3:] == ["begin", "replay", "end"]


@torch.no_grad()
def test_a_capture_goes_when_the_device_is_done_with_it() -> None:
    kept: list[int] = []

    class Watched(Tapes):
        def settle(self) -> None:
            super().settle()
            kept.append(len(sampler.captures))

    net = Net()
    sampler: GraphedSampler[Any] = GraphedSampler(net.denoise, backend="torch", graphs=Watched(), max_captures=1)
    sampler(CONDITIONING, PLAN, NOISE)
    assert kept == []
    sampler(CONDITIONING, PLAN, NOISE[:1])
    assert kept == [1]
    assigned(net, 1)
    sampler(CONDITIONING, PLAN, NOISE[:1])
    assert kept[1:] == [1]
    sampler.clear()
    assert kept[2:] == [1]

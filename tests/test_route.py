"""The way through the network: its stops are the modules that the network has now, and its skips come out even."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from ldmperf.model import UNet, UNetConfig
from ldmperf.model.blocks import ResBlock
from ldmperf.model.choices import Choices

pytestmark = pytest.mark.usefixtures("_one_thread")

SMALL = {"norm_groups": 4, "context_dim": 12}
CONFIGS = {
    "three levels": UNetConfig((16, 16, 32), (2, 2, 4), (True, False, True), **SMALL),
    "no middle": UNetConfig((16, 32), (2, 4), (False, True), layers_per_block=1, has_middle=False, **SMALL),
    "one level": UNetConfig((16,), (2,), (True,), **SMALL),
}
SAMPLE = torch.randn(2, 4, 7, 5, generator=torch.Generator().manual_seed(0))
CONTEXT = torch.randn(2, 3, 12, generator=torch.Generator().manual_seed(1))


def network(name: str = "three levels") -> UNet:
    torch.manual_seed(0)
    return UNet(CONFIGS[name], backend="torch").eval().requires_grad_(False)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_block_is_one_stop_and_every_skip_is_taken(name: str) -> None:
    unet = network(name)
    route = unet._route()
    blocks = [module for module in unet.modules() if isinstance(module, ResBlock)]
    assert [stop.resblock for stop in route] == blocks
    skips, level = [0], 0
    for stop in route:
        if stop.pops:
            assert skips.pop() == level
        assert stop.enlarges == (stop.pops and stop.resample is not None)
        if stop.enlarges:
            assert skips[-1] == level - 1
        skips += [level] * stop.pushes
        if stop.resample is not None:
            level += -1 if stop.enlarges else 1
            skips += [level] * stop.pushes
    assert (skips, level) == ([], 0)


class Doubled(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


def other_block(unet: UNet) -> None:
    torch.manual_seed(5)
    unet.down[0].resblocks[1] = ResBlock(16, 16, 4, 1e-5, Choices("torch")).requires_grad_(False)


def other_level(unet: UNet) -> None:
    unet.up[0] = copy.deepcopy(unet.up[0])
    unet.up[0].resblocks[0].conv2.bias.add_(1.0)


def other_levels(unet: UNet) -> None:
    unet.down = nn.ModuleList(copy.deepcopy(level) for level in unet.down)
    unet.down[1].downsample.conv.bias.add_(1.0)


def parametrized(unet: UNet) -> None:
    block = unet.up[1].resblocks[0]
    for layer, name in ((block.conv1, "weight"), (block.conv2, "bias"), (block.shortcut, "weight")):
        parametrize.register_parametrization(layer, name, Doubled())


def pickled(unet: UNet) -> UNet:
    other: UNet = pickle.loads(pickle.dumps(unet))
    return other


@pytest.mark.parametrize("change", [other_block, other_level, other_levels, parametrized])
@pytest.mark.parametrize("then", [lambda unet: unet, copy.deepcopy, pickled])
def test_a_replaced_module_is_the_one_that_runs(
    change: Callable[[UNet], None], then: Callable[[UNet], UNet]
) -> None:
    """A changed network, or its copy, computes what a plain network of the same weights does."""
    unet = network()
    before = unet(SAMPLE, 5.0, CONTEXT)
    change(unet)
    plain = network()
    for name, _ in plain.named_parameters():
        # Of a parametrized module the attribute is the value in use.
        module, _, parameter = name.rpartition(".")
        plain.get_submodule(module).get_parameter(parameter).copy_(getattr(unet.get_submodule(module), parameter))
    # Torch pickles no parametrized module.
    used = unet if (change, then) == (parametrized, pickled) else then(unet)
    found = used(SAMPLE, 5.0, CONTEXT)
    assert torch.equal(found, plain(SAMPLE, 5.0, CONTEXT))
    assert not torch.equal(found, before)

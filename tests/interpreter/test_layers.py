"""The layers of diffusers on the kernels, in the interpreter, against diffusers' own in float64."""

import copy

import pytest
import torch
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from ldmperf.kernels import _recipes, layers

LAYERS = {
    ResnetBlock2D: layers.ResnetBlock2D,
    BasicTransformerBlock: layers.BasicTransformerBlock,
    GEGLU: layers.GEGLU,
    nn.GroupNorm: layers.GroupNorm,
    nn.LayerNorm: layers.LayerNorm,
}


def image(*shape):
    return torch.randn(*shape).contiguous(memory_format=torch.channels_last)


def resnet(**options):
    return ResnetBlock2D(in_channels=8, out_channels=12, temb_channels=6, groups=4, **options)


CASES = {
    "resnet": (resnet, lambda: (image(2, 8, 3, 5), torch.randn(2, 6)), ["group_norm"] * 2 + ["residual_add"]),
    "resnet of contiguous images": (
        resnet,
        lambda: (torch.randn(2, 8, 3, 5), torch.randn(2, 6)),
        ["group_norm"] * 2 + ["residual_add"],
    ),
    "scale and shift": (
        lambda: resnet(time_embedding_norm="scale_shift"),
        lambda: (image(2, 8, 3, 5), torch.randn(2, 6)),
        ["group_norm"] * 2 + ["residual_add"],
    ),
    "transformer": (
        lambda: BasicTransformerBlock(12, 2, 6, cross_attention_dim=10),
        # An image that is not channels-last, read as tokens.
        lambda: (torch.randn(2, 12, 7).transpose(1, 2), None, torch.randn(2, 5, 10)),
        ["layer_norm"] * 3,
    ),
    "geglu": (lambda: GEGLU(6, 10), lambda: (torch.randn(2, 3, 6),), ["linear"]),
    "group norm": (lambda: nn.GroupNorm(3, 12), lambda: (image(2, 12, 3, 5),), ["group_norm"]),
    "layer norm": (lambda: nn.LayerNorm(12), lambda: (torch.randn(2, 12, 3).transpose(1, 2),), ["layer_norm"]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("case", CASES)
def test_layers_run_on_the_kernels(case, dtype, kit, monkeypatch):
    torch.manual_seed(0)
    make, inputs, expected = CASES[case]
    module, given = make().to(dtype).eval(), [g if g is None else g.to(dtype) for g in inputs()]
    launched = []
    run = _recipes._BoundLaunch.run

    def noted(self, tensors):
        launched.append(self.kernel.__name__.removesuffix("_kernel"))
        run(self, tensors)

    monkeypatch.setattr(_recipes._BoundLaunch, "run", noted)
    ours = copy.deepcopy(module)
    host = type(module)
    ours.__class__ = type(host.__name__, (host,), {"forward": LAYERS[host].forward})
    ours.ldmperf_backend = "triton"
    with torch.no_grad():
        exact = copy.deepcopy(module).double()(*[g if g is None else g.double() for g in given])
        kit.judge(ours(*given), exact, module(*given), dtype, factor=2.5)
    assert launched == expected

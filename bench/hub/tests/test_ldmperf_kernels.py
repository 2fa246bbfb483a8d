"""Operators and layers beside torch's own in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytestmark = pytest.mark.kernels_ci
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
DTYPES = tuple(TOLERANCES)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def close(result: Tensor, expected: Tensor) -> bool:
    """Whether no error exceeds the dtype's tolerance, of the largest value."""
    error = (result.double() - expected).abs().max()
    return bool(error <= TOLERANCES[result.dtype] * expected.abs().max())


@pytest.mark.parametrize("dtype", DTYPES)
def test_group_norm_silu(kernel, device, dtype) -> None:
    x = torch.randn(2, 64, 9, 7, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(2, 64, device=device, dtype=dtype)
    expected = F.silu(F.group_norm(x.double(), 8, weight.double(), bias.double(), 1e-5))
    assert close(kernel.group_norm_silu(x, 8, weight, bias, eps=1e-5), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention(kernel, device, dtype) -> None:
    q, k, v = torch.randn(2, 33, 3, 4, 40, device=device, dtype=dtype).unbind(2)
    heads_first = (x.double().transpose(1, 2) for x in (q, k, v))
    expected = F.scaled_dot_product_attention(*heads_first).transpose(1, 2)
    assert close(kernel.attention(q, k, v), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_geglu(kernel, device, dtype) -> None:
    x = torch.randn(5, 64, device=device, dtype=dtype)
    value, gate = x.double().chunk(2, dim=-1)
    assert close(kernel.geglu(x), value * F.gelu(gate))


def test_layers(kernel, device) -> None:
    for module, x in (
        (nn.GroupNorm(8, 64), torch.randn(2, 64, 9, 7)),
        (nn.LayerNorm(64), torch.randn(2, 5, 64)),
    ):
        layer = getattr(kernel.layers, type(module).__name__)
        expected = module.double()(x.double()).to(device)
        assert close(layer.forward(module.float().to(device), x.to(device)), expected)

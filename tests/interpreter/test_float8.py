"""Rows quantized to float8 by the norm and the gate that write them: bits, scales, and what is not finite."""

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ldmperf.kernels import OPERATORS, KernelUnsupported, layer_norm
from ldmperf.kernels._launch import NO_GPU
from ldmperf.kernels.layer_norm import default_config

LAYOUTS = st.sampled_from(["plain", "sliced", "channel_slice", "expanded", "transposed"])
DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])
COUNTS = st.tuples(st.integers(1, 3), st.sampled_from([1, 2, 5, 17]))
SCALES = st.sampled_from([1.0, 1e-3, 1e3])
fuzz = settings(max_examples=20, deadline=None)


def written_out(values):
    """What rows of float32 become, by the formula and torch's own rounding: (float8, scale [rows, 1])."""
    rows = values.reshape(-1, values.shape[-1])
    scale = torch.empty(len(rows), 1)
    quantized = torch.empty(rows.shape, dtype=torch.float8_e4m3fn)
    for n, row in enumerate(rows):
        scale[n] = max(max(map(abs, row.tolist())) * torch.tensor(1 / 448).item(), 2.0**-126)
        quantized[n] = (row * (1 / scale[n])).to(torch.float8_e4m3fn)
    return quantized.view(values.shape), scale


def check(result, values):
    """`values` are those of the same kernel in float32: what it quantized."""
    quantized, scale = result
    wanted, wanted_scale = written_out(values)
    assert torch.equal(scale, wanted_scale)
    assert quantized.dtype == torch.float8_e4m3fn
    assert torch.equal(quantized.view(torch.uint8), wanted.view(torch.uint8))
    check_distance(result, values)


def check_distance(result, values):
    """By the format's definition: 3 bits of mantissa, and 2^-9 the least number."""
    quantized, scale = result
    rows = values.reshape(scale.shape[0], -1).double()
    off = quantized.double().view_as(rows) * scale.double() - rows
    assert (off.abs() <= torch.maximum(rows.abs() / 16, scale.double() / 1024) * (1 + 1e-5)).all()


def check_rounded_sums(result, values):
    """The same where a compiler may order the sums of the two calls differently: bits but for ties."""
    quantized, scale = result
    assert quantized.dtype == torch.float8_e4m3fn
    assert torch.allclose(scale, written_out(values)[1], rtol=1e-5, atol=0)
    rows = values.reshape(scale.shape[0], -1) / scale
    noise = 1e-5 * (rows.abs() + 1)
    low, high = ((rows + by).clamp(-448, 448).to(torch.float8_e4m3fn).float() for by in (-noise, noise))
    found = quantized.float().view_as(rows)
    assert ((low <= found) & (found <= high)).all()
    assert (low != high).float().mean() < 0.01 + 2 / rows.numel()
    check_distance(result, values)


@fuzz
@given(
    counts=COUNTS,
    channels=st.sampled_from([2, 7, 24, 64, 96, 130, 320, 1152]),
    layout=LAYOUTS,
    biased=st.booleans(),
    scale=SCALES,
    dtype=DTYPES,
    seed=st.integers(0, 2**31),
)
def test_layer_norm(kit, counts, channels, layout, biased, scale, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    x = kit.tokens((*counts, channels), layout, dtype, generator, scale=scale)
    weight, bias, x_bias = torch.randn(3, channels, generator=generator).to(dtype)
    operator, x_bias = OPERATORS["layer_norm"], x_bias if biased else None
    for config in kit.pick_configs(operator, random.Random(seed), x, weight, bias, x_bias=x_bias, float8=True):
        # Sums of the same configuration are in the same order.
        config = config or default_config(math.prod(counts), channels, NO_GPU, True)
        result = kit.launch(operator, x, weight, bias, x_bias=x_bias, float8=True, config=config)
        check_rounded_sums(result, kit.launch(operator, x.float(), weight, bias, x_bias=x_bias, config=config))


@fuzz
@given(
    counts=COUNTS,
    half=st.sampled_from([1, 7, 24, 65, 256, 1280, 2100]),
    layout=LAYOUTS,
    biased=st.booleans(),
    scale=SCALES,
    dtype=DTYPES,
    seed=st.integers(0, 2**31),
)
def test_geglu(kit, counts, half, layout, biased, scale, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    x = kit.tokens((*counts, 2 * half), layout, dtype, generator, scale=scale)
    bias = torch.randn(2 * half, generator=generator).to(dtype) if biased else None
    operator = OPERATORS["geglu"]
    values = kit.launch(operator, x.float(), bias=bias)
    for config in kit.pick_configs(operator, random.Random(seed), x, bias=bias, float8=True):
        check(kit.launch(operator, x, bias=bias, float8=True, config=config), values)


def test_rows_of_zeros_and_of_tiny_numbers(kit):
    x = torch.zeros(1, 3, 128)
    x[0, 1], x[0, 2] = 1e-30, 1e-38
    gated = kit.launch(OPERATORS["geglu"], x, bias=None)
    quantized, scale = kit.launch(OPERATORS["geglu"], x, bias=None, float8=True)
    check((quantized, scale), gated)
    assert (scale == 2.0**-126).all()
    quantized, scale = kit.launch(OPERATORS["layer_norm"], x, torch.zeros(128), torch.zeros(128), float8=True)
    assert (quantized.float() == 0).all()
    assert (scale == 2.0**-126).all()


def test_a_row_of_what_is_not_finite_is_not_finite_and_no_other_is(kit):
    x = torch.randn(1, 4, 64)
    x[0, 1, 5], x[0, 2, 6] = math.nan, math.inf
    x[0, 2, 38] = 1.0
    plain = kit.launch(OPERATORS["geglu"], x)
    quantized, scale = kit.launch(OPERATORS["geglu"], x, float8=True)
    product = quantized[0].float() @ torch.ones(32) * scale[:, 0]
    assert product.isfinite().tolist() == [True, False, False, True]
    assert quantized[0, 1].float().isnan().tolist() == plain[0, 1].isnan().tolist()
    check((quantized[:, ::3].contiguous(), scale[::3]), plain[:, ::3])
    quantized, scale = kit.launch(OPERATORS["layer_norm"], x, torch.ones(64), torch.zeros(64), float8=True)
    product = quantized[0].float() @ torch.ones(64) * scale[:, 0]
    assert product.isfinite().tolist() == [True, False, False, True]


def test_the_interpreter_is_refused_to_users():
    with pytest.raises(KernelUnsupported, match="interpreter cuts off what it converts to float8"):
        layer_norm(torch.zeros(1, 8), torch.ones(8), torch.ones(8), float8=True, backend="triton")

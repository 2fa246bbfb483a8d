"""layer_norm, geglu and residual_add: their kernels against float64, in the interpreter."""

import math
import random

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from ldmperf.kernels import OPERATORS, KernelUnsupported, channel_statistics, geglu, layer_norm, residual_add

LAYOUTS = st.sampled_from(["plain", "channels_last", "sliced", "channel_slice", "expanded", "transposed"])
DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])
SEEDS = st.integers(0, 2**31)
COUNTS = st.tuples(st.integers(1, 3), st.sampled_from([1, 2, 5, 17]))
fuzz = settings(max_examples=30, deadline=None)


def exact_layer_norm(x, weight, bias, eps, x_bias, residual):
    total = x.double()
    if x_bias is not None:
        total = total + x_bias.double()
    if residual is not None:
        total = total + residual.double()
    mean = total.mean(-1, keepdim=True)
    variance = (total - mean).square().mean(-1, keepdim=True)
    return (total - mean) / (variance + eps).sqrt() * weight.double() + bias.double(), total


@fuzz
@given(
    counts=COUNTS,
    channels=st.sampled_from([2, 7, 24, 64, 96, 130, 320, 1152]),
    layouts=st.tuples(LAYOUTS, LAYOUTS),
    biased=st.booleans(),
    added=st.booleans(),
    mean=st.sampled_from([0.0, 100.0]),
    dtype=DTYPES,
    seed=SEEDS,
)
def test_layer_norm(kit, counts, channels, layouts, biased, added, mean, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    shape = (*counts, channels)
    x = kit.tokens(shape, layouts[0], dtype, generator, mean)
    weight, bias, x_bias = torch.randn(3, channels, generator=generator).to(dtype)
    residual = kit.tokens(shape, layouts[1], dtype, generator) if added else None
    options = {"x_bias": x_bias if biased else None, "residual": residual}
    eps = 1e-1 if channels < 8 else 1e-3
    exact, exact_sum = exact_layer_norm(x, weight, bias, eps, *options.values())
    own_sum = x + (x_bias if biased else 0) + (residual if added else 0)
    own = F.layer_norm(own_sum, (channels,), weight, bias, eps)
    operator = OPERATORS["layer_norm"]
    for config in kit.pick_configs(operator, random.Random(seed), x, weight, bias, eps, **options):
        result = kit.launch(operator, x, weight, bias, eps, **options, config=config)
        out = result[0] if added else result
        # The sum is rounded to float32 before it is centred.
        rounding = 1e-7 * float(exact_sum.abs().max())
        if kit.relative_rms(out, exact) > 10 * rounding:
            kit.judge(out, exact, own, dtype)
        if added:
            kit.judge(result[1], exact_sum, own_sum, dtype)


def test_layer_norm_at_a_mean_of_1e4(kit):
    x = kit.tokens((2, 5, 320), "plain", torch.float32, torch.Generator().manual_seed(0), mean=1e4)
    weight, bias = torch.ones(320), torch.zeros(320)
    out = kit.launch(OPERATORS["layer_norm"], x, weight, bias)
    assert kit.relative_rms(out, exact_layer_norm(x, weight, bias, 1e-5, None, None)[0]) < 1e-6


def exact_geglu(x, bias):
    x = x.double() if bias is None else x.double() + bias.double()
    value, gate = x.chunk(2, dim=-1)
    return value * gate * torch.special.erfc(-gate / math.sqrt(2)) / 2


@fuzz
@given(
    counts=COUNTS,
    half=st.sampled_from([1, 7, 24, 65, 256, 1280]),
    layout=LAYOUTS,
    biased=st.booleans(),
    scale=st.sampled_from([1.0, 10.0]),
    dtype=DTYPES,
    seed=SEEDS,
)
def test_geglu(kit, counts, half, layout, biased, scale, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    x = kit.tokens((*counts, 2 * half), layout, dtype, generator, scale=scale)
    bias = torch.randn(2 * half, generator=generator).to(dtype) if biased else None
    value, gate = (x if bias is None else x + bias).chunk(2, dim=-1)
    own = value * F.gelu(gate)
    operator = OPERATORS["geglu"]
    for config in kit.pick_configs(operator, random.Random(seed), x, bias=bias):
        kit.judge(kit.launch(operator, x, bias=bias, config=config), exact_geglu(x, bias), own, dtype)


def test_gelu_is_closer_than_by_erf_and_keeps_its_tail():
    gate = torch.linspace(-12, 12, 20_001)
    out = geglu(torch.cat([torch.ones_like(gate), gate]), backend="triton").double()
    own = F.gelu(gate).double()
    exact = exact_geglu(torch.cat([torch.ones_like(gate), gate]), None)
    assert (out - exact).norm() < (own - exact).norm()
    tail = (gate > -5) & (gate < -1)
    assert ((out - exact) / exact)[tail].abs().max() < 1e-4


def test_geglu_of_what_is_not_finite_is_that_of_its_formula():
    gate = torch.tensor([math.inf, -math.inf, math.nan, 1e30, -1e30, 0.0, -0.0, 1e-30])
    # Not F.gelu: on some processors torch's float32 gives NaN for infinity.
    phi = (1 + torch.erf(gate.double() / math.sqrt(2))) / 2
    for value in (1.0, math.nan, math.inf):
        out = geglu(torch.cat([torch.full_like(gate, value), gate]), backend="triton")
        torch.testing.assert_close(out, (value * (gate.double() * phi)).float(), equal_nan=True)


@fuzz
@given(
    batch=st.integers(1, 3),
    channels=st.sampled_from([1, 3, 24, 65, 320]),
    size=st.tuples(st.integers(1, 8), st.integers(1, 8)),
    layouts=st.tuples(LAYOUTS, LAYOUTS),
    biased=st.booleans(),
    enlarge=st.sampled_from([None, (0, 0), (1, 0), (0, 1), (1, 1)]),
    dtype=DTYPES,
    seed=SEEDS,
)
def test_residual_add(kit, batch, channels, size, layouts, biased, enlarge, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    x, residual = (kit.image((batch, channels, *size), layout, dtype, generator) for layout in layouts)
    bias = torch.randn(channels, generator=generator).to(dtype) if biased else None
    to = None if enlarge is None else tuple(2 * n - less for n, less in zip(size, enlarge, strict=True))
    exact = x.double() + residual.double()
    own = x + residual
    if biased:
        exact, own = exact + bias.double()[:, None, None], own + bias[:, None, None]
    if to is not None:
        exact, own = (F.interpolate(value, size=to, mode="nearest") for value in (exact, own))
    operator = OPERATORS["residual_add"]
    for config in kit.pick_configs(operator, random.Random(seed), x, residual, bias, size=to):
        kit.judge(kit.launch(operator, x, residual, bias, size=to, config=config), exact, own, dtype)


@pytest.mark.parametrize("height", range(1, 33))
def test_enlargement_is_torchs_nearest(height):
    x = torch.arange(3.0 * height).reshape(1, 1, height, 3)
    for size in ((2 * height, 6), (2 * height - 1, 5)):
        out = residual_add(x, torch.zeros_like(x), size=size, backend="triton")
        assert torch.equal(out, F.interpolate(x, size=size, mode="nearest"))


def test_nan_and_infinity_propagate(kit):
    x = torch.randn(2, 3, 64)
    x[0, 1, 5], x[1, 2, 6] = math.nan, math.inf
    out, total = layer_norm(x, torch.ones(64), torch.zeros(64), residual=torch.randn(2, 3, 64), backend="triton")
    assert out[0, 1].isnan().all()
    assert out[1, 2].isnan().all()
    assert out.isnan().sum() == 128
    assert total.isnan().sum() == 1
    assert total[1, 2, 6] == math.inf
    image = torch.zeros(1, 2, 2, 2)
    image[0, 1, 0, 1] = math.nan
    assert residual_add(image, torch.zeros_like(image), size=(4, 4), backend="triton").isnan().sum() == 4


def test_float16_overflows_only_where_the_result_does():
    x = torch.full((1, 2, 1, 2), 40000.0).half()
    out = residual_add(x, x, torch.tensor([-30000.0, 0.0]), backend="triton")
    assert (out[0, 0] - 50000.0).abs().max() <= 32
    assert (out[0, 1] == math.inf).all()
    extremes = torch.tensor([[65504.0, -65504.0] * 8]).half()
    y = layer_norm(extremes, torch.ones(16), torch.zeros(16), backend="triton")
    torch.testing.assert_close(y.float().abs(), torch.ones(1, 16))


def test_of_nothing():
    assert layer_norm(torch.empty(0, 8), torch.ones(8), torch.ones(8), backend="triton").shape == (0, 8)
    assert geglu(torch.empty(2, 0, 8), backend="triton").shape == (2, 0, 4)
    empty = torch.empty(2, 3, 0, 5)
    assert residual_add(empty, empty, backend="triton").shape == empty.shape


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda: geglu(torch.randn(3, 8).double(), backend="triton"), "x is torch.float64"),
        (lambda: geglu(torch.randn(8, 3).t(), backend="triton"), "last dimension has stride"),
        (
            lambda: layer_norm(
                torch.randn(2, 3, 4, 8).transpose(0, 2)[:, ::2], torch.ones(8), torch.ones(8), backend="triton"
            ),
            "do not collapse",
        ),
        (lambda: layer_norm(torch.randn(1, 16640), *torch.ones(2, 16640), backend="triton"), "more than 16384"),
        (
            lambda: residual_add(
                torch.zeros(1, 4, 2, 2), torch.zeros(1, 4, 2, 2), torch.zeros(8)[::2], backend="triton"
            ),
            "bias is not contiguous",
        ),
    ],
)
def test_what_they_cannot_serve_is_named(call, reason):
    with pytest.raises(KernelUnsupported, match=reason):
        call()


@fuzz
@given(
    batch=st.integers(1, 3),
    channels=st.sampled_from([1, 3, 8, 24, 40, 96]),
    size=st.tuples(st.integers(1, 13), st.integers(1, 13)),
    layouts=st.tuples(LAYOUTS, LAYOUTS),
    biased=st.booleans(),
    mean=st.sampled_from([0.0, 100.0]),
    dtype=DTYPES,
    seed=st.integers(0, 2**31),
)
def test_what_a_residual_add_leaves(kit, batch, channels, size, layouts, biased, mean, dtype, seed):
    operator = OPERATORS["residual_add"]
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, channels, *size)
    x = kit.image(shape, layouts[0], dtype, generator, mean)
    residual = kit.image(shape, layouts[1], dtype, generator)
    bias = torch.randn(channels, generator=generator) if biased else None
    plain = kit.launch(operator, x, residual, bias)
    for config in kit.pick_configs(operator, random.Random(seed), x, residual, bias, statistics=True):
        out, statistics = kit.launch(operator, x, residual, bias, statistics=True, config=config)
        assert torch.equal(out, plain)
        exact = channel_statistics(out, 64)
        assert statistics.shape == exact.shape
        assert torch.allclose(statistics[:, :, 0], exact[:, :, 0], rtol=1e-6, atol=1e-6)
        # A float32 mean is off by 1e-7 of it, and each deviation with it.
        noise = 64 * (2e-6 + 1e-7 * mean) ** 2
        assert torch.allclose(statistics[:, :, 1], exact[:, :, 1], rtol=1e-5 + 1e-6 * mean, atol=noise)
    reference = residual_add(x, residual, bias, statistics=True, backend="torch")
    assert torch.allclose(reference[1], exact, rtol=1e-2, atol=1e-2 * (1 + mean))

"""linear: its kernels against float64, in the interpreter."""

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ldmperf.kernels import OPERATORS, KernelUnsupported, linear, linear_ref
from ldmperf.kernels._linear_config import LinearConfig

LINEAR = OPERATORS["linear"]
LAYOUTS = st.sampled_from(["plain", "sliced", "expanded", "transposed"])
DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])
fuzz = settings(max_examples=30, deadline=None)


def exact_linear(x, weight, bias, norm_weight, norm_bias, x_bias, eps, gated):
    """By the formulas, in float64, with no operator of torch's but the product."""
    x = x.double()
    if norm_weight is not None:
        x = x if x_bias is None else x + x_bias.double()
        centred = x - x.mean(-1, keepdim=True)
        x = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
        x = x * norm_weight.double() + norm_bias.double()
    y = x @ weight.double().t()
    y = y if bias is None else y + bias.double()
    if not gated:
        return y
    value, gate = y.chunk(2, dim=-1)
    return value * gate * torch.special.erfc(-gate / math.sqrt(2)) / 2


@fuzz
@given(
    counts=st.tuples(st.integers(1, 2), st.sampled_from([1, 5, 70])),
    channels=st.sampled_from([3, 16, 24, 40, 64, 96, 130, 320, 544]),
    columns=st.sampled_from([1, 24, 64, 96, 130]),
    layout=LAYOUTS,
    weight_layout=st.sampled_from(["plain", "sliced"]),
    normed=st.booleans(),
    shifted=st.booleans(),
    biased=st.booleans(),
    gated=st.booleans(),
    mean=st.sampled_from([0.0, 30.0]),
    dtype=DTYPES,
    seed=st.integers(0, 2**31),
)
def test_linear(
    kit, counts, channels, columns, layout, weight_layout, normed, shifted, biased, gated, mean, dtype, seed
):
    generator = torch.Generator().manual_seed(seed)
    x = kit.tokens((*counts, channels), layout, dtype, generator, mean)
    rows = 2 * columns if gated else columns
    weight = kit.tokens((1, rows, channels), weight_layout, dtype, generator, scale=channels**-0.5)[0]
    bias = torch.randn(rows, generator=generator).to(dtype) if biased else None
    vectors = torch.randn(3, channels, generator=generator).to(dtype)
    norms = {"norm_weight": vectors[0], "norm_bias": vectors[1]} if normed else {}
    if normed and shifted:
        norms["x_bias"] = vectors[2]
    # So few channels may lie so close to each other that rounding decides.
    eps = 1e-1 if channels < 8 else 1e-3
    options = {**norms, "eps": eps, "activation": "geglu" if gated else None}
    exact = exact_linear(
        x, weight, bias, norms.get("norm_weight"), norms.get("norm_bias"), norms.get("x_bias"), eps, gated
    )
    own = linear_ref(x, weight, bias, **options)
    for config in kit.pick_configs(LINEAR, random.Random(seed), x, weight, bias, **options):
        out = kit.launch(LINEAR, x, weight, bias, **options, config=config)
        # Of a few results torch's own error is a matter of luck.
        kit.judge(out, exact, own, dtype, factor=2.0 if exact.numel() > 100 else 4.0)


@pytest.mark.parametrize("block_k", [0, 32])
def test_every_row_and_column_is_written_once_wherever_tiles_end(kit, block_k):
    """Whole numbers, whose sums float32 holds exactly; the norm is of rows that it leaves as they are."""
    generator = torch.Generator().manual_seed(0)
    for rows, channels, columns in ((64, 32, 64), (65, 32, 65), (63, 64, 31), (1, 32, 1), (200, 96, 33)):
        # Half of a row 1 and half -1: mean 0, variance 1.
        signs = torch.ones(rows, channels)
        signs[:, ::2] = -1
        x = signs[:, torch.randperm(channels, generator=generator)]
        weight = torch.randint(-4, 5, (columns, channels), generator=generator).float()
        norms = {"norm_weight": torch.ones(channels), "norm_bias": torch.zeros(channels), "eps": 0.0}
        config = LinearConfig(32, 32, block_k, 1, 4, 2)
        out = kit.launch(LINEAR, x, weight, **norms, config=config)
        assert torch.equal(out, x @ weight.t()), (rows, channels, columns)


@pytest.mark.parametrize("tiles_n", [1, 2, 4])
def test_tiles_of_columns_that_share_a_norm(kit, tiles_n):
    generator = torch.Generator().manual_seed(1)
    x, weight = torch.randn(70, 64, generator=generator), torch.randn(2 * 192, 64, generator=generator)
    norms = {"norm_weight": torch.randn(64), "norm_bias": torch.randn(64)}
    exact = exact_linear(x, weight, None, *norms.values(), None, 1e-5, True)
    config = LinearConfig(32, 32, 0, tiles_n, 4, 2)
    out = kit.launch(LINEAR, x, weight, **norms, activation="geglu", config=config)
    assert kit.relative_rms(out, exact) < 1e-6


def test_a_norm_at_a_mean_of_1e4(kit):
    x = kit.tokens((1, 5, 96), "plain", torch.float32, torch.Generator().manual_seed(0), mean=1e4)[0]
    norms = {"norm_weight": torch.ones(96), "norm_bias": torch.zeros(96)}
    out = kit.launch(LINEAR, x, torch.eye(96), **norms)
    assert kit.relative_rms(out, exact_linear(x, torch.eye(96), None, *norms.values(), None, 1e-5, False)) < 1e-6


def test_nan_and_infinity_stay_in_their_rows():
    x = torch.randn(4, 64)
    x[1, 5], x[2, 6] = math.nan, math.inf
    ones = torch.ones(64)
    for options in ({}, {"norm_weight": ones, "norm_bias": ones}, {"activation": "geglu"}):
        out = linear(x, torch.randn(32, 64), **options, backend="triton")
        assert not out[1].isfinite().any()
        assert not out[2].isfinite().all()
        assert out[[0, 3]].isfinite().all()


def test_float16_overflows_only_where_the_result_does():
    """Values of 4e4 times gates of 1e-3: their product is small, and so is what is multiplied before the norm."""
    x = torch.full((1, 16), 2500.0).half()
    weight = torch.cat([torch.ones(8, 16), torch.zeros(8, 16)]).half()
    bias = torch.cat([torch.zeros(8), torch.full((8,), 1e-3)]).half()
    out = linear(x, weight, bias, activation="geglu", backend="triton")
    torch.testing.assert_close(out.float(), torch.full((1, 8), 4e4 * 1e-3 * 0.5004), rtol=2e-3, atol=0)


def test_of_nothing():
    assert linear(torch.empty(0, 8), torch.ones(4, 8), backend="triton").shape == (0, 4)
    assert linear(torch.empty(2, 0, 8), torch.ones(4, 8), activation="geglu", backend="triton").shape == (2, 0, 2)


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (
            lambda: linear(torch.randn(3, 8).double(), torch.randn(4, 8).double(), backend="triton"),
            "x is torch.fl",
        ),
        (
            lambda: linear(torch.randn(8, 3).t(), torch.randn(4, 8), backend="triton"),
            "x's last dimension has stri",
        ),
        (
            lambda: linear(torch.randn(3, 8), torch.randn(8, 4).t(), backend="triton"),
            "weight's last dimension has",
        ),
        (
            lambda: linear(torch.randn(3, 8), torch.randn(4, 8), torch.randn(8)[::2], backend="triton"),
            "bias is not contiguous",
        ),
        (
            lambda: linear(torch.randn(2, 3, 4, 8).transpose(0, 2)[:, ::2], torch.randn(4, 8), backend="triton"),
            "col",
        ),
    ],
)
def test_what_they_cannot_serve_is_named(call, reason):
    with pytest.raises(KernelUnsupported, match=reason):
        call()


def test_bfloat16_is_refused_in_the_interpreter_for_users():
    x = torch.randn(3, 8).bfloat16()
    with pytest.raises(KernelUnsupported, match="multiplies bfloat16"):
        linear(x, torch.randn(4, 8).bfloat16(), backend="triton")


def test_without_channels_it_is_refused_and_auto_is_the_bias():
    x, weight, bias, none = torch.empty(5, 0), torch.empty(3, 0), torch.ones(3), torch.empty(0)
    options = {"norm_weight": none, "norm_bias": none}
    with pytest.raises(KernelUnsupported, match="there are no channels"):
        linear(x, weight, bias, **options, backend="triton")
    assert torch.equal(linear(x, weight, bias, **options), torch.ones(5, 3))


def test_a_configuration_that_would_leave_columns_out_is_refused():
    with pytest.raises(ValueError, match="several tiles"):
        LinearConfig(32, 32, 32, 2, 4, 2)
    with pytest.raises(ValueError, match="keeps rows for their norm, and there is none"):
        LINEAR.plan(LINEAR.bind(torch.randn(3, 32), torch.randn(32, 32)), config=LinearConfig(32, 32, 0, 1, 4, 2))

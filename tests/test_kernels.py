"""The operators' torch backend against float64 formulas written out, over awkward shapes, strides and values."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ldmperf.kernels import attention, geglu, group_norm_silu, layer_norm

# Relative RMS error against float64; half dtypes round the result once, and torch's attention rounds inside too.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
DTYPES = st.sampled_from(list(TOLERANCE))
SEEDS = st.integers(0, 2**31)
fuzz = settings(max_examples=40, deadline=None)


def assert_close(actual, expected, dtype, factor=1.0):
    assert actual.dtype == dtype
    assert actual.shape == expected.shape
    if expected.numel():
        error = (actual.double() - expected).norm() / expected.norm().clamp_min(1e-6)
        assert error.item() < factor * TOLERANCE[dtype]


def strided(shape, kind, dtype, seed):
    """A tensor of `shape` that is not plain memory: a slice, a transpose, an expanded batch, or channels-last."""
    generator = torch.Generator().manual_seed(seed)

    def random(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype)

    if kind == "slice":
        return random(shape[0] + 1, *shape[1:-1], 2 * shape[-1])[1:, ..., : shape[-1]]
    if kind == "expanded":
        return random(1, *shape[1:]).expand(*shape)
    if kind == "transposed":
        return random(shape[1], shape[0], *shape[2:]).transpose(0, 1)
    if kind == "channels_last":
        return random(*shape).contiguous(memory_format=torch.channels_last)
    return random(*shape)


KINDS = st.sampled_from(["plain", "slice", "expanded", "transposed"])


def attention64(q, k, v, scale):
    scores = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()) * scale
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    weights = weights / weights.sum(-1, keepdim=True)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v.double())


@fuzz
@given(
    batch=st.integers(1, 3),
    queries=st.integers(1, 40),
    keys=st.integers(1, 90),
    heads=st.integers(1, 3),
    dim=st.sampled_from([1, 4, 7, 8, 12, 20, 40, 64, 160]),
    kind=KINDS,
    dtype=DTYPES,
    scale=st.sampled_from([None, 0.3]),
    seed=SEEDS,
)
def test_attention(batch, queries, keys, heads, dim, kind, dtype, scale, seed):
    q = strided((batch, queries, heads, dim), kind, dtype, seed)
    k = strided((batch, keys, heads, dim), kind, dtype, seed + 1)
    v = strided((batch, keys, heads, dim), kind, dtype, seed + 2)
    out = attention(q, k, v, scale=scale, backend="torch")
    assert out.is_contiguous()
    assert_close(out, attention64(q, k, v, scale or dim**-0.5), dtype, factor=4)


def test_attention_reads_a_packed_projection():
    qkv = torch.randn(2, 9, 3, 4, 12)
    q, k, v = qkv.unbind(2)
    assert_close(attention(q, k, v, backend="torch"), attention64(q, k, v, 12**-0.5), torch.float32)


def test_attention_of_nothing():
    q = torch.randn(2, 5, 3, 8)
    assert attention(q[:, :0], q, q, backend="torch").shape == (2, 0, 3, 8)
    assert attention(q[:0], q[:0], q[:0], backend="torch").shape == (0, 5, 3, 8)
    assert torch.equal(attention(q, q[:, :0], q[:, :0], backend="torch"), torch.zeros_like(q))


def test_attention_survives_large_logits_and_passes_nan_on():
    q, k, v = (torch.randn(1, 6, 2, 8, dtype=torch.float32) for _ in range(3))
    q[:, 0] *= 1e4
    assert_close(attention(q, k, v, backend="torch"), attention64(q, k, v, 8**-0.5), torch.float32, factor=10)
    v[0, 3, 1, 2] = math.nan
    out = attention(q, k, v, backend="torch")
    assert out[0, :, 1, 2].isnan().all()
    assert out.isnan().sum() == 6


def group_norm64(x, groups, weight, bias, eps, x_bias, activation):
    x = x.double()
    if x_bias is not None:
        x = x + x_bias.double()[:, :, None, None]
    grouped = x.reshape(x.shape[0], groups, -1)
    mean = grouped.mean(-1, keepdim=True)
    variance = (grouped - mean).square().mean(-1, keepdim=True)
    y = ((grouped - mean) / (variance + eps).sqrt()).reshape(x.shape)
    if weight is not None:
        y = y * weight.double()[:, None, None]
    if bias is not None:
        y = y + bias.double()[:, None, None]
    return y / (1 + torch.exp(-y)) if activation == "silu" else y


@fuzz
@given(
    batch=st.integers(1, 3),
    groups=st.sampled_from([1, 2, 32]),
    width=st.sampled_from([1, 2, 3, 10]),
    size=st.tuples(st.integers(1, 9), st.integers(2, 9)),
    kind=st.sampled_from(["plain", "slice", "expanded", "transposed", "channels_last"]),
    affine=st.booleans(),
    shifted=st.sampled_from([None, "plain", "expanded"]),
    activation=st.sampled_from(["silu", None]),
    dtype=DTYPES,
    seed=SEEDS,
)
def test_group_norm_silu(batch, groups, width, size, kind, affine, shifted, activation, dtype, seed):
    channels = groups * width
    x = strided((batch, channels, *size), kind, dtype, seed)
    weight, bias = (torch.randn(2, channels).to(dtype)) if affine else (None, None)
    x_bias = None if shifted is None else strided((batch, channels), shifted, dtype, seed + 1)
    out = group_norm_silu(x, groups, weight, bias, 1e-5, x_bias=x_bias, activation=activation, backend="torch")
    assert_close(out, group_norm64(x, groups, weight, bias, 1e-5, x_bias, activation), dtype, factor=2)
    if kind == "channels_last":
        assert out.is_contiguous(memory_format=torch.channels_last)
    if kind == "plain":
        assert out.is_contiguous()


def test_group_norm_at_a_large_mean():
    """A one-pass variance in float32 would be wrong by tens of percent here."""
    x = (torch.randn(1, 64, 8, 8, dtype=torch.float64) + 1e3).float()
    out = group_norm_silu(x, 32, activation=None, backend="torch")
    assert_close(out, group_norm64(x, 32, None, None, 1e-5, None, None), torch.float32, factor=100)


def test_group_norm_of_nothing_and_nan():
    assert group_norm_silu(torch.empty(0, 4, 3, 3), 2, backend="torch").shape == (0, 4, 3, 3)
    assert group_norm_silu(torch.empty(2, 4, 0, 3), 2, backend="torch").shape == (2, 4, 0, 3)
    x = torch.randn(2, 4, 3, 3)
    x[1, 3, 0, 0] = math.nan
    out = group_norm_silu(x, 2, backend="torch")
    assert out[1, 2:].isnan().all()
    assert out.isnan().sum() == 18


def layer_norm64(x, weight, bias, eps):
    x = x.double()
    mean = x.mean(-1, keepdim=True)
    variance = (x - mean).square().mean(-1, keepdim=True)
    return (x - mean) / (variance + eps).sqrt() * weight.double() + bias.double()


@fuzz
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(2, 70)),
    kind=KINDS,
    residual=st.booleans(),
    dtype=DTYPES,
    seed=SEEDS,
)
def test_layer_norm(shape, kind, residual, dtype, seed):
    x = strided(shape, kind, dtype, seed)
    weight, bias = torch.randn(2, shape[-1]).to(dtype)
    if not residual:
        out = layer_norm(x, weight, bias, backend="torch")
        assert out.is_contiguous()
        assert_close(out, layer_norm64(x, weight, bias, 1e-5), dtype, factor=10)
        return
    other = strided(shape, kind, dtype, seed + 1)
    out, total = layer_norm(x, weight, bias, residual=other, backend="torch")
    assert out.is_contiguous()
    assert total.is_contiguous()
    assert_close(total, x.double() + other.double(), dtype)
    assert_close(out, layer_norm64(x.double() + other.double(), weight, bias, 1e-5), dtype, factor=10)


@fuzz
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(0, 9), st.integers(0, 40)), kind=KINDS, dtype=DTYPES, seed=SEEDS
)
def test_geglu(shape, kind, dtype, seed):
    x = strided((*shape[:2], 2 * shape[2]), kind, dtype, seed)
    value, gate = x.double().chunk(2, -1)
    expected = value * 0.5 * gate * (1 + torch.erf(gate / math.sqrt(2)))
    out = geglu(x, backend="torch")
    assert out.is_contiguous()
    assert_close(out, expected, dtype, factor=2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: attention(x, x[..., :2], x[..., :2]), r"k must be \[.*, Nk, "),
        (lambda x: attention(x, x, x[:, :1]), "q must be"),
        (lambda x: attention(x, x.double(), x.double()), "one float dtype"),
        (lambda x: attention(x.int(), x.int(), x.int()), "one float dtype"),
        (lambda x: attention(x, x.to("meta"), x.to("meta")), "share a device"),
        (lambda x: group_norm_silu(x, 3), "do not divide"),
        (lambda x: group_norm_silu(x, 0), "do not divide"),
        (lambda x: group_norm_silu(x, 2, activation="relu"), "activation"),
        (lambda x: group_norm_silu(x, 2, torch.ones(3)), r"weight must be a float \[4\]"),
        (lambda x: group_norm_silu(x, 2, x_bias=torch.ones(4)), r"x_bias must be a float \[2, 4\]"),
        (lambda x: group_norm_silu(x[0], 2), r"\[B, C, H, W\]"),
        (lambda x: layer_norm(x, torch.ones(3), torch.ones(4)), r"must be a float \[4\]"),
        (lambda x: layer_norm(x, torch.ones(4), torch.ones(4), residual=x[:1]), "residual must be"),
        (lambda x: geglu(x[..., :3]), "2C"),
        (lambda x: geglu(x, backend="cuda"), "unknown backend 'cuda'"),
    ],
)
def test_what_does_not_fit_is_named(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call(torch.randn(2, 4, 4, 4))
    assert "\n" not in str(caught.value)

"""attention's kernels against float64, in the interpreter."""

import dataclasses
import math
import random

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from ldmperf.kernels import KernelUnsupported, attention
from ldmperf.kernels.attention import OPERATOR, AttentionConfig

FAMILY_DIMS = (8, 12, 16, 20, 24, 28, 32, 36, 40, 48, 56, 64, 72, 80, 96, 112, 128, 144, 160, 192, 256, 384)
LAYOUTS = ("plain", "packed", "sliced", "expanded", "expanded heads", "transposed heads", "transposed batch")
HALF = (torch.float16, torch.bfloat16)
# Small tiles: of a long context, and two of a short one's, whose second walks over three tiles of queries.
FLASH = AttentionConfig(16, 16, 1, 1)
SHORT, WALKING = AttentionConfig(16, 0, 1, 1), AttentionConfig(16, 0, 1, 1, query_tiles=3)
EVERY_KERNEL = (
    FLASH,
    dataclasses.replace(FLASH, matrix_sums=True, polynomial=2),
    dataclasses.replace(FLASH, ahead=True),
    SHORT,
    dataclasses.replace(WALKING, matrix_sums=True, polynomial=1),
)
every_kernel = pytest.mark.parametrize("config", EVERY_KERNEL)


def heads(shape, layout, dtype, generator):
    """[B, N, H, D] of the layout, its last dimension contiguous; the storage around it is NaN."""
    batch, tokens, count, dim = shape

    def random_values(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype)

    if layout == "packed":
        around = torch.full((batch + 1, tokens + 2, 3, count, dim), torch.nan, dtype=dtype)
        return around[1:, 1:-1, 1].copy_(random_values(*shape))
    if layout == "sliced":
        around = torch.full((batch, tokens, count + 1, 2 * dim + 3), torch.nan, dtype=dtype)
        return around[:, :, :-1, 3 : dim + 3].copy_(random_values(*shape))
    if layout == "expanded":
        return random_values(1, tokens, count, dim).expand(*shape)
    if layout == "expanded heads":
        return random_values(batch, tokens, 1, dim).expand(*shape)
    if layout == "transposed heads":
        return random_values(batch, count, tokens, dim).transpose(1, 2)
    if layout == "transposed batch":
        return random_values(tokens, batch, count, dim).transpose(0, 1)
    return random_values(*shape)


def attended(k, key_lengths, key_mask):
    """[B, Nk] True for keys to attend to, or None."""
    if key_lengths is None:
        return key_mask
    return torch.stack([torch.arange(k.shape[1]) < int(length) for length in key_lengths])


def without(x, mask):
    """x [B, N, H, D] with zeros where the mask [B, N] leaves out."""
    return x if mask is None else torch.where(mask[:, :, None, None], x, 0)


def exact_attention(q, k, v, *, scale=None, key_lengths=None, key_mask=None):
    mask = attended(k, key_lengths, key_mask)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    scores = torch.einsum("bqhd,bkhd->bhqk", q.double(), without(k, mask).double()) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None, :], -math.inf)
    weights = torch.softmax(scores, dim=-1)
    if mask is not None:
        weights = weights.masked_fill(~mask.any(1)[:, None, None, None], 0.0)
    return torch.einsum("bhqk,bkhd->bqhd", weights, without(v, mask).double())


def torchs_own(q, k, v, *, scale=None, key_lengths=None, key_mask=None):
    mask = attended(k, key_lengths, key_mask)
    q, k, v = (x.transpose(1, 2) for x in (q, without(k, mask), without(v, mask)))
    where = None if mask is None else mask[:, None, None, :]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=where, scale=scale).transpose(1, 2)
    return out if mask is None else torch.where(mask.any(1)[:, None, None, None], out, 0)


def some_config(choose, keys, dtype):
    """Any configuration, those among them that no tuner would try."""
    half = dtype in HALF
    short = keys <= 128 and choose.random() < 0.5
    return AttentionConfig(
        block_m=choose.choice((16, 32, 64)),
        block_n=0 if short else choose.choice((16, 32, 64, 128)),
        num_warps=4,
        num_stages=choose.randrange(1, 4),
        polynomial=choose.randrange(5) if half else 0,
        matrix_sums=half and choose.random() < 0.5,
        query_tiles=choose.randrange(1, 5) if short else 1,
        ahead=choose.random() < 0.5,
    )


def random_masks(kind, batch, keys, choose, generator):
    """Arguments that leave keys out, of several dtypes and strides."""
    if kind == "lengths":
        lengths = torch.tensor([choose.choice((0, choose.randint(-2, keys + 3), keys)) for _ in range(batch)])
        return {"key_lengths": lengths.to(choose.choice((torch.int32, torch.int64)))}
    if kind is None:
        return {}
    share = choose.choice((0.05, 0.5, 0.95))
    mask = torch.rand(keys, batch, generator=generator).t() < share
    mask[choose.randrange(batch)] = choose.random() < 0.5
    if kind == "sliced mask":
        around = torch.ones(batch + 1, 2 * keys + 1, dtype=torch.bool)
        return {"key_mask": around[1:, 1::2].copy_(mask)}
    if kind == "expanded mask":
        return {"key_mask": mask[:1].expand(batch, keys)}
    return {"key_mask": mask if kind == "transposed mask" else mask.contiguous()}


@settings(max_examples=30, deadline=None)
@given(
    dim=st.one_of(
        st.sampled_from(FAMILY_DIMS),
        st.integers(1, 24).map(lambda n: 4 * n),
        st.integers(1, 96).map(lambda n: 4 * n),
    ),
    queries=st.integers(1, 200),
    keys=st.one_of(st.integers(1, 128), st.just(77), st.integers(100, 200)),
    count=st.integers(1, 3),
    batch=st.integers(1, 3),
    layouts=st.tuples(*[st.sampled_from(LAYOUTS)] * 3),
    masked=st.sampled_from([None, "lengths", "mask", "transposed mask", "sliced mask", "expanded mask"]),
    scale=st.sampled_from([None, 0.03, 1.0]),
    dtype=st.sampled_from([torch.float32, *HALF]),
    seed=st.integers(0, 2**31),
)
def test_against_float64(kit, dim, queries, keys, count, batch, layouts, masked, scale, dtype, seed):
    if dim > 96:
        # The interpreter takes the time of the padded product.
        queries, count = queries % 70 + 1, 1
    generator, choose = torch.Generator().manual_seed(seed), random.Random(seed)
    q = heads((batch, queries, count, dim), layouts[0], dtype, generator)
    k, v = (heads((batch, keys, count, dim), layout, dtype, generator) for layout in layouts[1:])
    options = {"scale": scale, **random_masks(masked, batch, keys, choose, generator)}
    mask = attended(k, options.get("key_lengths"), options.get("key_mask"))
    for x, layout in zip((k, v), layouts[1:], strict=True):
        if mask is not None and not layout.startswith("expanded"):
            x[~mask] = torch.nan
    exact, own = exact_attention(q, k, v, **options), torchs_own(q, k, v, **options)
    for config in (*kit.pick_configs(OPERATOR, choose, q, k, v, **options)[:2], some_config(choose, keys, dtype)):
        out = kit.launch(OPERATOR, q, k, v, **options, config=config)
        kit.judge(out, exact, own, dtype, factor=1.5)
        assert out.is_contiguous()
        if mask is not None:
            assert not out[~mask.any(1)].any()
    assert torch.equal(out, kit.launch(OPERATOR, q, k, v, **options, config=config)), "two runs, same bits"


@pytest.mark.parametrize("dim", [*range(4, 100, 4), *range(112, 385, 16)])
def test_every_head_dimension(kit, dim):
    generator = torch.Generator().manual_seed(dim)
    q = heads((1, 5, 2, dim), "packed", torch.float32, generator)
    k, v = (heads((1, 19, 2, dim), "packed", torch.float32, generator) for _ in range(2))
    exact, own = exact_attention(q, k, v), torchs_own(q, k, v)
    for config in (FLASH, SHORT):
        kit.judge(kit.launch(OPERATOR, q, k, v, config=config), exact, own, torch.float32, factor=1.5)


@pytest.mark.parametrize("keys", [1, 15, 16, 17, 33, 48, 64, 77, 80, 97, 127, 128])
def test_every_kind_of_last_tile(kit, keys):
    """Whole, ragged, in one part and in two; seen also by lengths that end in each."""
    generator = torch.Generator().manual_seed(keys)
    q = heads((4, 17, 1, 12), "plain", torch.float16, generator)
    k, v = (heads((4, keys, 1, 12), "plain", torch.float16, generator) for _ in range(2))
    for lengths in (None, torch.tensor([keys, max(keys - 1, 0), keys // 2, keys // 16 * 16])):
        exact, own = (f(q, k, v, key_lengths=lengths) for f in (exact_attention, torchs_own))
        for config in EVERY_KERNEL:
            out = kit.launch(OPERATOR, q, k, v, key_lengths=lengths, config=config)
            kit.judge(out, exact, own, torch.float16, factor=1.5)


@every_kernel
def test_a_packed_projection_is_read_in_place(kit, config):
    qkv = torch.full((2, 21, 4, 3, 40), torch.nan)
    qkv[:, :, :3] = torch.randn(2, 21, 3, 3, 40, generator=torch.Generator().manual_seed(0))
    q, k, v, _ = qkv.half().unbind(2)
    out = kit.launch(OPERATOR, q, k, v, config=config)
    kit.judge(out, exact_attention(q, k, v), torchs_own(q, k, v), torch.float16, factor=1.5)


def masks_of(lengths, keys):
    """The same keys by lengths, and by a mask."""
    return (
        {"key_lengths": torch.tensor(lengths, dtype=torch.int32)},
        {"key_mask": torch.arange(keys) < torch.tensor(lengths)[:, None]},
    )


@every_kernel
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_what_is_masked_off_does_not_matter_and_a_row_of_nothing_is_zeros(kit, config, dtype):
    if dtype == torch.float32:
        config = dataclasses.replace(config, polynomial=0, matrix_sums=False)
    q, k, v = torch.randn(3, 5, 33, 1, 20, generator=torch.Generator().manual_seed(0)).to(dtype)
    lengths = [0, 17, 33, -3, 99]
    for options in masks_of(lengths, 33):
        expected = kit.launch(OPERATOR, q, k, v, **options, config=config)
        assert torch.equal(expected[[0, 3]], torch.zeros_like(expected[[0, 3]]))
        kit.judge(expected, exact_attention(q, k, v, **options), torchs_own(q, k, v, **options), dtype, factor=1.5)
        k2, v2 = k.clone(), v.clone()
        for b, length in enumerate(lengths):
            k2[b, max(length, 0) :] = math.nan
            v2[b, max(length, 0) :] = math.inf
        assert torch.equal(kit.launch(OPERATOR, q, k2, v2, **options, config=config), expected)


@every_kernel
def test_lengths_of_any_stride(kit, config):
    q, k, v = torch.randn(3, 3, 20, 1, 8, generator=torch.Generator().manual_seed(0)).half()
    spread = torch.tensor([7, 99, 13, 99, 20, 99])[::2]
    for lengths in (spread, torch.tensor([7]).expand(3), torch.tensor([9, 13])[1:].expand(3)):
        out = kit.launch(OPERATOR, q, k, v, key_lengths=lengths, config=config)
        expected = kit.launch(OPERATOR, q, k, v, key_lengths=lengths.contiguous(), config=config)
        assert torch.equal(out, expected)


@every_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("order", ["rising", "falling", "mixed", "low", "high"])
def test_logits_of_1e4(kit, config, dtype, order):
    """The largest of a row last, first, anywhere; and all far from zero, with less than one between them."""
    if dtype == torch.float32:
        config = dataclasses.replace(config, polynomial=0, matrix_sums=False)
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 48, 1, 8, generator=generator)
    ramp = torch.linspace(-100, 100, 48)
    first = {
        "rising": ramp,
        "falling": ramp.flip(0),
        "mixed": ramp[torch.randperm(48, generator=generator)],
        "low": torch.full((48,), -100.0),
        "high": torch.full((48,), 100.0),
    }[order]
    k[0, :, 0, 0] = first
    # Very uneven rows: the logits of some are large, those of the others small.
    q[..., 0] = 100.0
    q[:, ::3, :, 0] = 0.1
    q, k, v = (x.to(dtype) for x in (q, k, v))
    out = kit.launch(OPERATOR, q, k, v, scale=1.0, config=config)
    kit.judge(out, exact_attention(q, k, v, scale=1.0), torchs_own(q, k, v, scale=1.0), dtype, factor=1.5)


@every_kernel
@pytest.mark.parametrize("scale", [1e-30, 1e-6, 300.0, 2.0**16])
def test_extreme_scales(kit, config, scale):
    """From the mean of all values to the value of the largest logit."""
    q, k, v = torch.randn(3, 2, 33, 1, 8, generator=torch.Generator().manual_seed(1))
    config = dataclasses.replace(config, polynomial=0, matrix_sums=False)
    for options in ({}, {"key_lengths": torch.tensor([0, 20])}):
        out = kit.launch(OPERATOR, q, k, v, scale=scale, **options, config=config)
        own = torchs_own(q, k, v, scale=min(scale, 300.0), **options)
        exact = exact_attention(q, k, v, scale=scale, **options)
        if scale == 300.0:
            kit.judge(out, exact, own, torch.float32, factor=1.5)
        else:
            assert kit.relative_rms(out, exact) < 1e-6


@every_kernel
def test_a_nan_stays_where_it_belongs(kit, config):
    """Of a query in its row; of a key in all rows of its head; of a value in its column of them.

    Each alone in a head of its own, in the first tile and in the last; the first image has none.
    """
    shape = (4, 40, 2, 8)
    x = dict(
        zip("qkv", torch.randn(3, *shape, generator=torch.Generator().manual_seed(0)).bfloat16(), strict=True)
    )
    nan = torch.zeros(shape, dtype=torch.bool)
    for image, name in enumerate("qkv", 1):
        for head, where in enumerate((2, 39)):
            x[name][image, where, head, 5] = torch.nan
            row, column = where if name == "q" else slice(None), 5 if name == "v" else slice(None)
            nan[image, row, head, column] = True
    clean = {key: value.nan_to_num(0.0) for key, value in x.items()}
    for options in ({}, {"key_lengths": torch.tensor([0, 40, 40, 40])}):
        out = kit.launch(OPERATOR, **x, **options, config=config)
        assert torch.equal(out.isnan(), nan)
        expected = kit.launch(OPERATOR, **clean, **options, config=config)
        assert torch.equal(out[~nan], expected[~nan])


@every_kernel
@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_infinity_propagates(kit, config, value):
    q, k, v = torch.randn(3, 1, 36, 1, 8, generator=torch.Generator().manual_seed(0)).half()
    v[0, 20, 0, 3] = value
    v[0, 4, 0, 6], v[0, 35, 0, 6] = value, -value
    # Of the scores of one key, infinite ones: what is -inf counts for nothing, what is inf has no softmax.
    k[0, 7, 0, 0] = value
    exact = exact_attention(q, k, v)
    assert exact[..., 0].isnan().any()
    assert exact[..., 0].isfinite().any()
    out = kit.launch(OPERATOR, q, k, v, config=config)
    torch.testing.assert_close(out.double(), exact, rtol=5e-3, atol=5e-3, equal_nan=True)


@every_kernel
@pytest.mark.parametrize("shape", [(0, 3, 5), (2, 0, 5), (2, 3, 0)])
def test_of_nothing(kit, config, shape):
    batch, queries, keys = shape
    q, k = torch.randn(batch, queries, 2, 8), torch.randn(batch, keys, 2, 8)
    masks = (
        {},
        {"key_lengths": torch.full((batch,), 3)},
        {"key_mask": torch.ones(batch, keys, dtype=torch.bool)},
    )
    for options in masks:
        out = kit.launch(OPERATOR, q, k, k, **options, config=config)
        assert torch.equal(out, torch.zeros_like(q) if keys == 0 else torch.empty_like(q))
        assert torch.equal(attention(q, k, k, **options, backend="triton"), out)


@pytest.mark.parametrize("config", [dataclasses.replace(FLASH, block_n=32), SHORT])
@pytest.mark.parametrize("polynomial", range(5))
def test_so_many_of_eight_exponentials_are_polynomials(kit, config, polynomial):
    """Told by their errors: a value of one key alone shows that key's weight."""
    keys = 64
    q, k = torch.randn(2, 1, keys, 1, keys, generator=torch.Generator().manual_seed(0))
    v = torch.eye(keys)[None, :, None, :]
    out = kit.launch(OPERATOR, q, k, v, config=dataclasses.replace(config, polynomial=polynomial))
    ratio = (out.double() / exact_attention(q, k, v))[0, :, 0]
    assert (ratio - 1).abs().max() < 2e-4
    # The row sum is a common factor; at least half of the others are exact.
    ratio = ratio / ratio.median(dim=1, keepdim=True).values
    inexact = ((ratio - 1).abs() > 3e-6).double().mean(dim=0) > 0.5
    assert inexact.sum() == keys * polynomial // 8


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda x: attention(*[x[..., :7]] * 3, backend="triton"), "head_dim 7 is not a multiple of 4 up to 384"),
        (
            lambda x: attention(*[torch.zeros(1, 2, 1, 388)] * 3, backend="triton"),
            "head_dim 388 is not a multiple",
        ),
        (lambda x: attention(x.double(), x.double(), x.double(), backend="triton"), "k is torch.float64"),
        (lambda x: attention(x, x, x.transpose(2, 3), backend="triton"), "v's last dimension has stride 8, not 1"),
        (lambda x: attention(x, x, x, scale=0.0, backend="triton"), r"scale 0.0 is not within 2\^-126 and 65536"),
        (lambda x: attention(x, x, x, scale=-1.0, backend="triton"), "scale -1.0 is not within"),
        (lambda x: attention(x, x, x, scale=65537.0, backend="triton"), "scale 65537.0 is not within"),
        (lambda x: attention(x, x, x, scale=math.inf, backend="triton"), "scale inf is not within"),
        (lambda x: attention(x, x, x, scale=math.nan, backend="triton"), "scale nan is not within"),
    ],
)
def test_what_it_cannot_serve_is_named(call, reason):
    with pytest.raises(KernelUnsupported, match=reason):
        call(torch.randn(1, 8, 8, 8))


def test_every_reason_is_named_at_once():
    x = torch.zeros(1, 3, 7, 2).transpose(2, 3).double()
    with pytest.raises(KernelUnsupported) as caught:
        attention(x, x, x, scale=-1.0, backend="triton")
    assert len(caught.value.reasons) == 3 + 1 + 3 + 1

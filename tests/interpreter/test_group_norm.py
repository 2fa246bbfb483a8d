"""group_norm_silu's kernels against float64, in the interpreter."""

import math
import random

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from ldmperf.kernels import OPERATORS, KernelUnsupported, channel_statistics, group_norm_silu, residual_add
from ldmperf.kernels.group_norm import GroupNormConfig

OPERATOR = OPERATORS["group_norm_silu"]
LAYOUTS = st.sampled_from(["plain", "channels_last", "sliced", "channel_slice", "expanded", "transposed"])
DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])


def exact_norm(x, groups, weight, bias, eps, x_bias, skip, activation):
    x = (x if skip is None else torch.cat([x, skip], dim=1)).double()
    if x_bias is not None:
        x = x + x_bias.double()[:, :, None, None]
    grouped = x.reshape(x.shape[0], groups, -1)
    mean = grouped.mean(-1, keepdim=True)
    variance = (grouped - mean).square().mean(-1, keepdim=True)
    y = ((grouped - mean) / (variance + eps).sqrt()).reshape(x.shape)
    if weight is not None:
        y = y * weight.double()[:, None, None] + bias.double()[:, None, None]
    return y / (1 + torch.exp(-y)) if activation == "silu" else y


def torchs_own(x, groups, weight, bias, eps, x_bias, skip, activation):
    """As people write it, every step in x's dtype."""
    x = x if skip is None else torch.cat([x, skip], dim=1)
    if x_bias is not None:
        x = x + x_bias.to(x.dtype)[:, :, None, None]
    if weight is not None:
        weight, bias = weight.to(x.dtype), bias.to(x.dtype)
    y = F.group_norm(x, groups, weight, bias, eps)
    return F.silu(y) if activation == "silu" else y


@settings(max_examples=30, deadline=None)
@given(
    batch=st.integers(1, 3),
    grouping=st.sampled_from([(1, 7), (2, 3), (2, 8), (4, 5), (4, 24), (32, 1), (32, 2), (32, 10)]),
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    split=st.floats(0, 1),
    layouts=st.tuples(LAYOUTS, LAYOUTS),
    affine=st.booleans(),
    shifted=st.sampled_from([None, "plain", "expanded"]),
    activation=st.sampled_from(["silu", None]),
    dtype=DTYPES,
    seed=st.integers(0, 2**31),
)
def test_against_float64(kit, batch, grouping, size, split, layouts, affine, shifted, activation, dtype, seed):
    groups, group_channels = grouping
    if math.prod(size) * group_channels < 4:
        size = (2, 3)  # one or two values have no variance worth dividing by
    generator = torch.Generator().manual_seed(seed)
    channels = groups * group_channels
    of_skip = int(split * channels)
    x = kit.image((batch, channels - of_skip, *size), layouts[0], dtype, generator)
    skip = kit.image((batch, of_skip, *size), layouts[1], dtype, generator) if of_skip else None
    if not x.shape[1]:
        x, skip = skip, None
    weight, bias = (torch.randn(2, channels, generator=generator).to(dtype)) if affine else (None, None)
    x_bias = None if shifted is None else torch.randn(batch, channels, generator=generator)
    x_bias = x_bias[:1].expand(batch, -1) if shifted == "expanded" else x_bias
    arguments = (x, groups, weight, bias, 1e-3)
    options = {"x_bias": x_bias, "skip": skip, "activation": activation}
    exact = exact_norm(*arguments, *options.values())
    own = torchs_own(*arguments, *options.values())
    for config in kit.pick_configs(OPERATOR, random.Random(seed), *arguments, **options):
        before = x.clone()
        out = kit.launch(OPERATOR, *arguments, **options, config=config)
        kit.judge(out, exact, own, dtype)
        assert torch.equal(x, before)
    assert torch.equal(out, kit.launch(OPERATOR, *arguments, **options, config=config)), "two runs, same bits"


@pytest.mark.parametrize("config", [None, GroupNormConfig(4, 8, 0, 1), GroupNormConfig(4, 8, 5, 1)])
@pytest.mark.parametrize("layout", ["plain", "channels_last"])
def test_a_mean_of_1e4_keeps_the_variance(kit, layout, config):
    x = kit.image((1, 32, 9, 10), layout, torch.float32, torch.Generator().manual_seed(0), mean=1e4)
    out = kit.launch(OPERATOR, x, 8, activation=None, config=config)
    # A float32 at 1e4 is 1e-3 apart from the next: what the lanes' own means may lose.
    assert kit.relative_rms(out, exact_norm(x, 8, None, None, 1e-5, None, None, None)) < 2e-4


@pytest.mark.parametrize("config", [None, GroupNormConfig(4, 8, 0, 1), GroupNormConfig(4, 8, 5, 1)])
def test_a_first_pixel_far_out_costs_no_accuracy(kit, config):
    """Sums are around first values: an outlier there must not become the centre of all."""
    x = kit.image((1, 16, 16, 16), "channels_last", torch.float32, torch.Generator().manual_seed(0))
    x[:, :, 0, 0] = 1e3
    exact = exact_norm(x, 4, None, None, 1e-5, None, None, None)
    out = kit.launch(OPERATOR, x, 4, activation=None, config=config)
    assert kit.relative_rms(out, exact) < 3e-6


@pytest.mark.parametrize("config", [None, GroupNormConfig(2, 8, 0, 1), GroupNormConfig(2, 8, 3, 1)])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_stay_in_their_group(kit, value, config):
    x = torch.randn(2, 8, 5, 6).contiguous(memory_format=torch.channels_last)
    x[1, 3, 4, 5] = value
    out = kit.launch(OPERATOR, x, 4, config=config)
    assert out[1, 2:4].isnan().all()
    assert out.isnan().sum() == out[1, 2:4].numel()


def test_float16_extremes_overflow_nowhere(kit):
    x = (torch.rand(1, 8, 6, 6) * 2 - 1).mul(65000).half().contiguous(memory_format=torch.channels_last)
    out = kit.launch(OPERATOR, x, 2, activation=None)
    assert kit.relative_rms(out, exact_norm(x, 2, None, None, 1e-5, None, None, None)) < 1e-3


@pytest.mark.parametrize("shape", [(0, 8, 3, 3), (2, 8, 0, 3)])
def test_of_nothing(shape):
    assert group_norm_silu(torch.empty(shape), 4, backend="triton").shape == shape


def test_the_results_layout_is_that_of_x():
    x = torch.randn(2, 8, 5, 6)
    assert group_norm_silu(x, 4, backend="triton").is_contiguous()
    out = group_norm_silu(x.to(memory_format=torch.channels_last), 4, skip=x, backend="triton")
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert out.shape == (2, 16, 5, 6)


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda: group_norm_silu(torch.randn(1, 4, 2, 2).double(), 2, backend="triton"), "x is torch.float64"),
        (
            lambda: group_norm_silu(
                torch.randn(1, 4, 2, 2), 2, torch.ones(8)[::2], torch.ones(4), backend="triton"
            ),
            "weight is not contiguous",
        ),
        (lambda: group_norm_silu(torch.randn(1, 8200, 1, 2), 1, backend="triton"), "more than 8192"),
    ],
)
def test_what_it_cannot_serve_is_named(call, reason):
    with pytest.raises(KernelUnsupported, match=reason):
        call()


def shuffled(image, generator):
    """The image with its pixels in another order: what a tile holds does not matter."""
    order = torch.randperm(math.prod(image.shape[2:]), generator=generator)
    return image.flatten(2)[:, :, order].unflatten(2, image.shape[2:])


@settings(max_examples=30, deadline=None)
@given(
    batch=st.integers(1, 3),
    grouping=st.sampled_from([(1, 7), (2, 3), (4, 5), (4, 24), (32, 2), (32, 10)]),
    size=st.tuples(st.integers(2, 9), st.integers(2, 9)),
    split=st.floats(0, 1),
    layouts=st.tuples(LAYOUTS, LAYOUTS),
    tiles=st.tuples(st.sampled_from([1, 2, 8, 16, 64, 128]), st.sampled_from([4, 16, 64])),
    shifted=st.booleans(),
    activation=st.sampled_from(["silu", None]),
    mean=st.sampled_from([0.0, 30.0]),
    dtype=DTYPES,
    seed=st.integers(0, 2**31),
)
def test_a_norm_of_given_statistics(
    kit, batch, grouping, size, split, layouts, tiles, shifted, activation, mean, dtype, seed
):
    groups, group_channels = grouping
    generator = torch.Generator().manual_seed(seed)
    channels = groups * group_channels
    of_skip = int(split * (channels - 1))
    x = kit.image((batch, channels - of_skip, *size), layouts[0], dtype, generator, mean)
    skip = kit.image((batch, of_skip, *size), layouts[1], dtype, generator) if of_skip else None
    weight, bias = torch.randn(2, channels, generator=generator).to(dtype)
    x_bias = torch.randn(batch, channels, generator=generator) if shifted else None
    arguments = (x, groups, weight, bias, 1e-3)
    options = {"x_bias": x_bias, "skip": skip, "activation": activation}
    exact = exact_norm(*arguments, *options.values())
    own = torchs_own(*arguments, *options.values())
    options["statistics"] = channel_statistics(shuffled(x, generator), tiles[0])
    if skip is not None:
        options["skip_statistics"] = channel_statistics(shuffled(skip, generator), tiles[1])
    # Of images so small the usual configurations are one program a bundle, which reads no statistics.
    several = [GroupNormConfig(bundle, 8, 3, 1) for bundle in {1, min(3, groups), groups}]
    for config in (*kit.pick_configs(OPERATOR, random.Random(seed), *arguments, **options), *several):
        out = kit.launch(OPERATOR, *arguments, **options, config=config)
        kit.judge(out, exact, own, dtype)
    assert torch.equal(out, kit.launch(OPERATOR, *arguments, **options, config=config)), "two runs, same bits"


def test_the_statistics_are_what_is_read(kit):
    x = kit.image((1, 8, 8, 8), "channels_last", torch.float32, torch.Generator().manual_seed(0))
    config = GroupNormConfig(4, 8, 5, 1)
    out = kit.launch(OPERATOR, x, 4, activation=None, statistics=channel_statistics(2 * x + 3, 16), config=config)
    assert kit.relative_rms(2 * out + exact_norm(x, 4, None, None, 1e-5, None, None, None), x.double()) > 0.1
    exact = exact_norm(x, 4, None, None, 1e-5, None, None, None)
    assert kit.relative_rms(out, exact) > 0.5


@pytest.mark.parametrize("tile", [8, 64])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_in_given_statistics_stay_in_their_group(kit, value, tile):
    x = torch.randn(2, 8, 5, 6).contiguous(memory_format=torch.channels_last)
    x[1, 3, 4, 5] = value
    given_ = channel_statistics(x, tile)
    out = kit.launch(OPERATOR, x, 4, statistics=given_, config=GroupNormConfig(2, 8, 3, 1))
    assert out[1, 2:4].isnan().all()
    assert out.isnan().sum() == out[1, 2:4].numel()


def test_from_a_sum_to_its_norm(kit):
    generator = torch.Generator().manual_seed(1)
    x, residual = (kit.image((2, 64, 9, 15), "channels_last", torch.float16, generator, 5.0) for _ in "xr")
    out, statistics = residual_add(x, residual, statistics=True, backend="triton")
    y = group_norm_silu(out, 32, statistics=statistics, backend="triton")
    assert kit.relative_rms(y, exact_norm(out, 32, None, None, 1e-5, None, None, "silu")) < 5e-4

"""transformer_tail: its kernel against float64, in the interpreter."""

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ldmperf.kernels import OPERATORS, KernelUnsupported, transformer_tail, transformer_tail_ref
from ldmperf.kernels._statistics import channel_statistics, tile_pixels
from ldmperf.kernels._transformer_config import TransformerTailConfig

TAIL = OPERATORS["transformer_tail"]
BIASES = ("out_bias", "cross_bias", "ff_in_bias", "ff_out_bias", "proj_bias")
# Channels and heads: head dimensions 8, 12, 16, those that a tile pads, channels in two parts, heads in two turns.
WIDTHS = ((64, 8), (96, 8), (128, 8), (48, 4), (80, 8), (40, 5), (24, 3), (64, 2), (96, 12))


def exact_tail(a):
    """By the formulas, in float64, with no operator of torch's but the product."""
    d = {name: value.double() if isinstance(value, torch.Tensor) else value for name, value in a.items()}

    def biased(value, name):
        return value if d.get(name) is None else value + d[name]

    def normed(x, name):
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + d["eps"]).sqrt()
        return scaled * d[f"{name}_weight"] + d[f"{name}_bias"]

    t = biased(d["x"] + d["attended"] @ d["out_weight"].t(), "out_bias")
    keys, values = d["context"].unbind(2)
    q = (normed(t, "norm2") @ d["q_weight"].t()).unflatten(2, keys.shape[2:])
    scores = torch.einsum("bnhd,bthd->bhnt", q, keys) / math.sqrt(keys.shape[3])
    shares = (scores - scores.amax(-1, keepdim=True)).exp()
    shares = shares / shares.sum(-1, keepdim=True)
    h = torch.einsum("bhnt,bthd->bnhd", shares, values).flatten(2)
    t = biased(t + h @ d["cross_weight"].t(), "cross_bias")
    h = biased(normed(t, "norm3") @ d["ff_in_weight"].t(), "ff_in_bias")
    value, gate = h.chunk(2, dim=-1)
    h = value * gate * torch.special.erfc(-gate / math.sqrt(2)) / 2
    t = biased(t + h @ d["ff_out_weight"].t(), "ff_out_bias")
    y = biased(t @ d["proj_weight"].t(), "proj_bias")
    return d["image"] + y.transpose(1, 2).unflatten(2, d["image"].shape[2:])


def drawn(batch, size, channels, heads, keys, inner, dtype, seed, mean=0.0, biases=BIASES):
    """The arguments of a call; activations have that mean."""
    generator = torch.Generator().manual_seed(seed)

    def random_(*shape, scale=1.0, around=0.0):
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale + around).to(dtype)

    tokens, square = (batch, size[0] * size[1], channels), (channels, channels)
    image = random_(batch, channels, *size, around=mean).contiguous(memory_format=torch.channels_last)
    lengths = dict.fromkeys(BIASES, channels) | {"ff_in_bias": 2 * inner}
    return {
        "attended": random_(*tokens),
        "x": random_(*tokens, around=mean),
        "image": image,
        "context": random_(batch, keys, 2, heads, channels // heads),
        **{
            name: random_(*square, scale=channels**-0.5)
            for name in ("out_weight", "q_weight", "cross_weight", "proj_weight")
        },
        **{name: random_(channels) for name in ("norm2_weight", "norm2_bias", "norm3_weight", "norm3_bias")},
        "ff_in_weight": random_(2 * inner, channels, scale=channels**-0.5),
        "ff_out_weight": random_(channels, inner, scale=inner**-0.5),
        "eps": 1e-5,
        **{name: random_(lengths[name]) for name in biases},
    }


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 3),
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    width=st.sampled_from(WIDTHS),
    keys=st.one_of(st.integers(1, 90), st.sampled_from([64, 77, 80, 128])),
    inner=st.sampled_from([None, 24, 100]),
    biases=st.sets(st.sampled_from(BIASES)),
    mean=st.sampled_from([0.0, 30.0]),
    with_statistics=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    seed=st.integers(0, 2**31),
)
def test_transformer_tail(kit, batch, size, width, keys, inner, biases, mean, with_statistics, dtype, seed):
    channels, heads = width
    arguments = drawn(batch, size, channels, heads, keys, inner or 4 * channels, dtype, seed, mean, sorted(biases))
    exact, own = exact_tail(arguments), transformer_tail_ref(**arguments)
    options = {"statistics": with_statistics}
    for config in kit.pick_configs(TAIL, random.Random(seed), **arguments, **options):
        found = kit.launch(TAIL, **arguments, **options, config=config)
        image, statistics = found if with_statistics else (found, None)
        assert image.is_contiguous(memory_format=torch.channels_last)
        # One rounding where the reference has eight; of few rows its error is a matter of luck.
        kit.judge(image, exact, own, dtype, factor=1.2 if exact.numel() > 1000 else 2.0)
        if statistics is not None:
            tile = tile_pixels(size[0] * size[1], statistics.shape[1])
            expected = channel_statistics(image, tile)
            torch.testing.assert_close(statistics[:, :, 0], expected[:, :, 0], rtol=2e-6, atol=2e-6)
            torch.testing.assert_close(statistics[:, :, 1], expected[:, :, 1], rtol=2e-5, atol=1e-9)


@pytest.mark.parametrize(("block_m", "heads_at_once"), [(16, 8), (16, 2), (32, 8), (64, 1)])
@pytest.mark.parametrize("pixels", [(1, 1), (3, 11), (8, 8), (5, 13)])
def test_tiles_end_where_samples_do(kit, block_m, heads_at_once, pixels):
    """Each sample alone has the same bits: no tile has rows of two, and none reads another's keys."""
    arguments = drawn(3, pixels, 64, 8, 7, 64, torch.float16, 0)
    config = TransformerTailConfig(block_m, 64, heads_at_once, 4, 2)
    together = kit.launch(TAIL, **arguments, statistics=True, config=config)
    for i in range(3):
        given_ = {name: arguments[name][i : i + 1] for name in ("attended", "x", "image", "context")}
        alone = kit.launch(TAIL, **{**arguments, **given_}, statistics=True, config=config)
        assert all(torch.equal(a[i : i + 1], b) for a, b in zip(together, alone, strict=True))


@pytest.mark.parametrize("key", [3, 70])
def test_scores_too_large_for_an_exponential(kit, key):
    """Of a key in either part of the keys; the largest of a row is taken away before."""
    arguments = drawn(1, (4, 5), 64, 8, 77, 64, torch.float32, 0)
    arguments["context"][:, key, 0] *= 300
    exact, own = exact_tail(arguments), transformer_tail_ref(**arguments)
    kit.judge(kit.launch(TAIL, **arguments), exact, own, torch.float32, factor=2.0)


def test_at_a_mean_of_1e4(kit):
    """The norms' mean is in two parts; the residual stream loses what float32 loses."""
    arguments = drawn(1, (4, 5), 64, 8, 77, 64, torch.float32, 0, mean=1e4)
    # What the norms leave of the mean has to be seen: nothing else of the image.
    arguments["image"] = torch.zeros_like(arguments["image"])
    arguments["proj_weight"] = arguments["proj_weight"] - arguments["proj_weight"].mean(1, keepdim=True)
    out, exact = kit.launch(TAIL, **arguments), exact_tail(arguments)
    own = transformer_tail_ref(**arguments)
    assert kit.relative_rms(out, exact) <= 1.2 * kit.relative_rms(own, exact)
    assert kit.relative_rms(out, exact) < 2e-3


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["attended", "x", "image", "context"])
def test_what_is_not_finite_stays_in_its_sample(kit, where, value):
    arguments = drawn(2, (5, 7), 64, 8, 77, 64, torch.float16, 0)
    clean = kit.launch(TAIL, **arguments)
    changed = {**arguments, where: arguments[where].clone()}
    changed[where][1][(0,) * (changed[where].dim() - 1)] = value
    out = kit.launch(TAIL, **changed)
    assert torch.equal(out[0], clean[0])
    assert not out[1].isfinite().all()
    if where != "context":
        # Beside the pixels of that row nothing is touched.
        spoilt = (~out[1].isfinite()).any(dim=0)
        assert spoilt.sum() == 1


def test_one_key_is_attended_to_whatever_its_score(kit):
    arguments = drawn(1, (4, 4), 64, 8, 1, 64, torch.float32, 0)
    arguments["context"][:, :, 0] *= 1e4
    assert kit.relative_rms(kit.launch(TAIL, **arguments), exact_tail(arguments)) < 1e-5


def test_keys_and_values_that_are_slices(kit):
    """As the model has them: one attention's of a stack of several."""
    arguments = drawn(2, (4, 4), 64, 8, 21, 64, torch.float32, 0)
    expected = kit.launch(TAIL, **arguments)
    stack = torch.full((2, 3, 2, 30, 2, 8, 8), math.nan)
    stack[1, 1, :, 4:25] = arguments["context"]
    arguments["context"] = stack[1, 1, :, 4:25]
    assert torch.equal(kit.launch(TAIL, **arguments), expected)


def test_in_place_of_the_image():
    arguments = drawn(2, (5, 7), 64, 8, 21, 64, torch.float32, 0)
    expected = transformer_tail(**arguments, backend="triton")
    assert transformer_tail(**arguments, backend="triton", out=arguments["image"]) is arguments["image"]
    assert torch.equal(arguments["image"], expected)


def test_of_nothing():
    for batch, size in ((0, (2, 3)), (2, (0, 3))):
        arguments = drawn(batch, size, 64, 8, 5, 64, torch.float32, 0)
        for backend in ("triton", "torch"):
            image, statistics = transformer_tail(**arguments, statistics=True, backend=backend)
            assert image.shape == arguments["image"].shape
            assert statistics.shape == (batch, 1 if size[0] else 0, 2, 64)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"x": torch.randn(1, 64, 6).transpose(1, 2)}, "x is not contiguous"),
        ({"q_weight": torch.randn(64, 64).t()}, "q_weight is not contiguous"),
        ({"image": torch.randn(1, 64, 2, 3)}, "image is not channels-last"),
        ({"context": torch.randn(1, 5, 2, 8, 16)[..., ::2]}, "the heads of context are not contiguous"),
        ({"context": torch.randn(1, 129, 2, 8, 8)}, "129 keys are not within 1 and 128"),
        ({"context": torch.randn(1, 0, 2, 8, 8)}, "0 keys are not"),
        ({"context": torch.randn(1, 5, 2, 1, 64)}, "head_dim 64 is more than 32"),
    ],
)
def test_unsupported_calls_tell_why(changes, reason):
    arguments = drawn(1, (2, 3), 64, 8, 5, 64, torch.float32, 0) | changes
    with pytest.raises(KernelUnsupported, match=reason):
        transformer_tail(**arguments, backend="triton")
    own = transformer_tail(**arguments, backend="torch")
    torch.testing.assert_close(transformer_tail(**arguments), own, rtol=1e-4, atol=1e-4)


def test_rows_that_registers_do_not_hold_are_told():
    for channels, dtype in ((160, torch.float16), (128, torch.float32)):
        arguments = drawn(1, (2, 3), channels, 8, 5, 64, dtype, 0)
        with pytest.raises(KernelUnsupported, match=f"{channels} channels of .* do not fit the registers"):
            transformer_tail(**arguments, backend="triton")

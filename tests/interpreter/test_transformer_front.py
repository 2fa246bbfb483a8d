"""transformer_front: its kernel against float64, in the interpreter."""

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ldmperf.kernels import OPERATORS, KernelUnsupported, transformer_front, transformer_front_ref
from ldmperf.kernels._statistics import channel_statistics
from ldmperf.kernels._transformer_config import TransformerFrontConfig

FRONT = OPERATORS["transformer_front"]
# Channels and groups: of one part and two, of groups that are powers of two, and not, within parts and across.
WIDTHS = ((64, 32), (96, 32), (128, 32), (64, 1), (96, 4), (48, 16), (40, 5), (24, 3), (80, 40), (128, 128))


def exact_front(a):
    """By the formulas, in float64, with no operator of torch's but the product."""
    d = {name: value.double() if isinstance(value, torch.Tensor) else value for name, value in a.items()}

    def normed(x, dims, eps):
        centred = x - x.mean(dims, keepdim=True)
        return centred / (centred.square().mean(dims, keepdim=True) + eps).sqrt()

    image = d["image"] if d.get("x_bias") is None else d["image"] + d["x_bias"][:, None, None]
    tokens = image.flatten(2).transpose(1, 2)
    h = normed(tokens.unflatten(2, (d["num_groups"], -1)), (1, 3), d["group_eps"]).flatten(2)
    x = (h * d["group_weight"] + d["group_bias"]) @ d["proj_weight"].t()
    x = x if d.get("proj_bias") is None else x + d["proj_bias"]
    n = normed(x, (2,), d["norm_eps"]) * d["norm_weight"] + d["norm_bias"]
    return x, n @ d["qkv_weight"].t()


def drawn(
    batch, size, channels, groups, dtype, seed, *, mean=0.0, tile=16, columns=None, biased=True, shifted=True
):
    """The arguments of a call; the image has that mean."""
    generator = torch.Generator().manual_seed(seed)

    def random_(*shape, scale=1.0, around=0.0):
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale + around).to(dtype)

    image = random_(batch, channels, *size, around=mean).contiguous(memory_format=torch.channels_last)
    return {
        "image": image,
        "num_groups": groups,
        **{name: random_(channels) for name in ("group_weight", "group_bias", "norm_weight", "norm_bias")},
        "proj_weight": random_(channels, channels, scale=channels**-0.5),
        "qkv_weight": random_(columns or 3 * channels, channels, scale=channels**-0.5),
        "group_eps": 1e-3,
        "norm_eps": 1e-5,
        "statistics": channel_statistics(image, tile),
        "proj_bias": random_(channels) if biased else None,
        "x_bias": random_(channels) if shifted else None,
    }


@settings(max_examples=30, deadline=None)
@given(
    batch=st.integers(1, 3),
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    width=st.sampled_from(WIDTHS),
    columns=st.sampled_from([None, 1, 40, 64]),
    tile=st.sampled_from([1, 2, 8, 16, 64]),
    biased=st.booleans(),
    shifted=st.booleans(),
    mean=st.sampled_from([0.0, 30.0]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    seed=st.integers(0, 2**31),
)
def test_transformer_front(kit, batch, size, width, columns, tile, biased, shifted, mean, dtype, seed):
    arguments = drawn(
        *(batch, size, *width, dtype, seed),
        mean=mean, tile=_tile(size, tile), columns=columns, biased=biased, shifted=shifted,
    )  # fmt: skip
    exact, own = exact_front(arguments), transformer_front_ref(**arguments)
    if width[0] == 128 and dtype == torch.float32:
        return
    for config in kit.pick_configs(FRONT, random.Random(seed), **arguments):
        found = kit.launch(FRONT, **arguments, config=config)
        for one, wanted, reference in zip(found, exact, own, strict=True):
            # Of few values torch's own error is a matter of luck.
            kit.judge(one, wanted, reference, dtype, factor=1.2 if wanted.numel() > 1000 else 3.0)


def _tile(size, tile):
    """The tile, or the largest smaller one of which an image has as many as their number tells."""
    pixels = size[0] * size[1]
    while tile > 1 and tile >= 2 * pixels:
        tile //= 2
    return tile


@pytest.mark.parametrize("block_m", [16, 32, 64])
@pytest.mark.parametrize("pixels", [(1, 1), (3, 11), (8, 8), (5, 13)])
def test_tiles_end_where_samples_do(kit, block_m, pixels):
    """Each sample alone has the same bits."""
    arguments = drawn(3, pixels, 64, 32, torch.float16, 0, tile=_tile(pixels, 16))
    config = TransformerFrontConfig(block_m, 64, 4, 2)
    together = kit.launch(FRONT, **arguments, config=config)
    for i in range(3):
        given_ = {name: arguments[name][i : i + 1] for name in ("image", "statistics")}
        alone = kit.launch(FRONT, **{**arguments, **given_}, config=config)
        assert all(torch.equal(a[i : i + 1], b) for a, b in zip(together, alone, strict=True))


@pytest.mark.parametrize("width", [(64, 32), (96, 32)])
def test_at_a_mean_of_1e4(kit, width):
    """A mean that x_bias takes off: it is merged in two parts, and so is what is left."""
    arguments = drawn(2, (5, 7), *width, torch.float32, 0, mean=1e4)
    arguments["x_bias"] = torch.full((width[0],), -1e4)
    for one, exact in zip(kit.launch(FRONT, **arguments), exact_front(arguments), strict=True):
        # A float32 holds the mean of a tile (_statistics.py).
        assert kit.relative_rms(one, exact) < 1e-3


def test_given_statistics_are_what_normalizes(kit):
    arguments = drawn(1, (4, 4), 64, 32, torch.float32, 0)
    expected = kit.launch(FRONT, **arguments)
    # Twice as wide: sums of squares four times as large.
    arguments["image"] = 2 * arguments["image"]
    arguments["x_bias"] = 2 * arguments["x_bias"]
    arguments["statistics"] = arguments["statistics"] * torch.tensor([2.0, 4.0])[:, None]
    arguments["group_eps"] *= 4
    for one, wanted in zip(kit.launch(FRONT, **arguments), expected, strict=True):
        torch.testing.assert_close(one, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_stays_in_its_sample(kit, value):
    arguments = drawn(2, (5, 7), 64, 32, torch.float16, 0)
    clean = kit.launch(FRONT, **arguments)
    image = arguments["image"].clone()
    image[1, 0, 0, 0] = value
    statistics = channel_statistics(image, 16)
    for one, wanted in zip(
        kit.launch(FRONT, **{**arguments, "image": image, "statistics": statistics}), clean, strict=True
    ):
        assert torch.equal(one[0], wanted[0])
        assert not one[1].isfinite().any()


def test_of_nothing():
    for batch, size in ((0, (2, 3)), (2, (0, 3))):
        arguments = drawn(batch, size, 64, 32, torch.float32, 0)
        for backend in ("triton", "torch"):
            x, qkv = transformer_front(**arguments, backend=backend)
            assert x.shape == (batch, size[0] * size[1], 64)
            assert qkv.shape == (batch, size[0] * size[1], 192)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"statistics": None}, "there are no statistics of the image"),
        ({"image": torch.randn(1, 64, 2, 3)}, "image is not channels-last"),
        ({"qkv_weight": torch.randn(64, 64).t()}, "qkv_weight is not contiguous"),
    ],
)
def test_unsupported_calls_tell_why(changes, reason):
    arguments = drawn(1, (2, 3), 64, 32, torch.float32, 0, tile=4) | changes
    with pytest.raises(KernelUnsupported, match=reason):
        transformer_front(**arguments, backend="triton")
    own = transformer_front(**arguments, backend="torch")
    for one, wanted in zip(transformer_front(**arguments), own, strict=True):
        torch.testing.assert_close(one, wanted, rtol=1e-4, atol=1e-4)

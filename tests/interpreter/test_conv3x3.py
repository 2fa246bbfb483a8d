"""conv3x3: its kernels against float64, in the interpreter."""

import math
import random

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from ldmperf.kernels import OPERATORS, KernelUnsupported, conv3x3, conv3x3_separate, pack_phases
from ldmperf.kernels._conv3x3_config import Conv3x3Config
from ldmperf.kernels._statistics import statistics_misfit, tile_pixels

CONV = OPERATORS["conv3x3"]
DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])
LAST = torch.channels_last
fuzz = settings(max_examples=40, deadline=None)


def exact_conv(x, weight, bias=None, stride=1, upsample=False, shortcut=(), shortcut_weight=None, residual=None):
    """In float64, pixel by pixel of a padded image; `weight` [N, C, 3, 3], never packed."""
    x = x.double()
    if upsample:
        x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    height, width = x.shape[2:]
    padded = F.pad(x, (1, 1, 1, 1))
    y = 0.0
    for i in range(3):
        for j in range(3):
            tap = padded[:, :, i : i + height : stride, j : j + width : stride]
            y = y + torch.einsum("bchw,nc->bnhw", tap, weight[:, :, i, j].double())
    if shortcut:
        side_by_side = torch.cat(shortcut, dim=1).double()
        y = y + torch.einsum("bchw,nc->bnhw", side_by_side, shortcut_weight.double())
    if bias is not None:
        y = y + bias.double()[:, None, None]
    return y if residual is None else y + residual.double()


def merged(statistics, pixels):
    """(mean, variance) [B, C] of an image from the statistics of its tiles (Chan, Golub and LeVeque, 1979)."""
    tiles = statistics.shape[1]
    size = tile_pixels(pixels, tiles)
    count, mean, m2 = 0, 0.0, 0.0
    for i in range(tiles):
        n = min(size, pixels - i * size)
        own_mean, own_m2 = statistics[:, i].double().unbind(1)
        delta = own_mean - mean
        total = count + n
        m2 = m2 + own_m2 + delta.square() * count * n / total
        mean = mean + delta * n / total
        count = total
    return mean, m2 / count


def check_statistics(statistics, y):
    """Those of the rounded result, to the rounding of float32."""
    assert statistics_misfit(statistics, y) is None
    values = y.double().flatten(2)
    mean, variance = merged(statistics, values.shape[2])
    scale = values.square().mean(2).sqrt() + 1e-30
    assert ((mean - values.mean(2)).abs() <= 1e-6 * scale).all()
    exact = values.var(2, unbiased=False)
    # A tile's mean is one float32: its deviations are off by up to half a unit of it.
    assert ((variance - exact).abs() <= 1e-5 * exact + (2e-7 * scale).square() + 1e-30).all()


def drawn(kit, sizes, columns, layout, dtype, seed, *, mean=0.0, stride=1, upsample=False, channels2=(), **beside):
    """(x, weight, options of `exact_conv`) of a call."""
    generator = torch.Generator().manual_seed(seed)
    batch, channels, height, width = sizes
    x = kit.image(sizes, layout, dtype, generator, mean)
    if layout == "strided":
        x = kit.image((batch, channels, 2 * height, 2 * width), "channels_last", dtype, generator, mean)[
            ..., ::2, ::2
        ]
    scale = (9 * channels) ** -0.5
    weight = kit.image((columns, channels, 3, 3), "channels_last", dtype, generator, scale=scale)
    size = (2 * height, 2 * width) if upsample else (-(-height // stride), -(-width // stride))
    options = {"stride": stride, "upsample": upsample}
    if channels2:
        options["shortcut"] = [kit.image((batch, c, *size), "channels_last", dtype, generator) for c in channels2]
        own = torch.randn(columns, sum(channels2), generator=generator) * sum(channels2) ** -0.5
        options["shortcut_weight"] = own.to(dtype)
    if beside.get("residual"):
        options["residual"] = kit.image((batch, columns, *size), "channels_last", dtype, generator, mean)
    if beside.get("biased"):
        options["bias"] = torch.randn(columns, generator=generator).to(beside.get("bias_dtype", dtype))
    return x, weight, options


def as_called(options):
    """The same as arguments of conv3x3."""
    parts = options.get("shortcut", ())
    named = dict(zip(("shortcut", "skip"), parts, strict=False))
    return {**{name: value for name, value in options.items() if name != "shortcut"}, **named}


@fuzz
@given(
    batch=st.integers(1, 3),
    size=st.tuples(st.sampled_from([1, 2, 5, 8, 9, 17]), st.sampled_from([1, 3, 8, 16, 19])),
    channels=st.sampled_from([4, 16, 24, 40, 64, 96]),
    columns=st.sampled_from([4, 24, 40, 64, 96]),
    layout=st.sampled_from(["channels_last", "channel_slice", "strided"]),
    kind=st.sampled_from(["plain", "stride 2", "upsample"]),
    channels2=st.sampled_from([(), (), (24,), (64, 40), (16, 33)]),
    residual=st.booleans(),
    biased=st.booleans(),
    statistics=st.booleans(),
    mean=st.sampled_from([0.0, 3.0]),
    dtype=DTYPES,
    seed=st.integers(0, 2**31),
)
def test_conv3x3(
    kit,
    batch,
    size,
    channels,
    columns,
    layout,
    kind,
    channels2,
    residual,
    biased,
    statistics,
    mean,
    dtype,
    seed,
):
    choose = random.Random(seed)
    x, weight, options = drawn(
        kit,
        (batch, channels, *size),
        columns,
        layout,
        dtype,
        seed,
        mean=mean,
        stride=2 if kind == "stride 2" else 1,
        upsample=kind == "upsample",
        channels2=channels2,
        residual=residual,
        biased=biased,
        bias_dtype=choose.choice([dtype, torch.float32]),
    )
    exact, called = exact_conv(x, weight, **options), as_called(options)
    own = conv3x3_separate(x, weight, **called, backend="torch")
    for config in kit.pick_configs(CONV, choose, x, weight, **called):
        result = kit.launch(CONV, x, weight, **called, statistics=statistics, config=config)
        y = result[0] if statistics else result
        assert y.is_contiguous(memory_format=LAST)
        # Both round once where nothing stands beside; of a few results the error is a matter of luck.
        kit.judge(y, exact, own, dtype, factor=1.2 if exact.numel() > 500 else 3.0)
        if statistics:
            check_statistics(result[1], y)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("size", [(8, 8), (16, 8), (5, 7)])
def test_packed_weights_are_as_exact_as_torchs_convolution_of_them(kit, size, splits, dtype):
    x, weight, options = drawn(kit, (2, 32, *size), 40, "channels_last", dtype, 1, upsample=True, residual=True)
    packed = pack_phases(weight)
    exact = exact_conv(x, weight, **options)
    own = conv3x3_separate(x, packed, **as_called(options), backend="torch")
    config = Conv3x3Config(64, 32, 32, splits, 4, 2)
    y, statistics = kit.launch(CONV, x, packed, **as_called(options), statistics=True, config=config)
    assert kit.relative_rms(y, exact) <= 1.2 * kit.relative_rms(own, exact)
    check_statistics(statistics, y)


def test_the_price_of_packed_weights(kit):
    """What `pack_phases` says: 1.4 times the error of nine taps; in float32, of what is exact, none."""
    for dtype in (torch.bfloat16, torch.float16):
        x, weight, _ = drawn(kit, (2, 64, 8, 8), 64, "channels_last", dtype, 2)
        exact = exact_conv(x, weight, upsample=True)
        config = Conv3x3Config(64, 64, 32, 1, 4, 2)
        errors = [
            kit.relative_rms(kit.launch(CONV, x, w, upsample=True, config=config), exact)
            for w in (weight, pack_phases(weight))
        ]
        assert 1.3 < errors[1] / errors[0] < 1.5
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-4, 5, (1, 16, 5, 3), generator=generator).float().contiguous(memory_format=LAST)
    weight = torch.randint(-4, 5, (16, 16, 3, 3), generator=generator).float()
    y = conv3x3(x, pack_phases(weight), upsample=True, backend="triton")
    assert torch.equal(y.double(), exact_conv(x, weight, upsample=True))


@pytest.mark.parametrize("splits", [1, 2, 5])
def test_every_pixel_and_channel_is_written_once_wherever_tiles_end(kit, splits):
    """Whole numbers, whose sums float32 holds exactly."""
    generator = torch.Generator().manual_seed(0)

    def whole(*shape):
        return torch.randint(-4, 5, shape, generator=generator).float().contiguous(memory_format=LAST)

    for batch, size, channels, columns in (
        *((1, (8, 8), 16, 32), (2, (1, 1), 16, 33), (3, (5, 7), 24, 31), (2, (16, 16), 32, 65)),
        *((1, (17, 3), 48, 64), (2, (8, 16), 17, 16)),
    ):
        for stride, upsample in ((1, False), (2, False), (1, True)):
            x, weight = whole(batch, channels, *size), whole(columns, channels, 3, 3)
            out_size = exact_conv(x, weight, stride=stride, upsample=upsample).shape[2:]
            parts = [whole(batch, 5, *out_size), whole(batch, 24, *out_size)]
            own = torch.randint(-4, 5, (columns, 29), generator=generator).float()
            options = {
                **{"stride": stride, "upsample": upsample, "shortcut": parts, "shortcut_weight": own},
                "residual": whole(batch, columns, *out_size),
            }
            config = Conv3x3Config(64, 32, 16, splits, 4, 2)
            y, statistics = kit.launch(CONV, x, weight, **as_called(options), statistics=True, config=config)
            assert torch.equal(y.double(), exact_conv(x, weight, **options)), (batch, size, channels, columns)
            check_statistics(statistics, y)


@pytest.mark.parametrize("mean", [1e2, 1e3, 1e4])
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_large_means(kit, mean, splits, dtype):
    """Statistics are of the rounded result, whatever rounding left of its variance."""
    x, weight, options = drawn(
        kit, (2, 32, 16, 20), 32, "channels_last", dtype, 3, mean=mean, residual=True, biased=True
    )
    config = Conv3x3Config(64, 32, 32, splits, 4, 2)
    exact = exact_conv(x, weight, **options)
    y, statistics = kit.launch(CONV, x, weight, **as_called(options), statistics=True, config=config)
    kit.judge(y, exact, conv3x3_separate(x, weight, **as_called(options), backend="torch"), dtype, factor=1.2)
    check_statistics(statistics, y)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_infinity_go_where_their_window_does(kit, value, splits):
    x = torch.randn(2, 16, 9, 9, generator=torch.Generator().manual_seed(0)).contiguous(memory_format=LAST)
    weight = torch.randn(16, 16, 3, 3, generator=torch.Generator().manual_seed(1)).contiguous(memory_format=LAST)
    config = Conv3x3Config(64, 32, 16, splits, 4, 2)
    for stride, upsample in ((1, False), (2, False), (1, True)):
        for place in ((0, 0), (4, 3), (8, 8)):
            wrong = x.clone(memory_format=torch.preserve_format)
            wrong[0, 5, place[0], place[1]] = value
            y = kit.launch(CONV, wrong, weight, stride=stride, upsample=upsample, config=config)
            enlarged = wrong.repeat_interleave(2, 2).repeat_interleave(2, 3) if upsample else wrong
            exact = F.conv2d(enlarged.double(), weight.double(), stride=stride, padding=1)
            assert torch.equal(y.isnan(), exact.isnan())
            assert torch.equal(y.isfinite(), exact.isfinite())
    residual = torch.zeros(2, 16, 9, 9).contiguous(memory_format=LAST)
    residual[1, 3, 2, 2] = value
    y = kit.launch(CONV, x, weight, residual=residual, config=config)
    assert (~y.isfinite()).nonzero().tolist() == [[1, 3, 2, 2]]


@pytest.mark.parametrize("splits", [1, 2, 7])
def test_the_same_bits_in_every_run_and_however_many_images_stand_beside(kit, splits):
    x, weight, options = drawn(kit, (3, 48, 9, 7), 40, "channels_last", torch.float16, 4, residual=True)
    config = Conv3x3Config(64, 32, 32, splits, 4, 2)
    runs = [
        kit.launch(CONV, x, weight, residual=options["residual"], statistics=True, config=config) for _ in range(2)
    ]
    assert all(map(torch.equal, *runs))
    alone = kit.launch(CONV, x[1:2], weight, residual=options["residual"][1:2], statistics=True, config=config)
    assert all(torch.equal(one[0], whole[1]) for one, whole in zip(alone, runs[0], strict=True))


def test_of_nothing():
    weight = torch.ones(16, 16, 3, 3).contiguous(memory_format=LAST)
    for shape in ((0, 16, 4, 4), (2, 16, 0, 4)):
        y = conv3x3(torch.empty(shape).contiguous(memory_format=LAST), weight, backend="triton")
        assert y.shape == shape


IMAGE = torch.randn(1, 16, 4, 4).contiguous(memory_format=LAST)
WEIGHT = torch.randn(16, 16, 3, 3).contiguous(memory_format=LAST)


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda: conv3x3(IMAGE.double(), WEIGHT.double(), backend="triton"), "x is torch.float64"),
        (lambda: conv3x3(IMAGE.contiguous(), WEIGHT, backend="triton"), "x's channels have stride 16, not 1"),
        (lambda: conv3x3(IMAGE, WEIGHT.contiguous(), backend="triton"), "weight is not in channels-last memory"),
        (
            lambda: conv3x3(IMAGE, pack_phases(WEIGHT).contiguous(), upsample=True, backend="triton"),
            "weight is not in channels-last memory",
        ),
        (
            lambda: conv3x3(IMAGE, WEIGHT, residual=IMAGE.contiguous(), backend="triton"),
            "residual is not in channels-last memory",
        ),
        (lambda: conv3x3(IMAGE, WEIGHT, torch.randn(32)[::2], backend="triton"), "bias is not contiguous"),
        (
            lambda: conv3x3(
                IMAGE, WEIGHT, shortcut=IMAGE, shortcut_weight=torch.randn(16, 32)[:, ::2], backend="triton"
            ),
            "shortcut_weight is not contiguous",
        ),
    ],
)
def test_what_they_cannot_serve_is_named(call, reason):
    with pytest.raises(KernelUnsupported, match=reason):
        call()


def test_bfloat16_is_refused_in_the_interpreter_for_users():
    with pytest.raises(KernelUnsupported, match="multiplies bfloat16"):
        conv3x3(IMAGE.bfloat16(), WEIGHT.bfloat16(), backend="triton")

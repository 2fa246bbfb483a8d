"""The StyleGAN2-shaped generator against loops of plain convolutions, the grouped form, scipy's resampling."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.signal
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ldmperf.profiling.rivals.gan import (
    EPS,
    Gan,
    StyledConv,
    StyleGan,
    activated,
    blurred,
    fir_filter,
    modulated_conv,
    upsampled,
)
from ldmperf.profiling.rivals.rival import GanShape

pytestmark = pytest.mark.usefixtures("_one_thread")


def modulated_weights(weight: Tensor, styles: Tensor, demodulate: bool) -> Tensor:
    """The paper's equations 1 and 3, a set of weights for each sample: [B, Cout, Cin, k, k]."""
    modulated = styles[:, None, :, None, None] * weight[None]
    if demodulate:
        modulated = modulated / torch.sqrt(modulated.square().sum((2, 3, 4), keepdim=True) + EPS)
    return modulated


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 3), st.integers(1, 5), st.integers(1, 5), st.sampled_from([1, 3]), st.integers(2, 7),
    st.booleans(), st.integers(0, 2**32),
)  # fmt: skip
def test_a_modulated_convolution_is_one_convolution_per_sample_and_the_grouped_form(
    batch: int, inner: int, outer: int, kernel: int, side: int, demodulate: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)

    def drawn(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    x, weight, styles = (
        drawn(batch, inner, side, side + 1),
        drawn(outer, inner, kernel, kernel),
        drawn(batch, inner),
    )
    ours = modulated_conv(x, weight, styles, demodulate=demodulate)
    of_samples = modulated_weights(weight, styles, demodulate)
    looped = torch.cat([F.conv2d(x[b : b + 1], of_samples[b], padding=kernel // 2) for b in range(batch)])
    grouped = F.conv2d(
        x.reshape(1, batch * inner, side, side + 1), of_samples.flatten(0, 1), padding=kernel // 2, groups=batch
    )
    torch.testing.assert_close(ours, looped, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(ours, grouped.view_as(looped), rtol=1e-9, atol=1e-9)


def test_upsampling_is_zeros_between_pixels_then_the_filter() -> None:
    """scipy.signal.upfirdn along each axis; the filter's sum is 2 along each, so that a constant stays itself."""
    x = torch.randn(1, 2, 5, 6, dtype=torch.float64)
    taps = np.array([1.0, 3.0, 3.0, 1.0]) / 4
    expected = scipy.signal.upfirdn(taps, scipy.signal.upfirdn(taps, x.numpy(), up=2, axis=2), up=2, axis=3)
    fir = fir_filter().double()
    # Of the whole convolution (2H - 1 + 3 = 2H + 2 long) the middle 2H.
    torch.testing.assert_close(upsampled(x, fir), torch.from_numpy(expected[:, :, 1:-1, 1:-1]))
    inside = upsampled(torch.ones(1, 1, 6, 6, dtype=torch.float64), fir)[:, :, 2:-2, 2:-2]
    torch.testing.assert_close(inside, torch.ones_like(inside))


def test_an_upsampling_convolution_is_zeros_the_convolution_and_the_filter() -> None:
    """Modulated per sample, on the image with zeros between its pixels, by scipy's true convolution."""
    x, weight, styles = torch.randn(2, 3, 4, 4), torch.randn(5, 3, 3, 3), torch.randn(2, 3)
    x, weight, styles = x.double(), weight.double(), styles.double()
    ours = blurred(modulated_conv(x, weight, styles, demodulate=True, upsample=True), fir_filter().double())
    spread = np.zeros((2, 3, 7, 7))
    spread[:, :, ::2, ::2] = x.numpy()
    of_samples = modulated_weights(weight, styles, True).numpy()
    fir = fir_filter().double().numpy()
    expected = np.zeros((2, 5, 8, 8))
    for b in range(2):
        for j in range(5):
            y = sum(scipy.signal.convolve2d(spread[b, i], of_samples[b, j, i]) for i in range(3))
            expected[b, j] = scipy.signal.convolve2d(y, fir)[2:-2, 2:-2]
    torch.testing.assert_close(ours, torch.from_numpy(expected))


def test_a_layer_adds_its_noise_and_bias_before_the_activation() -> None:
    layer = StyledConv(2, 3, 4, 5, upsample=False).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    layer.noise.normal_()
    x, w = torch.randn(1, 2, 5, 5).double(), torch.randn(1, 4).double()
    y = F.conv2d(x, modulated_weights(layer.weight, layer.style(w), True)[0], padding=1)
    y = y + layer.noise_strength * layer.noise + layer.bias[None, :, None, None]
    expected = torch.where(y > 0, y, 0.2 * y) * math.sqrt(2)
    torch.testing.assert_close(layer(x, w, fir_filter().double()), expected)


def test_the_activation_keeps_the_second_moment_to_four_percent() -> None:
    moment = float(activated(torch.randn(100_000)).square().mean())
    assert moment == pytest.approx(1.04, abs=0.03)


@pytest.mark.parametrize("size", [4, 8, 32])
def test_a_generator_has_a_block_for_each_power_of_two(size: int) -> None:
    shape = GanShape(channel_base=64, most_channels=8, style_dim=6, mapping_layers=2)
    network = StyleGan(shape, size)
    Gan(shape).initialize(network, 0)
    with torch.no_grad():
        assert network(torch.randn(3, 6)).shape == (3, 3, size, size)
        # z is normalized: its length says nothing.
        z = torch.randn(1, 6)
        torch.testing.assert_close(network(5 * z), network(z), rtol=1e-3, atol=1e-3)
    assert len(network.blocks) == size.bit_length() - 2
    assert [block.to_rgb.weight.shape[1] for block in network.blocks] == [
        min(64 // side, 8) for side in (4, 8, 16, 32) if side <= size
    ]

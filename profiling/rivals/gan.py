"""A StyleGAN2-shaped generator: from z to an image in one pass.

Karras et al., Analyzing and Improving the Image Quality of StyleGAN, arXiv 1912.04958, section 2.2, equations 1 to
3; configuration F, whose blocks add up their RGB. Modulated convolution with weights w, styles s and scale 1:

    w'_ijk = s_i w_ijk                                  modulation, input channel i
    w''_ijk = w'_ijk / sqrt(sum_ik w'_ijk^2 + eps)      demodulation, output channel j

A convolution is linear in its input and in each output channel, so scaling the input by s and the output by
1 / sqrt(sum_i s_i^2 sum_k w_ijk^2 + eps) is the same, and one set of weights serves the whole batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..measure.outcomes import Unsupported
from ..trajectory.case import Case
from .kind import LATENT_PIXELS, RivalKind
from .rival import GanShape

# The first block's resolution.
LEAST = 4
EPS = 1e-8


def modulated_conv(
    x: Tensor, weight: Tensor, styles: Tensor, *, demodulate: bool, upsample: bool = False
) -> Tensor:
    """x [B, Cin, H, W] by weight [Cout, Cin, k, k] under styles [B, Cin], without a change of size.

    upsample: to twice the size, by a transposed convolution that the caller blurs: [B, Cout, 2H + 1, 2W + 1].
    """
    x = x * styles[:, :, None, None]
    if upsample:
        y = F.conv_transpose2d(x, weight.transpose(0, 1), stride=2)
    else:
        y = F.conv2d(x, weight, padding=weight.shape[-1] // 2)
    if not demodulate:
        return y
    norm = torch.rsqrt(styles.square() @ weight.square().sum((2, 3)).T + EPS)
    return y * norm[:, :, None, None]


def fir_filter() -> Tensor:
    """The 4x4 low-pass filter [1, 3, 3, 1] in both directions, its sum 4: what upsampling by 2 x 2 divides by."""
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0])
    return 4.0 * torch.outer(taps, taps) / taps.sum() ** 2


def blurred(x: Tensor, fir: Tensor) -> Tensor:
    """x [B, C, 2H + 1, 2W + 1] of a transposed convolution, filtered, [B, C, 2H, 2W]."""
    channels = x.shape[1]
    return F.conv2d(x, fir.expand(channels, 1, 4, 4), padding=1, groups=channels)


def upsampled(x: Tensor, fir: Tensor) -> Tensor:
    """x [B, C, H, W] with zeros between its pixels, filtered, [B, C, 2H, 2W]."""
    channels = x.shape[1]
    return F.conv_transpose2d(x, fir.expand(channels, 1, 4, 4), stride=2, padding=1, groups=channels)


def activated(x: Tensor) -> Tensor:
    """Leaky ReLU at slope 0.2, scaled so that it keeps the variance."""
    return F.leaky_relu(x, 0.2) * math.sqrt(2.0)


class MappingNetwork(nn.Module):
    """z [B, D], normalized, to a style vector w [B, D]: fully connected layers."""

    def __init__(self, style_dim: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(style_dim, style_dim) for _ in range(layers))

    def forward(self, z: Tensor) -> Tensor:
        w = z * torch.rsqrt(z.square().mean(1, keepdim=True) + EPS)
        for layer in self.layers:
            w = activated(layer(w))
        return w


class StyledConv(nn.Module):
    """A modulated 3x3 convolution, the noise of its layer, bias, activation; w [B, D] gives the styles."""

    noise: Tensor

    def __init__(self, in_channels: int, out_channels: int, style_dim: int, size: int, upsample: bool) -> None:
        super().__init__()
        self.style = nn.Linear(style_dim, in_channels)
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, 3, 3))
        self.bias = nn.Parameter(torch.empty(out_channels))
        self.noise_strength = nn.Parameter(torch.empty(()))
        # Constant, as NVIDIA's generate.py has it unless told.
        self.register_buffer("noise", torch.empty(size, size))
        self.upsample = upsample

    def forward(self, x: Tensor, w: Tensor, fir: Tensor) -> Tensor:
        x = modulated_conv(x, self.weight, self.style(w), demodulate=True, upsample=self.upsample)
        x = blurred(x, fir) if self.upsample else x
        return activated(x + self.noise * self.noise_strength + self.bias[:, None, None])


class ToRgb(nn.Module):
    """A modulated 1x1 convolution to RGB, without demodulation."""

    def __init__(self, channels: int, style_dim: int) -> None:
        super().__init__()
        self.style = nn.Linear(style_dim, channels)
        self.weight = nn.Parameter(torch.empty(3, channels, 1, 1))
        self.bias = nn.Parameter(torch.empty(3))

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        return modulated_conv(x, self.weight, self.style(w), demodulate=False) + self.bias[:, None, None]


class SynthesisBlock(nn.Module):
    """A resolution: twice that of the block before, two styled convolutions (the first block has one), its RGB."""

    def __init__(self, in_channels: int, channels: int, style_dim: int, size: int) -> None:
        super().__init__()
        convs = [StyledConv(channels, channels, style_dim, size, upsample=False)]
        if size > LEAST:
            convs.insert(0, StyledConv(in_channels, channels, style_dim, size, upsample=True))
        self.convs = nn.ModuleList(convs)
        self.to_rgb = ToRgb(channels, style_dim)

    def forward(self, x: Tensor, image: Tensor | None, w: Tensor, fir: Tensor) -> tuple[Tensor, Tensor]:
        for conv in self.convs:
            x = conv(x, w, fir)
        rgb = self.to_rgb(x, w)
        return x, rgb if image is None else upsampled(image, fir) + rgb


class StyleGan(nn.Module):
    """z [B, D] to an image [B, 3, size, size]; size is a power of two of at least 4."""

    fir: Tensor

    def __init__(self, shape: GanShape, size: int) -> None:
        super().__init__()
        sizes = [LEAST << level for level in range((size // LEAST).bit_length())]
        channels = [min(shape.channel_base // side, shape.most_channels) for side in sizes]
        self.mapping = MappingNetwork(shape.style_dim, shape.mapping_layers)
        self.constant = nn.Parameter(torch.empty(channels[0], LEAST, LEAST))
        self.blocks = nn.ModuleList(
            SynthesisBlock(before, here, shape.style_dim, side)
            for before, here, side in zip([channels[0], *channels], channels, sizes, strict=False)
        )
        self.register_buffer("fir", fir_filter())

    def forward(self, z: Tensor) -> Tensor:
        w = self.mapping(z)
        x = self.constant.expand(len(z), -1, -1, -1)
        image: Tensor | None = None
        for block in self.blocks:
            x, image = block(x, image, w, self.fir)
        assert image is not None
        return image


@dataclass(frozen=True)
class Gan(RivalKind):
    """One pass of a StyleGAN2-shaped generator."""

    shape: GanShape

    def network(self, case: Case) -> nn.Module:
        height, width = case.latent_height * LATENT_PIXELS, case.latent_width * LATENT_PIXELS
        if height != width or height & (height - 1):
            raise Unsupported(
                f"{case.unet} makes square images whose side is a power of two; this one is {height}x{width}: "
                "choose another --latent, such as 64x64"
            )
        return StyleGan(self.shape, height)

    def arguments(self, case: Case, generator: torch.Generator) -> dict[str, Tensor]:
        return {"z": torch.randn(case.batch, self.shape.style_dim, generator=generator)}

    @torch.no_grad()
    def initialize(self, network: nn.Module, seed: int) -> None:
        """Random weights of unit gain, the filter, and the constant noise of each layer."""
        super().initialize(network, seed)
        assert isinstance(network, StyleGan)
        network.fir.copy_(fir_filter())
        for module in network.modules():
            if isinstance(module, StyledConv):
                generator = torch.Generator(module.noise.device).manual_seed(seed)
                module.noise.normal_(generator=generator)

"""The blocks that the autoencoder has beside the UNet's: attention of an image, and encoder and decoder.

Layouts are as in written.py, deferred biases and `in_place` as in blocks.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldmperf.kernels import MAX_HEAD_DIM, GroupNormSiLU, attention

from .autoencoder_config import AutoencoderConfig
from .blocks import Resample, ResBlock
from .choices import Choices
from .deferred import biases_of
from .route import Level, Stop, stops_of
from .written import Image, Written, as_tokens, matmul_add

# Every norm of AutoencoderKL has this eps; no field of its configuration says another.
NORM_EPS = 1e-6


def _choices(backend: str) -> Choices:
    """Those of an autoencoder: its images are too large for convolutions of ours to be the faster ones."""
    return Choices(backend, convolutions="torch", statistics="torch").checked()


class ImageAttention(nn.Module):
    """Self-attention of one head over the positions of an image, added to it.

    A head is as wide as the image has channels, 512 in Stable Diffusion. Above `MAX_HEAD_DIM`, and where it is no
    multiple of 4, the attention is torch's scaled_dot_product_attention on every backend: no kernel serves it.
    """

    # No transformer blocks inside, for deferred.py.
    blocks: tuple[()] = ()

    def __init__(self, channels: int, groups: int, backend: str) -> None:
        super().__init__()
        self.backend = backend if channels % 4 == 0 and channels <= MAX_HEAD_DIM else "torch"
        self.norm = GroupNormSiLU(groups, channels, NORM_EPS, activation=None, backend=backend)
        self.to_qkv = nn.Linear(channels, 3 * channels)
        self.proj_out = nn.Linear(channels, channels)

    def forward(self, x: Tensor, between: Tensor | None, in_place: bool = False) -> Tensor:
        """x [B, C, H, W] -> [B, C, H, W] without the projection's bias; `between` as of `Biases`.

        `in_place` overwrites x, for a caller that alone holds it.
        """
        packed: Tensor = self.to_qkv(as_tokens(self.norm(x, between)))
        # One head of all channels.
        qkv = packed.unflatten(2, (3, 1, x.shape[1]))
        h = attention(*qkv.unbind(2), backend=self.backend).flatten(2)
        return matmul_add(x, h, self.proj_out.weight, in_place)


class HalvingConv(Resample):
    """The 3x3 convolution of stride 2 that pads below and on the right alone, without its bias."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, 2, _choices("torch"))

    def forward(self, x: Image) -> Tensor:
        """x [B, C, H, W] -> [B, C, H // 2, W // 2]."""
        x = Written.of(x).image
        height, width = x.shape[2] // 2, x.shape[3] // 2
        # Padded by 2 on all sides, the first row and column of the result are too many. To copy the rest costs a
        # quarter of a padded copy of x.
        out = F.conv2d(x, self.conv.weight, stride=2, padding=2)
        return out[:, :, 1 : height + 1, 1 : width + 1].contiguous(memory_format=torch.channels_last)


class Coder(nn.Module):
    """The encoder or the decoder: a convolution, levels of blocks, then a norm with a SiLU and a convolution."""

    def __init__(self, conv_in: nn.Conv2d, down: list[Level], middle: Level, up: list[Level], out: int) -> None:
        super().__init__()
        self.conv_in = conv_in
        self.down = nn.ModuleList(down)
        self.middle = middle
        self.up = nn.ModuleList(up)
        last = cast(Level, (*self.down, self.middle, *self.up)[-1])
        norm = cast(ResBlock, last.resblocks[-1]).norm2
        self.norm_out = GroupNormSiLU(norm.num_groups, norm.num_channels, NORM_EPS, backend=norm.backend)
        self.conv_out = nn.Conv2d(norm.num_channels, out, 3, padding=1)

    def _route(self) -> tuple[Stop, ...]:
        levels = cast(Iterable[Level], chain(self.down, (self.middle,), self.up))
        return tuple(chain.from_iterable(map(stops_of, levels)))

    def forward(self, x: Tensor, in_place: bool = False) -> Tensor:
        """x [B, Cin, H, W], channels-last -> [B, Cout, H', W'] of the same layout.

        `in_place` overwrites results of submodules, never x.
        """
        stops = self._route()
        at_stops, at_end = biases_of(stops, cast(Tensor, self.conv_in.bias))
        x = F.conv2d(x, self.conv_in.weight, padding=1)
        for stop, biases in zip(stops, at_stops, strict=True):
            size = torch.Size(2 * n for n in x.shape[2:]) if stop.enlarges else None
            block = stop.resblock
            x = block(x, block.conv1.bias, None, biases.before, biases.bias, size, in_place)
            if stop.transformer is not None:
                x = stop.transformer(x, biases.between, in_place)
            if stop.resample is not None:
                x = stop.resample(x)
        out: Tensor = self.conv_out(self.norm_out(x, at_end))
        return out


def encoder_of(config: AutoencoderConfig, backend: str) -> Coder:
    """Images [B, Cin, H, W] -> moments [B, 2 L, H / scale, W / scale]."""
    widths, layers = config.block_channels, config.layers_per_block
    down = []
    for i, (before, width) in enumerate(zip((widths[0], *widths), widths, strict=False)):
        halving = HalvingConv(width) if i < len(widths) - 1 else None
        blocks = _resblocks(config, [before, *[width] * (layers - 1)], width, backend)
        down.append(Level(blocks, [], downsample=halving, upsample=None))
    conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
    return Coder(conv_in, down, _middle(config, backend), [], 2 * config.latent_channels)


def decoder_of(config: AutoencoderConfig, backend: str) -> Coder:
    """Latents [B, L, H, W] -> images [B, Cout, scale H, scale W]."""
    widths, layers = config.block_channels[::-1], config.layers_per_block
    up = []
    for i, (before, width) in enumerate(zip((widths[0], *widths), widths, strict=False)):
        conv = Resample(width, 1, _choices(backend)) if i < len(widths) - 1 else None
        blocks = _resblocks(config, [before, *[width] * layers], width, backend)
        up.append(Level(blocks, [], downsample=None, upsample=conv))
    conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
    return Coder(conv_in, [], _middle(config, backend), up, config.out_channels)


def _middle(config: AutoencoderConfig, backend: str) -> Level:
    width = config.block_channels[-1]
    attentions = [ImageAttention(width, config.norm_groups, backend)] if config.attention else []
    return Level(_resblocks(config, [width] * 2, width, backend), attentions, downsample=None, upsample=None)


def _resblocks(config: AutoencoderConfig, widths: list[int], out: int, backend: str) -> list[ResBlock]:
    return [ResBlock(width, out, config.norm_groups, NORM_EPS, _choices(backend)) for width in widths]

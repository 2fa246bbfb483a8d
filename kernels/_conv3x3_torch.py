"""`conv3x3` by torch's own operators, part by part; its call as a value; weights for an enlarged image."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._checks import tensors
from ._conv3x3_config import Conv3x3Shape
from ._launch import ceil_div, dtype_name
from ._library import compute_dtype
from ._statistics import channel_statistics
from .residual_add import residual_add


class Conv3x3Call(NamedTuple):
    """The arguments of `conv3x3`."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None = None
    stride: int = 1
    upsample: bool = False
    shortcut: Tensor | None = None
    skip: Tensor | None = None
    shortcut_weight: Tensor | None = None
    residual: Tensor | None = None
    statistics: bool = False

    @property
    def packed(self) -> bool:
        """Whether the weight is of `pack_phases`."""
        return self.weight.ndim == 5

    @property
    def columns(self) -> int:
        """The channels of the result."""
        return self.weight.shape[1 if self.packed else 0]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the result."""
        height, width = self.x.shape[2:]
        if self.upsample:
            return 2 * height, 2 * width
        return ceil_div(height, self.stride), ceil_div(width, self.stride)

    @property
    def result_shape(self) -> tuple[int, int, int, int]:
        """Of the image."""
        return (self.x.shape[0], self.columns, *self.size)

    @property
    def pointwise(self) -> tuple[int, ...]:
        """The channels of shortcut and skip, where they are."""
        return tuple(part.shape[1] for part in (self.shortcut, self.skip) if part is not None)

    @property
    def tile(self) -> int:
        """Pixels of a tile of statistics: it depends on the image alone, so that their shape does too."""
        return 64 if math.prod(self.size) > 256 else 16

    @property
    def shape(self) -> Conv3x3Shape:
        """What a configuration depends on."""
        batch, channels, height, width = self.x.shape
        return Conv3x3Shape(
            batch=batch,
            height=ceil_div(height, self.stride),
            width=ceil_div(width, self.stride),
            channels=channels,
            columns=self.columns,
            stride=self.stride,
            upsample=self.upsample,
            packed=self.packed,
            pointwise=self.pointwise,
            residual=self.residual is not None,
            statistics=self.statistics,
            itemsize=self.x.element_size(),
        )


def separate(call: Conv3x3Call, backend: str, out: Tensor | None = None) -> Tensor:
    """The image, in any memory format unless `out` is given."""
    x, weight, bias, residual = call.x, call.weight, call.bias, call.residual
    if not math.prod(call.result_shape):
        return empty_image(call) if out is None else out
    own_bias = None if residual is not None or bias is None else bias.to(x.dtype)
    if not x.shape[1]:
        # Torch's convolution of no channels has a result of none.
        y = x.new_zeros(call.result_shape)
        y = y if own_bias is None else y + own_bias[:, None, None]
    elif call.packed:
        y = _packed_convolution(x, weight, own_bias)
    else:
        if call.upsample:
            x = F.interpolate(x, scale_factor=2, mode="nearest")
        y = F.conv2d(x, weight, own_bias, call.stride, padding=1)
    if call.shortcut is not None and call.shortcut_weight is not None:
        parts = [part for part in (call.shortcut, call.skip) if part is not None]
        weights = call.shortcut_weight.split([part.shape[1] for part in parts], dim=1)
        for part, own in zip(parts, weights, strict=True):
            y = _matmul_add(y, part, own)
    if residual is not None:
        return residual_add(y, residual, bias, backend=backend, out=out)
    return y if out is None else out.copy_(y)


def _packed_convolution(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """One 2x2 convolution to the channels of all four phases, which then take their places."""
    height, width = x.shape[2:]
    every = F.conv2d(x, weight.flatten(0, 1), None if bias is None else bias.repeat(4), padding=1)
    phases = every.unflatten(1, (4, -1)).unbind(1)
    placed = [phases[p][:, :, p // 2 : p // 2 + height, p % 2 : p % 2 + width] for p in range(4)]
    rows = [torch.stack(placed[2 * py : 2 * py + 2], dim=-1).flatten(-2) for py in (0, 1)]
    return torch.stack(rows, dim=-2).flatten(-3, -2)


def _matmul_add(y: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """y + W x pixel by pixel."""
    rows = torch.addmm(_as_rows(y), _as_rows(x), weight.t())
    batch, _, height, width = y.shape
    return rows.view(batch, height, width, -1).movedim(-1, 1)


def _as_rows(x: Tensor) -> Tensor:
    """[B, C, H, W] -> [B * H * W, C], a view of channels-last memory."""
    return x.movedim(1, -1).flatten(0, 2)


def image_statistics(y: Tensor, tile: int) -> Tensor:
    """Those of an image by torch, in few launches where its tiles are even."""
    batch, channels, height, width = y.shape
    if height * width % tile or not y.numel():
        return channel_statistics(y, tile)
    values = y.movedim(1, -1).reshape(batch, -1, tile, channels).to(compute_dtype(y))
    variance, mean = torch.var_mean(values, dim=2, correction=0)
    return torch.stack([mean, variance * tile], dim=2).float()


def pack_phases(weight: Tensor) -> Tensor:
    """The weight [N, C, 3, 3] of a convolution of an enlarged image -> [4, N, C, 2, 2] for the image itself.

    After an enlargement to twice the size by nearest neighbour, the result's pixels of one parity of row and
    column (phase 2 * (row % 2) + column % 2) are a 2x2 convolution of the small image, whose weights are sums of
    one, two or four of the nine. The sums are float32 (float64 for float64) and rounded once to the weight's
    dtype. In bfloat16 and float16 that makes the result's error 1.4 times that of the nine taps (root mean square
    against float64, normal weights). Where that is too much, `conv3x3(upsample=True)` takes the weight as it is.
    Each [N, C, 2, 2] lies in channels-last memory. Raises ValueError for another shape.
    """
    tensors(pack_phases, (weight,))
    if weight.ndim != 4 or weight.shape[2:] != (3, 3) or not weight.is_floating_point():
        raise ValueError(
            f"pack_phases: weight must be a float [N, C, 3, 3]; got {dtype_name(weight)} {list(weight.shape)}"
        )
    taps = weight.to(compute_dtype(weight)).permute(0, 2, 3, 1)
    first = torch.stack([taps[:, 0], taps[:, 1] + taps[:, 2]], dim=1)
    second = torch.stack([taps[:, 0] + taps[:, 1], taps[:, 2]], dim=1)
    phases = []
    for rows in (first, second):
        phases.append(torch.stack([rows[:, :, 0], rows[:, :, 1] + rows[:, :, 2]], dim=2))
        phases.append(torch.stack([rows[:, :, 0] + rows[:, :, 1], rows[:, :, 2]], dim=2))
    return torch.stack(phases).to(weight.dtype).permute(0, 1, 4, 2, 3)


def empty_image(call: Conv3x3Call) -> Tensor:
    x = call.x
    return torch.empty(call.result_shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)

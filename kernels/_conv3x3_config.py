"""Launch configurations of `conv3x3`, and the prediction whether it pays, until a tuner has measured both."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from ._launch import Chip, ceil_div


@dataclass(frozen=True)
class Conv3x3Config:
    """A tile of block_m pixels and block_n channels of the result, block_k channels of x at a time.

    splits: the programs that share a tile's passes. With more than one, a second launch sums what they found.
    """

    block_m: int
    block_n: int
    block_k: int
    splits: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Conv3x3Shape:
    """What a configuration depends on.

    height, width: of the result, with `upsample` of x. pointwise: channels of the 1x1 convolutions that are added.
    packed: four 2x2 convolutions stand for one 3x3 of an enlarged image. residual, statistics: whether they are.
    """

    batch: int
    height: int
    width: int
    channels: int
    columns: int
    stride: int
    upsample: bool
    packed: bool
    pointwise: tuple[int, ...]
    residual: bool
    statistics: bool
    itemsize: int

    @property
    def rows(self) -> int:
        """Pixels of the result; with `upsample`, of one phase."""
        return self.batch * self.height * self.width

    @property
    def phases(self) -> int:
        """With `upsample`, parities of a pixel's row and column."""
        return 4 if self.upsample else 1

    @property
    def taps(self) -> int:
        """Of the window, along an axis."""
        return 2 if self.packed else 3

    def passes(self, block_k: int) -> int:
        """Of a tile, through all taps and channels."""
        return self.taps**2 * ceil_div(self.channels, block_k) + sum(ceil_div(c, block_k) for c in self.pointwise)


def _tiles(shape: Conv3x3Shape, config: Conv3x3Config) -> int:
    return shape.phases * ceil_div(shape.rows, config.block_m) * ceil_div(shape.columns, config.block_n)


@functools.cache
def default_config(shape: Conv3x3Shape, chip: Chip) -> Conv3x3Config:
    """The configuration for a chip that nothing was measured on."""
    if shape.itemsize != 2:
        return Conv3x3Config(64, 32, 32, 1, 8, 2)
    return Conv3x3Config(64, 64, 64 if shape.channels % 64 == 0 else 32, 1, 4, 4)


def candidate_configs(shape: Conv3x3Shape, chip: Chip) -> list[Conv3x3Config]:
    """What a tuner tries."""
    found = []
    for m, n, k, warps, stages in (
        (64, 64, 32, 4, 3),
        (64, 32, 64, 4, 3),
        (128, 64, 32, 4, 3),
        (128, 32, 16, 4, 3),
    ):
        for splits in (1, 2, 3):
            found.append(Conv3x3Config(m, n, k, splits, warps, stages))
    return found


@functools.cache
def predicted_to_gain(shape: Conv3x3Shape, chip: Chip) -> bool:
    """Whether the kernels are predicted to be clearly faster than torch's convolution with all beside it."""
    return False

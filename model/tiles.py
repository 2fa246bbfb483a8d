"""A network of images applied tile by tile, and the overlaps blended: memory for a few tiles, whatever the size.

Tiles start every `step` positions and reach over the next ones. Of an overlap of n positions, position i is
(1 - i / n) of the tile before and i / n of this one, down and to the right. Source: diffusers' AutoencoderKL.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tiling:
    """Squares of `tile` positions, `step` apart. Raises ValueError for sizes that are none."""

    tile: int
    step: int

    def __post_init__(self) -> None:
        if not 1 <= self.step <= self.tile:
            raise ValueError(
                f"tiles of {self.tile}, {self.step} apart, do not cover an image: give 1 or more of both"
            )

    @classmethod
    def of(cls, tile: int, overlap: float) -> Tiling:
        """Tiles that share `overlap` of their side with the next: 0.25 for a quarter."""
        if isinstance(tile, bool) or not isinstance(tile, int) or tile < 1:
            raise ValueError(f"tile must be a whole number of latents from 1 on; got {tile!r}")
        if isinstance(overlap, bool) or not isinstance(overlap, int | float) or not 0 <= overlap < 1:
            raise ValueError(f"overlap must be from 0 to below 1, the part of a tile; got {overlap!r}")
        return cls(tile, max(int(tile * (1 - overlap)), 1))

    def times(self, scale: int) -> Tiling:
        """The same tiles counted in positions that are `scale` times finer."""
        return Tiling(scale * self.tile, scale * self.step)

    def covers(self, x: Tensor) -> bool:
        """Whether one tile is the whole of x [B, C, H, W]."""
        return max(x.shape[2:]) <= self.tile


def apply_tiled(
    network: Callable[[Tensor], Tensor], x: Tensor, tiles: Tiling, out: Tensor, out_tiles: Tiling
) -> Tensor:
    """`out`, with the network's result of every tile of x written into it, blended.

    Held beside x and `out`: what the network needs for one tile, a tile, and the last rows of a row of tiles.
    """
    overlap = out_tiles.tile - out_tiles.step
    above: list[Tensor] = []
    # By the rows and columns of the result: the pixels left beside whole latents are no tile of their own.
    for row in range(0, out.shape[2], out_tiles.step):
        below: list[Tensor] = []
        beside: Tensor | None = None
        for column in range(0, out.shape[3], out_tiles.step):
            top, left = (at // out_tiles.step * tiles.step for at in (row, column))
            result = network(x[:, :, top : top + tiles.tile, left : left + tiles.tile])
            if above:
                _blend(above[len(below)], result, dim=2)
            if beside is not None:
                _blend(beside, result, dim=3)
            kept = result[:, :, : out_tiles.step, : out_tiles.step]
            out[:, :, row : row + kept.shape[2], column : column + kept.shape[3]] = kept
            if overlap:
                beside = result[:, :, :, -overlap:].clone()
                below.append(result[:, :, -overlap:].clone())
            del result, kept
        above = below
    return out


def _blend(before: Tensor, tile: Tensor, dim: int) -> None:
    """The first positions of a tile along `dim`, in place, with the last ones of the tile before it."""
    count = min(before.shape[dim], tile.shape[dim])
    ramp = torch.arange(count, device=tile.device, dtype=torch.promote_types(tile.dtype, torch.float32)) / count
    ramp = ramp.view(-1, *[1] * (3 - dim))
    first = tile.narrow(dim, 0, count)
    first.copy_(before.narrow(dim, before.shape[dim] - count, count) * (1 - ramp) + first * ramp)

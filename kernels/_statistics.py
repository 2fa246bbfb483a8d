"""Statistics beside an image: what the next group norm needs of it, left by whoever wrote it.

float32 [B, tiles, 2, C]: for each tile of pixels of one sample, by channel, the mean of the values as they were
rounded, and the sum of their squared deviations from it. A tile has T pixels, an image's last tile what is left; T
is the least power of two of which `tiles` cover the image. Which pixels a tile has does not matter: moments are
merged exactly (Chan, Golub and LeVeque, 1979), a constant by channel moves means alone, and images side by side
have two of them. One float32 holds a mean: enough for 16-bit images. Of a float32 image whose mean is 1e4 standard
deviations the normalized values are off by 6e-4.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ._checks import tensors, whole
from ._launch import ceil_div, next_power_of_two
from ._layout import MAX_INDEX
from ._triton import jit, tl


def tile_pixels(pixels: int, tiles: int) -> int:
    """T: the pixels of every tile of an image but the last."""
    return next_power_of_two(ceil_div(pixels, tiles))


def empty_statistics(image: Tensor, tile: int) -> Tensor:
    """Not yet computed: those of an image [B, C, H, W] in tiles of `tile` pixels, a power of two."""
    batch, channels, height, width = image.shape
    return image.new_empty((batch, ceil_div(height * width, tile), 2, channels), dtype=torch.float32)


def channel_statistics(image: Tensor, tile: int) -> Tensor:
    """Reference: those of an image [B, C, H, W] whose tiles are runs of pixels, float32 from float64.

    ValueError for what is no float image, and for a `tile` that is no power of two.
    """
    _check_image(channel_statistics, image)
    tile = whole("channel_statistics", "tile", tile)
    if tile < 1 or tile & (tile - 1):
        raise ValueError(f"channel_statistics: tile must be a power of two of pixels; got {tile}")
    values = image.double().flatten(2)
    parts = values.split(tile, dim=2) if image.numel() else ()
    moments = [torch.stack([part.mean(2), part.var(2, unbiased=False) * part.shape[2]], dim=1) for part in parts]
    return torch.stack(moments, dim=1).float() if moments else empty_statistics(image, tile)


def like_statistics(statistics: Tensor, image: Tensor) -> Tensor:
    """Reference: those of an image [B, C, H, W] in as many tiles as `statistics`, of such an image, has.

    ValueError where `statistics` cannot be those of an image of this size.
    """
    tensors(like_statistics, (statistics,))
    _check_image(like_statistics, image)
    if (misfit := statistics_misfit(statistics, image)) is not None:
        raise ValueError(
            f"like_statistics: statistics must be {misfit}; got {statistics.dtype} {list(statistics.shape)}"
        )
    return channel_statistics(image, tile_pixels(image.shape[2] * image.shape[3], statistics.shape[1]))


def _check_image(call: Callable[..., Tensor], image: Tensor) -> None:
    if not isinstance(image, Tensor) or image.ndim != 4 or not image.is_floating_point():
        told = f"{image.dtype} {list(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
        raise ValueError(f"{call.__name__}: image must be a float [B, C, H, W]; got {told}")


def statistics_misfit(statistics: Tensor, image: Tensor) -> str | None:
    """Why a tensor cannot hold the statistics of an image [B, C, H, W], in words that follow "must be"; None if it
    can."""
    batch, channels, height, width = image.shape
    pixels, shape = height * width, statistics.shape
    wanted = f"float32 [{batch}, tiles, 2, {channels}]"
    if statistics.dtype != torch.float32 or len(shape) != 4 or (shape[0], *shape[2:]) != (batch, 2, channels):
        return wanted
    tiles = shape[1]
    if pixels and (not tiles or ceil_div(pixels, tile_pixels(pixels, tiles)) != tiles):
        return f"{wanted}, tiles of a power of two of {pixels} pixels"
    return None


def statistics_reasons(**given: Tensor | None) -> list[str]:
    """Why kernels cannot address statistics, which they number in 32 bits within a sample; empty if they can."""
    return [
        f"{name} of a sample are {statistics[0].numel()} numbers, more than {MAX_INDEX}"
        for name, statistics in given.items()
        if statistics is not None and len(statistics) and statistics[0].numel() > MAX_INDEX
    ]


@jit
def store_statistics(statistics_ptr, tile, values, mask_rows, count, offs_c, mask_c, channels):
    """Writes those of one tile: `values` [pixels, channels] as they were rounded, in float32.

    `tile` counts through all samples; `count` pixels are in `mask_rows`, which is None where all are.
    """
    if mask_rows is None:
        mean = tl.sum(values, axis=0) / count
        deviation = values - mean[None, :]
    else:
        mean = tl.sum(tl.where(mask_rows[:, None], values, 0.0), axis=0) / count
        deviation = tl.where(mask_rows[:, None], values - mean[None, :], 0.0)
    ptrs = statistics_ptr + tile.to(tl.int64) * (2 * channels) + offs_c
    tl.store(ptrs, mean, mask=mask_c)
    tl.store(ptrs + channels, tl.sum(deviation * deviation, axis=0), mask=mask_c)

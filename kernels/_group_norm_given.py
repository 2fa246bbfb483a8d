"""The Triton kernel of `group_norm_silu` for images whose statistics are given (_statistics.py): one launch.

Every program merges the statistics of its bundle's channels over all tiles of its sample, which are a few percent
of the image, and normalizes a chunk of pixels. The order of every sum is fixed.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from ._dependent import launch_dependents, wait_for_primary
from ._group_norm_kernels import (
    _affine,
    _bundle_channels,
    _load_x_bias,
    _merge_lanes,
    _normalize,
)
from ._triton import jit, tl


@jit
def _tile_moments(statistics_ptr, tiles, tile, pixels, channels, offs_c, mask_c):
    """(mean, squares around it, pixels) of tiles [T] by channel; the mean is 0 past the last tile."""
    mask = (tile < tiles[0])[:, None] & mask_c[None, :]
    ptrs = statistics_ptr + (tile * (2 * channels))[:, None] + offs_c[None, :]
    size = tl.maximum(tl.minimum(pixels - tile * tiles[1], tiles[1]), 0).to(tl.float32)
    return tl.load(ptrs, mask=mask, other=0.0), tl.load(ptrs + channels, mask=mask, other=0.0), size


@jit
def _channel_moments(statistics_ptr, tiles, pixels, channels, offs_c, mask_c, BLOCK_T: tl.constexpr):
    """(mean, squares around it) [channels] of a sample; `tiles` is (their number, the pixels of each)."""
    lanes = tl.arange(0, BLOCK_T)
    # Around each lane's own first tile: no cancellation at large means.
    pivot, squares, weight = _tile_moments(statistics_ptr, tiles, lanes, pixels, channels, offs_c, mask_c)
    total = tl.zeros_like(pivot)
    for start in tl.range(BLOCK_T, tiles[0], BLOCK_T, loop_unroll_factor=2):
        mean, m2, size = _tile_moments(statistics_ptr, tiles, start + lanes, pixels, channels, offs_c, mask_c)
        deviation = tl.where((size > 0.0)[:, None], mean - pivot, 0.0)
        total += size[:, None] * deviation
        squares += m2 + size[:, None] * deviation * deviation
        weight += size
    mean = total / tl.maximum(weight, 1.0)[:, None]
    squares -= total * mean
    mean += pivot
    center = tl.sum(weight[:, None] * mean, axis=0) / pixels
    deviation = tl.where((weight > 0.0)[:, None], mean - center[None, :], 0.0)
    return center, tl.sum(squares + weight[:, None] * deviation * deviation, axis=0)


@jit
def group_norm_given_kernel(
    x_ptr,
    skip_ptr,
    x_bias_ptr,
    weight_ptr,
    bias_ptr,
    statistics_ptr,
    skip_statistics_ptr,
    out_ptr,
    num_groups,
    bundles,
    chunks,
    chunk_pixels,
    tiles,
    tile_pixels,
    skip_tiles,
    skip_tile_pixels,
    x_channels,
    pixels,
    width,
    eps,
    stride_xb,
    stride_xc,
    stride_xh,
    stride_xw,
    stride_kb,
    stride_kc,
    stride_kh,
    stride_kw,
    stride_tb,
    stride_tc,
    stride_ob,
    stride_oc,
    stride_ow,
    GROUP_CHANNELS: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_HW: tl.constexpr,
    BLOCK_T: tl.constexpr,
    SILU: tl.constexpr,
    FLAT: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program merges the statistics of its bundle and normalizes one chunk of pixels."""
    launch_dependents(PDL)
    pid = tl.program_id(0)
    chunk = (pid // bundles) % chunks
    b = (pid // bundles // chunks).to(tl.int64)
    bundle = pid % bundles
    offs_c, mask_c, member = _bundle_channels(bundle, num_groups, GROUP_CHANNELS, GROUPS, BLOCK_C, BLOCK_G)
    wait_for_primary(PDL)
    shift = _load_x_bias(x_bias_ptr, b, offs_c, mask_c, stride_tb, stride_tc, BLOCK_C)
    of_x = offs_c < x_channels
    mean, m2 = _channel_moments(
        statistics_ptr + b * tiles * (2 * x_channels), (tiles, tile_pixels), pixels, x_channels, offs_c,
        mask_c & of_x, BLOCK_T,
    )  # fmt: skip
    if skip_ptr is not None:
        skip_channels = num_groups * GROUP_CHANNELS - x_channels
        skip_mean, skip_m2 = _channel_moments(
            skip_statistics_ptr + b * skip_tiles * (2 * skip_channels), (skip_tiles, skip_tile_pixels), pixels,
            skip_channels, offs_c - x_channels, mask_c & (offs_c >= x_channels), BLOCK_T,
        )  # fmt: skip
        mean = tl.where(of_x, mean, skip_mean)
        m2 = tl.where(of_x, m2, skip_m2)
        skip_ptr += b * stride_kb
    count = pixels * (1.0 * GROUP_CHANNELS)
    weight = tl.zeros([1], tl.float32) + pixels
    mean0, delta, m2 = _merge_lanes(mean[None, :] + shift[None, :], m2[None, :], weight, mask_c, member, count)
    center, slope, offset = _affine(
        weight_ptr, bias_ptr, shift, mean0, delta, m2, count, eps, offs_c, mask_c, member
    )
    _normalize(
        x_ptr + b * stride_xb, skip_ptr, out_ptr + b * stride_ob, center, slope, offset, chunk * chunk_pixels,
        tl.minimum((chunk + 1) * chunk_pixels, pixels), width, offs_c, mask_c, x_channels,
        stride_xc, stride_xh, stride_xw, stride_kc, stride_kh, stride_kw, stride_oc, stride_ow, BLOCK_HW, SILU,
        FLAT,
    )  # fmt: skip

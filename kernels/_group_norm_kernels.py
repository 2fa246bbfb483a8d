"""The Triton kernels of `group_norm_silu`; group_norm.py tells what they do and why.

Every kernel takes an image and a bundle of GROUPS groups of GROUP_CHANNELS channels: BLOCK_C lanes, BLOCK_G groups
(both padded to powers of two), in tiles of BLOCK_HW pixels.
"""

from __future__ import annotations

from ._dependent import launch_dependents, wait_for_primary
from ._layout import pixel_offsets
from ._triton import jit, tl


@jit
def _load_tile(  # type: ignore[no-untyped-def]
    x_ptr,
    skip_ptr,
    pixels,
    end,
    width,
    offs_c,
    mask_c,
    x_channels,
    stride_xc,
    stride_xh,
    stride_xw,
    stride_kc,
    stride_kh,
    stride_kw,
    FLAT: tl.constexpr,
):
    """A tile [pixels, channels] of x and skip in float32, and its mask; other lanes hold zero.

    Without the shift, which is the same for all pixels: it is added to what they are reduced to, so that no loop
    carries it.
    """
    mask = (pixels < end)[:, None] & mask_c[None, :]
    x_rows = pixel_offsets(pixels, width, stride_xh, stride_xw, FLAT)
    x_ptrs = x_ptr + x_rows[:, None] + (offs_c.to(tl.int64) * stride_xc)[None, :]
    if skip_ptr is None:
        x = tl.load(x_ptrs, mask=mask, other=0.0)
    else:
        # Two loads under opposite masks: lanes that are off ask for no memory.
        of_x = (offs_c < x_channels)[None, :]
        k_rows = pixel_offsets(pixels, width, stride_kh, stride_kw, FLAT)
        k_ptrs = skip_ptr + k_rows[:, None] + ((offs_c - x_channels).to(tl.int64) * stride_kc)[None, :]
        x = tl.load(x_ptrs, mask=mask & of_x, other=0.0)
        x = tl.where(of_x, x, tl.load(k_ptrs, mask=mask & (offs_c >= x_channels)[None, :], other=0.0))
    return x.to(tl.float32), mask


@jit
def _to_channels(per_group, member):  # type: ignore[no-untyped-def]
    """[groups] -> [channels]: to each channel its group's value."""
    return tl.sum(tl.where(member, per_group[None, :], 0.0), axis=1)


@jit
def _to_groups(per_channel, member):  # type: ignore[no-untyped-def]
    """[channels] -> [groups]: sums."""
    return tl.sum(tl.where(member, per_channel[:, None], 0.0), axis=0)


@jit
def _merge_lanes(mean, m2, weight, mask_c, member, count):  # type: ignore[no-untyped-def]
    """Lanes [pixels, channels] merged to groups of `count` values: (mean0, delta, m2) [groups];
    mean0 + delta is the mean, m2 the squares around it. A lane has `weight` [pixels] values, their mean and m2."""
    valid = (weight > 0.0)[:, None] & mask_c[None, :]
    mean0 = _to_groups(tl.sum(tl.where(valid, weight[:, None] * mean, 0.0), axis=0), member) / count
    deviation = mean - _to_channels(mean0, member)[None, :]
    first = tl.sum(tl.where(valid, weight[:, None] * deviation, 0.0), axis=0)
    second = tl.sum(tl.where(valid, m2 + weight[:, None] * deviation * deviation, 0.0), axis=0)
    delta = _to_groups(first, member) / count
    return mean0, delta, _to_groups(second, member) - count * delta * delta


@jit
def _bundle_channels(  # type: ignore[no-untyped-def]
    bundle,
    num_groups,
    GROUP_CHANNELS: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """A bundle's channels, their mask, and their membership [channels, groups]."""
    lanes = tl.arange(0, BLOCK_C)
    offs_c = bundle * (GROUPS * GROUP_CHANNELS) + lanes
    mask_c = (lanes < GROUPS * GROUP_CHANNELS) & (offs_c < num_groups * GROUP_CHANNELS)
    member = (lanes // GROUP_CHANNELS)[:, None] == tl.arange(0, BLOCK_G)[None, :]
    return offs_c, mask_c, member & mask_c[:, None]


@jit
def _load_x_bias(x_bias_ptr, b, offs_c, mask_c, stride_tb, stride_tc, BLOCK_C: tl.constexpr):  # type: ignore[no-untyped-def]
    if x_bias_ptr is None:
        shift = tl.zeros([BLOCK_C], dtype=tl.float32)
    else:
        offs = b * stride_tb + offs_c.to(tl.int64) * stride_tc
        shift = tl.load(x_bias_ptr + offs, mask=mask_c, other=0.0).to(tl.float32)
    return shift


@jit
def _affine(weight_ptr, bias_ptr, shift, mean0, delta, m2, count, eps, offs_c, mask_c, member):  # type: ignore[no-untyped-def]
    """(center, slope, offset) [channels]: the normalized value is (x - center) * slope + offset.

    With `shift` x is without it: the center is the mean less the shift, and what rounding takes from that
    difference goes to the offset.
    """
    rstd = 1.0 / tl.sqrt(m2 / count + eps)
    slope = _to_channels(rstd, member)
    if weight_ptr is not None:
        slope *= tl.load(weight_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
    mean = _to_channels(mean0, member)
    center = mean
    rest = _to_channels(delta, member)
    if shift is not None:
        center = mean - shift
        rest += (mean - center) - shift
    offset = -rest * slope
    if bias_ptr is not None:
        offset += tl.load(bias_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
    return center, slope, offset


@jit
def _store_tile(  # type: ignore[no-untyped-def]
    out_ptr, x, mask, center, slope, offset, pixels, offs_c, stride_oc, stride_ow, SILU: tl.constexpr
):
    y = (x - center[None, :]) * slope[None, :] + offset[None, :]
    if SILU:
        y = y / (1.0 + tl.exp(-y))
    ptrs = out_ptr + (pixels.to(tl.int64) * stride_ow)[:, None] + (offs_c.to(tl.int64) * stride_oc)[None, :]
    tl.store(ptrs, y.to(out_ptr.dtype.element_ty), mask=mask)


@jit
def _normalize(  # type: ignore[no-untyped-def]
    x_ptr,
    skip_ptr,
    out_ptr,
    center,
    slope,
    offset,
    start,
    end,
    width,
    offs_c,
    mask_c,
    x_channels,
    stride_xc,
    stride_xh,
    stride_xw,
    stride_kc,
    stride_kh,
    stride_kw,
    stride_oc,
    stride_ow,
    BLOCK_HW: tl.constexpr,
    SILU: tl.constexpr,
    FLAT: tl.constexpr,
):
    """Normalize the pixels from start to end, tile by tile."""
    lanes = tl.arange(0, BLOCK_HW)
    x, mask = _load_tile(
        x_ptr, skip_ptr, start + lanes, end, width, offs_c, mask_c, x_channels,
        stride_xc, stride_xh, stride_xw, stride_kc, stride_kh, stride_kw, FLAT,
    )  # fmt: skip
    for tile in range(start, end, BLOCK_HW):
        # The next tile is on its way while this one is worked on; past the end it is masked off.
        next_x, next_mask = _load_tile(
            x_ptr, skip_ptr, tile + BLOCK_HW + lanes, end, width, offs_c, mask_c, x_channels,
            stride_xc, stride_xh, stride_xw, stride_kc, stride_kh, stride_kw, FLAT,
        )  # fmt: skip
        _store_tile(out_ptr, x, mask, center, slope, offset, tile + lanes, offs_c, stride_oc, stride_ow, SILU)
        x = next_x
        mask = next_mask


@jit
def _statistics(  # type: ignore[no-untyped-def]
    x_ptr,
    skip_ptr,
    shift,
    start,
    end,
    width,
    offs_c,
    mask_c,
    member,
    x_channels,
    stride_xc,
    stride_xh,
    stride_xw,
    stride_kc,
    stride_kh,
    stride_kw,
    GROUP_CHANNELS: tl.constexpr,
    BLOCK_HW: tl.constexpr,
    FLAT: tl.constexpr,
):
    """(mean0, delta, m2) [groups] of the pixels from start to end, tile by tile."""
    lanes = tl.arange(0, BLOCK_HW)
    # Sums around each lane's own first value: with n values a lane, the variance loses at most n roundings.
    pivot, _ = _load_tile(
        x_ptr, skip_ptr, start + lanes, end, width, offs_c, mask_c, x_channels,
        stride_xc, stride_xh, stride_xw, stride_kc, stride_kh, stride_kw, FLAT,
    )  # fmt: skip
    total = tl.zeros_like(pivot)
    squares = tl.zeros_like(pivot)
    for tile in tl.range(start + BLOCK_HW, end, BLOCK_HW, loop_unroll_factor=4):
        x, mask = _load_tile(
            x_ptr, skip_ptr, tile + lanes, end, width, offs_c, mask_c, x_channels,
            stride_xc, stride_xh, stride_xw, stride_kc, stride_kh, stride_kw, FLAT,
        )  # fmt: skip
        deviation = tl.where(mask, x - pivot, 0.0)
        total += deviation
        squares += deviation * deviation
    weight = tl.maximum((end - start - lanes + BLOCK_HW - 1) // BLOCK_HW, 0).to(tl.float32)
    mean = total / tl.maximum(weight, 1.0)[:, None]
    count = (end - start) * (1.0 * GROUP_CHANNELS)
    return _merge_lanes(pivot + mean + shift[None, :], squares - total * mean, weight, mask_c, member, count)


@jit
def group_norm_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    skip_ptr,
    x_bias_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    num_groups,
    bundles,
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
    ONE_TILE: tl.constexpr,
    SILU: tl.constexpr,
    FLAT: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program does all of an image's bundle."""
    launch_dependents(PDL)
    pid = tl.program_id(0)
    b = (pid // bundles).to(tl.int64)
    offs_c, mask_c, member = _bundle_channels(pid % bundles, num_groups, GROUP_CHANNELS, GROUPS, BLOCK_C, BLOCK_G)
    wait_for_primary(PDL)
    shift = _load_x_bias(x_bias_ptr, b, offs_c, mask_c, stride_tb, stride_tc, BLOCK_C)
    x_ptr += b * stride_xb
    out_ptr += b * stride_ob
    if skip_ptr is not None:
        skip_ptr += b * stride_kb
    lanes = tl.arange(0, BLOCK_HW)
    count = pixels * (1.0 * GROUP_CHANNELS)
    if ONE_TILE:
        x, mask = _load_tile(
            x_ptr, skip_ptr, lanes, pixels, width, offs_c, mask_c, x_channels,
            stride_xc, stride_xh, stride_xw, stride_kc, stride_kh, stride_kw, FLAT,
        )  # fmt: skip
        x += shift[None, :]
        weight = (lanes < pixels).to(tl.float32)
        mean0, delta, m2 = _merge_lanes(x, tl.zeros_like(x), weight, mask_c, member, count)
        center, slope, offset = _affine(
            weight_ptr, bias_ptr, None, mean0, delta, m2, count, eps, offs_c, mask_c, member
        )
        _store_tile(out_ptr, x, mask, center, slope, offset, lanes, offs_c, stride_oc, stride_ow, SILU)
    else:
        mean0, delta, m2 = _statistics(
            x_ptr, skip_ptr, shift, 0, pixels, width, offs_c, mask_c, member, x_channels,
            stride_xc, stride_xh, stride_xw, stride_kc, stride_kh, stride_kw, GROUP_CHANNELS, BLOCK_HW, FLAT,
        )  # fmt: skip
        center, slope, offset = _affine(
            weight_ptr, bias_ptr, shift, mean0, delta, m2, count, eps, offs_c, mask_c, member
        )
        _normalize(
            x_ptr, skip_ptr, out_ptr, center, slope, offset, 0, pixels, width, offs_c, mask_c, x_channels,
            stride_xc, stride_xh, stride_xw, stride_kc, stride_kh, stride_kw, stride_oc, stride_ow, BLOCK_HW,
            SILU, FLAT,
        )  # fmt: skip


@jit
def group_norm_statistics_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    skip_ptr,
    x_bias_ptr,
    statistics_ptr,
    num_groups,
    bundles,
    chunks,
    chunk_pixels,
    x_channels,
    pixels,
    width,
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
    GROUP_CHANNELS: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_HW: tl.constexpr,
    FLAT: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program writes (mean0, delta, m2) of a chunk of pixels to statistics [B, chunks, 3, groups]."""
    launch_dependents(PDL)
    pid = tl.program_id(0)
    chunk = (pid // bundles) % chunks
    b = (pid // bundles // chunks).to(tl.int64)
    bundle = pid % bundles
    offs_c, mask_c, member = _bundle_channels(bundle, num_groups, GROUP_CHANNELS, GROUPS, BLOCK_C, BLOCK_G)
    wait_for_primary(PDL)
    shift = _load_x_bias(x_bias_ptr, b, offs_c, mask_c, stride_tb, stride_tc, BLOCK_C)
    x_ptr += b * stride_xb
    if skip_ptr is not None:
        skip_ptr += b * stride_kb
    start = chunk * chunk_pixels
    mean0, delta, m2 = _statistics(
        x_ptr, skip_ptr, shift, start, tl.minimum(start + chunk_pixels, pixels), width, offs_c, mask_c, member,
        x_channels, stride_xc, stride_xh, stride_xw, stride_kc, stride_kh, stride_kw, GROUP_CHANNELS, BLOCK_HW,
        FLAT,
    )  # fmt: skip
    offs_g = tl.arange(0, BLOCK_G)
    groups = bundle * GROUPS + offs_g
    mask_g = (offs_g < GROUPS) & (groups < num_groups)
    ptrs = statistics_ptr + (b * chunks + chunk) * 3 * num_groups + groups
    tl.store(ptrs, mean0, mask=mask_g)
    tl.store(ptrs + num_groups, delta, mask=mask_g)
    tl.store(ptrs + 2 * num_groups, m2, mask=mask_g)


@jit
def group_norm_apply_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    skip_ptr,
    x_bias_ptr,
    weight_ptr,
    bias_ptr,
    statistics_ptr,
    out_ptr,
    num_groups,
    bundles,
    chunks,
    chunk_pixels,
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
    BLOCK_CHUNKS: tl.constexpr,
    SILU: tl.constexpr,
    FLAT: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program merges the statistics of its bundle's chunks and normalizes one chunk."""
    launch_dependents(PDL)
    # The last programs of the launch before have left their pixels in the L2 cache: begin with those.
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    chunk = (pid // bundles) % chunks
    b = (pid // bundles // chunks).to(tl.int64)
    bundle = pid % bundles
    offs_c, mask_c, member = _bundle_channels(bundle, num_groups, GROUP_CHANNELS, GROUPS, BLOCK_C, BLOCK_G)
    wait_for_primary(PDL)
    shift = _load_x_bias(x_bias_ptr, b, offs_c, mask_c, stride_tb, stride_tc, BLOCK_C)

    offs_g = tl.arange(0, BLOCK_G)
    groups = bundle * GROUPS + offs_g
    offs_k = tl.arange(0, BLOCK_CHUNKS)
    mask_kg = (offs_k < chunks)[:, None] & ((offs_g < GROUPS) & (groups < num_groups))[None, :]
    ptrs = statistics_ptr + ((b * chunks + offs_k) * 3 * num_groups)[:, None] + groups[None, :]
    chunk_mean0 = tl.load(ptrs, mask=mask_kg, other=0.0)
    chunk_delta = tl.load(ptrs + num_groups, mask=mask_kg, other=0.0)
    chunk_m2 = tl.load(ptrs + 2 * num_groups, mask=mask_kg, other=0.0)
    chunk_size = tl.maximum(tl.minimum(pixels - offs_k * chunk_pixels, chunk_pixels), 0)
    weight = (chunk_size.to(tl.float32) * GROUP_CHANNELS)[:, None]
    count = pixels * (1.0 * GROUP_CHANNELS)
    mean0 = tl.sum(weight * chunk_mean0, axis=0) / count
    deviation = tl.where(mask_kg, (chunk_mean0 - mean0[None, :]) + chunk_delta, 0.0)
    delta = tl.sum(weight * deviation, axis=0) / count
    m2 = tl.sum(chunk_m2 + weight * deviation * deviation, axis=0) - count * delta * delta

    center, slope, offset = _affine(
        weight_ptr, bias_ptr, shift, mean0, delta, m2, count, eps, offs_c, mask_c, member
    )
    x_ptr += b * stride_xb
    out_ptr += b * stride_ob
    if skip_ptr is not None:
        skip_ptr += b * stride_kb
    _normalize(
        x_ptr, skip_ptr, out_ptr, center, slope, offset, chunk * chunk_pixels,
        tl.minimum((chunk + 1) * chunk_pixels, pixels), width, offs_c, mask_c, x_channels,
        stride_xc, stride_xh, stride_xw, stride_kc, stride_kh, stride_kw, stride_oc, stride_ow, BLOCK_HW, SILU,
        FLAT,
    )  # fmt: skip

"""The Triton kernel of `transformer_front`; transformer_front.py tells what it does and why.

A tile of rows stays in registers, its channels in one or two parts (_parts.py).
"""

# Branches on constants are statements: Triton decides them when it compiles, and expressions it does not.
# ruff: noqa: SIM108
# mypy: disable-error-code="no-untyped-def, assignment"

from __future__ import annotations

from ._dependent import launch_dependents, wait_for_primary
from ._group_norm_given import _channel_moments
from ._linear_kernels import _normalized
from ._parts import load_parts, part_columns, row_ptrs
from ._prefetch import prefetch_share
from ._transformer_tail_kernels import add_matmul, add_vector, load_square, store_rows, store_tile, to_dtype
from ._triton import jit, tl


@jit
def _spread(
    per_group,
    c,
    GROUP_CHANNELS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    WHOLE_GROUPS: tl.constexpr,
):
    """[BLOCK_G] -> [part]: to each of the channels c its group's value."""
    if WHOLE_GROUPS:
        rows = tl.broadcast_to(per_group[:, None], [BLOCK_G, GROUP_CHANNELS])
        values = tl.reshape(rows, [BLOCK_G * GROUP_CHANNELS])
    else:
        values = tl.gather(per_group, tl.minimum(c // GROUP_CHANNELS, BLOCK_G - 1), 0)
    return values


@jit
def _load_vector(ptr, c, mask):
    return tl.load(ptr + c, mask=mask, other=0.0).to(tl.float32)


@jit
def _group_norm_factors(
    statistics_ptr,
    tiles,
    pixels,
    x_bias_ptr,
    weight_ptr,
    bias_ptr,
    eps,
    CHANNELS: tl.constexpr,
    PART_1: tl.constexpr,
    PART_2: tl.constexpr,
    GROUP_CHANNELS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_GC: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """(centers, slopes, offsets) by part: the normalized value is (x - center) * slope + offset.

    `tiles` is (their number, the pixels of each) of the statistics of one sample. Channels are merged in lanes
    [BLOCK_G, BLOCK_GC], padded where groups are no powers of two. The mean is in two parts, as in group_norm_silu.
    With x_bias the center is the mean less it, and what rounding takes from that difference goes to the offset.
    """
    lanes = tl.arange(0, BLOCK_G * BLOCK_GC)
    of_lane = lanes // BLOCK_GC * GROUP_CHANNELS + lanes % BLOCK_GC
    inside = (lanes % BLOCK_GC < GROUP_CHANNELS) & (of_lane < CHANNELS)
    mean, m2 = _channel_moments(statistics_ptr, tiles, pixels, CHANNELS, of_lane, inside, BLOCK_T)
    if x_bias_ptr is not None:
        mean += _load_vector(x_bias_ptr, of_lane, inside)
    mean = tl.reshape(mean, [BLOCK_G, BLOCK_GC])
    mean0 = tl.sum(mean, axis=1) / GROUP_CHANNELS
    deviation = tl.where(tl.reshape(inside, [BLOCK_G, BLOCK_GC]), mean - mean0[:, None], 0.0)
    delta = tl.sum(deviation, axis=1) / GROUP_CHANNELS
    m2 = tl.sum(tl.reshape(m2, [BLOCK_G, BLOCK_GC]) + pixels * deviation * deviation, axis=1)
    variance = m2 / (pixels * (1.0 * GROUP_CHANNELS)) - delta * delta
    rstd = 1.0 / tl.sqrt(variance + eps)

    columns = part_columns(PART_1, PART_2)
    # To spread them by a reshape takes no exchange between threads.
    WHOLE_GROUPS: tl.constexpr = PART_2 == 0 and BLOCK_GC == GROUP_CHANNELS and BLOCK_G * BLOCK_GC == PART_1
    centers = ()
    slopes = ()
    offsets = ()
    for i in tl.static_range(len(columns)):
        c = columns[i]
        mask = c < CHANNELS
        center = _spread(mean0, c, GROUP_CHANNELS, BLOCK_G, WHOLE_GROUPS)
        rest = _spread(delta, c, GROUP_CHANNELS, BLOCK_G, WHOLE_GROUPS)
        slope = _spread(rstd, c, GROUP_CHANNELS, BLOCK_G, WHOLE_GROUPS)
        slope *= _load_vector(weight_ptr, c, mask)
        if x_bias_ptr is not None:
            mean = center
            shift = _load_vector(x_bias_ptr, c, mask)
            center = mean - shift
            rest += (mean - center) - shift
        centers += (center,)
        slopes += (slope,)
        offsets += (_load_vector(bias_ptr, c, mask) - rest * slope,)
    return centers, slopes, offsets


@jit
def transformer_front_kernel(
    image_ptr,
    moments_ptr,
    x_bias_ptr,
    group_weight_ptr,
    group_bias_ptr,
    proj_weight_ptr,
    proj_bias_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    qkv_weight_ptr,
    x_ptr,
    qkv_ptr,
    tokens,
    blocks,
    tiles,
    tile_pixels,
    columns,
    group_eps,
    norm_eps,
    CHANNELS: tl.constexpr,
    PART_1: tl.constexpr,
    PART_2: tl.constexpr,
    GROUP_CHANNELS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_GC: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EVEN_M: tl.constexpr,
    EVEN_N: tl.constexpr,
    LINES: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program does BLOCK_M rows of one sample; `blocks` programs do a sample."""
    launch_dependents(PDL)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    pid = tl.program_id(0)
    sample = (pid // blocks).to(tl.int64)
    offs_m = (pid % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    if EVEN_M:
        mask_m = None
    else:
        mask_m = offs_m < tokens
    rows = sample * tokens + offs_m

    # What was last read a step ago comes from memory, while the statistics are merged.
    prefetch_share(qkv_weight_ptr, columns * CHANNELS, LINES)
    wait_for_primary(PDL)
    weight = load_square(proj_weight_ptr, CHANNELS, PART_1, PART_2)
    centers, slopes, offsets = _group_norm_factors(
        moments_ptr + sample * tiles * (2 * CHANNELS), (tiles, tile_pixels), tokens, x_bias_ptr, group_weight_ptr,
        group_bias_ptr, group_eps, CHANNELS, PART_1, PART_2, GROUP_CHANNELS, BLOCK_G, BLOCK_GC, BLOCK_T,
    )  # fmt: skip
    # Not before: a thread has no registers for them beside the statistics.
    image = load_parts(image_ptr + rows * CHANNELS, mask_m, CHANNELS, PART_1, PART_2)
    h = ()
    t = ()
    for i in tl.static_range(len(image)):
        y = (image[i].to(tl.float32) - centers[i][None, :]) * slopes[i][None, :] + offsets[i][None, :]
        h += (y.to(dtype),)
        t += (tl.zeros_like(y),)
    t = add_matmul(add_vector(t, proj_bias_ptr, CHANNELS, PART_1, PART_2), h, weight, PRECISION)
    store_rows(x_ptr + rows * CHANNELS, t, mask_m, CHANNELS, PART_1, PART_2)

    n = to_dtype(_normalized(t, None, norm_weight_ptr, norm_bias_ptr, norm_eps, CHANNELS, PART_1, PART_2), dtype)
    for start in range(0, columns, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        if EVEN_N:
            mask_n = None
        else:
            mask_n = offs_n < columns
        w = load_parts(row_ptrs(qkv_weight_ptr, offs_n, CHANNELS, 1), mask_n, CHANNELS, PART_1, PART_2)
        (acc,) = add_matmul((tl.zeros([BLOCK_M, BLOCK_N], tl.float32),), n, (w,), PRECISION)
        ptrs = qkv_ptr + (rows * columns)[:, None] + offs_n[None, :]
        store_tile(ptrs, acc.to(dtype), mask_m, mask_n)

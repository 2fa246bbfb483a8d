"""The Triton kernels of `conv3x3`; conv3x3.py tells what they do and why.

An implicit GEMM: a row of a tile is a pixel of the result, a column one of its channels. One flat loop goes over
taps and blocks of channels. Which taps of a row lie inside the image is one bit each, made before the loop: a pass
costs a row a shift and a test, and the offset of a tap is one number for all rows.

Rows are numbered image by image. An image has `image_rows` of them, its pixels rounded up to whole tiles of
statistics (TILE), so that no tile of statistics has pixels of two images.

PHASES: x is enlarged to twice its size as it is read. A program takes pixels of one parity (phase) of row and
column, so that a tap is at the same distance for all of them: 3 x 3 taps of the weight itself, or the 2 x 2 of
`pack_phases`.
"""

# Branches on constants are statements: Triton decides them when it compiles, and expressions it does not.
# ruff: noqa: SIM108
# mypy: disable-error-code="no-untyped-def, assignment"

from __future__ import annotations

from ._dependent import launch_dependents, wait_for_primary
from ._triton import jit, tl


@jit
def _tap_offset(tap, parity, TAPS: tl.constexpr, PHASES: tl.constexpr):
    """How far tap 0, 1 (or 2) lies from a pixel of x, along one axis."""
    if not PHASES:
        offset = tap - 1
    elif TAPS == 2:
        offset = tap - 1 + parity
    else:
        offset = (tap - 1 + parity) >> 1
    return offset


@jit
def _store_statistics(
    statistics_ptr,
    y,
    first,
    tiles,
    phase,
    pixels,
    image_rows,
    offs_n,
    COLUMNS: tl.constexpr,
    TILE: tl.constexpr,
    PHASES: tl.constexpr,
    EVEN_M: tl.constexpr,
):
    """Those of _statistics.py for the rows y [rows, columns], float32 of rounded values, in tiles of TILE; `first`
    is the first of them, of `tiles` in all."""
    COUNT: tl.constexpr = y.shape[0] // TILE
    values = tl.reshape(y, [COUNT, TILE, y.shape[1]])
    tile = first + tl.arange(0, COUNT)
    mask = (offs_n < COLUMNS)[None, :] & (tile < tiles)[:, None]
    if EVEN_M:
        mean = tl.sum(values, axis=1) / TILE
        deviation = values - mean[:, None, :]
    else:
        inside = tl.minimum(pixels - (tile * TILE) % image_rows, TILE)
        rows = (tl.arange(0, TILE)[None, :] < inside[:, None])[:, :, None]
        mean = tl.sum(tl.where(rows, values, 0.0), axis=1) / inside[:, None]
        deviation = tl.where(rows, values - mean[:, None, :], 0.0)
    m2 = tl.sum(deviation * deviation, axis=1)
    if PHASES:
        tile = tile * 4 + phase
    ptrs = statistics_ptr + tile.to(tl.int64)[:, None] * (2 * COLUMNS) + offs_n[None, :]
    tl.store(ptrs, mean, mask=mask)
    tl.store(ptrs + COLUMNS, m2, mask=mask)


@jit
def _store_rows(
    out_ptr,
    residual_ptr,
    bias_ptr,
    acc,
    out_rows,
    mask_m,
    offs_n,
    COLUMNS: tl.constexpr,
    EVEN_M: tl.constexpr,
    EVEN_N: tl.constexpr,
):
    """Adds bias and residual, rounds once, writes; returns the rounded values in float32."""
    offsets = out_rows[:, None] * COLUMNS + offs_n[None, :]
    if EVEN_M and EVEN_N:
        mask = None
    elif EVEN_N:
        mask = mask_m[:, None]
    else:
        mask = mask_m[:, None] & (offs_n < COLUMNS)[None, :]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + offs_n, mask=offs_n < COLUMNS, other=0.0).to(tl.float32)[None, :]
    if residual_ptr is not None:
        acc += tl.load(residual_ptr + offsets, mask=mask).to(tl.float32)
    elif bias_ptr is None:
        # Else LLVM moves the conversion to float16 into the loop before, and ptxas serializes its wgmma (C7514).
        acc += 0.0
    y = acc.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + offsets, y, mask=mask)
    return y.to(tl.float32)


@jit
def _add_pointwise(
    acc,
    x_ptr,
    weight_rows,
    out_rows,
    mask_m,
    first,
    last,
    CHANNELS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_M: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """acc + x W^T over the blocks of channels first, ..., last - 1, for an image x of the result's size."""
    offs_k = tl.arange(0, BLOCK_K)
    x_rows = x_ptr + out_rows * CHANNELS
    for step in range(first, last):
        offs_c = step * BLOCK_K + offs_k
        x_ptrs = x_rows[:, None] + offs_c[None, :]
        w_ptrs = weight_rows[:, None] + offs_c[None, :]
        if CHANNELS % BLOCK_K != 0:
            mask_k = (offs_c < CHANNELS)[None, :]
            a = tl.load(x_ptrs, mask=mask_m[:, None] & mask_k, other=0.0)
            w = tl.load(w_ptrs, mask=mask_k, other=0.0)
        elif EVEN_M:
            a = tl.load(x_ptrs)
            w = tl.load(w_ptrs)
        else:
            a = tl.load(x_ptrs, mask=mask_m[:, None], other=0.0)
            w = tl.load(w_ptrs)
        acc = tl.dot(a, tl.trans(w), acc, input_precision=PRECISION)
    return acc


@jit
def conv3x3_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    residual_ptr,
    shortcut_ptr,
    skip_ptr,
    shortcut_weight_ptr,
    out_ptr,
    statistics_ptr,
    batch,
    height,
    width,
    tile_height,
    tile_width,
    image_rows,
    passes,
    shortcut_passes,
    skip_passes,
    stride_xb,
    stride_xh,
    stride_xw,
    split_stride,
    CHANNELS: tl.constexpr,
    SHORTCUT_CHANNELS: tl.constexpr,
    SKIP_CHANNELS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TAPS: tl.constexpr,
    STRIDE: tl.constexpr,
    PHASES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SPLITS: tl.constexpr,
    TILE: tl.constexpr,
    EVEN_M: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGN: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program does one tile; of SPLITS > 1, its part of the passes, into out [SPLITS, B, pixels, COLUMNS].

    tile_height, tile_width: the pixels that are rows of tiles, those of one phase where PHASES. Passes are no
    constants: as such LLVM would unroll 9 or 18 of them.
    """
    EVEN_N: tl.constexpr = COLUMNS % BLOCK_N == 0
    EVEN_K: tl.constexpr = CHANNELS % BLOCK_K == 0
    BLOCKS_N: tl.constexpr = (COLUMNS + BLOCK_N - 1) // BLOCK_N
    PASSES_TAP: tl.constexpr = (CHANNELS + BLOCK_K - 1) // BLOCK_K
    K: tl.constexpr = TAPS * TAPS * CHANNELS
    launch_dependents(PDL)
    rows = batch * image_rows
    pid = tl.program_id(0)
    phase = 0
    if PHASES:
        phase = pid % 4
        pid = pid // 4
    split = pid % SPLITS
    pid = pid // SPLITS
    # Neighbouring programs share GROUP_M tiles of rows, so that what they read stays in the L2 cache.
    group = pid // (GROUP_M * BLOCKS_N)
    group_size = tl.minimum(tl.cdiv(rows, BLOCK_M) - group * GROUP_M, GROUP_M)
    in_group = pid % (GROUP_M * BLOCKS_N)
    tile_m = group * GROUP_M + in_group % group_size
    offs_n = (in_group // group_size) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    # Columns past the end are those of the first channels again, never written: no mask in the loop.
    if EVEN_N:
        w_n = offs_n
    else:
        w_n = offs_n % COLUMNS
    w_rows = w_n
    if PHASES and TAPS == 2:
        w_rows = w_n + phase * COLUMNS
    w_ptrs = weight_ptr + (w_rows.to(tl.int64) * K)[:, None] + offs_k[None, :]

    offs_m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    pixels = tile_height * tile_width
    b = offs_m // image_rows
    in_image = offs_m % image_rows
    mask_m = (in_image < pixels) & (offs_m < rows)
    oy = in_image // tile_width
    ox = in_image % tile_width
    phase_y = phase // 2
    phase_x = phase % 2
    y0 = oy * STRIDE
    x0 = ox * STRIDE
    valid = tl.zeros([BLOCK_M], tl.int32)
    for t in tl.static_range(TAPS * TAPS):
        y = y0 + _tap_offset(t // TAPS, phase_y, TAPS, PHASES)
        x = x0 + _tap_offset(t % TAPS, phase_x, TAPS, PHASES)
        inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
        valid |= tl.where(inside, 1 << t, 0)
    if not EVEN_M:
        valid = tl.where(mask_m, valid, 0)
    x_rows = b.to(tl.int64) * stride_xb + y0.to(tl.int64) * stride_xh + x0.to(tl.int64) * stride_xw
    if ALIGN > 1:
        x_rows = tl.multiple_of(x_rows, [ALIGN])
    x_ptrs = x_ptr + x_rows[:, None] + offs_k[None, :]
    if PHASES:
        out_rows = (b * tile_height + oy).to(tl.int64) * 2 + phase_y
        out_rows = (out_rows * tile_width + ox) * 2 + phase_x
    else:
        out_rows = b.to(tl.int64) * pixels + in_image

    # Passes are numbered through: those of x, of the shortcut, of the skip connection beside it.
    if SPLITS > 1:
        total = passes + shortcut_passes + skip_passes
        first = split * total // SPLITS
        last = (split + 1) * total // SPLITS
        end = tl.minimum(last, passes)
    else:
        first = 0
        end = passes
        # No way around the loop: see linear_kernel.
        tl.assume(passes > 0)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    wait_for_primary(PDL)
    for step in range(first, end):
        tap = step // PASSES_TAP
        c = (step % PASSES_TAP) * BLOCK_K
        y_offset = _tap_offset(tap // TAPS, phase_y, TAPS, PHASES)
        x_offset = _tap_offset(tap % TAPS, phase_x, TAPS, PHASES)
        offset = y_offset.to(tl.int64) * stride_xh + x_offset.to(tl.int64) * stride_xw + c
        if ALIGN > 1:
            offset = tl.multiple_of(offset, ALIGN)
        mask_a = ((valid >> tap) & 1)[:, None] != 0
        if EVEN_K:
            a = tl.load(x_ptrs + offset, mask=mask_a, other=0.0)
            w = tl.load(w_ptrs + (tap * CHANNELS + c))
        else:
            mask_k = (c + offs_k < CHANNELS)[None, :]
            a = tl.load(x_ptrs + offset, mask=mask_a & mask_k, other=0.0)
            w = tl.load(w_ptrs + (tap * CHANNELS + c), mask=mask_k, other=0.0)
        acc = tl.dot(a, tl.trans(w), acc, input_precision=PRECISION)
    if SHORTCUT_CHANNELS > 0:
        s_rows = shortcut_weight_ptr + w_n.to(tl.int64) * (SHORTCUT_CHANNELS + SKIP_CHANNELS)
        begin = 0
        end = shortcut_passes
        if SPLITS > 1:
            begin = tl.maximum(first - passes, 0)
            end = tl.minimum(last - passes, shortcut_passes)
        acc = _add_pointwise(
            acc, shortcut_ptr, s_rows, out_rows, mask_m, begin, end, SHORTCUT_CHANNELS, BLOCK_K, EVEN_M, PRECISION
        )
        if SKIP_CHANNELS > 0:
            begin = 0
            end = skip_passes
            if SPLITS > 1:
                begin = tl.maximum(first - passes - shortcut_passes, 0)
                end = last - passes - shortcut_passes
            s_rows += SHORTCUT_CHANNELS
            acc = _add_pointwise(
                acc, skip_ptr, s_rows, out_rows, mask_m, begin, end, SKIP_CHANNELS, BLOCK_K, EVEN_M, PRECISION
            )
    if SPLITS > 1:
        out_ptr += split.to(tl.int64) * split_stride
    y = _store_rows(out_ptr, residual_ptr, bias_ptr, acc, out_rows, mask_m, offs_n, COLUMNS, EVEN_M, EVEN_N)
    if statistics_ptr is not None:
        _store_statistics(
            statistics_ptr,
            y,
            tile_m * (BLOCK_M // TILE),
            rows // TILE,
            phase,
            pixels,
            image_rows,
            offs_n,
            COLUMNS,
            TILE,
            PHASES,
            EVEN_M,
        )


@jit
def conv3x3_reduce_kernel(
    partial_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    statistics_ptr,
    batch,
    pixels,
    split_stride,
    COLUMNS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILE: tl.constexpr,
    EVEN_M: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program sums TILE pixels of one image over the splits, in their order, and finishes them."""
    EVEN_N: tl.constexpr = COLUMNS % BLOCK_N == 0
    BLOCKS_N: tl.constexpr = (COLUMNS + BLOCK_N - 1) // BLOCK_N
    launch_dependents(PDL)
    pid = tl.program_id(0)
    tile = pid // BLOCKS_N
    tiles = tl.cdiv(pixels, TILE)
    offs_n = (pid % BLOCKS_N) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_image = (tile % tiles) * TILE + tl.arange(0, TILE)
    mask_m = in_image < pixels
    out_rows = (tile // tiles).to(tl.int64) * pixels + in_image
    ptrs = partial_ptr + out_rows[:, None] * COLUMNS + offs_n[None, :]
    mask = mask_m[:, None] & (offs_n < COLUMNS)[None, :]
    acc = tl.zeros([TILE, BLOCK_N], tl.float32)
    wait_for_primary(PDL)
    for _ in tl.static_range(SPLITS):
        acc += tl.load(ptrs, mask=mask, other=0.0)
        ptrs += split_stride
    y = _store_rows(out_ptr, residual_ptr, bias_ptr, acc, out_rows, mask_m, offs_n, COLUMNS, EVEN_M, EVEN_N)
    if statistics_ptr is not None:
        _store_statistics(
            statistics_ptr,
            y,
            tile,
            batch * tiles,
            0,
            pixels,
            tiles * TILE,
            offs_n,
            COLUMNS,
            TILE,
            False,
            EVEN_M,
        )

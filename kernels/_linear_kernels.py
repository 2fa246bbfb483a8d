"""The Triton kernels of `linear`; linear.py tells what they do and why.

A tile is [BLOCK_M, BLOCK_N] of the result. A gated tile's matmul has twice the columns: value and gate by turns.
Rows of values and gates are not neighbours in the weight, but their columns are in a thread's registers: to take
them apart moves nothing.
"""

# Branches on constants are statements: Triton decides them when it compiles, and expressions it does not.
# ruff: noqa: SIM108
# mypy: disable-error-code="no-untyped-def, assignment"

from __future__ import annotations

from ._dependent import launch_dependents, wait_for_primary
from ._layout import row_offsets
from ._parts import load_parts, part_columns, row_ptrs
from ._triton import jit, tl
from .geglu import gelu


@jit
def _normalized(
    x,
    x_bias_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    eps,
    CHANNELS: tl.constexpr,
    PART_1: tl.constexpr,
    PART_2: tl.constexpr,
):
    """Layer norm of whole rows, part by part, in the dtype of x; zeros in the padding."""
    columns = part_columns(PART_1, PART_2)
    rows = ()
    total = tl.zeros([x[0].shape[0]], tl.float32)
    for i in tl.static_range(len(columns)):
        mask = columns[i] < CHANNELS
        value = x[i].to(tl.float32)
        if x_bias_ptr is not None:
            value += tl.load(x_bias_ptr + columns[i], mask=mask, other=0.0).to(tl.float32)[None, :]
        rows += (value,)
        total += tl.sum(value, axis=1)
    # The mean in two parts, because one float32 cannot hold a mean of 1e4 exactly enough.
    mean = (total / CHANNELS)[:, None]
    first = tl.zeros([x[0].shape[0]], tl.float32)
    second = tl.zeros([x[0].shape[0]], tl.float32)
    for i in tl.static_range(len(columns)):
        deviation = tl.where((columns[i] < CHANNELS)[None, :], rows[i] - mean, 0.0)
        first += tl.sum(deviation, axis=1)
        second += tl.sum(deviation * deviation, axis=1)
    delta = first / CHANNELS
    rstd = (1.0 / tl.sqrt(second / CHANNELS - delta * delta + eps))[:, None]
    normalized = ()
    for i in tl.static_range(len(columns)):
        mask = columns[i] < CHANNELS
        weight = tl.load(norm_weight_ptr + columns[i], mask=mask, other=0.0).to(tl.float32)[None, :]
        bias = tl.load(norm_bias_ptr + columns[i], mask=mask, other=0.0).to(tl.float32)[None, :]
        y = ((rows[i] - mean) - delta[:, None]) * rstd * weight + bias
        normalized += (y.to(x[i].dtype),)
    return normalized


@jit
def _product(a, weight_rows, mask_n, CHANNELS, PART_1, PART_2, PRECISION: tl.constexpr):
    """[BLOCK_M, BLOCK_N]: whole rows a, part by part, times the rows of the weight."""
    w = load_parts(weight_rows, mask_n, CHANNELS, PART_1, PART_2)
    acc = tl.dot(a[0], tl.trans(w[0]), input_precision=PRECISION)
    for i in tl.static_range(1, len(a)):
        acc = tl.dot(a[i], tl.trans(w[i]), acc, input_precision=PRECISION)
    return acc


@jit
def _product_columns(start, columns, BLOCK_N: tl.constexpr, GATED: tl.constexpr):
    """(rows of the weight, columns of the result) of a tile's product, for the columns from `start` on."""
    if GATED:
        lanes = tl.arange(0, 2 * BLOCK_N)
        offs_n = start + lanes // 2
        rows = offs_n + (lanes % 2) * columns
    else:
        offs_n = start + tl.arange(0, BLOCK_N)
        rows = offs_n
    return rows, offs_n


@jit
def _store_tile(
    out_ptr,
    bias_ptr,
    acc,
    offs_m,
    start,
    rows,
    columns,
    BLOCK_N: tl.constexpr,
    GATED: tl.constexpr,
    EVEN_N: tl.constexpr,
):
    """Adds the bias, gates the values where there is a gate, and writes the tile."""
    offs_n = start + tl.arange(0, BLOCK_N)
    mask_n = offs_n < columns
    if GATED:
        value, gate = tl.split(tl.reshape(acc, [acc.shape[0], BLOCK_N, 2]))
        if bias_ptr is not None:
            value += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
            gate += tl.load(bias_ptr + columns + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
        acc = value * gelu(gate)
    elif bias_ptr is not None:
        acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    out_ptrs = out_ptr + offs_m.to(tl.int64)[:, None] * columns + offs_n[None, :]
    mask = (offs_m < rows)[:, None]
    if not EVEN_N:
        mask = mask & mask_n[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask)


@jit
def norm_linear_kernel(
    x_ptr,
    x_bias_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    rows,
    columns,
    inner,
    eps,
    tiles_n,
    stride_outer,
    stride_inner,
    stride_w,
    CHANNELS: tl.constexpr,
    PART_1: tl.constexpr,
    PART_2: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GATED: tl.constexpr,
    EVEN_N: tl.constexpr,
    FLAT: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGN: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program normalizes BLOCK_M whole rows, keeps them, and does tiles_n tiles of columns."""
    launch_dependents(PDL)
    blocks_n = tl.cdiv(columns, BLOCK_N * tiles_n)
    pid = tl.program_id(0)
    offs_m = (pid // blocks_n) * BLOCK_M + tl.arange(0, BLOCK_M)
    offsets = row_offsets(offs_m, inner, stride_outer, stride_inner, FLAT)
    if ALIGN > 1:
        offsets = tl.multiple_of(offsets, [ALIGN])
    wait_for_primary(PDL)
    x = load_parts(x_ptr + offsets, offs_m < rows, CHANNELS, PART_1, PART_2)
    a = _normalized(x, x_bias_ptr, norm_weight_ptr, norm_bias_ptr, eps, CHANNELS, PART_1, PART_2)
    first = (pid % blocks_n) * (BLOCK_N * tiles_n)
    for start in range(first, first + BLOCK_N * tiles_n, BLOCK_N):
        w_rows, offs_n = _product_columns(start, columns, BLOCK_N, GATED)
        if EVEN_N:
            w_mask = None
        else:
            w_mask = offs_n < columns
        w_ptrs = row_ptrs(weight_ptr, w_rows, stride_w, ALIGN)
        acc = _product(a, w_ptrs, w_mask, CHANNELS, PART_1, PART_2, PRECISION)
        _store_tile(out_ptr, bias_ptr, acc, offs_m, start, rows, columns, BLOCK_N, GATED, EVEN_N)


@jit
def _load_tile(rows, mask_rows, start, offs_k, channels, EVEN_K: tl.constexpr):
    """[rows, offs_k] from `start` on; zeros past `channels` and in masked rows (None: no mask)."""
    ptrs = rows[:, None] + (start + offs_k)[None, :]
    if EVEN_K:
        if mask_rows is None:
            tile = tl.load(ptrs)
        else:
            tile = tl.load(ptrs, mask=mask_rows[:, None], other=0.0)
    else:
        mask = (start + offs_k < channels)[None, :]
        if mask_rows is None:
            tile = tl.load(ptrs, mask=mask, other=0.0)
        else:
            tile = tl.load(ptrs, mask=mask & mask_rows[:, None], other=0.0)
    return tile


@jit
def linear_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    rows,
    columns,
    channels,
    inner,
    stride_outer,
    stride_inner,
    stride_w,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    GATED: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    FLAT: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGN: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program does one tile, BLOCK_K channels at a time."""
    launch_dependents(PDL)
    # Neighbouring programs share GROUP_M tiles of rows, so that what they read stays in the L2 cache.
    blocks_m = tl.cdiv(rows, BLOCK_M)
    blocks_n = tl.cdiv(columns, BLOCK_N)
    pid = tl.program_id(0)
    group = pid // (GROUP_M * blocks_n)
    group_size = tl.minimum(blocks_m - group * GROUP_M, GROUP_M)
    in_group = pid % (GROUP_M * blocks_n)
    offs_m = (group * GROUP_M + in_group % group_size) * BLOCK_M + tl.arange(0, BLOCK_M)
    first = (in_group // group_size) * BLOCK_N
    offs_k = tl.arange(0, BLOCK_K)
    # Rows past the end are read again from the first ones and never written: no mask in the loop.
    x_offsets = row_offsets(offs_m % rows, inner, stride_outer, stride_inner, FLAT)
    if ALIGN > 1:
        x_offsets = tl.multiple_of(x_offsets, [ALIGN])
    x_ptrs = x_ptr + x_offsets
    w_rows, offs_n = _product_columns(first, columns, BLOCK_N, GATED)
    if EVEN_N:
        w_mask = None
    else:
        w_mask = offs_n < columns
    w_ptrs = row_ptrs(weight_ptr, w_rows, stride_w, ALIGN)
    wait_for_primary(PDL)
    acc = tl.zeros([BLOCK_M, (1 + GATED) * BLOCK_N], tl.float32)
    # No way around the loop: else triton 3.6.0 comes to wgmma that ptxas serializes in 128 x 256 tiles (C7515).
    tl.assume(channels > 0)
    for start in range(0, channels, BLOCK_K):
        x = _load_tile(x_ptrs, None, start, offs_k, channels, EVEN_K)
        w = _load_tile(w_ptrs, w_mask, start, offs_k, channels, EVEN_K)
        acc = tl.dot(x, tl.trans(w), acc, input_precision=PRECISION)
    _store_tile(out_ptr, bias_ptr, acc, offs_m, first, rows, columns, BLOCK_N, GATED, EVEN_N)

"""The Triton kernel of `transformer_tail`; transformer_tail.py tells what it does and why.

A tile of rows stays in registers from beginning to end, its channels in one or two parts (_parts.py): in float32
as the residual stream, rounded as the operand of a matmul. Weights pass through every program, piece by piece.
"""

# Branches on constants are statements: Triton decides them when it compiles, and expressions it does not.
# ruff: noqa: SIM108
# mypy: disable-error-code="no-untyped-def, assignment"

from __future__ import annotations

from ._dependent import launch_dependents, wait_for_primary
from ._linear_kernels import _normalized
from ._parts import load_parts, part_columns, row_ptrs
from ._prefetch import prefetch_share
from ._statistics import store_statistics
from ._triton import jit, tl
from .geglu import gelu


@jit
def part_mask(columns, i: tl.constexpr, SIZE: tl.constexpr, PART_1: tl.constexpr, PART_2: tl.constexpr):
    """Which indices of part i are below SIZE; None where all are."""
    if i == len(columns) - 1 and PART_1 + PART_2 > SIZE:
        mask = columns[i] < SIZE
    else:
        mask = None
    return mask


@jit
def to_dtype(rows, dtype: tl.constexpr):
    """The parts, rounded."""
    rounded = ()
    for i in tl.static_range(len(rows)):
        rounded += (rows[i].to(dtype),)
    return rounded


@jit
def _both(a, b):
    """Where both masks hold; one that is None lets all pass."""
    if a is None:
        mask = b
    elif b is None:
        mask = a
    else:
        mask = a & b
    return mask


@jit
def _tile_mask(rows, columns):
    """The mask of a tile of rows and columns; one that is None lets all pass."""
    if rows is not None:
        rows = rows[:, None]
    if columns is not None:
        columns = columns[None, :]
    return _both(rows, columns)


@jit
def _load(ptrs, mask):
    """Zeros where masked; a mask that is None lets all pass."""
    if mask is None:
        values = tl.load(ptrs)
    else:
        values = tl.load(ptrs, mask=mask, other=0.0)
    return values


@jit
def add_vector(rows, vector_ptr, CHANNELS: tl.constexpr, PART_1: tl.constexpr, PART_2: tl.constexpr):
    """Float32 rows plus a vector of their channels; a pointer that is None adds nothing."""
    if vector_ptr is None:
        total = rows
    else:
        columns = part_columns(PART_1, PART_2)
        total = ()
        for i in tl.static_range(len(columns)):
            vector = _load(vector_ptr + columns[i], part_mask(columns, i, CHANNELS, PART_1, PART_2)).to(tl.float32)
            total += (rows[i] + vector[None, :],)
    return total


@jit
def load_square(weight_ptr, CHANNELS: tl.constexpr, PART_1: tl.constexpr, PART_2: tl.constexpr):
    """A weight [C, C] of contiguous rows: for each part of its rows the parts of its columns."""
    columns = part_columns(PART_1, PART_2)
    weight = ()
    for i in tl.static_range(len(columns)):
        rows = row_ptrs(weight_ptr, columns[i], CHANNELS, 1)
        mask = part_mask(columns, i, CHANNELS, PART_1, PART_2)
        weight += (load_parts(rows, mask, CHANNELS, PART_1, PART_2),)
    return weight


@jit
def add_matmul(acc, a, weight, PRECISION: tl.constexpr):
    """acc + a W^T, part by part; `weight` as of `load_square`."""
    total = ()
    for i in tl.static_range(len(weight)):
        s = acc[i]
        for j in tl.static_range(len(a)):
            s = tl.dot(a[j], tl.trans(weight[i][j]), s, input_precision=PRECISION)
        total += (s,)
    return total


@jit
def _load_keys(ptr, n, keys, stride_t, d, mask_d, IS_WHOLE: tl.constexpr):
    """Rows n of keys or values, their channels d; zeros past `keys`, unless all are there, and where masked."""
    if IS_WHOLE:
        mask_n = None
    else:
        mask_n = (n < keys)[:, None]
    return _load(ptr + (row_ptrs(0, n, stride_t, 1)[:, None] + d), _both(mask_n, mask_d))


@jit
def _attend(
    q,
    key_ptr,
    value_ptr,
    mask_heads,
    keys,
    stride_t,
    scale_log2,
    HEAD_CHANNELS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    KEYS_1: tl.constexpr,
    KEYS_2: tl.constexpr,
    WHOLE_PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Attention of queries [rows, BLOCK_D] over all keys of one head, float32; the first WHOLE_PARTS parts of the
    keys have no padding. Of several heads [heads, rows, BLOCK_D], pointers and their mask (None: no mask) are
    [heads, 1, 1]."""
    offs_n = part_columns(KEYS_1, KEYS_2)
    d = tl.arange(0, BLOCK_D)[None, :]
    if HEAD_CHANNELS == BLOCK_D:
        mask_d = mask_heads
    else:
        mask_d = _both(mask_heads, d < HEAD_CHANNELS)
    s = ()
    for j in tl.static_range(len(offs_n)):
        k = _load_keys(key_ptr, offs_n[j], keys, stride_t, d, mask_d, j < WHOLE_PARTS)
        s_j = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if j >= WHOLE_PARTS:
            s_j = tl.where((offs_n[j] < keys)[None, :], s_j, float("-inf"))
        s += (s_j,)
        if j == 0:
            m_i = tl.max(s_j, axis=-1)
        else:
            m_i = tl.maximum(m_i, tl.max(s_j, axis=-1))
    m_i *= scale_log2
    for j in tl.static_range(len(offs_n)):
        v = _load_keys(value_ptr, offs_n[j], keys, stride_t, d, mask_d, j < WHOLE_PARTS)
        p = tl.exp2(s[j] * scale_log2 - tl.expand_dims(m_i, -1))
        if j == 0:
            l_i = tl.sum(p, axis=-1)
            acc = tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
        else:
            l_i += tl.sum(p, axis=-1)
            acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
    return acc * tl.expand_dims(1.0 / l_i, -1)


@jit
def _add_cross_attention(
    t,
    n,
    q_weight_ptr,
    context_ptr,
    out_weight_ptr,
    keys,
    stride_t,
    stride_kv,
    scale_log2,
    HEADS: tl.constexpr,
    HEADS_AT_ONCE: tl.constexpr,
    HEAD_CHANNELS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    KEYS_1: tl.constexpr,
    KEYS_2: tl.constexpr,
    WHOLE_PARTS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PART_1: tl.constexpr,
    PART_2: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """t + attention(n Wq^T, keys, values) Wo^T, HEADS_AT_ONCE heads after the other.

    Of several heads at once each warp has some: no sum of a row is over warps, and while one head waits others
    need not. One at a time needs the fewest registers.
    """
    columns = part_columns(PART_1, PART_2)
    lanes = tl.arange(0, HEADS_AT_ONCE * BLOCK_D)
    rows: tl.constexpr = n[0].shape[0]
    for first in range(0, HEADS, HEADS_AT_ONCE):
        if HEAD_CHANNELS == BLOCK_D:
            channels = first * HEAD_CHANNELS + lanes
            mask_c = None
        else:
            channels = (first + lanes // BLOCK_D) * HEAD_CHANNELS + lanes % BLOCK_D
            mask_c = lanes % BLOCK_D < HEAD_CHANNELS
        key_ptr = context_ptr + first * HEAD_CHANNELS
        mask_heads = None
        if HEADS_AT_ONCE > 1:
            heads = tl.arange(0, HEADS_AT_ONCE)
            key_ptr += (heads * HEAD_CHANNELS)[:, None, None]
            if HEADS % HEADS_AT_ONCE:
                mask_heads = (first + heads < HEADS)[:, None, None]
                mask_c = _both(mask_c, first + lanes // BLOCK_D < HEADS)
        q_rows = row_ptrs(q_weight_ptr, channels, CHANNELS, 1)
        q_weight = (load_parts(q_rows, mask_c, CHANNELS, PART_1, PART_2),)
        (q,) = add_matmul((tl.zeros([rows, HEADS_AT_ONCE * BLOCK_D], tl.float32),), n, q_weight, PRECISION)
        q = q.to(n[0].dtype)
        if HEADS_AT_ONCE > 1:
            q = tl.permute(tl.reshape(q, [rows, HEADS_AT_ONCE, BLOCK_D]), (1, 0, 2))
        o = _attend(
            q, key_ptr, key_ptr + stride_kv, mask_heads, keys, stride_t, scale_log2,
            HEAD_CHANNELS, BLOCK_D, KEYS_1, KEYS_2, WHOLE_PARTS, PRECISION,
        ).to(n[0].dtype)  # fmt: skip
        if HEADS_AT_ONCE > 1:
            o = tl.reshape(tl.permute(o, (1, 0, 2)), [rows, HEADS_AT_ONCE * BLOCK_D])
        weight = ()
        for i in tl.static_range(len(columns)):
            ptrs = row_ptrs(out_weight_ptr, columns[i], CHANNELS, 1)[:, None] + channels[None, :]
            mask = part_mask(columns, i, CHANNELS, PART_1, PART_2)
            weight += ((_load(ptrs, _tile_mask(mask, mask_c)),),)
        t = add_matmul(t, (o,), weight, PRECISION)
    return t


@jit
def _add_feed_forward(
    t,
    n,
    in_weight_ptr,
    in_bias_ptr,
    out_weight_ptr,
    inner,
    BLOCK_J: tl.constexpr,
    EVEN_J: tl.constexpr,
    CHANNELS: tl.constexpr,
    PART_1: tl.constexpr,
    PART_2: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """t + geglu(n Win^T + bin) Wout^T, BLOCK_J of `inner` channels at a time."""
    columns = part_columns(PART_1, PART_2)
    for start in range(0, inner, BLOCK_J):
        offs_j = start + tl.arange(0, BLOCK_J)
        if EVEN_J:
            mask_j = None
        else:
            mask_j = offs_j < inner
        value_rows = row_ptrs(in_weight_ptr, offs_j, CHANNELS, 1)
        gate_rows = row_ptrs(in_weight_ptr, inner + offs_j, CHANNELS, 1)
        zeros = tl.zeros([n[0].shape[0], BLOCK_J], tl.float32)
        (value,) = add_matmul((zeros,), n, (load_parts(value_rows, mask_j, CHANNELS, PART_1, PART_2),), PRECISION)
        (gate,) = add_matmul((zeros,), n, (load_parts(gate_rows, mask_j, CHANNELS, PART_1, PART_2),), PRECISION)
        if in_bias_ptr is not None:
            value += _load(in_bias_ptr + offs_j, mask_j).to(tl.float32)[None, :]
            gate += _load(in_bias_ptr + inner + offs_j, mask_j).to(tl.float32)[None, :]
        h = (value * gelu(gate)).to(n[0].dtype)
        weight = ()
        for i in tl.static_range(len(columns)):
            ptrs = row_ptrs(out_weight_ptr, columns[i], inner, 1)[:, None] + offs_j[None, :]
            mask = part_mask(columns, i, CHANNELS, PART_1, PART_2)
            weight += ((_load(ptrs, _tile_mask(mask, mask_j)),),)
        t = add_matmul(t, (h,), weight, PRECISION)
    return t


@jit
def store_tile(ptrs, value, mask_m, mask_n):
    """Writes a tile; a mask of rows or columns that is None lets all pass."""
    mask = _tile_mask(mask_m, mask_n)
    if mask is None:
        tl.store(ptrs, value)
    else:
        tl.store(ptrs, value, mask=mask)


@jit
def store_rows(rows, parts, mask_m, CHANNELS: tl.constexpr, PART_1: tl.constexpr, PART_2: tl.constexpr):
    """Writes rows, part by part, in the dtype of the pointers; returns them as they were rounded, in float32."""
    columns = part_columns(PART_1, PART_2)
    rounded = ()
    for i in tl.static_range(len(columns)):
        value = parts[i].to(rows.dtype.element_ty)
        mask = part_mask(columns, i, CHANNELS, PART_1, PART_2)
        store_tile(rows[:, None] + columns[i][None, :], value, mask_m, mask)
        rounded += (value.to(tl.float32),)
    return rounded


@jit
def transformer_tail_kernel(
    attended_ptr,
    x_ptr,
    image_ptr,
    context_ptr,
    out_weight_ptr,
    out_bias_ptr,
    norm2_weight_ptr,
    norm2_bias_ptr,
    q_weight_ptr,
    cross_weight_ptr,
    cross_bias_ptr,
    norm3_weight_ptr,
    norm3_bias_ptr,
    in_weight_ptr,
    in_bias_ptr,
    ff_weight_ptr,
    ff_bias_ptr,
    proj_weight_ptr,
    proj_bias_ptr,
    result_ptr,
    result_statistics_ptr,
    tokens,
    tiles,
    keys,
    inner,
    eps,
    scale_log2,
    stride_cb,
    stride_ct,
    stride_ckv,
    HEADS: tl.constexpr,
    HEADS_AT_ONCE: tl.constexpr,
    HEAD_CHANNELS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    KEYS_1: tl.constexpr,
    KEYS_2: tl.constexpr,
    WHOLE_PARTS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PART_1: tl.constexpr,
    PART_2: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_J: tl.constexpr,
    EVEN_M: tl.constexpr,
    EVEN_J: tl.constexpr,
    SQUARE_LINES: tl.constexpr,
    INNER_LINES: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program does BLOCK_M rows of one sample."""
    launch_dependents(PDL)
    dtype: tl.constexpr = result_ptr.dtype.element_ty
    pid = tl.program_id(0)
    sample = (pid // tiles).to(tl.int64)
    offs_m = (pid % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    if EVEN_M:
        mask_m = None
    else:
        mask_m = offs_m < tokens
    offsets = (sample * tokens + offs_m) * CHANNELS
    columns = part_columns(PART_1, PART_2)
    # What was last read a step ago comes from memory, in the time of the first loads.
    prefetch_share(q_weight_ptr, CHANNELS * CHANNELS, SQUARE_LINES)
    prefetch_share(cross_weight_ptr, CHANNELS * CHANNELS, SQUARE_LINES)
    prefetch_share(in_weight_ptr, 2 * inner * CHANNELS, 2 * INNER_LINES)
    prefetch_share(ff_weight_ptr, inner * CHANNELS, INNER_LINES)
    prefetch_share(proj_weight_ptr, CHANNELS * CHANNELS, SQUARE_LINES)
    wait_for_primary(PDL)

    weight = load_square(out_weight_ptr, CHANNELS, PART_1, PART_2)
    h = load_parts(attended_ptr + offsets, mask_m, CHANNELS, PART_1, PART_2)
    x = load_parts(x_ptr + offsets, mask_m, CHANNELS, PART_1, PART_2)
    t = add_vector(to_dtype(x, tl.float32), out_bias_ptr, CHANNELS, PART_1, PART_2)
    t = add_matmul(t, h, weight, PRECISION)

    n = to_dtype(_normalized(t, None, norm2_weight_ptr, norm2_bias_ptr, eps, CHANNELS, PART_1, PART_2), dtype)
    t = add_vector(t, cross_bias_ptr, CHANNELS, PART_1, PART_2)
    t = _add_cross_attention(
        t, n, q_weight_ptr, context_ptr + sample * stride_cb, cross_weight_ptr, keys, stride_ct, stride_ckv,
        scale_log2, HEADS, HEADS_AT_ONCE, HEAD_CHANNELS, BLOCK_D, KEYS_1, KEYS_2, WHOLE_PARTS, CHANNELS, PART_1,
        PART_2, PRECISION,
    )  # fmt: skip

    n = to_dtype(_normalized(t, None, norm3_weight_ptr, norm3_bias_ptr, eps, CHANNELS, PART_1, PART_2), dtype)
    t = add_vector(t, ff_bias_ptr, CHANNELS, PART_1, PART_2)
    t = _add_feed_forward(
        t, n, in_weight_ptr, in_bias_ptr, ff_weight_ptr, inner,
        BLOCK_J, EVEN_J, CHANNELS, PART_1, PART_2, PRECISION,
    )  # fmt: skip

    weight = load_square(proj_weight_ptr, CHANNELS, PART_1, PART_2)
    image = load_parts(image_ptr + offsets, mask_m, CHANNELS, PART_1, PART_2)
    y = add_vector(to_dtype(image, tl.float32), proj_bias_ptr, CHANNELS, PART_1, PART_2)
    y = add_matmul(y, to_dtype(t, dtype), weight, PRECISION)
    y = store_rows(result_ptr + offsets, y, mask_m, CHANNELS, PART_1, PART_2)
    if result_statistics_ptr is not None:
        count = tl.minimum(tokens - (pid % tiles) * BLOCK_M, BLOCK_M)
        for i in tl.static_range(len(columns)):
            mask = part_mask(columns, i, CHANNELS, PART_1, PART_2)
            store_statistics(result_statistics_ptr, pid, y[i], mask_m, count, columns[i], mask, CHANNELS)

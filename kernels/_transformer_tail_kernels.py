"""The Triton kernel of `transformer_tail`; transformer_tail.py tells what it does and why.

A tile of rows stays in registers from beginning to end, its channels in one or two parts (_parts.py): in float32
as the residual stream, rounded as the operand of a matmul. Weights pass through every program, piece by piece.
"""

# Branches on constants are statements: Triton decides them when it compiles, and expressions it does not.
# ruff: noqa: SIM108
# mypy: disable-error-code="no-untyped-def, assignment"

from __future__ import annotations

from ._dependent import launch_dependents, prefetch_rows, wait_for_primary
from ._linear_kernels import _normalized
from ._parts import load_parts, part_columns, row_ptrs
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
def _load_vector(ptrs, mask):
    """In float32, with zeros where masked; a mask that is None lets all pass."""
    if mask is None:
        vector = tl.load(ptrs)
    else:
        vector = tl.load(ptrs, mask=mask, other=0.0)
    return vector.to(tl.float32)


@jit
def add_vector(rows, vector_ptr, CHANNELS: tl.constexpr, PART_1: tl.constexpr, PART_2: tl.constexpr):
    """Float32 rows plus a vector of their channels; a pointer that is None adds nothing."""
    if vector_ptr is None:
        total = rows
    else:
        columns = part_columns(PART_1, PART_2)
        total = ()
        for i in tl.static_range(len(columns)):
            vector = _load_vector(vector_ptr + columns[i], part_mask(columns, i, CHANNELS, PART_1, PART_2))
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
def _load_head(rows, mask_rows, HEAD_CHANNELS: tl.constexpr, BLOCK_D: tl.constexpr):
    """[rows, BLOCK_D] of one head; zeros in masked rows (None: no mask) and past HEAD_CHANNELS."""
    d = tl.arange(0, BLOCK_D)[None, :]
    ptrs = rows[:, None] + d
    if HEAD_CHANNELS == BLOCK_D and mask_rows is None:
        values = tl.load(ptrs)
    elif HEAD_CHANNELS == BLOCK_D:
        values = tl.load(ptrs, mask=mask_rows[:, None], other=0.0)
    elif mask_rows is None:
        values = tl.load(ptrs, mask=d < HEAD_CHANNELS, other=0.0)
    else:
        values = tl.load(ptrs, mask=mask_rows[:, None] & (d < HEAD_CHANNELS), other=0.0)
    return values


@jit
def _key_mask(offs_n, keys, IS_WHOLE: tl.constexpr):
    """Which keys there are; None where all are."""
    if IS_WHOLE:
        mask = None
    else:
        mask = offs_n < keys
    return mask


@jit
def _attend(
    q,
    key_ptr,
    value_ptr,
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
    keys have no padding."""
    offs_n = part_columns(KEYS_1, KEYS_2)
    s = ()
    m_i = tl.full([q.shape[0]], float("-inf"), tl.float32)
    for j in tl.static_range(len(offs_n)):
        mask_n = _key_mask(offs_n[j], keys, j < WHOLE_PARTS)
        k = _load_head(row_ptrs(key_ptr, offs_n[j], stride_t, 1), mask_n, HEAD_CHANNELS, BLOCK_D)
        s_j = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if mask_n is not None:
            s_j = tl.where(mask_n[None, :], s_j, float("-inf"))
        s += (s_j,)
        m_i = tl.maximum(m_i, tl.max(s_j, axis=1))
    m_i *= scale_log2
    l_i = tl.zeros([q.shape[0]], tl.float32)
    acc = tl.zeros([q.shape[0], BLOCK_D], tl.float32)
    for j in tl.static_range(len(offs_n)):
        mask_n = _key_mask(offs_n[j], keys, j < WHOLE_PARTS)
        v = _load_head(row_ptrs(value_ptr, offs_n[j], stride_t, 1), mask_n, HEAD_CHANNELS, BLOCK_D)
        p = tl.exp2(s[j] * scale_log2 - m_i[:, None])
        l_i += tl.sum(p, axis=1)
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
    return acc * (1.0 / l_i)[:, None]


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
    """t + attention(n Wq^T, keys, values) Wo^T, one head after the other."""
    columns = part_columns(PART_1, PART_2)
    d = tl.arange(0, BLOCK_D)
    for h in range(0, HEADS):
        if HEAD_CHANNELS == BLOCK_D:
            mask_d = None
        else:
            mask_d = d < HEAD_CHANNELS
        q_rows = row_ptrs(q_weight_ptr, h * HEAD_CHANNELS + d, CHANNELS, 1)
        q_weight = (load_parts(q_rows, mask_d, CHANNELS, PART_1, PART_2),)
        (q,) = add_matmul((tl.zeros([n[0].shape[0], BLOCK_D], tl.float32),), n, q_weight, PRECISION)
        key_ptr = context_ptr + h * HEAD_CHANNELS
        o = _attend(
            q.to(n[0].dtype), key_ptr, key_ptr + stride_kv, keys, stride_t, scale_log2,
            HEAD_CHANNELS, BLOCK_D, KEYS_1, KEYS_2, WHOLE_PARTS, PRECISION,
        ).to(n[0].dtype)  # fmt: skip
        weight = ()
        for i in tl.static_range(len(columns)):
            rows = row_ptrs(out_weight_ptr + h * HEAD_CHANNELS, columns[i], CHANNELS, 1)
            mask = part_mask(columns, i, CHANNELS, PART_1, PART_2)
            weight += ((_load_head(rows, mask, HEAD_CHANNELS, BLOCK_D),),)
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
            value += _load_vector(in_bias_ptr + offs_j, mask_j)[None, :]
            gate += _load_vector(in_bias_ptr + inner + offs_j, mask_j)[None, :]
        h = (value * gelu(gate)).to(n[0].dtype)
        weight = ()
        for i in tl.static_range(len(columns)):
            ptrs = row_ptrs(out_weight_ptr, columns[i], inner, 1)[:, None] + offs_j[None, :]
            mask = part_mask(columns, i, CHANNELS, PART_1, PART_2)
            if mask is None and mask_j is None:
                w = tl.load(ptrs)
            elif mask_j is None:
                w = tl.load(ptrs, mask=mask[:, None], other=0.0)
            elif mask is None:
                w = tl.load(ptrs, mask=mask_j[None, :], other=0.0)
            else:
                w = tl.load(ptrs, mask=mask[:, None] & mask_j[None, :], other=0.0)
            weight += ((w,),)
        t = add_matmul(t, (h,), weight, PRECISION)
    return t


@jit
def store_tile(ptrs, value, mask_m, mask_n):
    """Writes a tile; a mask of rows or columns that is None lets all pass."""
    if mask_m is None and mask_n is None:
        tl.store(ptrs, value)
    elif mask_m is None:
        tl.store(ptrs, value, mask=mask_n[None, :])
    elif mask_n is None:
        tl.store(ptrs, value, mask=mask_m[:, None])
    else:
        tl.store(ptrs, value, mask=mask_m[:, None] & mask_n[None, :])


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
    for i in tl.static_range(len(columns)):
        rows = tl.minimum(columns[i], CHANNELS - 1) * CHANNELS
        prefetch_rows(out_weight_ptr + rows, CHANNELS, PART_1 + PART_2, PDL)
        prefetch_rows(q_weight_ptr + rows, CHANNELS, PART_1 + PART_2, PDL)
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
        scale_log2, HEADS, HEAD_CHANNELS, BLOCK_D, KEYS_1, KEYS_2, WHOLE_PARTS, CHANNELS, PART_1, PART_2,
        PRECISION,
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

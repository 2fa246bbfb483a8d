"""The Triton kernels of `attention`; attention.py tells what they do and why.

Head dimensions and short contexts are not powers of two, and tiles must be: a dimension is held as one or two
parts, PART_1 and PART_2 (0 for none), each a power of two, and a value of that dimension as a tuple of tensors.
"""

# Branches on constants are statements: Triton decides them when it compiles, and expressions it does not.
# ruff: noqa: SIM102, SIM108
# mypy: disable-error-code="no-untyped-def, assignment"

from __future__ import annotations

from ._dependent import launch_dependents, wait_for_primary
from ._parts import load_parts, part_columns, row_ptrs
from ._triton import jit, tl


@jit
def _tile_ptrs(ptr, start, rows, stride, ALIGN: tl.constexpr):
    """Pointers to the rows of a tile that begins at `start`; what is of the tile is added once, not by lane."""
    offset = tl.full([], start, tl.int64) * stride
    if ALIGN > 1:
        offset = tl.multiple_of(offset, ALIGN)
    return row_ptrs(ptr + offset, rows, stride, ALIGN)


@jit
def _head_ptr(ptr, b, h, stride_b, stride_h, ALIGN: tl.constexpr):
    offset = b * stride_b + h * stride_h
    if ALIGN > 1:
        offset = tl.multiple_of(offset, ALIGN)
    return ptr + offset


@jit
def _scores(q, k, PRECISION: tl.constexpr):
    """[queries, keys], q k^T over the parts of the head dimension."""
    s = tl.dot(q[0], tl.trans(k[0]), input_precision=PRECISION)
    for i in tl.static_range(1, len(q)):
        s = tl.dot(q[i], tl.trans(k[i]), s, input_precision=PRECISION)
    return s


@jit
def polynomial_exp2(x):
    """2^x for x <= 0 without the exponential unit, within a relative 7.5e-5; 0 below -127. Keeps NaN.

    2^x = 2^n 2^f, f in [-1/2, 1/2], and for 2^f the polynomial of degree 3 of the least relative error (Remez).
    Adding MAGIC rounds x to n and leaves n + 127 in the low bits, whence the exponent.
    """
    MAGIC: tl.constexpr = 12582912.0 + 127.0
    x = tl.maximum(x, -127.0, propagate_nan=tl.PropagateNan.ALL)
    rounded = x + MAGIC
    f = x - (rounded - MAGIC)
    p = 0.055171669058038664 * f + 0.24261112219321873
    p = p * f + 0.6932609854606235
    p = p * f + 0.9999280735393951
    # Multiplied, not added to the exponent's bits: a NaN stays one.
    return p * (rounded.to(tl.int32, bitcast=True) << 23).to(tl.float32, bitcast=True)


@jit
def _exp2(x, POLYNOMIAL: tl.constexpr):
    """2^x [M, N], POLYNOMIAL of every eight columns as a polynomial, N at least 32 (under it, shares are rougher).

    Which ones is told by bits 0, 3 and 4 of the column. In the layout of a matrix product's result those are known
    of every register when the code is made: of the two values one remains, and the selection costs nothing.
    """
    y = tl.exp2(x)
    if POLYNOMIAL > 0:
        c = tl.arange(0, x.shape[1])
        rank = (c & 1) * 4 + ((c >> 3) & 1) * 2 + ((c >> 4) & 1)
        y = tl.where((rank < POLYNOMIAL)[None, :], polynomial_exp2(x), y)
    return y


@jit
def _zeros(BLOCK_M: tl.constexpr, PART_1: tl.constexpr, PART_2: tl.constexpr, MATRIX_SUMS: tl.constexpr):
    """What a row of queries begins with: (row sums, accumulators by part). Equal row sums in all of 8 columns
    where a product with ones makes them."""
    if MATRIX_SUMS:
        l_i = tl.zeros([BLOCK_M, 8], tl.float32)
    else:
        l_i = tl.zeros([BLOCK_M], tl.float32)
    if PART_2 == 0:
        acc = (tl.zeros([BLOCK_M, PART_1], tl.float32),)
    else:
        acc = (tl.zeros([BLOCK_M, PART_1], tl.float32), tl.zeros([BLOCK_M, PART_2], tl.float32))
    return l_i, acc


@jit
def _accumulate(p, v, l_i, acc, MATRIX_SUMS: tl.constexpr, PRECISION: tl.constexpr):
    """(l_i, acc) with the exponentials p [M, N] of keys whose values are v added."""
    if not MATRIX_SUMS:
        l_i += tl.sum(p, axis=1)
    p = p.to(v[0].dtype)
    if MATRIX_SUMS:
        # Made in float32: the interpreter has no bfloat16 constants.
        l_i = tl.dot(p, tl.full([p.shape[1], 8], 1.0, tl.float32).to(p.dtype), l_i)
    updated = ()
    for i in tl.static_range(len(acc)):
        updated += (tl.dot(p, v[i], acc[i], input_precision=PRECISION),)
    return l_i, updated


@jit
def _scaled(l_i, acc, alpha, MATRIX_SUMS: tl.constexpr):
    """(l_i, acc), rows times alpha [M]."""
    if MATRIX_SUMS:
        l_i *= alpha[:, None]
    else:
        l_i *= alpha
    scaled = ()
    for i in tl.static_range(len(acc)):
        scaled += (acc[i] * alpha[:, None],)
    return l_i, scaled


@jit
def _store_rows(
    out_rows,
    acc,
    l_i,
    attended,
    mask_rows,
    HEAD_DIM: tl.constexpr,
    PART_1: tl.constexpr,
    PART_2: tl.constexpr,
    MATRIX_SUMS: tl.constexpr,
):
    """acc / l_i, or zeros where no key is attended to: a row whose scores are all -inf is NaN, as torch's is."""
    columns = part_columns(PART_1, PART_2)
    if MATRIX_SUMS:
        l_i = tl.max(l_i, axis=1)
    factor = 1.0 / tl.where(attended > 0, l_i, 1.0)
    for i in tl.static_range(len(acc)):
        c = columns[i][None, :]
        out = (acc[i] * factor[:, None]).to(out_rows.dtype.element_ty)
        tl.store(out_rows[:, None] + c, out, mask=mask_rows[:, None] & (c < HEAD_DIM))


@jit
def _copied(x):
    """x [M, N] float32 through a `mov` of PTX, which LLVM does not see through; ptxas needs no instruction for it.

    Without it ptxas finds reads or writes of accumulators between a wgmma and its wait, and serializes them all:
    each waits for the one before (remarks C7514, C7515). Found by trial; `ldmperf inspect` shows the order.
    """
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1)


@jit
def _copied_parts(parts):
    copies = ()
    for i in tl.static_range(len(parts)):
        copies += (_copied(parts[i]),)
    return copies


@jit
def _tile_scores(
    q,
    k_ptr,
    start,
    offs_n,
    mask_n,
    stride_kn,
    HEAD_DIM: tl.constexpr,
    PART_1: tl.constexpr,
    PART_2: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """q k^T [queries, keys] of the keys offs_n; mask_n [keys] is False for those to leave out, or None."""
    k = load_parts(_tile_ptrs(k_ptr, start, offs_n, stride_kn, ALIGN), mask_n, HEAD_DIM, PART_1, PART_2)
    s = _scores(q, k, PRECISION)
    if mask_n is not None:
        s = tl.where(mask_n[None, :], s, float("-inf"))
    return s


@jit
def _online_softmax(
    s,
    v_ptr,
    start,
    offs_n,
    mask_n,
    stride_vn,
    m_i,
    l_i,
    acc,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    PART_1: tl.constexpr,
    PART_2: tl.constexpr,
    POLYNOMIAL: tl.constexpr,
    MATRIX_SUMS: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """(m_i, l_i, acc) after a tile of scores: the largest so far in units of log2, the row sums, the outputs."""
    m_new = tl.maximum(m_i, tl.max(s, axis=1) * scale_log2)
    # With nothing attended so far -inf - -inf would be NaN.
    m_finite = tl.where(m_new == float("-inf"), 0.0, m_new)
    # One multiply-add an element, and the same rounding of m_i's in every tile: it drops out of the quotient.
    p = _exp2(s * scale_log2 - m_finite[:, None], POLYNOMIAL)
    l_i, acc = _scaled(l_i, acc, tl.exp2(m_i - m_finite), MATRIX_SUMS)
    v = load_parts(_tile_ptrs(v_ptr, start, offs_n, stride_vn, ALIGN), mask_n, HEAD_DIM, PART_1, PART_2)
    l_i, acc = _accumulate(p, v, l_i, acc, MATRIX_SUMS, PRECISION)
    return m_new, l_i, acc


@jit
def _key_mask(mask_ptr, b, offs_n, keys, stride_mb, stride_mn):
    """Which of the keys offs_n are attended to: those below `keys` that the mask, if any, holds True for."""
    mask_n = offs_n < keys
    if mask_ptr is not None:
        ptrs = mask_ptr + b * stride_mb + offs_n.to(tl.int64) * stride_mn
        mask_n = mask_n & (tl.load(ptrs, mask=mask_n, other=0) != 0)
    return mask_n


@jit
def _key_count(lengths_ptr, b, keys, stride_lb):
    if lengths_ptr is not None:
        keys = tl.minimum(tl.maximum(tl.load(lengths_ptr + b * stride_lb), 0), keys).to(tl.int32)
    return keys


@jit
def attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    lengths_ptr,
    mask_ptr,
    out_ptr,
    scale_log2,
    heads,
    queries,
    keys,
    stride_qb,
    stride_qn,
    stride_qh,
    stride_kb,
    stride_kn,
    stride_kh,
    stride_vb,
    stride_vn,
    stride_vh,
    stride_lb,
    stride_mb,
    stride_mn,
    HEAD_DIM: tl.constexpr,
    PART_1: tl.constexpr,
    PART_2: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKS: tl.constexpr,
    AHEAD: tl.constexpr,
    PTX_COPY: tl.constexpr,
    POLYNOMIAL: tl.constexpr,
    MATRIX_SUMS: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGN: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program does a tile of queries of one head, over all keys tile by tile.

    MASKS tells which tiles may hold keys to leave out: "none", the "last", or "every". AHEAD computes the scores
    of a tile during the softmax of the tile before. PTX_COPY keeps ptxas from serializing wgmma (`_copied`).
    """
    launch_dependents(PDL)
    blocks_m = tl.cdiv(queries, BLOCK_M)
    pid = tl.program_id(0)
    b = (pid // blocks_m // heads).to(tl.int64)
    h = (pid // blocks_m % heads).to(tl.int64)
    offs_m = (pid % blocks_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    mask_m = offs_m < queries
    wait_for_primary(PDL)
    q_rows = row_ptrs(_head_ptr(q_ptr, b, h, stride_qb, stride_qh, ALIGN), offs_m, stride_qn, ALIGN)
    q = load_parts(q_rows, mask_m, HEAD_DIM, PART_1, PART_2)
    k_ptr = _head_ptr(k_ptr, b, h, stride_kb, stride_kh, ALIGN)
    v_ptr = _head_ptr(v_ptr, b, h, stride_vb, stride_vh, ALIGN)
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i, acc = _zeros(BLOCK_M, PART_1, PART_2, MATRIX_SUMS)

    keys = _key_count(lengths_ptr, b, keys, stride_lb)
    if mask_ptr is None:
        attended = keys
    else:
        attended = tl.zeros([BLOCK_N], tl.int32)
    if AHEAD:
        # The matrix unit computes the scores of the next tile while this one's exponentials are made.
        s = _tile_scores(q, k_ptr, 0, offs_n, None, stride_kn, HEAD_DIM, PART_1, PART_2, PRECISION, ALIGN)
        for start in range(0, keys - BLOCK_N, BLOCK_N):
            s_next = _tile_scores(
                q, k_ptr, start + BLOCK_N, offs_n, None, stride_kn, HEAD_DIM, PART_1, PART_2, PRECISION, ALIGN
            )
            if PTX_COPY:
                s_next = _copied(s_next)
            m_i, l_i, acc = _online_softmax(
                s, v_ptr, start, offs_n, None, stride_vn, m_i, l_i, acc, scale_log2,
                HEAD_DIM, PART_1, PART_2, POLYNOMIAL, MATRIX_SUMS, PRECISION, ALIGN,
            )  # fmt: skip
            s = s_next
        m_i, l_i, acc = _online_softmax(
            s, v_ptr, keys - BLOCK_N, offs_n, None, stride_vn, m_i, l_i, acc, scale_log2,
            HEAD_DIM, PART_1, PART_2, POLYNOMIAL, MATRIX_SUMS, PRECISION, ALIGN,
        )  # fmt: skip
    else:
        end = keys // BLOCK_N * BLOCK_N if MASKS == "last" else keys
        for start in range(0, end, BLOCK_N):
            if MASKS == "every":
                mask_n = _key_mask(mask_ptr, b, start + offs_n, keys, stride_mb, stride_mn)
                if mask_ptr is not None:
                    # By lane; a sum over lanes would be a barrier in every tile.
                    attended |= mask_n.to(tl.int32)
            else:
                mask_n = None
            s = _tile_scores(
                q, k_ptr, start, offs_n, mask_n, stride_kn, HEAD_DIM, PART_1, PART_2, PRECISION, ALIGN
            )
            m_i, l_i, acc = _online_softmax(
                s, v_ptr, start, offs_n, mask_n, stride_vn, m_i, l_i, acc, scale_log2,
                HEAD_DIM, PART_1, PART_2, POLYNOMIAL, MATRIX_SUMS, PRECISION, ALIGN,
            )  # fmt: skip
            if PTX_COPY:
                acc = _copied_parts(acc)
        if MASKS == "last":
            if end < keys:
                mask_n = end + offs_n < keys
                s = _tile_scores(
                    q, k_ptr, end, offs_n, mask_n, stride_kn, HEAD_DIM, PART_1, PART_2, PRECISION, ALIGN
                )
                m_i, l_i, acc = _online_softmax(
                    s, v_ptr, end, offs_n, mask_n, stride_vn, m_i, l_i, acc, scale_log2,
                    HEAD_DIM, PART_1, PART_2, POLYNOMIAL, MATRIX_SUMS, PRECISION, ALIGN,
                )  # fmt: skip
    if mask_ptr is not None:
        attended = tl.max(attended, axis=0)
    out_ptr = _head_ptr(out_ptr, b * queries, h, heads * HEAD_DIM, HEAD_DIM, ALIGN)
    out_rows = row_ptrs(out_ptr, offs_m, heads * HEAD_DIM, ALIGN)
    _store_rows(out_rows, acc, l_i, attended, mask_m, HEAD_DIM, PART_1, PART_2, MATRIX_SUMS)


@jit
def short_attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    lengths_ptr,
    mask_ptr,
    out_ptr,
    scale_log2,
    heads,
    queries,
    keys,
    stride_qb,
    stride_qn,
    stride_qh,
    stride_kb,
    stride_kn,
    stride_kh,
    stride_vb,
    stride_vn,
    stride_vh,
    stride_lb,
    stride_mb,
    stride_mn,
    HEAD_DIM: tl.constexpr,
    PART_1: tl.constexpr,
    PART_2: tl.constexpr,
    KEYS_1: tl.constexpr,
    KEYS_2: tl.constexpr,
    BLOCK_M: tl.constexpr,
    QUERY_TILES: tl.constexpr,
    WHOLE_PARTS: tl.constexpr,
    POLYNOMIAL: tl.constexpr,
    MATRIX_SUMS: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGN: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program does QUERY_TILES tiles of queries of one head and holds all its keys and values, in one or two
    parts; the first WHOLE_PARTS of them hold no key that is to be left out."""
    launch_dependents(PDL)
    blocks_m = tl.cdiv(queries, BLOCK_M * QUERY_TILES)
    pid = tl.program_id(0)
    b = (pid // blocks_m // heads).to(tl.int64)
    h = (pid // blocks_m % heads).to(tl.int64)
    q_ptr = _head_ptr(q_ptr, b, h, stride_qb, stride_qh, ALIGN)
    k_ptr = _head_ptr(k_ptr, b, h, stride_kb, stride_kh, ALIGN)
    v_ptr = _head_ptr(v_ptr, b, h, stride_vb, stride_vh, ALIGN)
    out_ptr = _head_ptr(out_ptr, b * queries, h, heads * HEAD_DIM, HEAD_DIM, ALIGN)

    wait_for_primary(PDL)
    keys = _key_count(lengths_ptr, b, keys, stride_lb)
    offs_n = part_columns(KEYS_1, KEYS_2)
    attended = keys if mask_ptr is None else 0
    k = ()
    v = ()
    masks = ()
    for j in tl.static_range(len(offs_n)):
        k_rows = row_ptrs(k_ptr, offs_n[j], stride_kn, ALIGN)
        v_rows = row_ptrs(v_ptr, offs_n[j], stride_vn, ALIGN)
        if j < WHOLE_PARTS:
            k += (load_parts(k_rows, None, HEAD_DIM, PART_1, PART_2),)
            v += (load_parts(v_rows, None, HEAD_DIM, PART_1, PART_2),)
        else:
            masks += (_key_mask(mask_ptr, b, offs_n[j], keys, stride_mb, stride_mn),)
            if mask_ptr is not None:
                attended += tl.sum(masks[j - WHOLE_PARTS].to(tl.int32))
            k += (load_parts(k_rows, masks[j - WHOLE_PARTS], HEAD_DIM, PART_1, PART_2),)
            v += (load_parts(v_rows, masks[j - WHOLE_PARTS], HEAD_DIM, PART_1, PART_2),)

    first = (pid % blocks_m) * (BLOCK_M * QUERY_TILES)
    for start in range(first, tl.minimum(first + BLOCK_M * QUERY_TILES, queries), BLOCK_M):
        offs_m = start + tl.arange(0, BLOCK_M)
        mask_m = offs_m < queries
        q = load_parts(row_ptrs(q_ptr, offs_m, stride_qn, ALIGN), mask_m, HEAD_DIM, PART_1, PART_2)
        m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
        s = ()
        for j in tl.static_range(len(offs_n)):
            s_j = _scores(q, k[j], PRECISION)
            if j >= WHOLE_PARTS:
                s_j = tl.where(masks[j - WHOLE_PARTS][None, :], s_j, float("-inf"))
            s += (s_j,)
            m_i = tl.maximum(m_i, tl.max(s_j, axis=1) * scale_log2)
        m_finite = tl.where(m_i == float("-inf"), 0.0, m_i)
        l_i, acc = _zeros(BLOCK_M, PART_1, PART_2, MATRIX_SUMS)
        for j in tl.static_range(len(offs_n)):
            p = _exp2(s[j] * scale_log2 - m_finite[:, None], POLYNOMIAL)
            l_i, acc = _accumulate(p, v[j], l_i, acc, MATRIX_SUMS, PRECISION)
        out_rows = row_ptrs(out_ptr, offs_m, heads * HEAD_DIM, ALIGN)
        _store_rows(out_rows, acc, l_i, attended, mask_m, HEAD_DIM, PART_1, PART_2, MATRIX_SUMS)

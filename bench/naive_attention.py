"""A textbook flash forward in Triton: the measure of what the kernels of `attention` gain.

The head dimension is padded to the next power of two, every tile is masked, scale and mask are steps of their own,
the row sum is added up. The compiler is told of aligned rows, as ours is: without it loads are 2 bytes wide.
Nothing dispatches to it.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ldmperf.kernels import Launch

Tile = tuple[int, int, int, int]
# Queries and keys of a tile, warps, stages: the usual ones.
_TILES: tuple[Tile, ...] = (
    *((128, 128, 8, 2), (128, 64, 8, 2), (128, 64, 4, 2), (64, 64, 4, 2)),
    *((128, 32, 8, 2), (64, 32, 8, 2), (64, 16, 8, 2)),
)
_SHARED_BYTES = 227 * 1024


@triton.jit
def naive_attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
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
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ALIGN: tl.constexpr,
):
    blocks_m = tl.cdiv(queries, BLOCK_M)
    pid = tl.program_id(0)
    b = (pid // blocks_m // heads).to(tl.int64)
    h = (pid // blocks_m % heads).to(tl.int64)
    offs_m = (pid % blocks_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d[None, :] < HEAD_DIM
    q_rows = tl.multiple_of(b * stride_qb + h * stride_qh + offs_m * stride_qn, [ALIGN])
    q_ptrs = q_ptr + q_rows[:, None] + offs_d[None, :]
    k_rows = tl.multiple_of(b * stride_kb + h * stride_kh + offs_n * stride_kn, [ALIGN])
    k_ptrs = k_ptr + k_rows[:, None] + offs_d[None, :]
    v_rows = tl.multiple_of(b * stride_vb + h * stride_vh + offs_n * stride_vn, [ALIGN])
    v_ptrs = v_ptr + v_rows[:, None] + offs_d[None, :]
    mask_m = offs_m[:, None] < queries
    q = tl.load(q_ptrs, mask=mask_m & mask_d, other=0.0)
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(0, keys, BLOCK_N):
        mask_n = start + offs_n < keys
        k = tl.load(k_ptrs, mask=mask_n[:, None] & mask_d, other=0.0)
        s = tl.dot(q, tl.trans(k))
        s = s * scale_log2
        s = tl.where(mask_n[None, :], s, float("-inf"))
        m_new = tl.maximum(m_i, tl.max(s, axis=1))
        p = tl.exp2(s - m_new[:, None])
        alpha = tl.exp2(m_i - m_new)
        l_i = l_i * alpha + tl.sum(p, axis=1)
        v = tl.load(v_ptrs, mask=mask_n[:, None] & mask_d, other=0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None])
        m_i = m_new
        k_ptrs += tl.multiple_of(BLOCK_N * stride_kn, ALIGN)
        v_ptrs += tl.multiple_of(BLOCK_N * stride_vn, ALIGN)
    out_rows = tl.multiple_of(((b * queries + offs_m) * heads + h) * HEAD_DIM, [ALIGN])
    out_ptrs = out_ptr + out_rows[:, None] + offs_d[None, :]
    tl.store(out_ptrs, (acc / l_i[:, None]).to(out_ptr.dtype.element_ty), mask=mask_m & mask_d)


def naive_launches(q: Tensor, k: Tensor, v: Tensor) -> list[Launch]:
    """Attention of q [B, Nq, H, D] over k, v [B, Nk, H, D], with each usual tile that may fit a multiprocessor."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    return [_launch(q, k, v, out, tile) for tile in _TILES if _fits(tile, _padded(q.shape[3]))]


def _padded(head_dim: int) -> int:
    return max(int(triton.next_power_of_2(head_dim)), 16)


def _fits(tile: Tile, block_d: int) -> bool:
    """Whether q, k and v fit shared memory, and accumulators and scores the registers of a thread."""
    block_m, block_n, num_warps, num_stages = tile
    shared = (block_m + 2 * num_stages * block_n) * block_d * 2
    return shared <= _SHARED_BYTES and block_m * (block_d + block_n) // (32 * num_warps) <= 200


def _launch(q: Tensor, k: Tensor, v: Tensor, out: Tensor, tile: Tile) -> Launch:
    block_m, block_n, num_warps, num_stages = tile
    batch, queries, heads, dim = q.shape
    strides = {
        f"stride_{name}{axis}": tensor.stride(i)
        for name, tensor in (("q", q), ("k", k), ("v", v))
        for i, axis in enumerate("bnh")
    }
    arguments = {
        "q_ptr": q,
        "k_ptr": k,
        "v_ptr": v,
        "out_ptr": out,
        "scale_log2": math.log2(math.e) * dim**-0.5,
        "heads": heads,
        "queries": queries,
        "keys": k.shape[1],
        **strides,
        "HEAD_DIM": dim,
        "BLOCK_D": _padded(dim),
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "ALIGN": math.gcd(8, dim, *strides.values()),
    }
    programs = batch * heads * triton.cdiv(queries, block_m)
    return Launch(naive_attention_kernel, programs, arguments, num_warps, num_stages, operator="attention")

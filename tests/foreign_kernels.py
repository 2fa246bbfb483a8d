"""Kernels such as others write: what triton's tutorials teach, written anew. No part of ldmperf is used.

Each function takes tensors on the device that triton says is active, and is what a user's test would call.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def add_kernel(x_ptr, y_ptr, out_ptr, count, BLOCK: tl.constexpr):
    start = tl.program_id(axis=0) * BLOCK
    offs = start + tl.arange(0, BLOCK)
    inside = offs < count
    x = tl.load(x_ptr + offs, mask=inside)
    y = tl.load(y_ptr + offs, mask=inside)
    tl.store(out_ptr + offs, x + y, mask=inside)


def add(x, y):
    out = torch.empty_like(x)
    add_kernel[lambda meta: (triton.cdiv(x.numel(), meta["BLOCK"]),)](x, y, out, x.numel(), BLOCK=256)
    return out


@triton.jit
def softmax_kernel(x_ptr, out_ptr, stride_x, stride_out, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * stride_x + offs, mask=offs < columns, other=-float("inf"))
    weights = tl.exp(x - tl.max(x, axis=0))
    tl.store(out_ptr + row * stride_out + offs, weights / tl.sum(weights, axis=0), mask=offs < columns)


def softmax(x):
    """Over the rows of [rows, columns], a program each."""
    out = torch.empty_like(x)
    rows, columns = x.shape
    block = triton.next_power_of_2(columns)
    softmax_kernel[(rows,)](x, out, x.stride(0), out.stride(0), columns, BLOCK=block, num_warps=2)
    return out


@triton.jit
def persistent_softmax_kernel(
    x_ptr, out_ptr, stride_x, stride_out, rows, columns, BLOCK: tl.constexpr, num_stages: tl.constexpr
):
    offs = tl.arange(0, BLOCK)
    inside = offs < columns
    for row in tl.range(tl.program_id(0), rows, tl.num_programs(0), num_stages=num_stages):
        x = tl.load(x_ptr + row * stride_x + offs, mask=inside, other=-float("inf"))
        weights = tl.exp(x - tl.max(x, axis=0))
        tl.store(out_ptr + row * stride_out + offs, weights / tl.sum(weights, axis=0), mask=inside)


def persistent_softmax(x, num_stages=2, num_warps=2):
    """The same by as many programs as the device holds at once, three at most, so that they loop."""
    active = triton.runtime.driver.active
    properties = active.utils.get_device_properties(active.get_active_torch_device().index)
    out = torch.empty_like(x)
    rows, columns = x.shape
    arguments = (x, out, x.stride(0), out.stride(0), rows, columns, triton.next_power_of_2(columns), num_stages)
    kernel = persistent_softmax_kernel.warmup(*arguments, num_warps=num_warps, grid=(1,))
    kernel._init_handles()
    per_program = kernel.n_regs * properties["warpSize"] * num_warps
    fit = properties["max_num_regs"] // per_program
    if kernel.metadata.shared:
        fit = min(fit, properties["max_shared_mem"] // kernel.metadata.shared)
    programs = min(properties["multiprocessor_count"] * fit, rows, 3)
    kernel[(programs, 1, 1)](*arguments)
    return out


@triton.jit
def leaky_relu(x):
    return tl.where(x >= 0, x, 0.01 * x)


@triton.jit
def _tile(pid, rows, columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """(tile of rows, tile of columns), GROUP tiles of rows after one another for each column."""
    tall, wide = tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, BLOCK_N)
    first = pid // (GROUP * wide) * GROUP
    height = min(tall - first, GROUP)
    within = pid % (GROUP * wide)
    return first + within % height, within // height


@triton.autotune(
    configs=[
        triton.Config({"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "GROUP": 2}, num_stages=3, num_warps=4),
        triton.Config({"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 16, "GROUP": 8}, num_stages=2, num_warps=2),
    ],
    key=["m", "n", "k"],
)
@triton.jit
def matmul_kernel(
    a_ptr, b_ptr, c_ptr, m, n, k, stride_am, stride_ak, stride_bk, stride_bn, stride_cm, stride_cn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    ACTIVATION: tl.constexpr,
):  # fmt: skip
    """Rows and columns past the end are taken from the start again, and are not stored."""
    pid_m, pid_n = _tile(tl.program_id(0), m, n, BLOCK_M, BLOCK_N, GROUP)
    offs_m = (pid_m * BLOCK_M + tl.arange(0, BLOCK_M)) % m
    offs_n = (pid_n * BLOCK_N + tl.arange(0, BLOCK_N)) % n
    offs_k = tl.arange(0, BLOCK_K)
    a_ptrs = a_ptr + offs_m[:, None] * stride_am + offs_k[None, :] * stride_ak
    b_ptrs = b_ptr + offs_k[:, None] * stride_bk + offs_n[None, :] * stride_bn
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for step in range(0, tl.cdiv(k, BLOCK_K)):
        left = k - step * BLOCK_K
        a = tl.load(a_ptrs, mask=offs_k[None, :] < left, other=0.0)
        b = tl.load(b_ptrs, mask=offs_k[:, None] < left, other=0.0)
        acc = tl.dot(a, b, acc)
        a_ptrs += BLOCK_K * stride_ak
        b_ptrs += BLOCK_K * stride_bk
    if ACTIVATION == "leaky_relu":
        acc = leaky_relu(acc)
    out_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    out_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    c_ptrs = c_ptr + out_m[:, None] * stride_cm + out_n[None, :] * stride_cn
    tl.store(c_ptrs, acc.to(c_ptr.dtype.element_ty), mask=(out_m[:, None] < m) & (out_n[None, :] < n))


@triton.autotune(
    configs=[
        triton.Config({"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 32}, num_stages=2, num_warps=4),
        triton.Config({"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 32}, num_stages=4, num_warps=1),
    ],
    key=["m", "n", "k"],
)
@triton.heuristics({"EVEN_K": lambda args: args["k"] % args["BLOCK_K"] == 0})
@triton.jit
def masked_matmul_kernel(
    a_ptr, b_ptr, c_ptr, m, n, k, stride_am, stride_ak, stride_bk, stride_bn, stride_cm, stride_cn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
    ACTIVATION: tl.constexpr,
):  # fmt: skip
    """Every edge is masked."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, k, BLOCK_K):
        offs_k = start + tl.arange(0, BLOCK_K)
        a_mask, b_mask = offs_m[:, None] < m, offs_n[None, :] < n
        if not EVEN_K:
            a_mask, b_mask = a_mask & (offs_k[None, :] < k), b_mask & (offs_k[:, None] < k)
        a = tl.load(a_ptr + offs_m[:, None] * stride_am + offs_k[None, :] * stride_ak, mask=a_mask, other=0.0)
        b = tl.load(b_ptr + offs_k[:, None] * stride_bk + offs_n[None, :] * stride_bn, mask=b_mask, other=0.0)
        acc += tl.dot(a, b)
    if ACTIVATION == "leaky_relu":
        acc = leaky_relu(acc)
    c_ptrs = c_ptr + offs_m[:, None] * stride_cm + offs_n[None, :] * stride_cn
    tl.store(c_ptrs, acc.to(c_ptr.dtype.element_ty), mask=(offs_m[:, None] < m) & (offs_n[None, :] < n))


def _matmul(kernel, grid, a, b, activation):
    (m, k), n = a.shape, b.shape[1]
    c = torch.empty((m, n), device=a.device, dtype=a.dtype)
    kernel[grid](a, b, c, m, n, k, *a.stride(), *b.stride(), *c.stride(), ACTIVATION=activation)
    return c


def matmul(a, b, activation=""):
    """a [m, k] times b [k, n]."""
    m, n = a.shape[0], b.shape[1]
    return _matmul(
        matmul_kernel,
        lambda meta: (triton.cdiv(m, meta["BLOCK_M"]) * triton.cdiv(n, meta["BLOCK_N"]),),
        a, b, activation,
    )  # fmt: skip


def masked_matmul(a, b, activation=""):
    m, n = a.shape[0], b.shape[1]
    return _matmul(
        masked_matmul_kernel,
        lambda meta: (triton.cdiv(m, meta["BLOCK_M"]), triton.cdiv(n, meta["BLOCK_N"])),
        a, b, activation,
    )  # fmt: skip


@triton.jit
def histogram_kernel(x_ptr, weight_ptr, count_ptr, sum_ptr, size, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = offs < size
    bins = tl.load(x_ptr + offs, mask=inside)
    weights = tl.load(weight_ptr + offs, mask=inside)
    tl.atomic_add(count_ptr + bins, 1, mask=inside)
    tl.atomic_add(sum_ptr + bins, weights, mask=inside)


def histogram(x, weight, bins):
    """(how often each of `bins` integers is in x, the sum of its weights)."""
    counts = torch.zeros(bins, dtype=torch.int32, device=x.device)
    sums = torch.zeros(bins, device=x.device)
    histogram_kernel[(triton.cdiv(x.numel(), 128),)](x, weight, counts, sums, x.numel(), BLOCK=128)
    return counts, sums


@triton.jit
def column_sums_kernel(x_ptr, out_ptr, rows, columns, stride_x, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for start in range(0, rows, BLOCK_M):
        offs_m = start + tl.arange(0, BLOCK_M)
        inside = (offs_m[:, None] < rows) & (offs_n[None, :] < columns)
        x = tl.load(x_ptr + offs_m[:, None] * stride_x + offs_n[None, :], mask=inside, other=0.0)
        acc += tl.sum(x.to(tl.float32), axis=0)
    tl.store(out_ptr + offs_n, acc, mask=offs_n < columns)


def column_sums(x):
    """The sums over the rows of [rows, columns], in float32."""
    rows, columns = x.shape
    out = torch.empty(columns, dtype=torch.float32, device=x.device)
    column_sums_kernel[(triton.cdiv(columns, 32),)](x, out, rows, columns, x.stride(0), BLOCK_M=16, BLOCK_N=32)
    return out

"""Kernels with one fault each, which `ldmperf emulate` finds without a GPU.

    ldmperf emulate examples/emulate/faults.py:out_of_bounds

Each function launches a kernel on CPU tensors. docs/emulate.md shows what is said of each.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def add_kernel(x_ptr, y_ptr, out_ptr, n, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < n
    x = tl.load(x_ptr + offs, mask=mask)
    y = tl.load(y_ptr + offs, mask=mask)
    if MASKED:
        tl.store(out_ptr + offs, x + y, mask=mask)
    else:
        tl.store(out_ptr + offs, x + y)


def out_of_bounds():
    """The last program stores past the end of the result: on a GPU, into whatever lies there."""
    x, y = torch.randn(2, 1000)
    out = torch.empty_like(x)
    add_kernel[(4,)](x, y, out, 1000, MASKED=False, BLOCK=256)


def uninitialised():
    """What is added up was never set to zero: torch.empty instead of torch.zeros."""
    x = torch.randn(1024)
    total = torch.empty_like(x)
    add_kernel[(4,)](x, total, total, 1024, MASKED=True, BLOCK=256)


@triton.jit
def blur_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    left = tl.load(x_ptr + offs - 1, mask=(offs > 0) & (offs < n), other=0.0)
    here = tl.load(x_ptr + offs, mask=offs < n)
    tl.store(out_ptr + offs, (left + here) / 2, mask=offs < n)


def race():
    """In place, an element's neighbour may be read before or after it is overwritten."""
    x = torch.randn(256)
    blur_kernel[(1,)](x, x, 256, BLOCK=256)


def race_of_programs():
    """The same between programs: the first element of one is read by the next."""
    x = torch.randn(1024)
    blur_kernel[(4,)](x, x, 1024, BLOCK=256)


@triton.jit
def histogram_kernel(x_ptr, counts_ptr, BLOCK: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, BLOCK))
    count = tl.load(counts_ptr + x)
    tl.store(counts_ptr + x, count + tl.arange(0, BLOCK))


def conflicting_stores():
    """Elements of one tile go to one place: which of them stays is not defined. tl.atomic_add is meant."""
    x = torch.randint(0, 8, (256,))
    histogram_kernel[(1,)](x, torch.zeros(8, dtype=torch.int64), BLOCK=256)


@triton.jit
def row_kernel(x_ptr, out_ptr, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    # A promise that the launch below does not keep.
    start = tl.multiple_of(row * stride, 16)
    offs = tl.arange(0, BLOCK)
    tl.store(out_ptr + row * BLOCK + offs, tl.load(x_ptr + start + offs))


def misaligned():
    """Rows of 250 elements do not start at multiples of 16 bytes, which the kernel was promised."""
    x = torch.randn(4, 250)
    row_kernel[(4,)](x, torch.empty(4, 128), 250, BLOCK=128, num_warps=1)


@triton.jit
def share_kernel(x_ptr, out_ptr, parts, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, tl.load(x_ptr + offs) // parts)


def division_by_zero():
    """A GPU does not stop at an integer division by zero."""
    x = torch.arange(128)
    share_kernel[(1,)](x, torch.empty_like(x), 0, BLOCK=128)

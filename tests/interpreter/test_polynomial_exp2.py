"""The polynomial exponential of attention: its error, that no cubic has less, and what rounding leaves of it."""

import itertools
import math

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from ldmperf.kernels._attention_kernels import polynomial_exp2

# What the docstring states, and half a unit of float32 for each of the last operations.
BOUND = 7.5e-5 + 2e-7


@triton.jit
def exp2_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, polynomial_exp2(tl.load(x_ptr + offs)))


def exp2(x):
    out = torch.full_like(x, torch.nan)
    exp2_kernel[(x.numel() // 4096,)](x, out, BLOCK=4096)
    return out


def relative_error(x):
    return exp2(x).double() / torch.exp2(x.double()) - 1


@pytest.mark.parametrize("low", [-1.0, -10.0, -126.0])
def test_the_error_is_within_the_bound(low):
    error = relative_error(torch.linspace(low, 0.0, 2**20, dtype=torch.float32))
    assert error.abs().max() <= BOUND


def test_no_cubic_has_a_smaller_error():
    """Chebyshev: its error takes its largest size five times over the interval, with alternating signs."""
    x = torch.linspace(-1.4999, -0.5001, 2**20, dtype=torch.float32)
    error = relative_error(x).numpy()
    sign_changes = np.flatnonzero(np.diff(np.sign(error)) * (np.abs(np.diff(error)) < 1e-5))
    pieces = [piece for piece in np.split(error, sign_changes + 1) if np.abs(piece).max() > 1e-6]
    extremes = [piece[np.abs(piece).argmax()] for piece in pieces]
    assert len(extremes) == 5
    assert all(a * b < 0 for a, b in itertools.pairwise(extremes))
    assert max(map(abs, extremes)) < 1.01 * min(map(abs, extremes))


@pytest.mark.parametrize(("dtype", "equal"), [(torch.bfloat16, 0.98), (torch.float16, 0.8)])
def test_most_values_round_to_what_the_exact_ones_round_to(dtype, equal):
    """And the others to its neighbour: the error is far below half a unit of the dtype's last place."""
    x = -14 * torch.rand(2**20, generator=torch.Generator().manual_seed(0))
    exact, got = torch.exp2(x.double()).to(dtype), exp2(x).to(dtype)
    assert (exact == got).float().mean() > equal
    apart = (exact.view(torch.int16).int() - got.view(torch.int16).int()).abs()
    assert apart.max() <= 1


def test_what_is_far_below_is_zero_and_nan_stays():
    x = torch.full([4096], -127.0)
    x[:6] = torch.tensor([-128.0, -1e4, -3e38, -math.inf, math.nan, 0.0])
    out = exp2(x)
    assert out[:4].eq(0).all()
    assert out[4].isnan()
    assert abs(out[5] - 1) <= BOUND

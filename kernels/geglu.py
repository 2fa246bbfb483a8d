"""Gated GELU: value * gelu(gate), the two halves of the last dimension, with the exact (erf) GELU.

The bias of the linear layer before may be added here, which saves that layer an epilogue.
Rows of 2C columns; a program takes a tile of rows and columns of both halves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from ._checks import tensors
from ._dependent import launch_dependents, launches_dependently, wait_for_primary
from ._launch import NO_GPU, Chip, Launch, Operator, ceil_div, chip_of, dtype_name, next_power_of_two, tuned
from ._layout import collapse_rows, column_block, row_count, row_offsets, row_reasons
from ._library import compute_dtype, define_operator
from ._triton import device_reasons, dtype_reasons, jit, tl


class GegluCall(NamedTuple):
    """The arguments of `geglu`."""

    x: Tensor
    bias: Tensor | None = None


def geglu_ref(x: Tensor, *, bias: Tensor | None = None) -> Tensor:
    """Reference of `geglu` in float32 (float64 for float64)."""
    x32 = x.to(compute_dtype(x))
    if bias is not None:
        x32 = x32 + bias.to(x32.dtype)
    value, gate = x32.chunk(2, dim=-1)
    return (value * F.gelu(gate)).to(x.dtype)


@jit
def gelu(x):  # type: ignore[no-untyped-def]
    """x Phi(x) for float32, to rounding; the tail is a product, not a difference.

    Phi(-|x|) = exp(-x^2 / 2) t P(t), t = 1 / (1 + 0.4 |x|): the form of Abramowitz and Stegun 7.1.26, with P of
    degree 5 fitted to the error of the product with |x|. It takes fewer instructions than an erf, which would take
    longer than the memory accesses (predicted from the machine code).
    """
    a = tl.abs(x)
    t = 1.0 / (1.0 + 0.4 * a)
    p = 0.056530579573759024 * t - 0.2551944777822908
    p = p * t + 0.34038071539567966
    p = p * t + 0.01275386666631087
    p = p * t + 0.18883871785206238
    p = p * t + 0.15669053181785925
    tail = p * t * tl.exp2(-0.7213475204444817 * (x * x))
    # No maximum, which may drop a NaN; and past 15 no product of the tail, then 0, with what may be infinite.
    return tl.where(x > 0.0, x, 0.0) - tl.where(x < 15.0, a, 0.0) * tail


@jit
def geglu_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    bias_ptr,
    out_ptr,
    rows,
    columns,
    inner,
    stride_outer,
    stride_inner,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FLAT: tl.constexpr,
    PDL: tl.constexpr,
):
    launch_dependents(PDL)
    blocks_n = tl.cdiv(columns, BLOCK_N)
    pid = tl.program_id(0)
    offs_m = (pid // blocks_n) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = (pid % blocks_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < columns
    mask = (offs_m < rows)[:, None] & mask_n[None, :]
    x_ptrs = x_ptr + row_offsets(offs_m, inner, stride_outer, stride_inner, FLAT)[:, None] + offs_n[None, :]
    wait_for_primary(PDL)
    value = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(x_ptrs + columns, mask=mask, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        value += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
        gate += tl.load(bias_ptr + columns + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    out = value * gelu(gate)
    out_ptrs = out_ptr + offs_m.to(tl.int64)[:, None] * columns + offs_n[None, :]
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=mask)


@dataclass(frozen=True)
class GegluConfig:
    """A tile of block_m rows and block_n columns of each half."""

    block_m: int
    block_n: int
    num_warps: int


def default_config(rows: int, columns: int, chip: Chip) -> GegluConfig:
    """Tiles of whole columns, 16 elements a thread; smaller ones where the chip would not be filled."""
    block_n = column_block(columns, most=1024)
    elements = 2048
    while elements > 512 and ceil_div(rows * columns, elements) < 2 * chip.multiprocessors:
        elements //= 2
    block_m = min(max(elements // block_n, 1), next_power_of_two(rows))
    return GegluConfig(block_m, block_n, num_warps=min(max(block_m * block_n // 512, 1), 8))


def candidates(call: GegluCall) -> list[GegluConfig]:
    """The configurations that bench/tune.py tries for this call."""
    columns = call.x.shape[-1] // 2
    widest = next_power_of_two(columns)
    return [
        GegluConfig(m, n, warps)
        for m in (1, 2, 4, 8, 16)
        for n in (128, 256, 512, 1024)
        for warps in (1, 2, 4, 8)
        if n <= widest and 8 <= m * n // (32 * warps) <= 32
    ] or [default_config(row_count(call.x), columns, NO_GPU)]


def tuning_key(call: GegluCall) -> str:
    """What a tuned configuration is looked up by."""
    return f"rows={row_count(call.x)} columns={call.x.shape[-1] // 2} {dtype_name(call.x)}"


def plan(
    call: GegluCall, *, config: GegluConfig | None = None, chip: Chip | None = None
) -> tuple[Tensor, list[Launch]]:
    """The result, not yet computed, and the launch that computes it."""
    out = _empty_result(call)
    rows = collapse_rows([call.x])
    columns = out.shape[-1]
    if rows is None or not out.numel():
        return out, []
    chip = chip or chip_of(call.x.device)
    config = (
        config or tuned("geglu", tuning_key(call), chip, GegluConfig) or default_config(rows.count, columns, chip)
    )
    pdl = launches_dependently(chip)
    ((stride_outer, stride_inner),) = rows.strides
    arguments = {
        "x_ptr": call.x,
        "bias_ptr": call.bias,
        "out_ptr": out,
        "rows": rows.count,
        "columns": columns,
        "inner": rows.inner,
        "stride_outer": stride_outer,
        "stride_inner": stride_inner,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "FLAT": rows.flat,
        "PDL": pdl,
    }
    programs = ceil_div(rows.count, config.block_m) * ceil_div(columns, config.block_n)
    return out, [Launch(geglu_kernel, programs, arguments, config.num_warps, operator="geglu", pdl=pdl)]


def unsupported_reasons(call: GegluCall) -> list[str]:
    """Every reason why the Triton kernel cannot serve this call; empty when it can."""
    return [
        *device_reasons(geglu_kernel, call.x),
        *dtype_reasons(x=call.x, bias=call.bias),
        *row_reasons(collapse_rows([call.x]), x=call.x, bias=call.bias),
    ]


def geglu(x: Tensor, *, bias: Tensor | None = None, backend: str = "auto", out: Tensor | None = None) -> Tensor:
    """x [..., 2C] -> value * gelu_erf(gate) [..., C], contiguous, in x's dtype; value is the first half.

    With `bias` [2C], any float dtype, of x + bias. Autocast changes nothing, as with F.gelu. Raises ValueError for
    an odd last dimension, an integer dtype or a bias that does not fit, `KernelUnsupported` for `backend="triton"`
    where the kernel cannot serve. `out`, contiguous and in memory of its own, is written and returned: without
    gradients.
    Source: Shazeer, arXiv 2002.05202.
    """
    tensors(geglu, (x,), (bias,))
    result: Tensor = _geglu(x, bias, backend, out=out)
    return result


def _check(call: GegluCall) -> None:
    x, bias = call
    if x.ndim < 1 or x.shape[-1] % 2 or not x.is_floating_point():
        raise ValueError(f"geglu: x must be a float [..., 2C]; got {x.dtype} {list(x.shape)}")
    if bias is not None and (bias.shape != x.shape[-1:] or not bias.is_floating_point()):
        raise ValueError(f"geglu: bias must be a float [{x.shape[-1]}]; got {bias.dtype} {list(bias.shape)}")


def _empty_result(call: GegluCall) -> Tensor:
    return call.x.new_empty((*call.x.shape[:-1], call.x.shape[-1] // 2))


OPERATOR = Operator(
    "geglu", geglu, geglu_ref, GegluCall, _check, plan, candidates, tuning_key, unsupported_reasons
)
_geglu = define_operator(
    "geglu(Tensor x, Tensor? bias, str backend) -> Tensor",
    OPERATOR,
    reference=lambda call: geglu_ref(**call._asdict()).contiguous(),
    fake=_empty_result,
)

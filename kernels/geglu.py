"""Gated GELU: value * gelu(gate), the two halves of the last dimension, with the exact (erf) GELU.

The bias of the linear layer before may be added here, which saves that layer an epilogue.
Rows of 2C columns; a program takes a tile of rows and columns of both halves. With float8 it takes whole rows and
keeps their results in registers, because each row is quantized by its largest number (_float8.py).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal, NamedTuple, overload

import torch.nn.functional as F
from torch import Tensor

from . import _formulas
from ._checks import flag, tensors
from ._dependent import launch_dependents, launches_dependently, wait_for_primary
from ._float8 import LEAST_TILE, empty_float8, float8_reasons, float8_rows, float8_scale, refuse_gradients
from ._launch import NO_GPU, Chip, Launch, Operator, ceil_div, chip_of, dtype_name, next_power_of_two, tuned
from ._layout import collapse_rows, column_block, row_count, row_offsets, row_reasons
from ._library import Formula, cast, compute_dtype, define_operator
from ._triton import device_reasons, dtype_reasons, jit, tl


class GegluCall(NamedTuple):
    """The arguments of `geglu`."""

    x: Tensor
    bias: Tensor | None = None
    float8: bool = False


def geglu_ref(x: Tensor, *, bias: Tensor | None = None, float8: bool = False) -> Tensor | tuple[Tensor, Tensor]:
    """Reference of `geglu` in float32 (float64 for float64)."""
    x32 = cast(x, compute_dtype(x))
    if bias is not None:
        x32 = x32 + cast(bias, x32.dtype)
    value, gate = x32.chunk(2, dim=-1)
    gated = value * F.gelu(gate)
    return float8_rows(gated) if float8 else cast(gated, x.dtype)


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


@jit
def geglu_float8_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    bias_ptr,
    out_ptr,
    scale_ptr,
    rows,
    columns,
    inner,
    stride_outer,
    stride_inner,
    CHUNKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FLAT: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program does BLOCK_M whole rows, in CHUNKS tiles of BLOCK_N columns that all stay in registers."""
    launch_dependents(PDL)
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = (offs_m < rows)[:, None]
    x_rows = x_ptr + row_offsets(offs_m, inner, stride_outer, stride_inner, FLAT)[:, None]
    out_rows = out_ptr + (offs_m.to(tl.int64) * columns)[:, None]
    tiles = ()
    wait_for_primary(PDL)
    largest = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for j in tl.static_range(CHUNKS):
        offs_n = j * BLOCK_N + tl.arange(0, BLOCK_N)
        mask_n = offs_n < columns
        mask = mask_m & mask_n[None, :]
        value = tl.load(x_rows + offs_n[None, :], mask=mask, other=0.0).to(tl.float32)
        gate = tl.load(x_rows + columns + offs_n[None, :], mask=mask, other=0.0).to(tl.float32)
        if bias_ptr is not None:
            value += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
            gate += tl.load(bias_ptr + columns + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
        gated = value * gelu(gate)
        tiles += (gated,)  # type: ignore[assignment]
        largest = tl.maximum(largest, tl.abs(gated))
    scale, inverse = float8_scale(tl.max(largest, axis=1))
    tl.store(scale_ptr + offs_m, scale, mask=offs_m < rows)
    for j in tl.static_range(CHUNKS):
        offs_n = j * BLOCK_N + tl.arange(0, BLOCK_N)
        quantized = (tiles[j] * inverse[:, None]).to(out_ptr.dtype.element_ty)
        tl.store(out_rows + offs_n[None, :], quantized, mask=mask_m & (offs_n < columns)[None, :])


# Of whole rows: tiles that a program keeps, by default and at most; results that a thread keeps of them at most.
FEW_CHUNKS, MAX_CHUNKS = 5, 12
MAX_VALUES = 64
# Columns of whole rows.
MAX_COLUMNS = 16384


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


def whole_rows_config(rows: int, columns: int, chip: Chip) -> GegluConfig:
    """The default with float8: 8 results a thread in each of few tiles; fewer rows for a chip not filled."""
    block_n = column_block(columns, most=1024)
    while ceil_div(columns, block_n) > FEW_CHUNKS:
        block_n *= 2
    block_m = max(1024 // block_n, 1)
    while block_m > 1 and ceil_div(rows, block_m) < 2 * chip.multiprocessors:
        block_m //= 2
    block_n = max(block_n, LEAST_TILE // block_m)
    return GegluConfig(block_m, block_n, num_warps=min(max(block_m * block_n // 256, 1), 16))


def candidates(call: GegluCall) -> list[GegluConfig]:
    """The configurations that bench/tune.py tries for this call."""
    columns = call.x.shape[-1] // 2
    widest = next_power_of_two(columns)
    if call.float8:
        return [
            GegluConfig(m, n, warps)
            for m in (1, 2, 4)
            for n in sorted({min(n, widest) for n in (128, 256, 512, 1024, 2048)})
            for warps in (1, 2, 4, 8, 16)
            if ceil_div(columns, n) <= MAX_CHUNKS
            and m * n // (32 * warps) in (4, 8, 16)
            and ceil_div(columns, n) * m * n // (32 * warps) <= MAX_VALUES
        ] or [whole_rows_config(row_count(call.x), columns, NO_GPU)]
    return [
        GegluConfig(m, n, warps)
        for m in (1, 2, 4, 8, 16)
        for n in (128, 256, 512, 1024)
        for warps in (1, 2, 4, 8)
        if n <= widest and 8 <= m * n // (32 * warps) <= 32
    ] or [default_config(row_count(call.x), columns, NO_GPU)]


def tuning_key(call: GegluCall) -> str:
    """What a tuned configuration is looked up by."""
    float8 = " float8" if call.float8 else ""
    return f"rows={row_count(call.x)} columns={call.x.shape[-1] // 2} {dtype_name(call.x)}{float8}"


def plan(
    call: GegluCall, *, config: GegluConfig | None = None, chip: Chip | None = None
) -> tuple[Tensor | tuple[Tensor, Tensor], list[Launch]]:
    """The result, not yet computed, and the launch that computes it."""
    result = _empty_result(call)
    out, scale = result if isinstance(result, tuple) else (result, None)
    rows = collapse_rows([call.x])
    columns = out.shape[-1]
    if rows is None or not out.numel():
        return result, []
    chip = chip or chip_of(call.x.device)
    default = whole_rows_config if call.float8 else default_config
    config = config or tuned("geglu", tuning_key(call), chip, GegluConfig) or default(rows.count, columns, chip)
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
    programs, tiles = ceil_div(rows.count, config.block_m), ceil_div(columns, config.block_n)
    launch = functools.partial(Launch, num_warps=config.num_warps, operator="geglu", pdl=pdl)
    if scale is not None:
        return result, [launch(geglu_float8_kernel, programs, arguments | {"scale_ptr": scale, "CHUNKS": tiles})]
    return result, [launch(geglu_kernel, programs * tiles, arguments)]


def unsupported_reasons(call: GegluCall) -> list[str]:
    """Every reason why the Triton kernel cannot serve this call; empty when it can."""
    reasons = [
        *device_reasons(geglu_kernel, call.x),
        *(float8_reasons(geglu_float8_kernel, call.x) if call.float8 else ()),
        *dtype_reasons(x=call.x, bias=call.bias),
        *row_reasons(collapse_rows([call.x]), x=call.x, bias=call.bias),
    ]
    if call.float8 and call.x.shape[-1] // 2 > MAX_COLUMNS:
        reasons.append(f"{call.x.shape[-1] // 2} columns are more than {MAX_COLUMNS}")
    return reasons


@overload
def geglu(
    x: Tensor,
    *,
    bias: Tensor | None = ...,
    float8: Literal[False] = ...,
    backend: str = ...,
    out: Tensor | None = ...,
) -> Tensor: ...
@overload
def geglu(
    x: Tensor,
    *,
    bias: Tensor | None = ...,
    float8: Literal[True],
    backend: str = ...,
    out: tuple[Tensor, Tensor] | None = ...,
) -> tuple[Tensor, Tensor]: ...
def geglu(
    x: Tensor,
    *,
    bias: Tensor | None = None,
    float8: bool = False,
    backend: str = "auto",
    out: Tensor | tuple[Tensor, Tensor] | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """x [..., 2C] -> value * gelu_erf(gate) [..., C], contiguous, in x's dtype; value is the first half.

    With `bias` [2C], any float dtype, of x + bias. With `float8` returns the same as `float8_rows` does, for a
    scaled matmul: (float8_e4m3fn [..., C], scale float32 [rows, 1]), without gradients. Autocast changes nothing,
    as with F.gelu. Raises ValueError for an odd last dimension, an integer dtype or a bias that does not fit,
    `KernelUnsupported` for `backend="triton"` where the kernel cannot serve. `out`, with float8 a pair, contiguous
    and in memory of its own, is written and returned: without gradients.
    Source: Shazeer, arXiv 2002.05202.
    """
    tensors(geglu, (x,), (bias,))
    flag("geglu", "float8", float8)
    if float8:
        refuse_gradients("geglu", (x, bias))
        both: tuple[Tensor, Tensor] = _float8_geglu(x, bias, backend, out=out)
        return both
    result: Tensor = _geglu(x, bias, backend, out=out)
    return result


def _check(call: GegluCall) -> None:
    x, bias, float8 = call
    if x.ndim < 1 or x.shape[-1] % 2 or not x.is_floating_point():
        raise ValueError(f"geglu: x must be a float [..., 2C]; got {x.dtype} {list(x.shape)}")
    if float8 and not x.shape[-1]:
        raise ValueError("geglu: with float8 there must be columns; got none")
    if bias is not None and (bias.shape != x.shape[-1:] or not bias.is_floating_point()):
        raise ValueError(f"geglu: bias must be a float [{x.shape[-1]}]; got {bias.dtype} {list(bias.shape)}")


def _empty_result(call: GegluCall) -> Tensor | tuple[Tensor, Tensor]:
    out = call.x.new_empty((*call.x.shape[:-1], call.x.shape[-1] // 2))
    return empty_float8(out) if call.float8 else out


def _reference(call: GegluCall) -> Tensor | tuple[Tensor, Tensor]:
    out = geglu_ref(**call._asdict())
    return out if isinstance(out, tuple) else out.contiguous()


OPERATOR = Operator(
    "geglu", geglu, geglu_ref, GegluCall, _check, plan, candidates, tuning_key, unsupported_reasons
)
_geglu = define_operator(
    "geglu(Tensor x, Tensor? bias, str backend) -> Tensor",
    OPERATOR,
    reference=_reference,
    fake=_empty_result,
    formula=Formula(_formulas.geglu),
)
_float8_geglu = define_operator(
    "float8_geglu(Tensor x, Tensor? bias, str backend) -> (Tensor, Tensor)",
    OPERATOR,
    reference=_reference,
    fake=_empty_result,
    bind=lambda x, bias: GegluCall(x, bias, float8=True),
    differentiable=False,
)

"""Layer normalization over the last dimension, optionally with a bias and a residual added before it.

s = x + x_bias + residual, y = layer_norm(s). A transformer block needs both: y for its next matmul, s as the
residual stream. x_bias is the bias of the linear layer that made x. The norm is of the unrounded sum.
Statistics are float32 (float64 for float64).

A program holds whole rows in registers, so it reads them once and takes the variance around the mean. Rows are in
tiles whose width wastes the fewest lanes: the family's channels are no powers of two. The mean is in two parts,
because one float32 cannot hold a mean of 1e4 exactly enough. With float8 each row is quantized as it is written
(_float8.py), for a matmul in float8.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _formulas
from ._autocast import in_float32, promoted
from ._checks import flag, real, tensors
from ._dependent import launch_dependents, launches_dependently, wait_for_primary
from ._float8 import LEAST_TILE, empty_float8, float8_reasons, float8_rows, float8_scale, refuse_gradients
from ._launch import NO_GPU, Chip, Launch, Operator, ceil_div, chip_of, dtype_name, next_power_of_two, tuned
from ._layout import Rows, collapse_rows, column_block, row_count, row_offsets, row_reasons
from ._library import Formula, cast, compute_dtype, define_operator
from ._triton import device_reasons, dtype_reasons, jit, tl

MAX_CHANNELS = 16384


class LayerNormCall(NamedTuple):
    """The arguments of `layer_norm`."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    eps: float = 1e-5
    x_bias: Tensor | None = None
    residual: Tensor | None = None
    float8: bool = False

    @property
    def rows(self) -> Rows | None:
        """The rows of x and of the residual, which is x where there is none."""
        return collapse_rows([self.x, self.x if self.residual is None else self.residual])


def layer_norm_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    *,
    x_bias: Tensor | None = None,
    residual: Tensor | None = None,
    float8: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Reference of `layer_norm` in float32 (float64 for float64)."""
    dtype = compute_dtype(x)
    x32 = cast(x, dtype)
    for addend in (x_bias, residual):
        if addend is not None:
            x32 = x32 + cast(addend, dtype)
    y = F.layer_norm(x32, (x.shape[-1],), cast(weight, dtype), cast(bias, dtype), eps)
    if float8:
        return float8_rows(y)
    y = cast(y, x.dtype)
    return y if residual is None else (y, cast(x32, x.dtype))


@jit
def layer_norm_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    x_bias_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    sum_ptr,
    scale_ptr,
    rows,
    columns,
    eps,
    inner,
    stride_x_outer,
    stride_x_inner,
    stride_r_outer,
    stride_r_inner,
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
    x_rows = x_ptr + row_offsets(offs_m, inner, stride_x_outer, stride_x_inner, FLAT)[:, None]
    out_rows = (offs_m.to(tl.int64) * columns)[:, None]
    if residual_ptr is not None:
        r_rows = residual_ptr + row_offsets(offs_m, inner, stride_r_outer, stride_r_inner, FLAT)[:, None]

    wait_for_primary(PDL)
    # Tiles are added up before lanes are: one reduction, whatever the number of tiles.
    tiles = ()
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for j in tl.static_range(CHUNKS):
        offs_n = j * BLOCK_N + tl.arange(0, BLOCK_N)
        mask_n = offs_n < columns
        mask = mask_m & mask_n[None, :]
        x = tl.load(x_rows + offs_n[None, :], mask=mask, other=0.0).to(tl.float32)
        if x_bias_ptr is not None:
            x += tl.load(x_bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
        if residual_ptr is not None:
            x += tl.load(r_rows + offs_n[None, :], mask=mask, other=0.0).to(tl.float32)
            tl.store(sum_ptr + out_rows + offs_n[None, :], x.to(sum_ptr.dtype.element_ty), mask=mask)
        tiles += (x,)  # type: ignore[assignment]
        total += x
    mean0 = (tl.sum(total, axis=1) / columns)[:, None]
    first = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    second = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for j in tl.static_range(CHUNKS):
        mask_n = j * BLOCK_N + tl.arange(0, BLOCK_N) < columns
        deviation = tl.where(mask_n[None, :], tiles[j] - mean0, 0.0)
        first += deviation
        second += deviation * deviation
    delta = (tl.sum(first, axis=1) / columns)[:, None]
    variance = (tl.sum(second, axis=1) / columns)[:, None] - delta * delta
    rstd = 1.0 / tl.sqrt(variance + eps)
    normalized = ()
    largest = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for j in tl.static_range(CHUNKS):
        offs_n = j * BLOCK_N + tl.arange(0, BLOCK_N)
        mask_n = offs_n < columns
        weight = tl.load(weight_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
        bias = tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
        y = ((tiles[j] - mean0) - delta) * rstd * weight + bias
        if scale_ptr is None:
            out = out_ptr + out_rows + offs_n[None, :]
            tl.store(out, y.to(out_ptr.dtype.element_ty), mask=mask_m & mask_n[None, :])
        else:
            normalized += (y,)  # type: ignore[assignment]
            # Masked columns are 0, or NaN, which a maximum drops.
            largest = tl.maximum(largest, tl.abs(y))
    if scale_ptr is not None:
        scale, inverse = float8_scale(tl.max(largest, axis=1))
        tl.store(scale_ptr + offs_m, scale, mask=offs_m < rows)
        for j in tl.static_range(CHUNKS):
            offs_n = j * BLOCK_N + tl.arange(0, BLOCK_N)
            quantized = (normalized[j] * inverse[:, None]).to(out_ptr.dtype.element_ty)
            out = out_ptr + out_rows + offs_n[None, :]
            tl.store(out, quantized, mask=mask_m & (offs_n < columns)[None, :])


@dataclass(frozen=True)
class LayerNormConfig:
    """A program takes block_m rows, in tiles of block_n columns."""

    block_m: int
    block_n: int
    num_warps: int


# Tiles of one row that a program keeps: each is at least 8 registers a thread.
MAX_CHUNKS = 12


def default_config(rows: int, columns: int, chip: Chip, float8: bool = False) -> LayerNormConfig:
    """Columns in tiles without waste, 16 elements or more to a thread; fewer rows for a chip not filled."""
    block_n = column_block(columns, most=1024)
    if ceil_div(columns, block_n) > MAX_CHUNKS:
        block_n = next_power_of_two(ceil_div(columns, MAX_CHUNKS))
    of_a_tile = 16 if block_n >= columns else 8
    block_m = max(128 * of_a_tile // block_n, 1)
    while block_m > 1 and ceil_div(rows, block_m) < 2 * chip.multiprocessors:
        block_m //= 2
    if float8:
        block_n = max(block_n, LEAST_TILE // block_m)
    return LayerNormConfig(block_m, block_n, min(max(block_m * block_n // (32 * of_a_tile), 1), 16))


def candidates(call: LayerNormCall) -> list[LayerNormConfig]:
    """The configurations that bench/tune.py tries for this call."""
    columns = call.x.shape[-1]
    widest = next_power_of_two(columns)
    return [
        LayerNormConfig(block_m, block_n, warps)
        for block_m in (1, 2, 4, 8, 16, 32)
        for block_n in sorted({min(n, widest) for n in (32, 64, 128, 256, 512, 1024, 2048, widest)})
        for warps in (1, 2, 4, 8, 16)
        if ceil_div(columns, block_n) <= MAX_CHUNKS
        and block_m * block_n // (32 * warps) in (4, 8, 16)
        and ceil_div(columns, block_n) * block_m * block_n // (32 * warps) <= 96
    ] or [default_config(row_count(call.x), columns, NO_GPU, call.float8)]


def tuning_key(call: LayerNormCall) -> str:
    """What a tuned configuration is looked up by."""
    with_sum = " float8" if call.float8 else "" if call.residual is None else " with residual"
    return f"rows={row_count(call.x)} columns={call.x.shape[-1]} {dtype_name(call.x)}{with_sum}"


def plan(
    call: LayerNormCall, *, config: LayerNormConfig | None = None, chip: Chip | None = None
) -> tuple[Tensor | tuple[Tensor, Tensor], list[Launch]]:
    """The result, not yet computed, and the launch that computes it."""
    x, weight, bias, eps, x_bias, residual, float8 = call
    result = _empty_result(call)
    out, beside = result if isinstance(result, tuple) else (result, None)
    rows = call.rows
    if rows is None or not x.numel():
        return result, []
    columns = x.shape[-1]
    chip = chip or chip_of(x.device)
    config = config or tuned("layer_norm", tuning_key(call), chip, LayerNormConfig)
    config = config or default_config(rows.count, columns, chip, float8)
    pdl = launches_dependently(chip)
    of_x, of_residual = rows.strides
    arguments = {
        "x_ptr": x,
        "x_bias_ptr": x_bias,
        "residual_ptr": residual,
        "weight_ptr": weight,
        "bias_ptr": bias,
        "out_ptr": out,
        "sum_ptr": None if float8 else beside,
        "scale_ptr": beside if float8 else None,
        "rows": rows.count,
        "columns": columns,
        "eps": eps,
        "inner": rows.inner,
        "stride_x_outer": of_x[0],
        "stride_x_inner": of_x[1],
        "stride_r_outer": of_residual[0],
        "stride_r_inner": of_residual[1],
        "CHUNKS": ceil_div(columns, config.block_n),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "FLAT": rows.flat,
        "PDL": pdl,
    }
    programs = ceil_div(rows.count, config.block_m)
    return result, [
        Launch(layer_norm_kernel, programs, arguments, config.num_warps, operator="layer_norm", pdl=pdl)
    ]


def unsupported_reasons(call: LayerNormCall) -> list[str]:
    """Every reason why the Triton kernel cannot serve this call; empty when it can."""
    x, weight, bias, _, x_bias, residual, float8 = call
    reasons = [
        *device_reasons(layer_norm_kernel, x),
        *(float8_reasons(layer_norm_kernel, x) if float8 else ()),
        *dtype_reasons(x=x, weight=weight, bias=bias, x_bias=x_bias),
        *row_reasons(call.rows, x=x, weight=weight, bias=bias, x_bias=x_bias, residual=residual),
    ]
    if x.shape[-1] > MAX_CHANNELS:
        reasons.append(f"{x.shape[-1]} channels are more than {MAX_CHANNELS}")
    return reasons


@overload
def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = ...,
    *,
    x_bias: Tensor | None = ...,
    float8: Literal[True],
    backend: str = ...,
    out: tuple[Tensor, Tensor] | None = ...,
) -> tuple[Tensor, Tensor]: ...
@overload
def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = ...,
    *,
    x_bias: Tensor | None = ...,
    residual: Tensor | None = ...,
    float8: bool = ...,
    backend: str = ...,
    out: Tensor | tuple[Tensor, Tensor] | None = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...
def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    *,
    x_bias: Tensor | None = None,
    residual: Tensor | None = None,
    float8: bool = False,
    backend: str = "auto",
    out: Tensor | tuple[Tensor, Tensor] | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Layer norm of x [..., C] with weight and bias [C]; contiguous, in x's dtype.

    With `x_bias` [C], any float dtype, of x + x_bias. With `residual` (shape and dtype of x) returns
    (norm(x + x_bias + residual), x + x_bias + residual). With `float8` returns the norm as `float8_rows` does, for
    a scaled matmul: (float8_e4m3fn [..., C], scale float32 [rows, 1]), without gradients and without a residual.
    Under autocast as a sum and F.layer_norm: x and residual of different dtypes are added in the wider one, the
    norm is float32 on a GPU. `out`, where two results are returned a pair, is written and returned: contiguous,
    memory of its own, without gradients. Raises ValueError for what does not fit, `KernelUnsupported` for
    `backend="triton"` where the kernel cannot serve.
    Source: Ba et al., arXiv 1607.06450.
    """
    tensors(layer_norm, (x, weight, bias), (x_bias, residual))
    eps = real("layer_norm", "eps", eps)
    flag("layer_norm", "float8", float8)
    if float8:
        if residual is not None:
            raise ValueError("layer_norm: float8 goes without a residual; add it before, or leave out float8")
        refuse_gradients("layer_norm", (x, weight, bias, x_bias))
        quantized: tuple[Tensor, Tensor] = _float8_layer_norm(x, weight, bias, eps, x_bias, backend, out=out)
        return quantized
    if residual is None:
        normalized: Tensor = _layer_norm(x, weight, bias, eps, x_bias, backend, out=out)
        return normalized
    both: tuple[Tensor, Tensor] = _add_layer_norm(x, residual, weight, bias, eps, x_bias, backend, out=out)
    return both


def _check(call: LayerNormCall) -> None:
    x, residual = call.x, call.residual
    if x.ndim < 1 or not x.is_floating_point():
        raise ValueError(f"layer_norm: x must be a float [..., C]; got {x.dtype} {list(x.shape)}")
    channels = x.shape[-1]
    if call.float8 and not channels:
        raise ValueError("layer_norm: with float8 there must be channels; got none")
    for name, value in (("weight", call.weight), ("bias", call.bias), ("x_bias", call.x_bias)):
        if value is not None and (value.shape != (channels,) or not value.is_floating_point()):
            raise ValueError(
                f"layer_norm: {name} must be a float [{channels}]; got {value.dtype} {list(value.shape)}"
            )
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(
            f"layer_norm: residual must be {x.dtype} {list(x.shape)}; got {residual.dtype} {list(residual.shape)}"
        )


def _empty_result(call: LayerNormCall) -> Tensor | tuple[Tensor, Tensor]:
    if call.float8:
        return empty_float8(call.x)
    out = torch.empty_like(call.x, memory_format=torch.contiguous_format)
    return out if call.residual is None else (out, torch.empty_like(out))


def _reference(call: LayerNormCall) -> Tensor | tuple[Tensor, Tensor]:
    out = layer_norm_ref(**call._asdict())
    return (out[0].contiguous(), out[1].contiguous()) if isinstance(out, tuple) else out.contiguous()


def _add_autocast(
    run: Callable[..., tuple[Tensor, Tensor]], x: Tensor, residual: Tensor, *others: Any
) -> tuple[Tensor, Tensor]:
    x, residual = promoted(x, residual)
    y, total = run(*in_float32(x, residual), *others)
    return y, total.to(x.dtype)


OPERATOR = Operator(
    "layer_norm",
    layer_norm,
    layer_norm_ref,
    LayerNormCall,
    _check,
    plan,
    candidates,
    tuning_key,
    unsupported_reasons,
)
_layer_norm = define_operator(
    "layer_norm(Tensor x, Tensor weight, Tensor bias, float eps, Tensor? x_bias, str backend) -> Tensor",
    OPERATOR,
    reference=_reference,
    fake=_empty_result,
    formula=Formula(_formulas.layer_norm),
    autocast=lambda run, x, *others: run(*in_float32(x), *others),
)
_add_layer_norm = define_operator(
    "add_layer_norm(Tensor x, Tensor residual, Tensor weight, Tensor bias, float eps, Tensor? x_bias, "
    "str backend) -> (Tensor, Tensor)",
    OPERATOR,
    reference=_reference,
    fake=_empty_result,
    bind=lambda x, residual, weight, bias, eps, x_bias: LayerNormCall(x, weight, bias, eps, x_bias, residual),
    autocast=_add_autocast,
    formula=Formula(_formulas.layer_norm),
    # The norm depends on what is added by the sum alone, which the residual stream keeps anyway.
    spared={"x": 1, "residual": None, "x_bias": None},
)
_float8_layer_norm = define_operator(
    "float8_layer_norm(Tensor x, Tensor weight, Tensor bias, float eps, Tensor? x_bias, str backend)"
    " -> (Tensor, Tensor)",
    OPERATOR,
    reference=_reference,
    fake=_empty_result,
    bind=lambda x, weight, bias, eps, x_bias: LayerNormCall(x, weight, bias, eps, x_bias, float8=True),
    autocast=lambda run, x, *others: run(*in_float32(x), *others),
    differentiable=False,
)

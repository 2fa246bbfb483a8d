"""Layer normalization over the last dimension, optionally with a bias and a residual added before it.

s = x + x_bias + residual, y = layer_norm(s). A transformer block needs y and s both, and s is in registers anyway;
x_bias is that of the linear layer that made x. The norm is of the unrounded sum.
Statistics are float32 (float64 for float64).

A program takes whole rows into registers, so the variance is taken around the mean, in one read; in tiles whose
width wastes the fewest lanes, as the family's channels are no powers of two. The mean is in two parts, because one
float32 cannot hold a mean of 1e4 exactly enough.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._autocast import in_float32, promoted
from ._checks import real, tensors
from ._dispatch import choose_backend
from ._launch import NO_GPU, Chip, Launch, Operator, ceil_div, chip_of, dtype_name, next_power_of_two, tuned
from ._layout import collapse_rows, column_block, row_offsets, row_reasons
from ._library import compute_dtype, define_operator
from ._recipes import served
from ._triton import device_reasons, dtype_reasons, jit, tl

MAX_CHANNELS = 16384


def layer_norm_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    *,
    x_bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Reference of `layer_norm` in float32 (float64 for float64)."""
    dtype = compute_dtype(x)
    x32 = x.to(dtype)
    if x_bias is not None:
        x32 = x32 + x_bias.to(dtype)
    if residual is not None:
        x32 = x32 + residual.to(dtype)
    y = F.layer_norm(x32, (x.shape[-1],), weight.to(dtype), bias.to(dtype), eps).to(x.dtype)
    return y if residual is None else (y, x32.to(x.dtype))


@jit
def layer_norm_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    x_bias_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    sum_ptr,
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
):
    """One program does BLOCK_M whole rows, in CHUNKS tiles of BLOCK_N columns that all stay in registers."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = (offs_m < rows)[:, None]
    x_rows = x_ptr + row_offsets(offs_m, inner, stride_x_outer, stride_x_inner, FLAT)[:, None]
    out_rows = (offs_m.to(tl.int64) * columns)[:, None]
    if residual_ptr is not None:
        r_rows = residual_ptr + row_offsets(offs_m, inner, stride_r_outer, stride_r_inner, FLAT)[:, None]

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
    for j in tl.static_range(CHUNKS):
        offs_n = j * BLOCK_N + tl.arange(0, BLOCK_N)
        mask_n = offs_n < columns
        weight = tl.load(weight_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
        bias = tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
        y = ((tiles[j] - mean0) - delta) * rstd * weight + bias
        out = out_ptr + out_rows + offs_n[None, :]
        tl.store(out, y.to(out_ptr.dtype.element_ty), mask=mask_m & mask_n[None, :])


@dataclass(frozen=True)
class LayerNormConfig:
    """A program takes block_m rows, in tiles of block_n columns."""

    block_m: int
    block_n: int
    num_warps: int


# Tiles of one row that a program keeps: each is at least 8 registers a thread.
MAX_CHUNKS = 12


def default_config(rows: int, columns: int, chip: Chip) -> LayerNormConfig:
    """Columns in tiles without waste, 16 elements or more to a thread; fewer rows for a chip not filled."""
    block_n = column_block(columns, most=1024)
    if ceil_div(columns, block_n) > MAX_CHUNKS:
        block_n = next_power_of_two(ceil_div(columns, MAX_CHUNKS))
    of_a_tile = 16 if block_n >= columns else 8
    block_m = max(128 * of_a_tile // block_n, 1)
    while block_m > 1 and ceil_div(rows, block_m) < 2 * chip.multiprocessors:
        block_m //= 2
    return LayerNormConfig(block_m, block_n, min(max(block_m * block_n // (32 * of_a_tile), 1), 16))


def candidates(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    *,
    x_bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> list[LayerNormConfig]:
    """The configurations that bench/tune.py tries for this call."""
    columns = x.shape[-1]
    widest = next_power_of_two(columns)
    return [
        LayerNormConfig(block_m, block_n, warps)
        for block_m in (1, 2, 4, 8, 16, 32)
        for block_n in sorted({min(n, widest) for n in (32, 64, 128, 256, 512, 1024, 2048, widest)})
        for warps in (1, 2, 4, 8, 16)
        if ceil_div(columns, block_n) <= MAX_CHUNKS
        and block_m * block_n // (32 * warps) in (4, 8, 16)
        and ceil_div(columns, block_n) * block_m * block_n // (32 * warps) <= 96
    ] or [default_config(x.numel() // max(columns, 1), columns, NO_GPU)]


def tuning_key(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    *,
    x_bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> str:
    """What a tuned configuration is looked up by."""
    columns = x.shape[-1]
    with_sum = "" if residual is None else " with residual"
    return f"rows={x.numel() // max(columns, 1)} columns={columns} {dtype_name(x)}{with_sum}"


def plan(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    *,
    x_bias: Tensor | None = None,
    residual: Tensor | None = None,
    config: LayerNormConfig | None = None,
) -> tuple[Tensor | tuple[Tensor, Tensor], list[Launch]]:
    """The result, not yet computed, and the launches that compute it; arguments as of `layer_norm`."""
    out = _fake(x)
    total = None if residual is None else _fake(x)
    result = out if total is None else (out, total)
    rows = collapse_rows([x, x if residual is None else residual])
    if rows is None or not x.numel():
        return result, []
    columns = x.shape[-1]
    if config is None:
        chip = chip_of(x.device)
        key = tuning_key(x, weight, bias, residual=residual)
        config = tuned("layer_norm", key, chip, LayerNormConfig) or default_config(rows.count, columns, chip)
    of_x, of_residual = rows.strides
    arguments = {
        "x_ptr": x,
        "x_bias_ptr": x_bias,
        "residual_ptr": residual,
        "weight_ptr": weight,
        "bias_ptr": bias,
        "out_ptr": out,
        "sum_ptr": total,
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
    }
    return result, [Launch(layer_norm_kernel, ceil_div(rows.count, config.block_m), arguments, config.num_warps)]


def unsupported_reasons(
    x: Tensor, weight: Tensor, bias: Tensor, x_bias: Tensor | None = None, residual: Tensor | None = None
) -> list[str]:
    """Every reason why the Triton kernel cannot serve these tensors; empty when it can."""
    reasons = [
        *device_reasons(layer_norm_kernel, x),
        *dtype_reasons(x=x, weight=weight, bias=bias, x_bias=x_bias),
        *row_reasons(
            collapse_rows([x, x if residual is None else residual]),
            x=x, weight=weight, bias=bias, x_bias=x_bias, residual=residual,
        ),
    ]  # fmt: skip
    if x.shape[-1] > MAX_CHANNELS:
        reasons.append(f"{x.shape[-1]} channels are more than {MAX_CHANNELS}")
    return reasons


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    *,
    x_bias: Tensor | None = None,
    residual: Tensor | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Layer norm of x [..., C] with weight and bias [C]; contiguous, in x's dtype.

    With `x_bias` [C], any float dtype, of x + x_bias. With `residual` (shape and dtype of x) returns
    (norm(x + x_bias + residual), x + x_bias + residual). Under autocast as a sum and F.layer_norm: x and residual
    of different dtypes are added in the wider one, the norm is float32 on a GPU. Raises ValueError for what does
    not fit, `KernelUnsupported` for `backend="triton"` where the kernel cannot serve.
    Source: Ba et al., arXiv 1607.06450.
    """
    tensors(layer_norm, (x, weight, bias), (x_bias, residual))
    eps = real("layer_norm", "eps", eps)
    if residual is not None and residual.dtype != x.dtype:
        x, residual = promoted(x, residual)
    if x.ndim < 1 or not x.is_floating_point():
        raise ValueError(f"layer_norm: x must be a float [..., C]; got {x.dtype} {list(x.shape)}")
    channels = x.shape[-1]
    for name, value in (("weight", weight), ("bias", bias), ("x_bias", x_bias)):
        if value is not None and (value.shape != (channels,) or not value.is_floating_point()):
            raise ValueError(
                f"layer_norm: {name} must be a float [{channels}]; got {value.dtype} {list(value.shape)}"
            )
    if residual is None:
        out: Tensor = _layer_norm(x, weight, bias, eps, x_bias, backend)
        return out
    if residual.shape != x.shape or residual.dtype != x.dtype:
        raise ValueError(
            f"layer_norm: residual must be {x.dtype} {list(x.shape)}; got {residual.dtype} {list(residual.shape)}"
        )
    both: tuple[Tensor, Tensor] = _add_layer_norm(x, residual, weight, bias, eps, x_bias, backend)
    return both


_Planned = tuple[Tensor | tuple[Tensor, Tensor], list[Launch]]


def _decided(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, x_bias: Tensor | None, backend: str
) -> _Planned | None:
    """The plan of a call, None where torch serves it."""
    reasons = [] if backend == "torch" else unsupported_reasons(x, weight, bias, x_bias)
    if choose_backend("layer_norm", backend, reasons) == "torch":
        return None
    return plan(x, weight, bias, eps, x_bias=x_bias)


def _reference(x: Tensor, weight: Tensor, bias: Tensor, eps: float, x_bias: Tensor | None, backend: str) -> Tensor:
    out = layer_norm_ref(x, weight, bias, eps, x_bias=x_bias)
    assert isinstance(out, Tensor)
    return out.contiguous()


def _fake(x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _add_decided(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    x_bias: Tensor | None,
    backend: str,
) -> _Planned | None:
    reasons = [] if backend == "torch" else unsupported_reasons(x, weight, bias, x_bias, residual)
    if choose_backend("layer_norm", backend, reasons) == "torch":
        return None
    return plan(x, weight, bias, eps, x_bias=x_bias, residual=residual)


def _add_reference(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    x_bias: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    y, total = layer_norm_ref(x, weight, bias, eps, x_bias=x_bias, residual=residual)
    return y.contiguous(), total.contiguous()


def _add_fake(x: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return _fake(x), _fake(x)


def _add_autocast(
    run: Callable[..., tuple[Tensor, Tensor]], x: Tensor, residual: Tensor, *others: Any
) -> tuple[Tensor, Tensor]:
    x, residual = promoted(x, residual)
    y, total = run(*in_float32(x, residual), *others)
    return y, total.to(x.dtype)


_layer_norm = define_operator(
    "layer_norm(Tensor x, Tensor weight, Tensor bias, float eps, Tensor? x_bias, str backend) -> Tensor",
    served("layer_norm", _decided, _reference),
    fake=_fake,
    autocast=lambda run, x, *others: run(*in_float32(x), *others),
    reference=_reference,
)
_add_layer_norm = define_operator(
    "add_layer_norm(Tensor x, Tensor residual, Tensor weight, Tensor bias, float eps, Tensor? x_bias, "
    "str backend) -> (Tensor, Tensor)",
    served("layer_norm", _add_decided, _add_reference),
    fake=_add_fake,
    autocast=_add_autocast,
    reference=_add_reference,
)

OPERATOR = Operator("layer_norm", layer_norm, layer_norm_ref, plan, candidates, tuning_key)

"""The sum of two images and the bias of the convolution that made one of them, doubled in size on request.

out = x + residual + bias[channel]. With `size` the sum is upsampled to the nearest neighbour as it is written:
upsampling follows the last residual add of a level, and nothing else reads the small sum. Where a group norm reads
the sum, its statistics are left beside it (_statistics.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _formulas
from ._autocast import in_float32, promoted
from ._checks import flag, tensors, whole
from ._dependent import launch_dependents, launches_dependently, wait_for_primary
from ._launch import NO_GPU, Chip, Launch, Operator, ceil_div, chip_of, dtype_name, next_power_of_two, tuned
from ._layout import column_block, image_reasons, image_strides, memory_format, named_strides, pixel_offsets
from ._library import Formula, cast, compute_dtype, define_operator
from ._statistics import channel_statistics, empty_statistics, store_statistics
from ._triton import contiguity_reasons, device_reasons, dtype_reasons, jit, tl

# Pixels of a tile of the statistics: these are then 6% of the bytes of a 16-bit sum.
STATISTICS_TILE = 64


class ResidualAddCall(NamedTuple):
    """The arguments of `residual_add`."""

    x: Tensor
    residual: Tensor
    bias: Tensor | None = None
    size: Sequence[int] | None = None
    statistics: bool = False

    @property
    def pixels(self) -> int:
        """Those of an image of x."""
        return self.x.shape[2] * self.x.shape[3]

    @property
    def interleaved(self) -> bool:
        """Whether the channels of a pixel lie side by side (channels-last)."""
        return memory_format(self.x) == torch.channels_last


def residual_add_ref(
    x: Tensor,
    residual: Tensor,
    bias: Tensor | None = None,
    *,
    size: Sequence[int] | None = None,
    statistics: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Reference of `residual_add` in float32 (float64 for float64)."""
    dtype = compute_dtype(x)
    total = cast(x, dtype) + cast(residual, dtype)
    if bias is not None:
        total = total + cast(bias, dtype)[:, None, None]
    total = cast(total, x.dtype)
    if size is not None and total.numel():
        total = F.interpolate(total, size=tuple(size), mode="nearest")
    elif size is not None:
        total = total.new_empty((*total.shape[:2], *size))
    total = total.contiguous(memory_format=memory_format(x))
    return (total, channel_statistics(total, STATISTICS_TILE)) if statistics else total


@jit
def residual_add_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    residual_ptr,
    bias_ptr,
    out_ptr,
    statistics_ptr,
    channels,
    pixels,
    width,
    out_height,
    out_width,
    stride_xb,
    stride_xc,
    stride_xh,
    stride_xw,
    stride_rb,
    stride_rc,
    stride_rh,
    stride_rw,
    stride_ob,
    stride_oc,
    stride_ow,
    SCALE: tl.constexpr,
    BLOCK_HW: tl.constexpr,
    BLOCK_C: tl.constexpr,
    FLAT: tl.constexpr,
    PDL: tl.constexpr,
):
    launch_dependents(PDL)
    blocks_c = tl.cdiv(channels, BLOCK_C)
    blocks_hw = tl.cdiv(pixels, BLOCK_HW)
    pid = tl.program_id(0)
    b = (pid // blocks_c // blocks_hw).to(tl.int64)
    start = ((pid // blocks_c) % blocks_hw) * BLOCK_HW
    offs_hw = start + tl.arange(0, BLOCK_HW)
    offs_c = (pid % blocks_c) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_hw = offs_hw < pixels
    mask_c = offs_c < channels
    mask = mask_hw[:, None] & mask_c[None, :]
    x_rows = b * stride_xb + pixel_offsets(offs_hw, width, stride_xh, stride_xw, FLAT)
    r_rows = b * stride_rb + pixel_offsets(offs_hw, width, stride_rh, stride_rw, FLAT)
    columns = offs_c.to(tl.int64)[None, :]
    wait_for_primary(PDL)
    total = tl.load(x_ptr + x_rows[:, None] + columns * stride_xc, mask=mask, other=0.0).to(tl.float32)
    total += tl.load(residual_ptr + r_rows[:, None] + columns * stride_rc, mask=mask, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)[None, :]
    out = total.to(out_ptr.dtype.element_ty)
    if statistics_ptr is not None:
        count = tl.minimum(pixels - start, BLOCK_HW)
        tile = pid // blocks_c
        store_statistics(statistics_ptr, tile, out.to(tl.float32), mask_hw, count, offs_c, mask_c, channels)
    out_ptr += b * stride_ob
    if SCALE == 1:
        tl.store(out_ptr + (offs_hw.to(tl.int64) * stride_ow)[:, None] + columns * stride_oc, out, mask=mask)
    else:
        for dy in tl.static_range(SCALE):
            for dx in tl.static_range(SCALE):
                row = (offs_hw // width) * SCALE + dy
                column = (offs_hw % width) * SCALE + dx
                # An odd size was rounded up on the way down: its last row and column are not doubled.
                inside = mask_hw & (row < out_height) & (column < out_width)
                target = (row.to(tl.int64) * out_width + column) * stride_ow
                tl.store(
                    out_ptr + target[:, None] + columns * stride_oc, out, mask=inside[:, None] & mask_c[None, :]
                )


@dataclass(frozen=True)
class ResidualAddConfig:
    """A program takes a tile of block_hw pixels and block_c channels."""

    block_hw: int
    block_c: int
    num_warps: int


def default_config(call: ResidualAddCall, chip: Chip) -> ResidualAddConfig:
    """16 elements a thread along what is contiguous; smaller tiles where the chip would not be filled."""
    batch, channels, pixels, elements = *call.x.shape[:2], call.pixels, 2048
    while elements > 512 and ceil_div(batch * channels * pixels, elements) < 2 * chip.multiprocessors:
        elements //= 2
    if call.statistics:
        block_hw, block_c = STATISTICS_TILE, min(32, next_power_of_two(channels))
    elif call.interleaved:
        block_c = column_block(channels, most=min(512, elements))
        block_hw = min(max(elements // block_c, 1), next_power_of_two(pixels))
    else:
        block_hw = column_block(pixels, most=min(1024, elements))
        block_c = min(max(elements // block_hw, 1), next_power_of_two(channels))
    return ResidualAddConfig(block_hw, block_c, num_warps=min(max(block_hw * block_c // 512, 1), 8))


def candidates(call: ResidualAddCall) -> list[ResidualAddConfig]:
    """The configurations that bench/tune.py tries for this call."""
    channels, pixels, interleaved = call.x.shape[1], call.pixels, call.interleaved
    return [
        ResidualAddConfig(block_hw, block_c, warps)
        for block_c in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
        for block_hw in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
        for warps in (1, 2, 4, 8)
        if block_c <= next_power_of_two(channels)
        and (block_hw == STATISTICS_TILE if call.statistics else block_hw <= next_power_of_two(pixels))
        and 8 <= block_hw * block_c // (32 * warps) <= 32
        and (block_c if interleaved else block_hw) >= min(64, channels if interleaved else pixels)
    ] or [default_config(call, NO_GPU)]


def tuning_key(call: ResidualAddCall) -> str:
    """What a tuned configuration is looked up by."""
    layout = "channels_last" if call.interleaved else "contiguous"
    doubled = ("" if call.size is None else " doubled") + (" with statistics" if call.statistics else "")
    batch, channels = call.x.shape[:2]
    return f"batch={batch} channels={channels} pixels={call.pixels} {dtype_name(call.x)} {layout}{doubled}"


def plan(
    call: ResidualAddCall, *, config: ResidualAddConfig | None = None, chip: Chip | None = None
) -> tuple[Tensor | tuple[Tensor, Tensor], list[Launch]]:
    """The result, not yet computed, and the launch that computes it."""
    x, residual, bias, size, _ = call
    out = _empty_sum(call)
    if not out.numel():
        return _empty_result(call), []
    batch, channels, _, width = x.shape
    chip = chip or chip_of(x.device)
    config = (
        config or tuned("residual_add", tuning_key(call), chip, ResidualAddConfig) or default_config(call, chip)
    )
    pdl = launches_dependently(chip)
    of_x, of_residual = image_strides(x), image_strides(residual)
    statistics = empty_statistics(out, STATISTICS_TILE) if call.statistics else None
    if call.statistics and config.block_hw != STATISTICS_TILE:
        raise ValueError(f"residual_add: statistics are of {STATISTICS_TILE} pixels; got {config}")
    arguments = {
        "x_ptr": x,
        "residual_ptr": residual,
        "bias_ptr": bias,
        "out_ptr": out,
        "statistics_ptr": statistics,
        "channels": channels,
        "pixels": call.pixels,
        "width": width,
        "out_height": out.shape[2],
        "out_width": out.shape[3],
        **named_strides("x", of_x),
        **named_strides("r", of_residual),
        **named_strides("o", image_strides(out), "bcw"),
        "SCALE": 1 if size is None else 2,
        "BLOCK_HW": config.block_hw,
        "BLOCK_C": config.block_c,
        "FLAT": of_x.flat and of_residual.flat,
        "PDL": pdl,
    }
    programs = batch * ceil_div(call.pixels, config.block_hw) * ceil_div(channels, config.block_c)
    launches = [
        Launch(residual_add_kernel, programs, arguments, config.num_warps, operator="residual_add", pdl=pdl)
    ]
    return out if statistics is None else (out, statistics), launches


def unsupported_reasons(call: ResidualAddCall) -> list[str]:
    """Every reason why the Triton kernel cannot serve this call; empty when it can."""
    return [
        *device_reasons(residual_add_kernel, call.x),
        *dtype_reasons(x=call.x, bias=call.bias),
        *image_reasons(call.x),
        *contiguity_reasons(bias=call.bias),
    ]


@overload
def residual_add(
    x: Tensor,
    residual: Tensor,
    bias: Tensor | None = ...,
    *,
    size: Sequence[int] | None = ...,
    statistics: Literal[False] = ...,
    backend: str = ...,
    out: Tensor | None = ...,
) -> Tensor: ...
@overload
def residual_add(
    x: Tensor,
    residual: Tensor,
    bias: Tensor | None = ...,
    *,
    size: None = ...,
    statistics: Literal[True],
    backend: str = ...,
    out: tuple[Tensor, Tensor] | None = ...,
) -> tuple[Tensor, Tensor]: ...
def residual_add(
    x: Tensor,
    residual: Tensor,
    bias: Tensor | None = None,
    *,
    size: Sequence[int] | None = None,
    statistics: bool = False,
    backend: str = "auto",
    out: Tensor | tuple[Tensor, Tensor] | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """x + residual + bias per channel, in x's dtype and memory format.

    x [B, C, H, W] and residual of the same shape and dtype, any strides; bias [C] of any float dtype or None.
    size (2H or 2H - 1, 2W or 2W - 1) enlarges the sum to it by nearest neighbour. With `statistics` returns
    (sum, its statistics float32 [B, ceil(H W / 64), 2, C]) for the group norm that reads it. Under autocast as a
    sum, of different dtypes in the widest, and as F.interpolate, on a GPU in float32. `out`, in x's memory format,
    with statistics a pair, is written and returned: without gradients. It may be x or the residual, where that has
    the result's size and strides; else it has memory of its own. Raises ValueError for what does not fit,
    `KernelUnsupported` for `backend="triton"` where the kernel cannot serve.
    """
    tensors(residual_add, (x, residual), (bias,))
    flag("residual_add", "statistics", statistics)
    if size is not None:
        if not isinstance(size, Iterable):
            raise ValueError(f"residual_add: size must be (height, width); got {size!r}")
        size = [whole("residual_add", "size", n) for n in size]
    if not statistics:
        result: Tensor = _residual_add(x, residual, bias, size, backend, out=out)
        return result
    if size is not None:
        raise ValueError("residual_add: statistics are of a sum of x's size; leave out size or statistics")
    both: tuple[Tensor, Tensor] = _statistics_residual_add(x, residual, bias, True, backend, out=out)
    return both


def _check(call: ResidualAddCall) -> None:
    x, residual, bias, size, _ = call
    if x.ndim != 4 or not x.is_floating_point():
        raise ValueError(f"residual_add: x must be a float [B, C, H, W]; got {x.dtype} {list(x.shape)}")
    if residual.shape != x.shape or residual.dtype != x.dtype:
        raise ValueError(
            f"residual_add: residual must be {x.dtype} {list(x.shape)}; "
            f"got {residual.dtype} {list(residual.shape)}"
        )
    if bias is not None and (bias.shape != x.shape[1:2] or not bias.is_floating_point()):
        raise ValueError(f"residual_add: bias must be a float [{x.shape[1]}]; got {bias.dtype} {list(bias.shape)}")
    if size is not None and (
        len(size) != 2 or any(not 2 * n - 1 <= to <= 2 * n for to, n in zip(size, x.shape[2:], strict=True))
    ):
        raise ValueError(f"residual_add: size must be twice {list(x.shape[2:])}, or one less in each; got {size}")


def _empty_result(call: ResidualAddCall) -> Tensor | tuple[Tensor, Tensor]:
    out = _empty_sum(call)
    return (out, empty_statistics(out, STATISTICS_TILE)) if call.statistics else out


def _empty_sum(call: ResidualAddCall) -> Tensor:
    x = call.x
    shape = (*x.shape[:2], *(x.shape[2:] if call.size is None else call.size))
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x))


def _reference(call: ResidualAddCall) -> Tensor | tuple[Tensor, Tensor]:
    return residual_add_ref(**call._asdict())


def _autocast(run: Callable[..., Tensor], x: Tensor, residual: Tensor, *others: Any) -> Tensor:
    x, residual = promoted(x, residual)
    _, size, _ = others
    return run(*(in_float32(x, residual) if size is not None else (x, residual)), *others)


OPERATOR = Operator(
    "residual_add",
    residual_add,
    residual_add_ref,
    ResidualAddCall,
    _check,
    plan,
    candidates,
    tuning_key,
    unsupported_reasons,
)
_residual_add = define_operator(
    "residual_add(Tensor x, Tensor residual, Tensor? bias, SymInt[]? size, str backend) -> Tensor",
    OPERATOR,
    reference=_reference,
    fake=_empty_result,
    autocast=_autocast,
    formula=Formula(_formulas.residual_add),
    # The kernel reads an element of either in the program that writes it, before.
    in_place=("x", "residual"),
    # A sum: its derivatives are the same everywhere.
    spared={"x": None, "residual": None, "bias": None},
)
_statistics_residual_add = define_operator(
    "statistics_residual_add(Tensor x, Tensor residual, Tensor? bias, bool statistics, str backend) "
    "-> (Tensor, Tensor)",
    OPERATOR,
    reference=_reference,
    fake=_empty_result,
    bind=lambda x, residual, bias, statistics: ResidualAddCall(x, residual, bias, None, statistics),
    autocast=lambda run, x, residual, *others: run(*promoted(x, residual), *others),
    in_place=("x", "residual"),
)

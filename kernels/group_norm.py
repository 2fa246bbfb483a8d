"""Group normalization with an optional bias before it and an optional SiLU after it.

y = act(group_norm(x + x_bias)), x [B, C, H, W] channels-last or contiguous. x_bias [B, C] holds a residual block's
time projection and the bias of the convolution before: each would cost a pass over x of its own. With `skip` the
input is x and skip side by side along the channels, read from both: no concatenation is written. Statistics are
float32 (float64 for float64); the result has the memory format of x.

The kernels (_group_norm_kernels.py). A program takes one image and a bundle of neighbouring groups, so wide that
channels-last memory is read in whole 16-byte pieces whatever the width of a group. It walks over the pixels in
tiles. Every lane sums around its first value: no cancellation at large means, no exchange between lanes until the
end. A matrix of membership then merges lanes into groups, whose width is no power of two. The mean is in two
parts, because one float32 cannot hold a mean of 1e4 exactly enough.

- One launch where a bundle is small: the tile stays in registers, or is read again from the cache.
- Two launches where a bundle is large, or one would leave the chip idle: many programs for each bundle write
  partial statistics; as many then merge all of these and normalize. No atomics: the order of every sum is fixed.
- One launch of many programs where whoever wrote x left its statistics (_statistics.py, _group_norm_given.py).
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _formulas
from ._autocast import in_float32, promoted
from ._checks import choice, real, tensors, whole
from ._dependent import launches_dependently
from ._group_norm_config import GroupNormConfig, GroupNormShape, candidate_configs, default_config, predicted_ns
from ._group_norm_given import group_norm_given_kernel
from ._group_norm_kernels import group_norm_apply_kernel, group_norm_kernel, group_norm_statistics_kernel
from ._launch import Chip, Launch, Operator, ceil_div, chip_of, dtype_name, next_power_of_two, tuned
from ._layout import image_reasons, image_strides, memory_format, named_strides
from ._library import Formula, cast, compute_dtype, define_operator
from ._statistics import statistics_misfit, statistics_reasons, tile_pixels
from ._triton import contiguity_reasons, device_reasons, dtype_reasons

ACTIVATIONS = ("silu", None)
MAX_GROUP_CHANNELS = 8192
# Given means, and as many squares, that a thread loads at once.
_THREAD_MOMENTS = 4


class GroupNormSiluCall(NamedTuple):
    """The arguments of `group_norm_silu`."""

    x: Tensor
    num_groups: int
    weight: Tensor | None = None
    bias: Tensor | None = None
    eps: float = 1e-5
    x_bias: Tensor | None = None
    skip: Tensor | None = None
    activation: str | None = "silu"
    statistics: Tensor | None = None
    skip_statistics: Tensor | None = None

    @property
    def given(self) -> bool:
        """Whether the statistics of all that is normalized are given."""
        return self.statistics is not None and (self.skip is None or self.skip_statistics is not None)

    @property
    def channels(self) -> int:
        """Those of x and of the skip connection beside it."""
        return self.x.shape[1] + (0 if self.skip is None else self.skip.shape[1])

    @property
    def shape(self) -> GroupNormShape:
        """What a configuration depends on."""
        batch, _, height, width = self.x.shape
        return GroupNormShape(
            batch,
            height * width,
            self.num_groups,
            self.channels // self.num_groups,
            self.x.element_size(),
            interleaved=memory_format(self.x) == torch.channels_last or height * width == 1,
            given=self.given,
        )


def group_norm_silu_ref(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    x_bias: Tensor | None = None,
    skip: Tensor | None = None,
    activation: str | None = "silu",
    statistics: Tensor | None = None,
    skip_statistics: Tensor | None = None,
) -> Tensor:
    """Reference of `group_norm_silu` in float32 (float64 for float64), which computes the statistics itself."""
    format_ = memory_format(x)
    if skip is not None:
        x = torch.cat([x, skip], dim=1)
    if x.numel() == 0:
        return torch.empty_like(x, memory_format=format_)
    dtype = compute_dtype(x)
    x32 = _formulas.centered(x, num_groups, x_bias)
    weight, bias = cast(weight, dtype), cast(bias, dtype)
    is_frozen = torch.is_grad_enabled() and x.device.type == "cpu" and not x32.requires_grad
    if is_frozen and any(p is not None and p.requires_grad for p in (weight, bias)):
        # Torch's backward for channels-last crashes the process where the image needs no gradient (seen in 2.13).
        x32 = x32.contiguous()
    y = F.group_norm(x32, num_groups, weight, bias, eps)
    if activation == "silu":
        y = F.silu(y)
    return cast(y, x.dtype).contiguous(memory_format=format_)  # type: ignore[no-any-return]


def candidates(call: GroupNormSiluCall) -> list[GroupNormConfig]:
    """The configurations that bench/tune.py tries for this call."""
    return candidate_configs(call.shape)


def tuning_key(call: GroupNormSiluCall) -> str:
    """What a tuned configuration is looked up by."""
    shape = call.shape
    sizes = f"batch={shape.batch} pixels={shape.pixels} groups={shape.num_groups}x{shape.group_channels}"
    layout = "channels_last" if shape.interleaved else "contiguous"
    return f"{sizes} {dtype_name(call.x)} {layout}{' given statistics' if shape.given else ''}"


def plan(
    call: GroupNormSiluCall, *, config: GroupNormConfig | None = None, chip: Chip | None = None
) -> tuple[Tensor, list[Launch]]:
    """The result, not yet computed, and the launches that compute it: one, or statistics and their application."""
    x, skip, x_bias = call.x, call.skip, call.x_bias
    out = _empty_result(call)
    if not out.numel():
        return out, []
    shape = call.shape
    chip = chip or chip_of(x.device)
    config = (
        config or tuned("group_norm_silu", tuning_key(call), chip, GroupNormConfig) or default_config(shape, chip)
    )
    pdl = launches_dependently(chip)
    of_x = image_strides(x)
    of_skip = of_x if skip is None else image_strides(skip)
    bundles = ceil_div(shape.num_groups, config.groups)
    block_c = next_power_of_two(config.groups * shape.group_channels)
    shared = {
        "x_ptr": x,
        "skip_ptr": skip,
        "x_bias_ptr": x_bias,
        "num_groups": shape.num_groups,
        "bundles": bundles,
        "x_channels": x.shape[1],
        "pixels": shape.pixels,
        "width": x.shape[3],
        **named_strides("x", of_x),
        **named_strides("k", of_skip),
        "stride_tb": 0 if x_bias is None else x_bias.stride(0),
        "stride_tc": 0 if x_bias is None else x_bias.stride(1),
        "GROUP_CHANNELS": shape.group_channels,
        "GROUPS": config.groups,
        "BLOCK_G": next_power_of_two(config.groups),
        "BLOCK_C": block_c,
        "BLOCK_HW": config.block_hw,
        "FLAT": of_x.flat and of_skip.flat,
        "PDL": pdl,
    }
    result = {
        "weight_ptr": call.weight,
        "bias_ptr": call.bias,
        "out_ptr": out,
        "eps": call.eps,
        **named_strides("o", image_strides(out), "bcw"),
        "SILU": call.activation == "silu",
    }
    launch = functools.partial(Launch, num_warps=config.num_warps, operator="group_norm_silu", pdl=pdl)
    if config.chunks == 0:
        arguments = shared | result | {"ONE_TILE": config.block_hw >= shape.pixels}
        return out, [launch(group_norm_kernel, shape.batch * bundles, arguments, role="group_norm")]
    chunk_pixels = ceil_div(ceil_div(shape.pixels, config.chunks), config.block_hw) * config.block_hw
    chunks = ceil_div(shape.pixels, chunk_pixels)
    programs = shape.batch * chunks * bundles
    chunked: dict[str, Any] = shared | {"chunks": chunks, "chunk_pixels": chunk_pixels}
    if call.statistics is not None and shape.given:
        tiles = call.statistics.shape[1]
        skip_tiles = 1 if call.skip_statistics is None else call.skip_statistics.shape[1]
        merged = {
            "statistics_ptr": call.statistics,
            "skip_statistics_ptr": call.skip_statistics,
            "tiles": tiles,
            "tile_pixels": tile_pixels(shape.pixels, tiles),
            "skip_tiles": skip_tiles,
            "skip_tile_pixels": tile_pixels(shape.pixels, skip_tiles),
            "BLOCK_T": min(next_power_of_two(tiles), max(32 * config.num_warps * _THREAD_MOMENTS // block_c, 1)),
        }
        return out, [launch(group_norm_given_kernel, programs, chunked | result | merged, role="group_norm_given")]
    statistics = x.new_empty((shape.batch, chunks, 3, shape.num_groups), dtype=torch.float32)
    chunked["statistics_ptr"] = statistics
    arguments = chunked | result | {"BLOCK_CHUNKS": next_power_of_two(chunks)}
    return out, [
        launch(group_norm_statistics_kernel, programs, chunked, role="group_norm_statistics"),
        launch(group_norm_apply_kernel, programs, arguments, role="group_norm_apply"),
    ]


def unsupported_reasons(call: GroupNormSiluCall) -> list[str]:
    """Every reason why the Triton kernels cannot serve this call; empty when they can."""
    reasons = [
        *device_reasons(group_norm_kernel, call.x),
        *dtype_reasons(x=call.x, weight=call.weight, bias=call.bias, x_bias=call.x_bias),
        *image_reasons(call.x),
        *contiguity_reasons(weight=call.weight, bias=call.bias),
        *contiguity_reasons(statistics=call.statistics, skip_statistics=call.skip_statistics),
        *statistics_reasons(statistics=call.statistics, skip_statistics=call.skip_statistics),
    ]
    group_channels = call.channels // call.num_groups
    if group_channels > MAX_GROUP_CHANNELS:
        reasons.append(f"a group has {group_channels} channels, more than {MAX_GROUP_CHANNELS}")
    return reasons


def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    x_bias: Tensor | None = None,
    skip: Tensor | None = None,
    activation: str | None = "silu",
    statistics: Tensor | None = None,
    skip_statistics: Tensor | None = None,
    backend: str = "auto",
    shift: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """act(group_norm(x + x_bias) * weight + bias), in x's dtype and memory format.

    x [B, C, H, W], any strides; skip [B, C2, H, W] of x's dtype or None: its channels follow those of x, and C
    below counts them too; x_bias [B, C] or None, any strides (an expanded batch too); weight, bias [C] or None;
    activation "silu" or None; shift is x_bias under its former name, deprecated. statistics and skip_statistics,
    float32 [B, tiles, 2, C] and [B, tiles, 2, C2]: what `residual_add` or `conv3x3` left of x and of skip
    (`channel_statistics`), without x_bias. With those of all that is normalized the kernel need not read it twice;
    wrong ones give a wrong result. Derivatives take x alone, of which they are made. Under autocast as torch.cat
    and F.group_norm: float32 on a GPU. `out` [B, C, H, W] in x's memory format, memory of its own, is written and
    returned: without gradients. Raises ValueError for what does not fit, `KernelUnsupported` for
    `backend="triton"` where the kernel cannot serve. Source: Wu and He, arXiv 1803.08494.
    """
    if shift is not None:
        x_bias = _renamed(x_bias, shift)
    tensors(group_norm_silu, (x,), (weight, bias, x_bias, skip, statistics, skip_statistics))
    choice("group_norm_silu", "activation", activation, ACTIVATIONS)
    num_groups, eps = whole("group_norm_silu", "num_groups", num_groups), real("group_norm_silu", "eps", eps)
    result: Tensor = _group_norm_silu(
        x, num_groups, weight, bias, eps, x_bias, skip, activation, statistics, skip_statistics, backend, out=out
    )
    return result


def _renamed(x_bias: Tensor | None, shift: Tensor) -> Tensor:
    if x_bias is not None:
        raise ValueError("group_norm_silu: shift is the former name of x_bias; give x_bias alone")
    if not torch.compiler.is_compiling():
        warnings.warn("group_norm_silu: shift is now x_bias; pass x_bias=", DeprecationWarning, stacklevel=3)
    return shift


def _check(call: GroupNormSiluCall) -> None:
    x, skip, num_groups = call.x, call.skip, call.num_groups
    if x.ndim != 4 or not x.is_floating_point():
        raise ValueError(f"group_norm_silu: x must be a float [B, C, H, W]; got {x.dtype} {list(x.shape)}")
    batch, _, height, width = x.shape
    if skip is not None:
        fits = skip.ndim == 4 and (skip.shape[0], *skip.shape[2:]) == (batch, height, width)
        if not fits or skip.dtype != x.dtype:
            raise ValueError(
                f"group_norm_silu: skip must be {x.dtype} [{batch}, C2, {height}, {width}]; "
                f"got {skip.dtype} {list(skip.shape)}"
            )
    channels = call.channels
    if num_groups < 1 or channels % num_groups:
        raise ValueError(
            f"group_norm_silu: {channels} channels do not divide into {num_groups} groups; num_groups must be a "
            f"divisor of {channels}"
        )
    choice("group_norm_silu", "activation", call.activation, ACTIVATIONS)
    for name, value, shape in (
        ("weight", call.weight, (channels,)),
        ("bias", call.bias, (channels,)),
        ("x_bias", call.x_bias, (batch, channels)),
    ):
        if value is not None and (value.shape != shape or not value.is_floating_point()):
            raise ValueError(
                f"group_norm_silu: {name} must be a float {list(shape)}; got {value.dtype} {list(value.shape)}"
            )
    for name, given, image in (
        ("statistics", call.statistics, x),
        ("skip_statistics", call.skip_statistics, skip),
    ):
        if given is None:
            continue
        misfit = "None without skip" if image is None else statistics_misfit(given, image)
        if misfit is not None:
            raise ValueError(f"group_norm_silu: {name} must be {misfit}; got {given.dtype} {list(given.shape)}")


def _reference(call: GroupNormSiluCall) -> Tensor:
    return group_norm_silu_ref(**call._asdict())


def _composite(call: GroupNormSiluCall) -> Tensor:
    """In forward mode torch's group norm takes contiguous images alone, and vmap no memory format."""
    skip = None if call.skip is None else call.skip.contiguous()
    out = _reference(call._replace(x=call.x.contiguous(), skip=skip))
    if memory_format(call.x) == torch.channels_last:
        out = out.movedim(1, -1).contiguous().movedim(-1, 1)
    return out


def _empty_result(call: GroupNormSiluCall) -> Tensor:
    x = call.x
    shape = (x.shape[0], call.channels, *x.shape[2:])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x))


def _autocast(run: Callable[..., Tensor], *arguments: Any) -> Tensor:
    call = GroupNormSiluCall(*arguments[:-1])
    x, skip = in_float32(*promoted(call.x, call.skip))
    return run(*call._replace(x=x, skip=skip), arguments[-1])


OPERATOR = Operator(
    "group_norm_silu",
    group_norm_silu,
    group_norm_silu_ref,
    GroupNormSiluCall,
    _check,
    plan,
    candidates,
    tuning_key,
    unsupported_reasons,
    predicted_ns=lambda call, chip: predicted_ns(call.shape, chip),
)
_group_norm_silu = define_operator(
    "group_norm_silu(Tensor x, int num_groups, Tensor? weight, Tensor? bias, float eps, Tensor? x_bias, "
    "Tensor? skip, str? activation, Tensor? statistics, Tensor? skip_statistics, str backend) -> Tensor",
    OPERATOR,
    reference=_reference,
    fake=_empty_result,
    autocast=_autocast,
    formula=Formula(_formulas.group_norm_silu),
    composite=_composite,
    # The reference does not read them.
    spared={"statistics": None, "skip_statistics": None},
)

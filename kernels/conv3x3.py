"""A 3x3 convolution together with what stands beside it in a residual block.

y = conv3x3(x) + bias + residual + [shortcut; skip] W^T, padding 1, each summand but the first optional, in
float32, rounded once. As launches of their own these read and write whole images: the bias and the residual sum;
the 1x1 convolution of a block whose width changes, here more passes of the same accumulator; the enlargement by
nearest neighbour (`upsample`), here a way to read x; and the statistics that the next group norm needs
(`statistics`), here taken from the registers of the result.

The kernel (_conv3x3_kernels.py) is an implicit GEMM over channels-last memory. Where the result has few tiles,
several programs share the passes of one: each writes a float32 partial sum, and a second launch adds these in a
fixed order and does the rest. No atomics: results are the same to the bit from run to run.

An enlarged image repeats its pixels, so that the nine taps of a pixel read four different ones at most.
`pack_phases` adds the weights of equal pixels beforehand: 4/9 of the products, and one more rounding of weights.

A convolution alone is left to cuDNN, unless the tuned table tells of a measurement or `predicted_to_gain`
(_conv3x3_config.py) expects a clear gain.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from ._autocast import lowered
from ._checks import flag, tensors, whole
from ._choice import Choice, Chosen, chooser
from ._conv3x3_config import (
    Conv3x3Config,
    Conv3x3Shape,
    candidate_configs,
    default_config,
    predicted_ns,
    predicted_to_gain,
)
from ._conv3x3_kernels import conv3x3_kernel, conv3x3_reduce_kernel
from ._conv3x3_torch import Conv3x3Call, empty_image, image_statistics, separate
from ._dependent import launches_dependently
from ._dispatch import choose_backend
from ._launch import (
    Chip,
    Launch,
    Operator,
    ceil_div,
    chip_of,
    dtype_name,
    tuned,
)
from ._layout import MAX_INDEX
from ._library import OUTS, define_operator
from ._recipes import checked
from ._statistics import empty_statistics
from ._triton import contiguity_reasons, device_reasons, dtype_reasons, is_interpreted

# Tiles of rows that run beside each other on the same columns.
GROUP_M = 8


def conv3x3_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int = 1,
    upsample: bool = False,
    shortcut: Tensor | None = None,
    skip: Tensor | None = None,
    shortcut_weight: Tensor | None = None,
    residual: Tensor | None = None,
    statistics: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Reference of `conv3x3`: torch's convolution, whose sums are float32 for half dtypes, and then the others."""
    call = Conv3x3Call(x, weight, bias, stride, upsample, shortcut, skip, shortcut_weight, residual, statistics)
    return _reference(call)


def conv3x3_separate(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int = 1,
    upsample: bool = False,
    shortcut: Tensor | None = None,
    skip: Tensor | None = None,
    shortcut_weight: Tensor | None = None,
    residual: Tensor | None = None,
    statistics: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """The same by torch's own convolution and matmuls, with the residual sum in a launch of its own, on `backend`.

    Arguments and errors as of `conv3x3`, whose backend "auto" takes this where the kernel is not expected to be
    faster.
    """
    choose_backend("conv3x3", backend, ())
    call = _bound(x, weight, bias, stride, upsample, shortcut, skip, shortcut_weight, residual, statistics)
    call = checked(OPERATOR, _lowered(call))
    y = separate(call, backend)
    return (y, image_statistics(y, call.tile)) if statistics else y


def _bound(*arguments: Any) -> Conv3x3Call:
    """The call of a user's arguments, or ValueError for what is no tensor, number or flag."""
    call = Conv3x3Call(*arguments)
    beside = (call.bias, call.shortcut, call.skip, call.shortcut_weight, call.residual)
    tensors(conv3x3, (call.x, call.weight), beside)
    flag("conv3x3", "upsample", call.upsample)
    flag("conv3x3", "statistics", call.statistics)
    return call._replace(stride=whole("conv3x3", "stride", call.stride))


def _reference(call: Conv3x3Call) -> Tensor | tuple[Tensor, Tensor]:
    y = separate(call, "torch").contiguous(memory_format=torch.channels_last)
    return (y, image_statistics(y, call.tile)) if call.statistics else y


def _composite(call: Conv3x3Call) -> Tensor | tuple[Tensor, Tensor]:
    """The same; vmap takes no memory format."""
    y = separate(call, "torch").movedim(1, -1).contiguous().movedim(-1, 1)
    return (y, image_statistics(y, call.tile)) if call.statistics else y


def candidates(call: Conv3x3Call) -> list[Conv3x3Config]:
    """The configurations that bench/tune.py tries for this call."""
    return candidate_configs(call.shape, chip_of(call.x.device))


def tuning_key(call: Conv3x3Call) -> str:
    """What a tuned configuration is looked up by."""
    return _key(call.shape, call.x.dtype)


def _key(shape: Conv3x3Shape, dtype: torch.dtype) -> str:
    words = [
        f"batch={shape.batch} channels={shape.channels} columns={shape.columns}",
        f"pixels={shape.height}x{shape.width} {str(dtype).removeprefix('torch.')}",
    ]
    if shape.stride > 1:
        words.append(f"stride={shape.stride}")
    if shape.upsample:
        words.append("packed" if shape.packed else "upsample")
    if shape.pointwise:
        words.append(f"shortcut={'+'.join(map(str, shape.pointwise))}")
    return " ".join([*words, *["residual"] * shape.residual, *["statistics"] * shape.statistics])


def plan(
    call: Conv3x3Call, *, config: Conv3x3Config | None = None, chip: Chip | None = None
) -> tuple[Tensor | tuple[Tensor, Tensor], list[Launch]]:
    """The result, not yet computed, and the launches that compute it: one, or partial sums and their sum."""
    x, weight, shape = call.x, call.weight, call.shape
    result = _empty_result(call)
    out, statistics = result if isinstance(result, tuple) else (result, None)
    if not out.numel():
        return result, []
    chip = chip or chip_of(x.device)
    config = config or tuned("conv3x3", tuning_key(call), chip, Conv3x3Config) or default_config(shape, chip)
    pdl = launches_dependently(chip)
    tile, pixels = call.tile, shape.height * shape.width
    splits = config.splits
    if statistics is not None and call.upsample and pixels % tile:
        # A phase's tiles would end inside an image; the sum of partial sums takes pixels in their order.
        splits = max(splits, 2)
    is_split = splits > 1
    image_rows = ceil_div(pixels, tile) * tile if statistics is not None and not is_split else pixels
    rows = shape.batch * image_rows
    finish = {"bias_ptr": call.bias, "residual_ptr": call.residual, "statistics_ptr": statistics}
    target = x.new_empty((splits, out.numel()), dtype=torch.float32) if is_split else out
    channels = [*call.pointwise, 0, 0]
    stride_b, _, stride_h, stride_w = x.stride()
    arguments: dict[str, Any] = {
        "x_ptr": x,
        "weight_ptr": weight,
        **(dict.fromkeys(finish) if is_split else finish),
        "shortcut_ptr": call.shortcut,
        "skip_ptr": call.skip,
        "shortcut_weight_ptr": call.shortcut_weight,
        "out_ptr": target,
        "batch": shape.batch,
        "height": x.shape[2],
        "width": x.shape[3],
        "tile_height": shape.height,
        "tile_width": shape.width,
        "image_rows": image_rows,
        "passes": shape.taps**2 * ceil_div(shape.channels, config.block_k),
        "shortcut_passes": ceil_div(channels[0], config.block_k),
        "skip_passes": ceil_div(channels[1], config.block_k),
        "stride_xb": stride_b,
        "stride_xh": stride_h,
        "stride_xw": stride_w,
        "split_stride": out.numel(),
        "CHANNELS": shape.channels,
        "SHORTCUT_CHANNELS": channels[0],
        "SKIP_CHANNELS": channels[1],
        "COLUMNS": shape.columns,
        "TAPS": shape.taps,
        "STRIDE": shape.stride,
        "PHASES": call.upsample,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "GROUP_M": GROUP_M,
        "SPLITS": splits,
        "TILE": tile,
        "EVEN_M": rows % config.block_m == 0 and image_rows == pixels,
        "PRECISION": "ieee",
        # Largest power of two up to 8 that divides all strides. The compiler cannot infer it for a stride of 40.
        "ALIGN": math.gcd(8, stride_b, stride_h, stride_w),
        "PDL": pdl,
    }
    programs = shape.phases * splits * ceil_div(rows, config.block_m) * ceil_div(shape.columns, config.block_n)
    fused = ("upsample", "conv3x3") if call.upsample else ("conv3x3",)
    launch = Launch(
        conv3x3_kernel,
        programs,
        arguments,
        config.num_warps,
        config.num_stages,
        operator="conv3x3",
        role=" + ".join((*fused, *["shortcut"] * (call.shortcut is not None))),
        flops=_flops(
            x.shape,
            weight.shape,
            None,
            call.stride,
            call.upsample,
            None if call.shortcut is None else call.shortcut.shape,
            None if call.skip is None else call.skip.shape,
        ),
        pdl=pdl,
    )
    if not is_split:
        return result, [launch]
    reduced = {
        "partial_ptr": target,
        **finish,
        "out_ptr": out,
        "batch": shape.batch,
        "pixels": math.prod(call.size),
        "split_stride": out.numel(),
        "COLUMNS": shape.columns,
        "SPLITS": splits,
        "BLOCK_N": REDUCE_COLUMNS,
        "TILE": tile,
        "EVEN_M": math.prod(call.size) % tile == 0,
        "PDL": pdl,
    }
    programs = shape.batch * ceil_div(math.prod(call.size), tile) * ceil_div(shape.columns, REDUCE_COLUMNS)
    return result, [
        launch,
        # 8 elements a thread: 16 bytes of each image.
        Launch(
            conv3x3_reduce_kernel,
            programs,
            reduced,
            num_warps=tile * REDUCE_COLUMNS // 256,
            operator="conv3x3",
            role="sum of splits",
            pdl=pdl,
        ),
    ]


# Columns of a program that sums partial sums.
REDUCE_COLUMNS = 32


def unsupported_reasons(call: Conv3x3Call) -> list[str]:
    """Every reason why the Triton kernels cannot serve this call; empty when they can."""
    x, weight = call.x, call.weight
    images = {"shortcut": call.shortcut, "skip": call.skip, "residual": call.residual}
    # Statistics have whole tiles of each image.
    tile = call.tile if call.statistics else 1
    rows = x.shape[0] * ceil_div(math.prod(call.size), tile) * tile
    reasons = [
        *device_reasons(conv3x3_kernel, x),
        *dtype_reasons(x=x, bias=call.bias),
        *contiguity_reasons(bias=call.bias, shortcut_weight=call.shortcut_weight),
    ]
    if x.shape[1] > 1 and x.stride(1) != 1:
        reasons.append(f"x's channels have stride {x.stride(1)}, not 1: channels-last memory has")
    # In the kernel's order: [N, 3, 3, C], packed [4, N, 2, 2, C].
    if not weight.movedim(-3, -1).is_contiguous():
        reasons.append("weight is not in channels-last memory")
    reasons += [
        f"{name} is not in channels-last memory"
        for name, image in images.items()
        if image is not None and not image.is_contiguous(memory_format=torch.channels_last)
    ]
    if x.shape[1] == 0:
        reasons.append("there are no channels")
    if rows > MAX_INDEX:
        reasons.append(f"{rows} rows are more than {MAX_INDEX}")
    if x.dtype == torch.bfloat16 and is_interpreted(conv3x3_kernel):
        reasons.append("triton's interpreter multiplies bfloat16 as if it were integers")
    return reasons


def conv3x3(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int = 1,
    upsample: bool = False,
    shortcut: Tensor | None = None,
    skip: Tensor | None = None,
    shortcut_weight: Tensor | None = None,
    residual: Tensor | None = None,
    statistics: bool = False,
    backend: str = "auto",
    out: Tensor | tuple[Tensor, Tensor] | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The 3x3 convolution of x [B, C, H, W] with padding 1, plus bias [N], residual and shortcut, in x's dtype.

    weight      [N, C, 3, 3]
    stride      1, or 2: the result is [B, N, H', W'] with H' = ceil(H / stride)
    upsample    x is first enlarged to twice its size by nearest neighbour: H' = 2 H. The weight may be what
                `pack_phases` made of it, which is faster and less exact
    shortcut    [B, C2, H', W'], and skip [B, C3, H', W'] or None: side by side along the channels, they are
                multiplied by shortcut_weight [N, C2 + C3] and added, without a bias of their own
    residual    [B, N, H', W']
    statistics  True: returns the image and its statistics (float32 [B, tiles, 2, N], see _statistics.py) for
                group_norm_silu. Tiles have 64 pixels, of images of up to 256 pixels 16
    backend     "triton": the kernels, which round once
                "torch": torch's convolution and matmuls and the reference of residual_add, each of which rounds
                "auto": the kernels where that was measured, or is predicted, to be faster on this GPU, else
                torch's convolution and matmuls and the kernel of residual_add; statistics are then launches of
                their own (`conv3x3_backend` tells beforehand)
    out         is written and returned, a pair with statistics: in channels-last memory, of the result's shape,
                memory of its own, no gradients

    The result is in channels-last memory. Images and weights share a dtype; bias is of any float dtype. The
    kernels take x of any strides whose channels lie side by side, and other images and the weight in channels-last
    memory. Under autocast as F.conv2d: all but the statistics in autocast's dtype. Raises ValueError for what does
    not fit, `KernelUnsupported` for `backend="triton"` where the kernels cannot serve.
    """
    call = _bound(x, weight, bias, stride, upsample, shortcut, skip, shortcut_weight, residual, statistics)
    if backend == "auto":
        # Outside the operator, so that what is chosen is seen by whoever traces: one operator, or several.
        call = _lowered(call)
        backend = _CHOICE.auto(call)
        if backend == "torch":
            return _torchs_own(call, out)
    result: Tensor | tuple[Tensor, Tensor] = _IMPLEMENTED[statistics](*call, backend, out=out)
    return result


def conv3x3_backend(call: Conv3x3Call, backend: str = "auto") -> Chosen:
    """Who serves a call, for who has a way of their own around torch's convolution.

    "auto" as of `conv3x3`; "triton" is "torch" here where the kernels cannot serve.
    """
    return _CHOICE.of(_lowered(call), backend)


def _torchs_own(call: Conv3x3Call, out: Any) -> Tensor | tuple[Tensor, Tensor]:
    """What "auto" takes where torch is faster."""
    if out is not None:
        OUTS[_NAMES[call.statistics]].checked((*call, "auto"), out)
    if not call.statistics:
        return separate(call, "auto", out)
    if out is None:
        y = separate(call, "auto").contiguous(memory_format=torch.channels_last)
        return y, image_statistics(y, call.tile)
    image, statistics = out
    separate(call, "auto", image)
    statistics.copy_(image_statistics(image, call.tile))
    return image, statistics


def _lowered(call: Conv3x3Call) -> Conv3x3Call:
    """The call as autocast makes it."""
    if not torch._C._is_any_autocast_enabled():
        return call
    names = [name for name, value in call._asdict().items() if isinstance(value, Tensor)]
    values = lowered(*(getattr(call, name) for name in names))
    return call._replace(**dict(zip(names, values, strict=True)))


def _check(call: Conv3x3Call) -> None:
    x, weight, residual, shortcut, skip = call.x, call.weight, call.residual, call.shortcut, call.skip
    if x.ndim != 4 or not x.is_floating_point():
        raise ValueError(f"conv3x3: x must be a float [B, C, H, W]; got {dtype_name(x)} {list(x.shape)}")
    channels = x.shape[1]
    plain = weight.ndim == 4 and weight.shape[1:] == (channels, 3, 3)
    packed = weight.ndim == 5 and (weight.shape[0], *weight.shape[2:]) == (4, channels, 2, 2) and call.upsample
    if not (plain or packed) or weight.dtype != x.dtype:
        wanted = f"[N, {channels}, 3, 3]" + (f" or packed [4, N, {channels}, 2, 2]" if call.upsample else "")
        raise ValueError(
            f"conv3x3: weight must be {dtype_name(x)} {wanted}; got {dtype_name(weight)} {list(weight.shape)}"
        )
    if call.stride not in (1, 2) or (call.upsample and call.stride != 1):
        raise ValueError(f"conv3x3: stride must be 1 or 2, with upsample 1; got {call.stride}")
    if (shortcut is None) != (call.shortcut_weight is None) or (skip is not None and shortcut is None):
        raise ValueError("conv3x3: shortcut and shortcut_weight come together, and skip only with them")
    batch, columns, height, width = call.result_shape
    for name, image, width_of in (
        ("shortcut", shortcut, "C2"),
        ("skip", skip, "C3"),
        ("residual", residual, str(columns)),
    ):
        if image is None:
            continue
        fits = image.ndim == 4 and (image.shape[0], *image.shape[2:]) == (batch, height, width)
        if not fits or image.dtype != x.dtype or (name == "residual" and image.shape[1] != columns):
            raise ValueError(
                f"conv3x3: {name} must be {dtype_name(x)} [{batch}, {width_of}, {height}, {width}]; "
                f"got {dtype_name(image)} {list(image.shape)}"
            )
    own = call.shortcut_weight
    if own is not None and (own.shape != (columns, sum(call.pointwise)) or own.dtype != x.dtype):
        raise ValueError(
            f"conv3x3: shortcut_weight must be {dtype_name(x)} [{columns}, {sum(call.pointwise)}]; "
            f"got {dtype_name(own)} {list(own.shape)}"
        )
    bias = call.bias
    if bias is not None and (bias.shape != (columns,) or not bias.is_floating_point()):
        raise ValueError(f"conv3x3: bias must be a float [{columns}]; got {dtype_name(bias)} {list(bias.shape)}")


def _empty_result(call: Conv3x3Call) -> Tensor | tuple[Tensor, Tensor]:
    image = empty_image(call)
    return (image, empty_statistics(image, call.tile)) if call.statistics else image


def _flops(
    x: torch.Size,
    weight: torch.Size,
    _bias: torch.Size | None,
    stride: int,
    upsample: bool,
    shortcut: torch.Size | None = None,
    skip: torch.Size | None = None,
    *_: object,
    **__: object,
) -> int:
    """A multiply-add is two; the sums are left out, as torch leaves out its own."""
    batch, channels, height, width = x
    *_phases, columns, _channels, taps, _taps = weight
    pixels = 4 * height * width if upsample else ceil_div(height, stride) * ceil_div(width, stride)
    pointwise = sum(part[1] for part in (shortcut, skip) if part is not None)
    return 2 * batch * pixels * columns * (taps**2 * channels + pointwise)


def _autocast(run: Any, *arguments: Any) -> Any:
    return run(*_lowered(Conv3x3Call(*arguments[:-1])), arguments[-1])


OPERATOR = Operator(
    "conv3x3",
    conv3x3,
    conv3x3_ref,
    Conv3x3Call,
    _check,
    plan,
    candidates,
    tuning_key,
    unsupported_reasons,
    torchs_own=conv3x3_separate,
    predicted_ns=lambda call, chip: predicted_ns(call.shape, chip),
)
_CHOICE = Choice(
    OPERATOR,
    conv3x3_kernel,
    chooser("conv3x3", Conv3x3Shape, predicted_to_gain, _key),
    lambda call: dataclasses.astuple(call.shape),
    lambda call: call.x.shape,
)
# Without statistics and with: a library's operator has one type of result.
_NAMES = {False: "conv3x3", True: "statistics_conv3x3"}
_ARGUMENTS = (
    "Tensor x, Tensor weight, Tensor? bias, int stride, bool upsample, Tensor? shortcut, Tensor? skip, "
    "Tensor? shortcut_weight, Tensor? residual, bool statistics, str backend"
)
_IMPLEMENTED = {
    statistics: define_operator(
        f"{name}({_ARGUMENTS}) -> {'(Tensor, Tensor)' if statistics else 'Tensor'}",
        OPERATOR,
        reference=_reference,
        fake=_empty_result,
        autocast=_autocast,
        composite=_composite,
        flops=_flops,
        # Summands: but for statistics, their values do not matter to the derivatives.
        spared=None if statistics else {"bias": None, "residual": None},
    )
    for statistics, name in _NAMES.items()
}

"""What precedes self-attention in a transformer: the group norm of its image, two matmuls and a layer norm.

    x = group_norm(image + x_bias) Wproj^T + bproj
    qkv = layer_norm(x) Wqkv^T

The statistics of the group norm lie beside the image (_statistics.py). Rows of up to 128 channels fit the
registers of a program: one launch in place of three or four (_transformer_front_kernels.py). x is written and not
read again; its norm is of the unrounded x.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._autocast import without_memory
from ._checks import one_device, real, tensors, whole
from ._choice import Choice, Chosen, chooser
from ._dependent import launches_dependently
from ._dispatch import choose_backend
from ._launch import (
    Chip,
    Launch,
    Operator,
    ceil_div,
    chip_of,
    dtype_name,
    next_power_of_two,
    tuned,
)
from ._layout import MAX_INDEX
from ._library import OUTS, define_operator
from ._parts import parts
from ._prefetch import lines_of_a_program
from ._recipes import checked
from ._statistics import statistics_misfit, statistics_reasons, tile_pixels
from ._transformer_config import (
    FrontShape,
    TransformerFrontConfig,
    default_front,
    front_candidates,
    front_predicted_ns,
    front_predicted_to_gain,
    keeps_row,
)
from ._transformer_front_kernels import transformer_front_kernel
from ._triton import contiguity_reasons, device_reasons, dtype_reasons, is_interpreted
from .group_norm import group_norm_silu
from .linear import linear

# Means, and as many squares, that a thread loads at once.
_THREAD_MOMENTS = 8


class TransformerFrontCall(NamedTuple):
    """The arguments of `transformer_front`."""

    image: Tensor
    num_groups: int
    group_weight: Tensor
    group_bias: Tensor
    proj_weight: Tensor
    norm_weight: Tensor
    norm_bias: Tensor
    qkv_weight: Tensor
    group_eps: float = 1e-6
    norm_eps: float = 1e-5
    statistics: Tensor | None = None
    proj_bias: Tensor | None = None
    x_bias: Tensor | None = None

    @property
    def shape(self) -> FrontShape:
        """What a configuration depends on."""
        batch, channels, height, width = self.image.shape
        tiles = 0 if self.statistics is None else self.statistics.shape[1]
        itemsize = self.image.element_size()
        return FrontShape(batch, height * width, channels, self.qkv_weight.shape[0], tiles, itemsize)


def transformer_front_ref(
    image: Tensor,
    num_groups: int,
    group_weight: Tensor,
    group_bias: Tensor,
    proj_weight: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    qkv_weight: Tensor,
    group_eps: float = 1e-6,
    norm_eps: float = 1e-5,
    *,
    statistics: Tensor | None = None,
    proj_bias: Tensor | None = None,
    x_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Reference of `transformer_front`: torch's matmuls between the references of its parts, each of which rounds
    its result. It computes the statistics itself."""
    call = TransformerFrontCall(
        *(image, num_groups, group_weight, group_bias, proj_weight, norm_weight, norm_bias, qkv_weight),
        *(group_eps, norm_eps, statistics, proj_bias, x_bias),
    )
    return _separate(call, "torch")


def transformer_front_separate(*arguments: Any, backend: str = "auto", **options: Any) -> tuple[Tensor, Tensor]:
    """The same by `group_norm_silu`, torch's matmul and `linear`, one after the other, on `backend`.

    Arguments and errors as of `transformer_front`, whose backend "auto" takes this where the kernel is not
    expected to be faster.
    """
    choose_backend("transformer_front", backend, ())
    call = _numbers(TransformerFrontCall(*arguments, **options))
    return _separate(checked(OPERATOR, call), backend)


def _separate(
    call: TransformerFrontCall, backend: str, out: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """One operator after the other; the results in `out`, where it is given."""
    image = call.image
    h = group_norm_silu(
        image,
        call.num_groups,
        call.group_weight,
        call.group_bias,
        call.group_eps,
        x_bias=None if call.x_bias is None else call.x_bias.expand(image.shape[0], -1),
        activation=None,
        # The reference computes its own.
        statistics=None if backend == "torch" else call.statistics,
        backend=backend,
    )
    x = F.linear(h.permute(0, 2, 3, 1).flatten(1, 2), call.proj_weight, call.proj_bias)
    if out is not None:
        x = out[0].copy_(x)
    qkv = linear(
        x,
        call.qkv_weight,
        norm_weight=call.norm_weight,
        norm_bias=call.norm_bias,
        eps=call.norm_eps,
        backend=backend,
        out=None if out is None else out[1],
    )
    return x, qkv


def candidates(call: TransformerFrontCall) -> list[TransformerFrontConfig]:
    """The configurations that bench/tune.py tries for this call."""
    return front_candidates(call.shape, chip_of(call.image.device))


def tuning_key(call: TransformerFrontCall) -> str:
    """What a tuned configuration is looked up by."""
    return _key(call.shape, call.image.dtype)


def _key(shape: FrontShape, dtype: torch.dtype) -> str:
    sizes = f"batch={shape.batch} tokens={shape.tokens} channels={shape.channels} columns={shape.columns}"
    return f"{sizes} tiles={shape.tiles} {str(dtype).removeprefix('torch.')}"


def plan(
    call: TransformerFrontCall, *, config: TransformerFrontConfig | None = None, chip: Chip | None = None
) -> tuple[tuple[Tensor, Tensor], list[Launch]]:
    """The results, not yet computed, and the launch that computes them."""
    shape, statistics = call.shape, call.statistics
    x, qkv = _empty_result(call)
    if not x.numel() and not qkv.numel():
        return (x, qkv), []
    assert statistics is not None
    chip = chip or chip_of(call.image.device)
    pdl = launches_dependently(chip)
    config = config or tuned("transformer_front", tuning_key(call), chip, TransformerFrontConfig)
    config = config or default_front(shape, chip)
    part_1, part_2 = parts(shape.channels)
    group_channels = shape.channels // call.num_groups
    block_g, block_gc = next_power_of_two(call.num_groups), next_power_of_two(group_channels)
    moments = 32 * config.num_warps * _THREAD_MOMENTS
    blocks = ceil_div(shape.tokens, config.block_m)
    arguments: dict[str, Any] = {
        "image_ptr": call.image,
        "moments_ptr": statistics,
        "x_bias_ptr": call.x_bias,
        "group_weight_ptr": call.group_weight,
        "group_bias_ptr": call.group_bias,
        "proj_weight_ptr": call.proj_weight,
        "proj_bias_ptr": call.proj_bias,
        "norm_weight_ptr": call.norm_weight,
        "norm_bias_ptr": call.norm_bias,
        "qkv_weight_ptr": call.qkv_weight,
        "x_ptr": x,
        "qkv_ptr": qkv,
        "tokens": shape.tokens,
        "blocks": blocks,
        "tiles": shape.tiles,
        "tile_pixels": tile_pixels(shape.tokens, shape.tiles),
        "columns": shape.columns,
        "group_eps": call.group_eps,
        "norm_eps": call.norm_eps,
        "CHANNELS": shape.channels,
        "PART_1": part_1,
        "PART_2": part_2,
        "GROUP_CHANNELS": group_channels,
        "BLOCK_G": block_g,
        "BLOCK_GC": block_gc,
        "BLOCK_T": min(next_power_of_two(shape.tiles), max(moments // (block_g * block_gc), 1)),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "EVEN_M": shape.tokens % config.block_m == 0,
        "EVEN_N": shape.columns % config.block_n == 0,
        "LINES": lines_of_a_program(
            shape.columns * shape.channels, shape.itemsize, shape.batch * blocks, transformer_front_kernel, chip
        ),
        "PRECISION": "ieee",
        "PDL": pdl,
    }
    launch = Launch(
        transformer_front_kernel,
        shape.batch * blocks,
        arguments,
        config.num_warps,
        config.num_stages,
        operator="transformer_front",
        flops=_count(call.image.shape, call.proj_weight.shape, call.qkv_weight.shape),
        pdl=pdl,
    )
    return (x, qkv), [launch]


def unsupported_reasons(call: TransformerFrontCall) -> list[str]:
    """Every reason why the Triton kernel cannot serve this call; empty when it can."""
    image, fields = call.image, call._asdict()
    given = {name: value for name, value in fields.items() if isinstance(value, Tensor)}
    reasons = [
        *device_reasons(transformer_front_kernel, image),
        *dtype_reasons(**given),
        *contiguity_reasons(**{name: value for name, value in given.items() if name != "image"}),
    ]
    if call.statistics is None:
        reasons.append("there are no statistics of the image")
    batch, channels, height, width = image.shape
    if not image.permute(0, 2, 3, 1).is_contiguous():
        reasons.append("image is not channels-last")
    if not keeps_row(channels, image.element_size()):
        reasons.append(f"{channels} channels of {dtype_name(image)} do not fit the registers of a program")
    reasons += statistics_reasons(statistics=call.statistics)
    if batch * height * width > MAX_INDEX:
        reasons.append(f"{batch * height * width} rows are more than {MAX_INDEX}")
    if image.dtype == torch.bfloat16 and is_interpreted(transformer_front_kernel):
        reasons.append("triton's interpreter multiplies bfloat16 as if it were integers")
    return reasons


def transformer_front(
    image: Tensor,
    num_groups: int,
    group_weight: Tensor,
    group_bias: Tensor,
    proj_weight: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    qkv_weight: Tensor,
    group_eps: float = 1e-6,
    norm_eps: float = 1e-5,
    *,
    statistics: Tensor | None = None,
    proj_bias: Tensor | None = None,
    x_bias: Tensor | None = None,
    backend: str = "auto",
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """(x, qkv): the tokens [B, H * W, C] of an image [B, C, H, W], and their norm times qkv_weight, [B, H * W, K].

    num_groups, group_weight, group_bias  [C]: the group norm of image + x_bias, with `group_eps`
    proj_weight    [C, C], proj_bias [C] or None: the matmul of its result, which is x
    norm_weight, norm_bias  [C]: the layer norm of x, with `norm_eps`
    qkv_weight     [K, C]
    statistics     float32 [B, tiles, 2, C]: what `residual_add` or `transformer_tail` left of the image, without
                   x_bias; wrong ones give a wrong result
    x_bias         [C], added to the image before its norm; None adds nothing
    backend        "triton": one kernel, with statistics, for C up to 128 (float32 96)
                   "torch": the references of the parts
                   "auto": the kernel where that was measured, or is predicted, to be faster on this GPU, else the
                   kernels of the parts (`transformer_front_separate`)
    out            a pair that is written and returned: contiguous, memory of its own, no gradients

    Image and matrices share a dtype; vectors are of any float dtype. Derivatives take the image alone, of which
    the statistics are made. Under autocast as the parts one after the other. Raises ValueError for what does not
    fit, `KernelUnsupported` for `backend="triton"` where the kernel cannot serve.
    Sources: Wu and He, arXiv 1803.08494 (group norm); Ba et al., arXiv 1607.06450 (layer norm).
    """
    call = _numbers(
        TransformerFrontCall(
            *(image, num_groups, group_weight, group_bias, proj_weight, norm_weight, norm_bias, qkv_weight),
            *(group_eps, norm_eps, statistics, proj_bias, x_bias),
        )
    )
    if backend == "auto" and not torch._C._is_any_autocast_enabled():
        # Outside the operator, so that what is chosen is seen by whoever traces: one operator, or several.
        backend = _CHOICE.auto(call)
        if backend == "torch":
            if out is not None:
                OUTS["transformer_front"].checked((*call, "auto"), out)
            return _separate(call, "auto", out)
    result: tuple[Tensor, Tensor] = _transformer_front(*call, backend, out=out)
    return result


def transformer_front_backend(call: TransformerFrontCall, backend: str = "auto") -> Chosen:
    """Who serves a call, for who has a way of their own around the kernel.

    "auto" as of `transformer_front`; "triton" is "torch" here where the kernel cannot serve, as under autocast.
    """
    return _CHOICE.of(call, backend, able=not torch._C._is_any_autocast_enabled())


def _numbers(call: TransformerFrontCall) -> TransformerFrontCall:
    """The call with Python's numbers. ValueError for what is no tensor or no number."""
    name = "transformer_front"
    image, num_groups, *matrices = call[:8]
    tensors(transformer_front, (image, *matrices), (call.statistics, call.proj_bias, call.x_bias))
    return call._replace(
        num_groups=whole(name, "num_groups", num_groups),
        group_eps=real(name, "group_eps", call.group_eps),
        norm_eps=real(name, "norm_eps", call.norm_eps),
    )


def _check(call: TransformerFrontCall) -> None:
    image, num_groups, statistics = call.image, call.num_groups, call.statistics
    if image.ndim != 4 or not image.is_floating_point():
        raise ValueError(
            f"transformer_front: image must be a float [B, C, H, W]; got {image.dtype} {list(image.shape)}"
        )
    channels = image.shape[1]
    if num_groups < 1 or channels % num_groups:
        raise ValueError(
            f"transformer_front: {channels} channels do not divide into {num_groups} groups; num_groups must be a "
            f"divisor of {channels}"
        )
    if statistics is not None and (misfit := statistics_misfit(statistics, image)):
        raise ValueError(
            f"transformer_front: statistics must be {misfit}; "
            f"got {dtype_name(statistics)} {list(statistics.shape)}"
        )
    vector = (channels,)
    for name, value, shape in (
        ("proj_weight", call.proj_weight, (channels, channels)),
        ("qkv_weight", call.qkv_weight, (call.qkv_weight.shape[0] if call.qkv_weight.ndim else 0, channels)),
        ("group_weight", call.group_weight, vector),
        ("group_bias", call.group_bias, vector),
        ("norm_weight", call.norm_weight, vector),
        ("norm_bias", call.norm_bias, vector),
        ("proj_bias", call.proj_bias, vector),
        ("x_bias", call.x_bias, vector),
    ):
        if value is None:
            continue
        fits = value.is_floating_point() if shape == vector else value.dtype == image.dtype
        if value.shape != shape or not fits:
            wanted = "a float" if shape == vector else dtype_name(image)
            raise ValueError(
                f"transformer_front: {name} must be {wanted} {list(shape)}; "
                f"got {dtype_name(value)} {list(value.shape)}"
            )


def _empty_result(call: TransformerFrontCall) -> tuple[Tensor, Tensor]:
    shape = call.shape
    rows = shape.batch, shape.tokens
    return call.image.new_empty((*rows, shape.channels)), call.image.new_empty((*rows, shape.columns))


def _reference(call: TransformerFrontCall) -> tuple[Tensor, Tensor]:
    x, qkv = _separate(call, "torch")
    return x.contiguous(), qkv.contiguous()


def _count(image: Any, proj_weight: Any, qkv_weight: Any) -> int:
    batch, _, height, width = image
    total: int = 2 * batch * height * width * (math.prod(proj_weight) + math.prod(qkv_weight))
    return total


def _flops(*shapes: Any, **_: object) -> int:
    """A multiply-add is two; norms are left out, as torch leaves out its own."""
    return _count(shapes[0], shapes[4], shapes[7])


def _autocast(_: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
    """The parts one after the other, each of which autocast treats by its own rule."""
    call = TransformerFrontCall(*arguments[:-1])
    one_device("transformer_front", call)
    _check(without_memory(call, "image", "proj_weight", "qkv_weight"))
    return _separate(call, arguments[-1])


OPERATOR = Operator(
    "transformer_front",
    transformer_front,
    transformer_front_ref,
    TransformerFrontCall,
    _check,
    plan,
    candidates,
    tuning_key,
    unsupported_reasons,
    torchs_own=transformer_front_separate,
    predicted_ns=lambda call, chip: front_predicted_ns(call.shape, chip),
)
_CHOICE = Choice(
    OPERATOR,
    transformer_front_kernel,
    chooser("transformer_front", FrontShape, front_predicted_to_gain, _key),
    lambda call: call.shape,
    lambda call: (call.shape.batch, call.shape.tokens),
)
_transformer_front = define_operator(
    "transformer_front(Tensor image, int num_groups, Tensor group_weight, Tensor group_bias, Tensor proj_weight, "
    "Tensor norm_weight, Tensor norm_bias, Tensor qkv_weight, float group_eps, float norm_eps, "
    "Tensor? statistics, Tensor? proj_bias, Tensor? x_bias, str backend) -> (Tensor, Tensor)",
    OPERATOR,
    reference=_reference,
    fake=_empty_result,
    autocast=_autocast,
    flops=_flops,
    # The reference does not read them.
    spared={"statistics": None},
)

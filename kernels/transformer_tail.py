"""What follows self-attention in a transformer of one block, up to the image that the transformer returns.

    t = x + attended Wo^T + bo
    t = t + cross_attention(layer_norm_2(t) Wq^T, keys, values) Wc^T + bc
    t = t + geglu(layer_norm_3(t) Win^T + bin) Wout^T + bout
    y = image + t Wproj^T + bproj

Rows of up to 128 channels fit the registers of a program, and so do the keys of a prompt: one launch in place of
seven, and nothing between them is written or read (_transformer_tail_kernels.py). t is float32 from beginning to
end; what enters a matmul is rounded, as the separate operators round it. Each program reads all weights, from the
L2 cache: wider rows, whose weights are larger, are left to the separate operators.

With statistics the kernel leaves beside the image what the next group norm needs of it (_statistics.py).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._autocast import without_memory
from ._checks import flag, one_device, real, tensors
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
from ._statistics import channel_statistics, empty_statistics
from ._transformer_config import (
    MAX_HEAD_DIM,
    MAX_KEYS,
    TailShape,
    TransformerTailConfig,
    default_tail,
    keeps_row,
    tail_candidates,
    tail_predicted_ns,
    tail_predicted_to_gain,
)
from ._transformer_tail_kernels import transformer_tail_kernel
from ._triton import contiguity_reasons, device_reasons, dtype_reasons, is_interpreted
from .attention import attention
from .linear import linear

_MATRICES = ("out_weight", "q_weight", "cross_weight", "ff_in_weight", "ff_out_weight", "proj_weight")
_VECTORS = (
    *("norm2_weight", "norm2_bias", "norm3_weight", "norm3_bias"),
    *("out_bias", "cross_bias", "ff_in_bias", "ff_out_bias", "proj_bias"),
)


class TransformerTailCall(NamedTuple):
    """The arguments of `transformer_tail`."""

    attended: Tensor
    x: Tensor
    image: Tensor
    context: Tensor
    out_weight: Tensor
    norm2_weight: Tensor
    norm2_bias: Tensor
    q_weight: Tensor
    cross_weight: Tensor
    norm3_weight: Tensor
    norm3_bias: Tensor
    ff_in_weight: Tensor
    ff_out_weight: Tensor
    proj_weight: Tensor
    eps: float = 1e-5
    out_bias: Tensor | None = None
    cross_bias: Tensor | None = None
    ff_in_bias: Tensor | None = None
    ff_out_bias: Tensor | None = None
    proj_bias: Tensor | None = None
    statistics: bool = False

    @property
    def shape(self) -> TailShape:
        """What a configuration depends on."""
        batch, tokens, channels = self.x.shape
        _, keys, _, heads, _ = self.context.shape
        inner = self.ff_out_weight.shape[1]
        return TailShape(batch, tokens, channels, heads, keys, inner, self.x.element_size(), self.statistics)


def transformer_tail_ref(
    attended: Tensor,
    x: Tensor,
    image: Tensor,
    context: Tensor,
    out_weight: Tensor,
    norm2_weight: Tensor,
    norm2_bias: Tensor,
    q_weight: Tensor,
    cross_weight: Tensor,
    norm3_weight: Tensor,
    norm3_bias: Tensor,
    ff_in_weight: Tensor,
    ff_out_weight: Tensor,
    proj_weight: Tensor,
    eps: float = 1e-5,
    *,
    out_bias: Tensor | None = None,
    cross_bias: Tensor | None = None,
    ff_in_bias: Tensor | None = None,
    ff_out_bias: Tensor | None = None,
    proj_bias: Tensor | None = None,
    statistics: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Reference of `transformer_tail`: torch's matmuls between the references of its parts, each of which rounds
    its result."""
    call = TransformerTailCall(
        *(attended, x, image, context, out_weight, norm2_weight, norm2_bias, q_weight, cross_weight),
        *(norm3_weight, norm3_bias, ff_in_weight, ff_out_weight, proj_weight, eps),
        *(out_bias, cross_bias, ff_in_bias, ff_out_bias, proj_bias, statistics),
    )
    return _with_statistics(call, _separate(call, "torch"))


def transformer_tail_separate(
    *arguments: Any, backend: str = "auto", **options: Any
) -> Tensor | tuple[Tensor, Tensor]:
    """The same by `linear`, `attention` and torch's matmuls, one after the other, on `backend`.

    Arguments and errors as of `transformer_tail`, whose backend "auto" takes this where the kernel is not expected
    to be faster.
    """
    choose_backend("transformer_tail", backend, ())
    call = TransformerTailCall(*arguments, **options)
    tensors(transformer_tail, call[:14], call[15:20])
    flag("transformer_tail", "statistics", call.statistics)
    call = call._replace(eps=real("transformer_tail", "eps", call.eps))
    return _with_statistics(call, _separate(checked(OPERATOR, call), backend))


def _separate(call: TransformerTailCall, backend: str, out: Tensor | None = None) -> Tensor:
    """The image by one operator after the other, in `out` where it is given."""
    x, context, eps = call.x, call.context, call.eps
    batch, tokens, channels = x.shape
    queries = batch, tokens, *context.shape[3:]
    t = _matmul_add(x, call.attended, call.out_weight, call.out_bias)
    q = linear(
        t, call.q_weight, norm_weight=call.norm2_weight, norm_bias=call.norm2_bias, eps=eps, backend=backend
    )
    h = attention(q.view(queries), *context.unbind(2), backend=backend).view(x.shape)
    t = _matmul_add(t, h, call.cross_weight, call.cross_bias)
    h = linear(
        t,
        call.ff_in_weight,
        call.ff_in_bias,
        norm_weight=call.norm3_weight,
        norm_bias=call.norm3_bias,
        eps=eps,
        activation="geglu",
        backend=backend,
    )
    t = _matmul_add(t, h, call.ff_out_weight, call.ff_out_bias)
    image = call.image.permute(0, 2, 3, 1).reshape(x.shape)
    if out is not None and not torch.compiler.is_compiling():
        rows = out.permute(0, 2, 3, 1).reshape(-1, channels)
        _matmul_add(image, t, call.proj_weight, call.proj_bias, rows)
        return out
    y = _matmul_add(image, t, call.proj_weight, call.proj_bias)
    result = y.view(batch, *call.image.shape[2:], channels).permute(0, 3, 1, 2)
    return result if out is None else out.copy_(result)


def _with_statistics(call: TransformerTailCall, image: Tensor) -> Tensor | tuple[Tensor, Tensor]:
    return (image, channel_statistics(image, tail_statistics_tile(call))) if call.statistics else image


def _matmul_add(
    x: Tensor, tokens: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None = None
) -> Tensor:
    """x + bias + tokens weight^T; x [B, N, C], tokens [B, N, K], weight [C, K]."""
    if torch._C._is_any_autocast_enabled():
        # addmm would round x too.
        return x + F.linear(tokens, weight, bias)
    rows = x.flatten(0, 1)
    if bias is not None:
        rows = rows + bias.to(rows.dtype)
    return torch.addmm(rows, tokens.flatten(0, 1), weight.t(), out=out).view(x.shape)


def tail_statistics_tile(call: TransformerTailCall) -> int:
    """Pixels of a tile of the statistics; no tuned table changes it, so that a traced call knows its shape."""
    return default_tail(call.shape, chip_of(call.x.device)).block_m


def candidates(call: TransformerTailCall) -> list[TransformerTailConfig]:
    """The configurations that bench/tune.py tries for this call."""
    return tail_candidates(call.shape, chip_of(call.x.device))


def tuning_key(call: TransformerTailCall) -> str:
    """What a tuned configuration is looked up by."""
    return _key(call.shape, call.x.dtype)


def _key(shape: TailShape, dtype: torch.dtype) -> str:
    sizes = f"batch={shape.batch} tokens={shape.tokens} channels={shape.channels} heads={shape.heads}"
    inner = f"keys={shape.keys} inner={shape.inner}"
    return f"{sizes} {inner} {str(dtype).removeprefix('torch.')}{' statistics' if shape.statistics else ''}"


def _tuned_or_default(call: TransformerTailCall, chip: Chip) -> TransformerTailConfig:
    """ValueError for a tuned one whose statistics would have another shape than callers are told."""
    default = default_tail(call.shape, chip)
    found = tuned("transformer_tail", tuning_key(call), chip, TransformerTailConfig) or default
    if call.statistics and found.block_m != default.block_m:
        raise ValueError(
            f"transformer_tail: statistics are of {default.block_m} pixels, and {chip.name}'s tuned table has "
            f"{found}: tune it anew"
        )
    return found


def plan(
    call: TransformerTailCall, *, config: TransformerTailConfig | None = None, chip: Chip | None = None
) -> tuple[Tensor | tuple[Tensor, Tensor], list[Launch]]:
    """The result, not yet computed, and the launch that computes it."""
    shape = call.shape
    chip = chip or chip_of(call.x.device)
    pdl = launches_dependently(chip)
    config = config or _tuned_or_default(call, chip)
    out = _empty_image(call)
    statistics = empty_statistics(out, config.block_m) if call.statistics else None
    result = out if statistics is None else (out, statistics)
    if not out.numel():
        return result, []
    head_dim = shape.channels // shape.heads
    part_1, part_2 = parts(shape.channels)
    keys_1, keys_2 = parts(shape.keys)
    tiles = ceil_div(shape.tokens, config.block_m)

    def lines(size: int) -> int:
        return lines_of_a_program(size, shape.itemsize, shape.batch * tiles, transformer_tail_kernel, chip)

    arguments: dict[str, Any] = {
        "attended_ptr": call.attended,
        "x_ptr": call.x,
        "image_ptr": call.image,
        "context_ptr": call.context,
        "out_weight_ptr": call.out_weight,
        "out_bias_ptr": call.out_bias,
        "norm2_weight_ptr": call.norm2_weight,
        "norm2_bias_ptr": call.norm2_bias,
        "q_weight_ptr": call.q_weight,
        "cross_weight_ptr": call.cross_weight,
        "cross_bias_ptr": call.cross_bias,
        "norm3_weight_ptr": call.norm3_weight,
        "norm3_bias_ptr": call.norm3_bias,
        "in_weight_ptr": call.ff_in_weight,
        "in_bias_ptr": call.ff_in_bias,
        "ff_weight_ptr": call.ff_out_weight,
        "ff_bias_ptr": call.ff_out_bias,
        "proj_weight_ptr": call.proj_weight,
        "proj_bias_ptr": call.proj_bias,
        "result_ptr": out,
        "result_statistics_ptr": statistics,
        "tokens": shape.tokens,
        "tiles": tiles,
        "keys": shape.keys,
        "inner": shape.inner,
        "eps": call.eps,
        "scale_log2": head_dim**-0.5 * math.log2(math.e),
        "stride_cb": call.context.stride(0),
        "stride_ct": call.context.stride(1),
        "stride_ckv": call.context.stride(2),
        "HEADS": shape.heads,
        "HEADS_AT_ONCE": config.heads_at_once,
        "HEAD_CHANNELS": head_dim,
        "BLOCK_D": max(next_power_of_two(head_dim), 16),
        "KEYS_1": keys_1,
        "KEYS_2": keys_2,
        "WHOLE_PARTS": 0 if shape.keys < keys_1 else 2 if shape.keys == keys_1 + keys_2 else 1,
        "CHANNELS": shape.channels,
        "PART_1": part_1,
        "PART_2": part_2,
        "BLOCK_M": config.block_m,
        "BLOCK_J": config.block_j,
        "EVEN_M": shape.tokens % config.block_m == 0,
        "EVEN_J": shape.inner % config.block_j == 0,
        "SQUARE_LINES": lines(shape.channels**2),
        "INNER_LINES": lines(shape.inner * shape.channels),
        "PRECISION": "ieee",
        "PDL": pdl,
    }
    launch = Launch(
        transformer_tail_kernel,
        shape.batch * tiles,
        arguments,
        config.num_warps,
        config.num_stages,
        operator="transformer_tail",
        flops=_flops(*(value.shape for value in call[:14])),
        exponentials=shape.batch * shape.heads * shape.tokens * shape.keys,
        pdl=pdl,
    )
    return result, [launch]


def unsupported_reasons(call: TransformerTailCall) -> list[str]:
    """Every reason why the Triton kernel cannot serve this call; empty when it can."""
    x, context, fields = call.x, call.context, call._asdict()
    given = {name: value for name, value in fields.items() if isinstance(value, Tensor)}
    plain = {name: fields[name] for name in ("attended", "x", *_MATRICES, *_VECTORS)}
    keys, head_dim = context.shape[1], context.shape[4]
    reasons = [
        *device_reasons(transformer_tail_kernel, x),
        *dtype_reasons(**given),
        *contiguity_reasons(**plain),
    ]
    if not call.image.permute(0, 2, 3, 1).is_contiguous():
        reasons.append("image is not channels-last")
    if context.stride(4) != 1 or context.stride(3) != head_dim:
        reasons.append("the heads of context are not contiguous")
    if not keeps_row(x.shape[2], x.element_size()):
        reasons.append(f"{x.shape[2]} channels of {dtype_name(x)} do not fit the registers of a program")
    if not 0 < keys <= MAX_KEYS:
        reasons.append(f"{keys} keys are not within 1 and {MAX_KEYS}")
    if head_dim > MAX_HEAD_DIM:
        reasons.append(f"head_dim {head_dim} is more than {MAX_HEAD_DIM}")
    if x.shape[0] * x.shape[1] > MAX_INDEX:
        reasons.append(f"{x.shape[0] * x.shape[1]} rows are more than {MAX_INDEX}")
    if x.dtype == torch.bfloat16 and is_interpreted(transformer_tail_kernel):
        reasons.append("triton's interpreter multiplies bfloat16 as if it were integers")
    return reasons


def transformer_tail(
    attended: Tensor,
    x: Tensor,
    image: Tensor,
    context: Tensor,
    out_weight: Tensor,
    norm2_weight: Tensor,
    norm2_bias: Tensor,
    q_weight: Tensor,
    cross_weight: Tensor,
    norm3_weight: Tensor,
    norm3_bias: Tensor,
    ff_in_weight: Tensor,
    ff_out_weight: Tensor,
    proj_weight: Tensor,
    eps: float = 1e-5,
    *,
    out_bias: Tensor | None = None,
    cross_bias: Tensor | None = None,
    ff_in_bias: Tensor | None = None,
    ff_out_bias: Tensor | None = None,
    proj_bias: Tensor | None = None,
    statistics: bool = False,
    backend: str = "auto",
    out: Tensor | tuple[Tensor, Tensor] | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The image [B, C, H, W], channels-last, that a transformer of one block returns, from its self-attention on.

    attended, x    [B, H * W, C]: self-attention's result, and the tokens that it is added to
    image          [B, C, H, W]: the transformer's input, which the result is added to
    context        [B, T, 2, heads, D]: keys and values of cross-attention, C = heads * D; its scale is D ** -0.5
    out_weight, q_weight, cross_weight, proj_weight  [C, C]: after self-attention, before and after
                   cross-attention, and before the sum with the image
    norm2_weight, norm2_bias, norm3_weight, norm3_bias  [C]: layer norms with `eps` before cross-attention and
                   before the feed-forward
    ff_in_weight   [2 F, C]: F rows of values, then F of gates; ff_out_weight [C, F]
    out_bias, cross_bias, ff_out_bias, proj_bias  [C], ff_in_bias [2 F]; None adds nothing
    statistics     returns (image, statistics of the image as float32 [B, tiles, 2, C]): by tile and channel the
                   mean and the sum of squared deviations
    backend        "triton": one kernel, for C up to 128 (float32 96), D up to 32, T up to 128
                   "torch": the references of the parts
                   "auto": the kernel where that was measured, or is predicted, to be faster on this GPU, else the
                   kernels of the parts (`transformer_tail_separate`); statistics then take many launches
                   (`transformer_tail_backend` tells beforehand)
    out            is written and returned, with statistics a pair; `image` itself is allowed for the image

    Tensors share a dtype, but for vectors, of any float dtype. Under autocast as the parts one after the other.
    Raises ValueError for what does not fit, `KernelUnsupported` for `backend="triton"` where the kernel cannot
    serve.
    Sources: Vaswani et al., arXiv 1706.03762; Shazeer, arXiv 2002.05202 (GEGLU).
    """
    call = TransformerTailCall(
        *(attended, x, image, context, out_weight, norm2_weight, norm2_bias, q_weight, cross_weight),
        *(norm3_weight, norm3_bias, ff_in_weight, ff_out_weight, proj_weight, eps),
        *(out_bias, cross_bias, ff_in_bias, ff_out_bias, proj_bias, statistics),
    )
    tensors(transformer_tail, call[:14], call[15:20])
    flag("transformer_tail", "statistics", statistics)
    call = call._replace(eps=real("transformer_tail", "eps", eps))
    if backend == "auto" and not torch._C._is_any_autocast_enabled():
        # Outside the operator, so that what is chosen is seen by whoever traces: one operator, or several.
        backend = _CHOICE.auto(call)
        if backend == "torch":
            return _unfused(call, out)
    result: Tensor | tuple[Tensor, Tensor] = _IMPLEMENTED[call.statistics](*call, backend, out=out)
    return result


def transformer_tail_backend(call: TransformerTailCall, backend: str = "auto") -> Chosen:
    """Who serves a call, for who has a way of their own around the kernel.

    "auto" as of `transformer_tail`; "triton" is "torch" here where the kernel cannot serve, as under autocast.
    """
    return _CHOICE.of(call, backend, able=not torch._C._is_any_autocast_enabled())


def _unfused(call: TransformerTailCall, out: Any) -> Tensor | tuple[Tensor, Tensor]:
    """What "auto" takes where the kernel is not expected to be faster."""
    if out is not None:
        OUTS[_NAMES[call.statistics]].checked((*call, "auto"), out)
    if out is None or not call.statistics:
        return _with_statistics(call, _separate(call, "auto", out))
    image, statistics = out
    statistics.copy_(channel_statistics(_separate(call, "auto", image), tail_statistics_tile(call)))
    return image, statistics


def _check(call: TransformerTailCall) -> None:
    x, context, image = call.x, call.context, call.image
    if x.ndim != 3 or not x.is_floating_point():
        raise ValueError(f"transformer_tail: x must be a float [B, N, C]; got {x.dtype} {list(x.shape)}")
    batch, tokens, channels = x.shape
    if image.ndim != 4 or (*image.shape[:2], image.shape[2] * image.shape[3]) != (batch, channels, tokens):
        raise ValueError(
            f"transformer_tail: image must be [{batch}, {channels}, H, W] of {tokens} pixels; "
            f"got {list(image.shape)}"
        )
    if context.ndim != 5 or context.shape[0] != batch or context.shape[2] != 2:
        raise ValueError(f"transformer_tail: context must be [{batch}, T, 2, heads, D]; got {list(context.shape)}")
    _, _, _, heads, head_dim = context.shape
    if heads * head_dim != channels:
        raise ValueError(
            f"transformer_tail: the heads of context must have {channels} channels together; "
            f"got {heads} of {head_dim}"
        )
    if call.ff_out_weight.ndim != 2:
        raise ValueError(
            f"transformer_tail: ff_out_weight must be {dtype_name(x)} [{channels}, F]; "
            f"got {dtype_name(call.ff_out_weight)} {list(call.ff_out_weight.shape)}"
        )
    inner = call.ff_out_weight.shape[1]
    shapes = {
        "attended": x.shape,
        "image": image.shape,
        "context": context.shape,
        **dict.fromkeys(_MATRICES, (channels, channels)),
        "ff_in_weight": (2 * inner, channels),
        "ff_out_weight": (channels, inner),
        **dict.fromkeys(_VECTORS, (channels,)),
        "ff_in_bias": (2 * inner,),
    }
    fields = call._asdict()
    for name, shape in shapes.items():
        value = fields[name]
        if value is None:
            continue
        is_vector = name in _VECTORS
        fits = value.is_floating_point() if is_vector else value.dtype == x.dtype
        if tuple(value.shape) != tuple(shape) or not fits:
            wanted = "a float" if is_vector else dtype_name(x)
            raise ValueError(
                f"transformer_tail: {name} must be {wanted} {list(shape)}; "
                f"got {dtype_name(value)} {list(value.shape)}"
            )


def _empty_image(call: TransformerTailCall) -> Tensor:
    image = call.image
    return torch.empty(image.shape, dtype=image.dtype, device=image.device, memory_format=torch.channels_last)


def _empty_result(call: TransformerTailCall) -> Tensor | tuple[Tensor, Tensor]:
    out = _empty_image(call)
    return (out, empty_statistics(out, tail_statistics_tile(call))) if call.statistics else out


def _reference(call: TransformerTailCall) -> Tensor | tuple[Tensor, Tensor]:
    return _with_statistics(call, _separate(call, "torch"))


def _flops(*shapes: Any, **__: object) -> int:
    """Of the matmuls and of attention, a multiply-add being two; norms and gates are left out, as torch leaves out
    its own."""
    _, x, _, context, out_weight, _, _, q_weight, cross_weight, _, _, ff_in, ff_out, proj, *_ = shapes
    batch, tokens, channels = x
    weights = sum(math.prod(weight) for weight in (out_weight, q_weight, cross_weight, ff_in, ff_out, proj))
    total: int = 2 * batch * tokens * weights + 4 * batch * tokens * context[1] * channels
    return total


def _autocast(_: Any, *arguments: Any) -> Tensor | tuple[Tensor, Tensor]:
    """The parts one after the other, each of which autocast treats by its own rule."""
    call = TransformerTailCall(*arguments[:-1])
    one_device("transformer_tail", call)
    _check(without_memory(call, "attended", "x", "image", "context", *_MATRICES))
    return _with_statistics(call, _separate(call, arguments[-1]))


OPERATOR = Operator(
    "transformer_tail",
    transformer_tail,
    transformer_tail_ref,
    TransformerTailCall,
    _check,
    plan,
    candidates,
    tuning_key,
    unsupported_reasons,
    torchs_own=transformer_tail_separate,
    predicted_ns=lambda call, chip: tail_predicted_ns(call.shape, chip),
)
_CHOICE = Choice(
    OPERATOR,
    transformer_tail_kernel,
    chooser("transformer_tail", TailShape, tail_predicted_to_gain, _key),
    lambda call: call.shape,
    lambda call: (call.shape.batch, call.shape.tokens, call.shape.keys),
)
_ARGUMENTS = (
    "(Tensor attended, Tensor x, Tensor image, Tensor context, Tensor out_weight, Tensor norm2_weight, "
    "Tensor norm2_bias, Tensor q_weight, Tensor cross_weight, Tensor norm3_weight, Tensor norm3_bias, "
    "Tensor ff_in_weight, Tensor ff_out_weight, Tensor proj_weight, float eps, Tensor? out_bias, "
    "Tensor? cross_bias, Tensor? ff_in_bias, Tensor? ff_out_bias, Tensor? proj_bias, bool statistics, str backend)"
)
# Without statistics and with: a library's operator has one type of result.
_NAMES = {False: "transformer_tail", True: "statistics_transformer_tail"}
_IMPLEMENTED = {
    statistics: define_operator(
        f"{name}{_ARGUMENTS} -> {'(Tensor, Tensor)' if statistics else 'Tensor'}",
        OPERATOR,
        reference=_reference,
        fake=_empty_result,
        autocast=_autocast,
        flops=_flops,
        in_place=("image",),
    )
    for statistics, name in _NAMES.items()
}

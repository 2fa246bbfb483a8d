"""First derivatives of the operators by torch's own backward kernels (`_library.Formula`).

Each computes in float32 (float64 for float64) and rounds once, as the reference does. What a norm needs of its
input is computed again, once and without a graph. A call without elements is left to the reference.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

from ._layout import memory_format
from ._library import cast, compute_dtype

_ATEN = torch.ops.aten
Gradients = Mapping[str, Tensor | None] | None
Kept = tuple[Any, tuple[Tensor, ...]] | None


def centered(x: Tensor, num_groups: int, x_bias: Tensor | None) -> Tensor:
    """x + x_bias around the first value of each group of x, in the dtype that it is computed in.

    Torch's CPU kernel for channels-last loses the variance at large means.
    """
    dtype, channels = compute_dtype(x), x.shape[1]
    first = cast(x.detach()[:, :: channels // num_groups, 0, 0], dtype)
    center = first.unsqueeze(2).expand(-1, -1, channels // num_groups).flatten(1)
    if x_bias is None:
        return cast(x, dtype) - center[:, :, None, None]  # type: ignore[no-any-return]
    return cast(x, dtype) + (cast(x_bias, dtype) - center)[:, :, None, None]  # type: ignore[no-any-return]


def group_norm_silu(
    call: Any, _kept: Sequence[Tensor], grads: Sequence[Tensor], needed: Container[str]
) -> Gradients:
    image = call.x if call.skip is None else torch.cat([call.x, call.skip], dim=1)
    if not image.numel():
        return None
    x = centered(image, call.num_groups, call.x_bias)
    # What torch's kernels take.
    layout = memory_format(x) if x.device.type == "cpu" else torch.contiguous_format
    x, weight, bias, grad = x.contiguous(memory_format=layout), _as(x, call.weight), _as(x, call.bias), grads[0]
    sizes = (x.shape[0], x.shape[1], x.shape[2] * x.shape[3], call.num_groups)
    normed, mean, rstd = _ATEN.native_group_norm.default(x, weight, bias, *sizes, call.eps)
    grad = grad.to(x.dtype)
    if call.activation == "silu":
        grad = _ATEN.silu_backward.default(grad, normed)
    # Of channels-last images torch 2.13 crashes the process where theirs is not asked for, on a CPU.
    of_image = layout == torch.channels_last or any(name in needed for name in ("x", "skip", "x_bias"))
    found, of_weight, of_bias = _ATEN.native_group_norm_backward.default(
        *(grad.contiguous(memory_format=layout), x, mean, rstd, weight, *sizes),
        [of_image, "weight" in needed, "bias" in needed],
    )
    result = {"weight": _as(call.weight, of_weight), "bias": _as(call.bias, of_bias)}
    if "x_bias" in needed:
        result["x_bias"] = found.sum((2, 3)).to(call.x_bias.dtype)
    if "x" in needed or "skip" in needed:
        found, channels = found.to(image.dtype), call.x.shape[1]
        result |= {"x": found} if call.skip is None else {"x": found[:, :channels], "skip": found[:, channels:]}
    return result


def _as(like: Tensor | None, value: Tensor | None) -> Tensor | None:
    """In the dtype of `like`; None for None."""
    return None if value is None or like is None else value.to(like.dtype)


def layer_norm(call: Any, _kept: Sequence[Tensor], grads: Sequence[Tensor], needed: Container[str]) -> Gradients:
    """With a residual `call.x` is the sum."""
    x, shape = call.x, call.x.shape[-1:]
    if not x.numel():
        return None
    total = x.to(compute_dtype(x))
    if call.residual is None and call.x_bias is not None:
        total = total + call.x_bias.to(total.dtype)
    total = total.contiguous()
    _, mean, rstd = _ATEN.native_layer_norm.default(total, shape, None, None, call.eps)
    of_x = any(name in needed for name in ("x", "residual", "x_bias"))
    found, of_weight, of_bias = _ATEN.native_layer_norm_backward.default(
        *(grads[0].to(total.dtype), total, shape, mean, rstd, _as(total, call.weight), _as(total, call.bias)),
        [of_x, "weight" in needed, "bias" in needed],
    )
    result = {"weight": _as(call.weight, of_weight), "bias": _as(call.bias, of_bias)}
    if of_x:
        found = found if len(grads) == 1 else found + grads[1]
        if "x_bias" in needed:
            result["x_bias"] = found.reshape(-1, *shape).sum(0).to(call.x_bias.dtype)
        result["x"] = result["residual"] = found.to(x.dtype)
    return result


def geglu(call: Any, _kept: Sequence[Tensor], grads: Sequence[Tensor], needed: Container[str]) -> Gradients:
    x = call.x
    values, grad = x.to(compute_dtype(x)), grads[0].to(compute_dtype(x))
    if call.bias is not None:
        values = values + call.bias.to(values.dtype)
    value, gate = values.chunk(2, dim=-1)
    found = torch.cat([grad * F.gelu(gate), _ATEN.gelu_backward.default(grad * value, gate)], dim=-1)
    result = {"x": found.to(x.dtype)}
    if "bias" in needed:
        result["bias"] = found.reshape(-1, found.shape[-1]).sum(0).to(call.bias.dtype)
    return result


def residual_add(call: Any, _kept: Sequence[Tensor], grads: Sequence[Tensor], needed: Container[str]) -> Gradients:
    """A sum: `call` need not hold what was added."""
    (grad,) = grads
    if not grad.numel():
        return None
    if call.size is not None:
        grad = _ATEN.upsample_nearest2d_backward.default(grad, call.size, call.x.shape)
    result = {"x": grad, "residual": grad}
    if "bias" in needed:
        result["bias"] = grad.sum((0, 2, 3), dtype=compute_dtype(grad)).to(call.bias.dtype)
    return result


def attention_and_sums(call: Any) -> Kept:
    """The result of torch's fused kernel on a CPU, and what its backward reads; None where that does not serve."""
    q, k, v = (tokens.transpose(1, 2) for tokens in (call.q, call.k, call.v))
    if call.key_lengths is not None or call.key_mask is not None or q.device.type != "cpu":
        return None
    if torch._fused_sdp_choice(q, k, v, scale=call.scale) != SDPBackend.FLASH_ATTENTION.value:
        return None
    out, sums = _ATEN._scaled_dot_product_flash_attention_for_cpu.default(q, k, v, scale=call.scale)
    out = out.transpose(1, 2).contiguous()
    return out, (out, sums)


def attention(call: Any, kept: Sequence[Tensor], grads: Sequence[Tensor], _needed: Container[str]) -> Gradients:
    if not kept:
        return None
    out, sums = kept
    tokens = (t.transpose(1, 2) for t in (grads[0], call.q, call.k, call.v, out))
    found = _ATEN._scaled_dot_product_flash_attention_for_cpu_backward.default(
        *tokens, sums, 0.0, False, scale=call.scale
    )
    return {name: one.transpose(1, 2) for name, one in zip("qkv", found, strict=True)}

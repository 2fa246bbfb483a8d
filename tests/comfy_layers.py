"""The layers, the attention and a tiny UNet of a stand-in of ComfyUI (comfy_contract.py).

Its classes and functions say that they are of ComfyUI's modules, by which a node knows them.
"""

from __future__ import annotations

import functools
import types
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

CHANNELS, CONTEXT, GROUPS, HEADS = 32, 16, 32, 4


def _of(module: str) -> Any:
    def mark(thing: Any) -> Any:
        thing.__module__ = module
        for value in vars(thing).values() if isinstance(thing, type) else ():
            if isinstance(value, types.FunctionType):
                value.__module__ = module
        return thing

    return mark


def cast_bias_weight(layer: Any, x: torch.Tensor, offloadable: bool = False) -> tuple[Any, ...]:
    """(weight, bias, stream) in the dtype of x, with what LoRA adds at every call."""
    found = []
    for name in ("weight", "bias"):
        value = getattr(layer, name)
        if value is not None:
            value = value.to(x.dtype)
            for function in getattr(layer, f"{name}_function"):
                value = function(value)
        found.append(value)
    return (*found, "stream") if offloadable else tuple(found)


def uncast_bias_weight(layer: Any, weight: Any, bias: Any, stream: Any) -> None:
    """Ends the use of what `cast_bias_weight` gave."""
    assert stream == "stream"


class Layer:
    comfy_cast_weights = False
    weight_function: tuple[Any, ...] = ()
    bias_function: tuple[Any, ...] = ()


def _layer(base: type, operation: Any) -> type:
    def forward_comfy_cast_weights(self: Any, x: torch.Tensor) -> torch.Tensor:
        weight, bias, stream = cast_bias_weight(self, x, offloadable=True)
        try:
            return operation(self, x, weight, bias)
        finally:
            uncast_bias_weight(self, weight, bias, stream)

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        if self.comfy_cast_weights or self.weight_function or self.bias_function:
            return self.forward_comfy_cast_weights(x)
        return base.forward(self, x)

    body = {"forward": forward, "forward_comfy_cast_weights": forward_comfy_cast_weights}
    return _of("comfy.ops")(type(base.__name__, (base, Layer), body))


class Ops:
    GroupNorm = _layer(nn.GroupNorm, lambda m, x, w, b: F.group_norm(x, m.num_groups, w, b, m.eps))
    LayerNorm = _layer(nn.LayerNorm, lambda m, x, w, b: F.layer_norm(x, m.normalized_shape, w, b, m.eps))
    Linear = _layer(nn.Linear, lambda m, x, w, b: F.linear(x, w, b))
    Conv2d = _layer(nn.Conv2d, lambda m, x, w, b: m._conv_forward(x, w, b))


CastOps = type(
    "CastOps",
    (),
    {
        name: _of("comfy.ops")(type(name, (getattr(Ops, name),), {"comfy_cast_weights": True}))
        for name in ("GroupNorm", "LayerNorm", "Linear", "Conv2d")
    },
)


def wrap_attn(function: Any) -> Any:
    """The outermost attention of a call asks the override in transformer_options, which gets `function`."""

    @functools.wraps(function)
    def wrapper(*arguments: Any, **named: Any) -> torch.Tensor:
        override = (named.get("transformer_options") or {}).get("optimized_attention_override")
        named.pop("preferred_attention", None)
        if named.get("_inside_attn_wrapper") or override is None:
            return function(*arguments, **named)
        return override(function, *arguments, **named, _inside_attn_wrapper=True)

    return wrapper


@wrap_attn
def attention_pytorch(
    q, k, v, heads, mask=None, attn_precision=None, skip_reshape=False, skip_output_reshape=False, **named
):
    """torch's attention in ComfyUI's layouts."""
    if not skip_reshape:
        dim = q.shape[-1] // heads
        q, k, v = (t.unflatten(-1, (-1, dim)).transpose(1, 2) for t in (q, k, v))
    if mask is not None:
        mask = mask.unsqueeze(1) if mask.ndim == 3 else mask
    extra = {name: named[name] for name in ("scale", "enable_gqa") if name in named}
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **extra)
    return out if skip_output_reshape else out.transpose(1, 2).flatten(2)


class _CrossAttention(nn.Module):
    def __init__(self, width, context, operations, dtype):
        super().__init__()
        self.to_q = operations.Linear(width, width, bias=False, dtype=dtype)
        self.to_k = operations.Linear(context, width, bias=False, dtype=dtype)
        self.to_v = operations.Linear(context, width, bias=False, dtype=dtype)
        self.to_out = nn.Sequential(operations.Linear(width, width, dtype=dtype), nn.Dropout(0.0))

    def forward(self, x, context, options):
        out = attention_pytorch(
            *(self.to_q(x), self.to_k(context), self.to_v(context), HEADS),
            attn_precision=None,
            transformer_options=options,
        )
        return self.to_out(out)


@_of("comfy.ldm.modules.attention")
class GEGLU(nn.Module):
    """ComfyUI's gate: the first half times the GELU of the second."""

    def __init__(self, width, inner, operations, dtype):
        super().__init__()
        self.proj = operations.Linear(width, 2 * inner, dtype=dtype)

    def forward(self, x):
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class _Transformer(nn.Module):
    def __init__(self, width, operations, dtype):
        super().__init__()
        self.norm = operations.GroupNorm(GROUPS, width, eps=1e-6, dtype=dtype)
        self.norm1, self.norm2, self.norm3 = (operations.LayerNorm(width, dtype=dtype) for _ in range(3))
        self.attn1 = _CrossAttention(width, width, operations, dtype)
        self.attn2 = _CrossAttention(width, CONTEXT, operations, dtype)
        gate = GEGLU(width, 4 * width, operations, dtype)
        self.ff = nn.Sequential(gate, nn.Dropout(0.0), operations.Linear(4 * width, width, dtype=dtype))

    def forward(self, image, context, options):
        x = self.norm(image).flatten(2).transpose(1, 2)
        n = self.norm1(x)
        x = x + self.attn1(n, n, options)
        x = x + self.attn2(self.norm2(x), context, options)
        x = x + self.ff(self.norm3(x))
        return image + x.transpose(1, 2).unflatten(2, image.shape[2:])


class _ResBlock(nn.Module):
    def __init__(self, width, out, operations, dtype):
        super().__init__()
        conv = functools.partial(operations.Conv2d, kernel_size=3, padding=1, dtype=dtype)
        self.in_layers = nn.Sequential(
            operations.GroupNorm(GROUPS, width, dtype=dtype), nn.SiLU(), conv(width, out)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), operations.Linear(CHANNELS, out, dtype=dtype))
        norm = operations.GroupNorm(GROUPS, out, dtype=dtype)
        self.out_layers = nn.Sequential(norm, nn.SiLU(), nn.Dropout(0.0), conv(out, out))
        self.skip_connection = nn.Identity() if width == out else operations.Conv2d(width, out, 1, dtype=dtype)

    def forward(self, x, embedding):
        h = self.in_layers(x) + self.emb_layers(embedding)[:, :, None, None]
        return self.skip_connection(x) + self.out_layers(h)


class UNet(nn.Module):
    def __init__(self, *, operations, dtype, **_):
        super().__init__()
        conv = functools.partial(operations.Conv2d, kernel_size=3, padding=1, dtype=dtype)
        self.time_embed = operations.Linear(1, CHANNELS, dtype=dtype)
        self.input_blocks = nn.ModuleList(
            [
                nn.ModuleList([conv(4, CHANNELS)]),
                nn.ModuleList(
                    [
                        _ResBlock(CHANNELS, CHANNELS, operations, dtype),
                        _Transformer(CHANNELS, operations, dtype),
                        _ResBlock(CHANNELS, 2 * CHANNELS, operations, dtype),
                    ]
                ),
            ]
        )
        self.out = nn.Sequential(
            operations.GroupNorm(GROUPS, 2 * CHANNELS, dtype=dtype), nn.SiLU(), conv(2 * CHANNELS, 4)
        )

    def forward(self, x, timesteps, context, transformer_options):
        embedding = self.time_embed(timesteps[:, None].to(x.dtype) / 1000)
        for layer in (layer for block in self.input_blocks for layer in block):
            if isinstance(layer, _ResBlock):
                x = layer(x, embedding)
            elif isinstance(layer, _Transformer):
                x = layer(x, context, transformer_options)
            else:
                x = layer(x)
        return self.out(x)

"""Arguments of each operator on the meta device, from a few numbers: what `ldmperf inspect` compiles for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shape:
    """The numbers that shapes are made of; an operator takes those that its builder names.

    mask: 1 for a mask of keys.
    """

    dtype: torch.dtype = torch.bfloat16
    batch: int = 2
    channels: int = 320
    height: int = 64
    width: int = 64
    groups: int = 32
    skip_channels: int = 0
    heads: int = 8
    head_dim: int = 40
    context: int = 0
    features: int = 0
    mask: int = 0

    def empty(self, *size: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(size, dtype=dtype or self.dtype, device="meta")

    def image(self, batch: int, channels: int) -> Tensor:
        """[batch, channels, height, width] in channels-last memory."""
        return self.empty(batch, channels, self.height, self.width).to(memory_format=torch.channels_last)

    def tokens(self, channels: int) -> Tensor:
        return self.empty(self.batch, self.height * self.width, channels)


Arguments = dict[str, Any]


def _attention(shape: Shape) -> Arguments:
    """Slices of packed projections: q, k and v of an image's tokens, or k and v of `context` tokens."""
    tokens, heads = shape.height * shape.width, (shape.heads, shape.head_dim)
    if shape.context:
        q = shape.empty(shape.batch, tokens, *heads)
        k, v = shape.empty(shape.batch, shape.context, 2, *heads).unbind(2)
    else:
        q, k, v = shape.empty(shape.batch, tokens, 3, *heads).unbind(2)
    masks = {"key_mask": shape.empty(*k.shape[:2], dtype=torch.bool)} if shape.mask else {}
    return {"q": q, "k": k, "v": v, **masks}


def _group_norm_silu(shape: Shape) -> Arguments:
    channels = shape.channels + shape.skip_channels
    skip = shape.image(shape.batch, shape.skip_channels) if shape.skip_channels else None
    return {
        "x": shape.image(shape.batch, shape.channels),
        "num_groups": shape.groups,
        "weight": shape.empty(channels),
        "bias": shape.empty(channels),
        "x_bias": None if shape.skip_channels else shape.empty(shape.batch, channels),
        "skip": skip,
    }


def _layer_norm(shape: Shape) -> Arguments:
    return {
        "x": shape.tokens(shape.channels),
        "weight": shape.empty(shape.channels),
        "bias": shape.empty(shape.channels),
        "residual": shape.tokens(shape.channels),
        "x_bias": shape.empty(shape.channels),
    }


def _geglu(shape: Shape) -> Arguments:
    return {"x": shape.tokens(2 * shape.channels), "bias": shape.empty(2 * shape.channels)}


def _linear(shape: Shape) -> Arguments:
    """The first matmul of a gated feed-forward, with the norm before it; `features` are its result's columns."""
    vector = shape.empty(shape.channels)
    features = 2 * (shape.features or 4 * shape.channels)
    return {
        "x": shape.tokens(shape.channels),
        "weight": shape.empty(features, shape.channels),
        "bias": shape.empty(features),
        "norm_weight": vector,
        "norm_bias": vector,
        "x_bias": vector,
        "activation": "geglu",
    }


def _conv3x3(shape: Shape) -> Arguments:
    """A residual block's second convolution, to `features` channels; with `skip_channels` also its shortcut."""
    columns = shape.features or shape.channels
    x, weight = shape.image(shape.batch, shape.channels), shape.empty(columns, shape.channels, 3, 3)
    beside: Arguments = {"residual": shape.image(shape.batch, columns)}
    if shape.skip_channels:
        beside = {
            "shortcut": shape.image(shape.batch, shape.channels),
            "skip": shape.image(shape.batch, shape.skip_channels),
            "shortcut_weight": shape.empty(columns, shape.channels + shape.skip_channels),
        }
    return {
        "x": x,
        "weight": weight.to(memory_format=torch.channels_last),
        "bias": shape.empty(columns),
        **beside,
        "statistics": True,
    }


def _transformer_front(shape: Shape) -> Arguments:
    channels, vector = shape.channels, shape.empty(shape.channels)
    image = shape.image(shape.batch, channels)
    tiles = -(-shape.height * shape.width // 64)
    return {
        "image": image,
        "num_groups": shape.groups,
        "group_weight": vector,
        "group_bias": vector,
        "proj_weight": shape.empty(channels, channels),
        "norm_weight": vector,
        "norm_bias": vector,
        "qkv_weight": shape.empty(shape.features or 3 * channels, channels),
        "statistics": shape.empty(shape.batch, tiles, 2, channels, dtype=torch.float32),
        "proj_bias": vector,
        "x_bias": vector,
    }


def _transformer_tail(shape: Shape) -> Arguments:
    channels, vector, tokens = shape.channels, shape.empty(shape.channels), shape.tokens(shape.channels)
    inner, heads = shape.features or 4 * channels, shape.heads
    square = shape.empty(channels, channels)
    return {
        "attended": tokens,
        "x": tokens,
        "image": shape.image(shape.batch, channels),
        "context": shape.empty(shape.batch, shape.context, 2, heads, channels // heads),
        "out_weight": square,
        "norm2_weight": vector,
        "norm2_bias": vector,
        "q_weight": square,
        "cross_weight": square,
        "norm3_weight": vector,
        "norm3_bias": vector,
        "ff_in_weight": shape.empty(2 * inner, channels),
        "ff_out_weight": shape.empty(channels, inner),
        "proj_weight": square,
        "out_bias": vector,
        "cross_bias": vector,
        "ff_in_bias": shape.empty(2 * inner),
        "ff_out_bias": vector,
        "proj_bias": vector,
        "statistics": True,
    }


def _residual_add(shape: Shape) -> Arguments:
    x = shape.image(shape.batch, shape.channels)
    return {"x": x, "residual": torch.empty_like(x), "bias": shape.empty(shape.channels)}


def _sampler_update(shape: Shape) -> Arguments:
    registers, steps, float32 = 2, 50, torch.float32
    return {
        "registers": _registers(shape, registers),
        "model_output": shape.image(2 * shape.batch, shape.channels),
        "table": shape.empty(steps, registers, registers + 2, dtype=float32),
        "step": shape.empty(1, dtype=torch.int64),
        "guidance_scale": shape.empty(steps, dtype=float32),
        "seeds": shape.empty(shape.batch, dtype=torch.int64),
        "model_input": shape.image(2 * shape.batch, shape.channels),
        "input_scale": shape.empty(steps, dtype=float32),
    }


def _registers(shape: Shape, count: int) -> Tensor:
    """[count, batch, channels, height, width], each register channels-last."""
    size = (count, shape.batch, shape.height, shape.width, shape.channels)
    return shape.empty(*size, dtype=torch.float32).permute(0, 1, 4, 2, 3)


_IMAGE = ("batch", "channels", "height", "width")

# By operator: what makes its arguments, the numbers that it takes, and what they are by default.
SHAPES: Mapping[str, tuple[Callable[[Shape], Arguments], tuple[str, ...], Mapping[str, int]]] = {
    "attention": (_attention, ("batch", "height", "width", "heads", "head_dim", "context"), {}),
    "group_norm_silu": (_group_norm_silu, (*_IMAGE, "groups", "skip_channels"), {}),
    "layer_norm": (_layer_norm, _IMAGE, {}),
    "linear": (_linear, (*_IMAGE, "features"), {}),
    "conv3x3": (_conv3x3, (*_IMAGE, "features", "skip_channels"), {}),
    "geglu": (_geglu, _IMAGE, {"channels": 1280}),
    "residual_add": (_residual_add, _IMAGE, {}),
    "transformer_front": (_transformer_front, (*_IMAGE, "groups", "features"), {"channels": 64}),
    "transformer_tail": (
        _transformer_tail,
        (*_IMAGE, "heads", "context", "features"),
        {"channels": 64, "context": 77},
    ),
    "sampler_update": (_sampler_update, _IMAGE, {"channels": 4}),
}

"""The classes that the operators of a step fall into: the roofline and the trace tell them apart alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

OperatorClass = Literal[
    "convolution", "linear", "self-attention", "cross-attention", "norm", "elementwise", "sampler"
]
# In the order of every table of them.
CLASSES: tuple[OperatorClass, ...] = get_args(OperatorClass)

# torch's operators that have a name of ours, or one that several share. Attention is self or cross by its place.
ATTENTION = "attention"
_TORCH_NAMES: Mapping[str, str] = {
    **dict.fromkeys(("aten::conv2d", "aten::convolution"), "convolution"),
    **dict.fromkeys((f"aten::{n}" for n in ("linear", "addmm", "addmm_", "mm", "bmm", "matmul")), "linear"),
    **dict.fromkeys(("aten::group_norm", "aten::native_group_norm"), "group_norm"),
    **dict.fromkeys(("aten::layer_norm", "aten::native_layer_norm"), "layer_norm"),
    "aten::scaled_dot_product_attention": ATTENTION,
}
_CLASS_OF: Mapping[str, OperatorClass] = {
    **dict.fromkeys(("convolution", "conv3x3"), "convolution"),
    "linear": "linear",
    **dict.fromkeys(("transformer_front", "transformer_tail"), "linear"),
    "self-attention": "self-attention",
    "cross-attention": "cross-attention",
    **dict.fromkeys(("group_norm", "group_norm_silu", "layer_norm"), "norm"),
    # diffusers' SiLU of an image follows a group norm, and ours is part of it (as in groups.py).
    "aten::silu": "norm",
    **dict.fromkeys(("geglu", "residual_add"), "elementwise"),
    "sampler_update": "sampler",
}


def operator_name(schema_name: str) -> str:
    """What torch's operator is called here: "linear" for aten::addmm_; "aten::add", where it has no other name."""
    return _TORCH_NAMES.get(schema_name, schema_name)


def is_operator(name: str) -> bool:
    """Whether a range of that name is an operator's."""
    return name in _CLASS_OF or "::" in name


def class_of(operator: str, *, in_network: bool = True) -> OperatorClass:
    """The class of an operator by its name.

    What has no class of its own is elementwise: sums, activations, copies, concatenations. All that runs outside
    the network is the sampler's.
    """
    return _CLASS_OF.get(operator, "elementwise") if in_network else "sampler"

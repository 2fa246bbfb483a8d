"""The classes that the operators of a step fall into: the roofline and the trace tell them apart alike."""

from __future__ import annotations

from typing import Literal, get_args

OperatorClass = Literal[
    "convolution", "linear", "self-attention", "cross-attention", "norm", "elementwise", "sampler"
]
# In the order of every table of them.
CLASSES: tuple[OperatorClass, ...] = get_args(OperatorClass)

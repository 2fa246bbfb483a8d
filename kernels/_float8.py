"""Quantization of rows to float8 (e4m3), for torch's scaled matmul (torch.nn.functional.scaled_mm, row-wise).

scale = max(|row|) * (1 / 448), at least 2^-126; quantized = row * (1 / scale), rounded to nearest, ties to even.
All is float32, so that a row and its scale give the same bits everywhere. The largest number of a row becomes 448,
the largest of e4m3: nothing overflows. NaN stays NaN and does not count for the scale. A row with an infinity has
an infinite scale, NaN for the infinity and zeros beside it, so that its products are NaN.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._checks import tensors
from ._launch import chip_of
from ._library import refuse_forward_mode
from ._triton import is_interpreted, jit, tl

FLOAT8 = torch.float8_e4m3fn
# The largest finite number of e4m3.
LARGEST = 448.0
# Of a scale: its reciprocal is finite. Rows of zeros have it.
SMALLEST_SCALE = 2.0**-126

# Elements of the smallest tile: a thread of one warp has two, which one instruction converts.
LEAST_TILE = 64


def float8_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., C], a float, by row in plain torch: (float8_e4m3fn [..., C], scale float32 [rows, 1]).

    quantized * scale is x, off by at most 2^-4 of each number or 2^-10 of the scale. `layer_norm` and `geglu`
    quantize their own results so as they write them.
    """
    tensors(float8_rows, (x,))
    if x.ndim < 1 or not x.shape[-1] or not x.is_floating_point():
        raise ValueError(f"float8_rows: x must be a float [..., C] with channels; got {x.dtype} {list(x.shape)}")
    if not x.numel():
        return empty_float8(x)
    rows = x.reshape(-1, x.shape[-1]).float()
    largest = rows.abs().masked_fill(rows.isnan(), 0.0).amax(1, keepdim=True)
    scale = (largest * (1 / LARGEST)).clamp_min(SMALLEST_SCALE)
    return (rows * scale.reciprocal()).to(FLOAT8).view(x.shape), scale


def empty_float8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Not yet computed: what `float8_rows` returns of x."""
    quantized = torch.empty(x.shape, dtype=FLOAT8, device=x.device)
    return quantized, torch.empty((math.prod(x.shape[:-1]), 1), dtype=torch.float32, device=x.device)


def refuse_gradients(name: str, arguments: Sequence[Any]) -> None:
    """ValueError where autograd would follow a quantization, which has no derivatives."""
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in arguments):
        raise ValueError(f"{name}: float8 has no gradients; call it in torch.no_grad() or without float8")
    refuse_forward_mode(name, arguments)


def float8_reasons(kernel: Any, x: Tensor) -> list[str]:
    """Why `kernel` cannot convert to float8 on the device of x; empty if it can."""
    if is_interpreted(kernel):
        return ["triton's interpreter cuts off what it converts to float8"]
    arch = chip_of(x.device).arch
    if not arch.startswith("sm_") or int(arch.removeprefix("sm_")) < 89:
        return [f"{arch} has no conversion to float8_e4m3fn: it takes compute capability 8.9 or later"]
    return []


@jit
def float8_scale(largest):
    """The scale of rows whose largest magnitudes these are, and its reciprocal."""
    # 1 / 448 in float32.
    scale = tl.maximum(largest * 0.002232142857142857, 1.1754943508222875e-38)
    return scale, tl.div_rn(1.0, scale)

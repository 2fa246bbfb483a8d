"""An activation, and how a step writes one and reads it again.

Activations are [B, C, H, W] in channels-last memory, which is [B, H * W, C] tokens read another way. Convolutions
take the image, linear layers and attention the tokens; no layout is copied. Where nobody but a step sees them they
travel as `Written`, with the statistics that the next norm needs beside them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldmperf.kernels import Conv3x3Call, conv3x3, conv3x3_backend, residual_add

from .choices import Choices

# Of more pixels a group norm is two launches, of which statistics beside its input spare one.
_FEW_PIXELS = 256


class Written(NamedTuple):
    """An image [B, C, H, W] and its statistics (`channel_statistics`), None where nobody left them."""

    image: Tensor
    statistics: Tensor | None = None

    @classmethod
    def of(cls, x: Tensor | Written) -> Written:
        """x, without statistics if it has none."""
        return x if isinstance(x, Written) else cls(x)


Image = Tensor | Written


def normed(norm: nn.Module, x: Image, x_bias: Tensor | None, skip: Image | None = None) -> Tensor:
    """The norm of x + x_bias, with the channels of skip beside those of x.

    A norm that somebody put in place of ours need not know of statistics: they are passed where there are some.
    """
    x, beside = Written.of(x), Written.of(skip) if skip is not None else None
    arguments = [x_bias, None if beside is None else beside.image, x.statistics]
    arguments.append(None if beside is None else beside.statistics)
    while arguments and arguments[-1] is None:
        arguments.pop()
    out: Tensor = norm(x.image, *arguments)
    return out


def convolved(x: Tensor, weight: Tensor, stride: int, choices: Choices, travels: bool) -> Written:
    """The 3x3 convolution of x, by our kernel or torch's, with statistics if it left some."""
    found = merged(x, weight, stride, choices, travels)
    return found or Written(F.conv2d(x, weight, stride=stride, padding=1))


def merged(
    x: Tensor,
    weight: Tensor,
    stride: int,
    choices: Choices,
    travels: bool,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    shortcut: Tensor | None = None,
    skip: Tensor | None = None,
    shortcut_weight: Tensor | None = None,
) -> Written | None:
    """The 3x3 convolution of x and what stands beside it, as of `conv3x3`; None where `choices` take torch's.

    Statistics are left where they travel and a norm of this size reads them.
    """
    if choices.convolutions == "torch":
        return None
    leaves = travels and wants_statistics(x, choices, stride)
    call = Conv3x3Call(x, weight, bias, stride, False, shortcut, skip, shortcut_weight, residual, leaves)
    if conv3x3_backend(call, choices.convolutions) == "torch":
        return None
    found = conv3x3(**call._asdict(), backend="triton")
    return Written(*found) if isinstance(found, tuple) else Written(found)


def wants_statistics(x: Tensor, choices: Choices, stride: int = 1) -> bool:
    """Whether statistics are wanted beside what a kernel writes, which has the size of x over `stride`."""
    return choices.statistics != "torch" and x.shape[2] * x.shape[3] > _FEW_PIXELS * stride**2


def summed(
    x: Tensor, h: Tensor, bias: Tensor | None, size: torch.Size | None, choices: Choices, travels: bool
) -> Image:
    """x + h + bias, enlarged to `size`, with its statistics where they are wanted of sums too."""
    if travels and size is None and choices.statistics == "triton" and wants_statistics(x, choices):
        return Written(*residual_add(x, h, bias, statistics=True, backend=choices.backend))
    total = residual_add(x, h, bias, size=size, backend=choices.backend)
    return Written(total) if travels else total


def matmul_add(x: Tensor, tokens: Tensor, weight: Tensor, in_place: bool) -> Tensor:
    """x + tokens weight^T in one matmul; x [B, C, H, W] or [B, N, C], tokens [B, N, K], weight [C, K].

    `in_place` overwrites x, except under autocast, where dtypes differ.
    """
    rows = (as_tokens(x) if x.ndim == 4 else x).flatten(0, 1)
    add = rows.addmm_ if in_place and tokens.dtype == rows.dtype == weight.dtype else rows.addmm
    out = add(tokens.flatten(0, 1), weight.t()).view(*tokens.shape[:2], weight.shape[0])
    return out if x.ndim == 3 else as_image(out, x.shape[2:])


def as_tokens(x: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, H * W, C], a view of channels-last memory."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def as_image(tokens: Tensor, size: torch.Size) -> Tensor:
    """[B, H * W, C] -> [B, C, H, W], a view: the result is channels-last."""
    return tokens.view(tokens.shape[0], *size, tokens.shape[2]).permute(0, 3, 1, 2)

"""The batch-invariant mode of the UNet: every image is evaluated alone, from memory of its own.

A sum's order, and so its last bits, may depend on the batch: libraries choose a matmul's or a convolution's
algorithm by all of its rows, our kernels choose tiles so that the batch fills the chip, and on a CPU the last
elements of a batch are computed by other code than those before. Alone, every call has one image's shapes, strides
and alignment, whatever the batch. docs/batch-invariance.md names the calls that differ.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor

from .arguments import Added

Function = TypeVar("Function", bound=Callable[..., Any])
Values = tuple[Tensor, tuple[Tensor, ...]]
_PLAIN = torch.contiguous_format


def conditioned(
    values: Callable[[Tensor, Tensor, Added], Values], t: Tensor, context: Tensor, added: Added
) -> Values:
    """values(t, context, added), `shifts` and `context` of a conditioning, of each image alone.

    t [K, B or 1]; context and what is added are of the batch, labels a tensor.
    """
    given = {name: x for name, x in added._asdict().items() if x is not None}
    found = [
        _uncompiled(values)(
            _alone(t, i, 1),
            _alone(context, i),
            added._replace(**{name: _alone(x, i) for name, x in given.items()}),
        )
        for i in range(context.shape[0])
    ]
    # Shifts that all images share are kept once, as for one.
    is_shared = t.shape[1] == 1 and not given
    shifts = [shifts for shifts, _ in found[: 1 if is_shared else None]]
    contexts = zip(*(contexts for _, contexts in found), strict=True)
    return torch.cat(shifts, dim=1), tuple(torch.cat(of_images, dim=1) for of_images in contexts)


def evaluated(
    evaluation: Callable[[Tensor, Tensor, Iterable[Tensor]], Tensor],
    sample: Tensor,
    shifts: Tensor,
    contexts: Iterable[Tensor],
) -> Tensor:
    """evaluation(sample, shifts, contexts) of each image alone; sample [B, ...], shifts [B or 1, S]."""
    images = [
        _uncompiled(evaluation)(
            _alone(sample, i, memory_format=torch.channels_last),
            _alone(shifts, i),
            [_alone(packed, i, 1) for packed in contexts],
        )
        for i in range(sample.shape[0])
    ]
    return torch.cat(images)


def _alone(x: Tensor, image: int, dim: int = 0, memory_format: torch.memory_format = _PLAIN) -> Tensor:
    """An image's part of x, whose images lie along `dim`, in memory of its own; what all share, if dim has one.

    A copy, as a slice begins wherever the images before it end, and libraries choose by alignment too.
    """
    return x.narrow(dim, image if x.shape[dim] > 1 else 0, 1).clone(memory_format=memory_format)


def _uncompiled(function: Function) -> Function:
    """The function, which torch.compile leaves as it is: it would make one piece of code of all images."""
    # Importing torch's compiler takes a second, and nobody compiles without.
    return torch.compiler.disable(function) if "torch._dynamo" in sys.modules else function

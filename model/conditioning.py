"""The values that a trajectory keeps: `Conditioning` from `UNet.condition`, `Constants` from `UNet.constants`."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field, replace

import torch.nn.functional as F
from torch import Tensor

from .staleness import MadeFrom


@dataclass(frozen=True)
class Constants:
    """The part of a conditioning that depends on the weights alone: `values` [N], the deferred biases."""

    values: Tensor
    made_from: MadeFrom | None = None

    def check(self) -> None:
        """Raises ValueError, in one line, where the network's weights have changed since."""
        if self.made_from is not None:
            self.made_from.check("the constants", "make them anew with UNet.constants()")


@dataclass(frozen=True)
class Conditioning:
    """The inputs of `UNet.denoise` that do not change in a trajectory.

    `shifts` [K, B or 1, S]: for each of K steps the time projection plus the first convolution's bias of every
    ResBlock, side by side in the order of the route. `context`: for every transformer, in the same order, the keys
    and values [N, B, T, 2, heads, D] of its N attentions that read the context, block by block. `constants` [N]:
    the deferred biases, those of each stop (`Biases`) and the last norm's. `made_from`: a mark of the weights that
    these values were computed from.

    The tensors are few and dense, because each run of a captured step copies them.
    """

    shifts: Tensor
    context: tuple[Tensor, ...]
    constants: Tensor
    made_from: MadeFrom | None = field(default=None, compare=False, repr=False, metadata={"tensors": False})

    @property
    def num_steps(self) -> int:
        return self.shifts.shape[0]

    def check(self) -> None:
        """Raises ValueError, in one line, where the network's weights have changed since."""
        if self.made_from is not None:
            self.made_from.check("the values of this conditioning", "make it anew with UNet.condition()")

    def padded(self, steps: int) -> Conditioning:
        """The same for `steps` steps, with zeros beyond its own; raises ValueError for fewer than its own."""
        missing = operator.index(steps) - self.shifts.shape[0]
        if missing < 0:
            raise ValueError(
                f"the conditioning holds {self.shifts.shape[0]} steps, more than {steps}: give as many at least"
            )
        return replace(self, shifts=F.pad(self.shifts, (0, 0, 0, 0, 0, missing)))

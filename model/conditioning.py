"""What `UNet.condition` and `UNet.constants` return: values that are computed once and kept."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field, replace

import torch.nn.functional as F
from torch import Tensor

from .staleness import MadeFrom


@dataclass(frozen=True)
class Constants:
    """What of a conditioning depends on the weights alone, from `UNet.constants`: `values` [N]."""

    values: Tensor
    made_from: MadeFrom | None = None

    def check(self) -> None:
        """Raises ValueError, in one line, where the network's weights have changed since."""
        if self.made_from is not None:
            self.made_from.check("the constants", "make them anew with UNet.constants()")


@dataclass(frozen=True)
class Conditioning:
    """What does not change in a trajectory, from `UNet.condition`.

    `shifts` [K, B or 1, S]: for each of K steps the sum of time projection and first convolution's bias of every
    ResBlock, side by side in the order in which they run. `context`: of every transformer, in that order, the keys
    and values [L, B, T, 2, heads, D] of its L blocks. `constants` [N]: the deferred biases (`Biases`) of every stop
    of the route, then of the norm at the end; they depend on the weights alone.
    `made_from`: a mark of the weights that all this was computed from, or None where nobody keeps it.

    Few tensors, and dense ones, as each run of a captured step copies them.
    """

    shifts: Tensor
    context: tuple[Tensor, ...]
    constants: Tensor
    made_from: MadeFrom | None = field(default=None, compare=False, repr=False, metadata={"tensors": False})

    def check(self) -> None:
        """Raises ValueError, in one line, where the network's weights have changed since."""
        if self.made_from is not None:
            self.made_from.check("the values of this conditioning", "make it anew with UNet.condition()")

    def padded(self, steps: int) -> Conditioning:
        """The same with room for `steps` steps, zeros in those beyond its own; raises ValueError for fewer."""
        missing = operator.index(steps) - self.shifts.shape[0]
        if missing < 0:
            raise ValueError(
                f"the conditioning holds {self.shifts.shape[0]} steps, more than {steps}: give as many at least"
            )
        return replace(self, shifts=F.pad(self.shifts, (0, 0, 0, 0, 0, missing)))

"""What a kind of rival has to say: its network, the arguments of an evaluation, its trajectory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..trajectory.backend import Trajectory
from ..trajectory.case import Case
from ..trajectory.network import randomize

# Pixels of an image for each latent pixel, along a side.
LATENT_PIXELS = 8


@dataclass(frozen=True)
class RivalInputs:
    """What a rival's trajectory starts from; the same values go to every backend of a group.

    arguments: of the network's first evaluation, by name, in the case's dtype. seeds: one for each image, of what
    a trajectory draws, unless tokens(k) [B, h, w] gives what evaluation k reads.
    """

    arguments: Mapping[str, Tensor]
    seeds: tuple[int, ...]
    tokens: Callable[[int], Tensor] | None = None

    def to(self, dtype: torch.dtype) -> RivalInputs:
        """The same values for a network in another dtype."""
        return replace(self, arguments={name: cast(value, dtype) for name, value in self.arguments.items()})


def cast(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Real numbers in that dtype; whole ones as they are."""
    return value.to(dtype) if value.is_floating_point() else value


class RivalKind(ABC):
    """A kind of generator at one size. Its trajectory is one evaluation unless it says more."""

    # Whether a timed trajectory draws what the check is given.
    is_stochastic = False

    @abstractmethod
    def network(self, case: Case) -> nn.Module:
        """The network for the case's image, on the device of the context, its weights not yet set.

        Raises `Unsupported` for an image that it cannot make, and where a package is missing.
        """

    @abstractmethod
    def arguments(self, case: Case, generator: torch.Generator) -> dict[str, Tensor]:
        """The arguments of the network's first evaluation, by name: random, in float32, on the CPU."""

    def initialize(self, network: nn.Module, seed: int) -> None:
        """Sets the weights: random, of unit gain."""
        randomize(network, seed)

    def tokens(self, case: Case) -> Callable[[int], Tensor] | None:
        """Of the check: what evaluation k reads, where a timed trajectory draws it."""
        return None

    def trajectory(self, network: Callable[..., Any], case: Case) -> Trajectory:
        """From `RivalInputs` to the result of a sample; `network` may be compiled."""
        return lambda inputs: network(**inputs.arguments)

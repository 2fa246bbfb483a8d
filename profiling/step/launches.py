"""A GPU launch as a value, its floor (the least time that it can take on an H200), and sums over launches."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

from ..machines import BYTES_PER_S, EXPONENTIALS_PER_S, FLOP_PER_S

# "sampler" is all that is launched outside the network.
LaunchGroup = Literal[
    "convolution",
    "linear",
    "attention",
    "group norm",
    "layer norm",
    "GEGLU",
    "elementwise and residual",
    "copies",
    "sampler",
]

GROUPS: tuple[LaunchGroup, ...] = get_args(LaunchGroup)


@dataclass(frozen=True)
class GpuLaunch:
    """One launch; `reads` and `writes` are shapes as text. is_ours: of a kernel of ours, and not of torch's."""

    name: str
    group: LaunchGroup
    reads: str
    writes: str
    nbytes: int
    flops: int = 0
    exponentials: int = 0
    is_ours: bool = False

    @property
    def floor_s(self) -> float:
        """The floor without softmax: seconds of its bytes or of its matmuls, the longer of both."""
        return max(self.nbytes / BYTES_PER_S, self.flops / FLOP_PER_S)

    @property
    def compute_floor_s(self) -> float:
        """The floor without memory: seconds of its matmuls or of its softmax, the longer of both."""
        return max(self.flops / FLOP_PER_S, self.exponentials / EXPONENTIALS_PER_S)

    @property
    def longest_floor_s(self) -> float:
        """The floor: the longest of all three."""
        return max(self.floor_s, self.compute_floor_s)


@dataclass(frozen=True)
class Total:
    """Sums over launches."""

    launches: int
    nbytes: int
    flops: int
    exponentials: int
    floor_s: float
    compute_floor_s: float
    longest_floor_s: float


def total(launches: Iterable[GpuLaunch]) -> Total:
    """The sums. Every launch takes its own floor, as no launch overlaps another."""
    launches = list(launches)
    return Total(
        launches=len(launches),
        nbytes=sum(launch.nbytes for launch in launches),
        flops=sum(launch.flops for launch in launches),
        exponentials=sum(launch.exponentials for launch in launches),
        floor_s=sum(launch.floor_s for launch in launches),
        compute_floor_s=sum(launch.compute_floor_s for launch in launches),
        longest_floor_s=sum(launch.longest_floor_s for launch in launches),
    )

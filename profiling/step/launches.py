"""A GPU launch as a value, what it takes at least, and sums over a step's launches."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

# "sampler" is all that is launched outside the network.
Group = Literal[
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

GROUPS: tuple[Group, ...] = get_args(Group)

# What an H200 reaches in practice: memory, bf16 matrix products, exponentials.
BYTES_PER_S = 4.07e12
FLOP_PER_S = 742e12
EXP_PER_S = 3.87e12


@dataclass(frozen=True)
class GpuLaunch:
    """One launch. `reads` and `writes` tell shapes; `first_result` is the bytes of what it returns first."""

    name: str
    group: Group
    reads: str
    writes: str
    nbytes: int
    flops: int = 0
    exponentials: int = 0
    first_result: int = 0

    @property
    def floor_s(self) -> float:
        """Seconds that its bytes or its matrix work take at least, whichever is more."""
        return max(self.nbytes / BYTES_PER_S, self.flops / FLOP_PER_S)

    @property
    def compute_floor_s(self) -> float:
        """Seconds that its matrix work or its softmax takes at least, whichever is more."""
        return max(self.flops / FLOP_PER_S, self.exponentials / EXP_PER_S)

    @property
    def longest_floor_s(self) -> float:
        """The longer of both."""
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
    """The sums; every launch takes its own floor, as none overlaps another."""
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

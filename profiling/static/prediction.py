"""A prediction of the cycles that each unit of a multiprocessor needs. Nothing here is measured.

The model counts: instructions times 32 lanes over the lanes of their unit, with perfect overlap, no stall, no bank
conflict and no cache. It tells which unit cannot be the limit and which may be; a time it does not tell.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..machines import Machine
from .sass import Instruction
from .units import is_global, unit_counts, width


@dataclass(frozen=True)
class Traffic:
    """Bytes that a program moves from and to memory in what is predicted, those through L2 where they differ, and
    what that is."""

    memory: float
    l2: float | None
    per: str


@dataclass(frozen=True)
class Prediction:
    """Predicted cycles of a multiprocessor for one program's pass over the region, by unit, and the longest."""

    cycles: Mapping[str, float]
    memory_bytes: float
    per_pass: str

    @property
    def bound(self) -> str:
        return max(self.cycles, key=lambda unit: self.cycles[unit])


def asked_bytes(region: Sequence[Instruction]) -> int:
    """The bytes that a thread's global instructions ask for."""
    return sum(width(instruction) for instruction in region if is_global(instruction))


def predict(
    machine: Machine, region: Sequence[Instruction], num_warps: int, traffic: Traffic | None = None
) -> Prediction:
    """The prediction for a region that each of a program's warps passes once.

    Without `traffic`, of the loop that the region then is: the bytes that its global instructions ask for, as if
    no lane were masked, no two asked for the same and all came from memory.
    """
    counts = unit_counts(region)
    cycles = {
        unit: num_warps * machine.warp_size * counts[unit] / lanes
        for unit, lanes in machine.lanes.items()
        if counts[unit]
    }
    if traffic is None:
        asked = num_warps * machine.warp_size * asked_bytes(region)
        traffic = Traffic(float(asked), None, "a pass of the loop by one program")
    cycles["memory"] = traffic.memory / machine.memory_bytes_per_cycle
    if traffic.l2 is not None:
        cycles["L2"] = traffic.l2 / machine.l2_bytes_per_cycle
    return Prediction(cycles, traffic.memory, traffic.per)

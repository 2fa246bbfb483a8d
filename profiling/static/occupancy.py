"""How many programs and warps of a kernel fit on an NVIDIA multiprocessor, by the occupancy calculator's rules."""

from __future__ import annotations

from dataclasses import dataclass

from ..machines import Machine

# Registers are handed out by the warp in units of 256, and a warp belongs to one of four partitions.
_REGISTER_UNIT = 256
_PARTITIONS = 4
_SHARED_UNIT = 128
# The driver keeps 1 KiB of shared memory of each block (compute capability 8.0 and later).
_SHARED_RESERVED = 1024


@dataclass(frozen=True)
class Occupancy:
    """Programs and warps resident at once; what limits them: "registers", "shared memory", "warps", "blocks"."""

    programs: int
    warps: int
    max_warps: int
    limit: str

    @property
    def fraction(self) -> float:
        return self.warps / self.max_warps


def occupancy(machine: Machine, *, registers: int, shared: int, num_warps: int) -> Occupancy:
    """The occupancy of programs of `num_warps` warps, `registers` a thread and `shared` bytes; 0 if none fits."""
    per_warp = max(_round_up(registers * machine.warp_size, _REGISTER_UNIT), _REGISTER_UNIT)
    partition = machine.registers_per_multiprocessor // _PARTITIONS
    warps_by_registers = partition // per_warp * _PARTITIONS
    per_block = _round_up(shared + _SHARED_RESERVED, _SHARED_UNIT)
    limits = {
        "warps": machine.max_warps // num_warps,
        "registers": warps_by_registers // num_warps if registers <= machine.max_registers else 0,
        "shared memory": machine.shared_per_multiprocessor // per_block
        if shared <= machine.shared_per_block
        else 0,
        "blocks": machine.max_blocks,
    }
    limit = min(limits, key=lambda name: limits[name])
    programs = limits[limit]
    return Occupancy(programs, programs * num_warps, machine.max_warps, limit)


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit

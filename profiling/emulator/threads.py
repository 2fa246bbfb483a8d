"""The threads of some programs of a launch, in lock step: their registers, memories and masks.

A register is an array of [lanes], one element for each thread of all the programs, or of [1] where all agree. An
instruction computes for all lanes; those that are elsewhere in the code are masked when it writes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .findings import Findings
from .global_memory import GlobalMemory
from .lane_accesses import LaneAccess
from .memory import EmulatedMemory
from .numerics import Numerics
from .program import DTYPES, UNSIGNED, PtxInstruction, PtxProgram
from .tallies import Tallies

Array = NDArray[Any]
_BOOL = DTYPES["pred"]
# Instructions that move bytes, and may move those of registers that nothing wrote.
_PACKING = ("mov", "prmt", "bfi")
# What a register holds before it is written, by its bytes: a NaN where it is a float.
_POISON = {1: 0xEE, 2: 0xFFF7, 4: 0xFFFEDEAD, 8: 0xFFFEDEADFFFEDEAD}


@dataclass
class Flight:
    """An asynchronous copy or matmul on its way.

    lanes   the threads that issued it, `group` how many groups each had committed before
    detail  what finishes it: of a copy its places and bytes, of a matmul its registers and granules
    """

    lanes: Array
    group: Array
    detail: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class LaunchGrid:
    """A launch: programs in three dimensions, the values of the parameters by name, bytes of shared memory.

    dependent  whether launches before it may still run, until it waits for them (griddepcontrol.wait)
    """

    size: tuple[int, int, int]
    parameters: Mapping[str, Array]
    shared: int
    dependent: bool = False

    @property
    def programs(self) -> int:
        x, y, z = self.size
        return x * y * z


class Threads:
    """Programs `first` to `first + programs` of a launch.

    size        threads of a program; `lanes` of all the programs. `launched`: programs of the whole launch
    mask        [lanes] which lanes are here, `count` of them; `full` where all are
    now         the instruction that is executed, and `place` its index
    copies      cp.async on their way, and `products` wgmma
    early       [lanes] which have not waited for the launches before this one; None where all have
    """

    def __init__(
        self,
        program: PtxProgram,
        grid: LaunchGrid,
        first: int,
        programs: int,
        memory: GlobalMemory,
        numerics: Numerics,
        findings: Findings,
        tallies: Tallies,
    ) -> None:
        self.program, self.grid, self.numerics = program, grid, numerics
        self.findings, self.tallies = findings, tallies
        self.size, self.programs, self.launched = program.threads, programs, grid.programs
        self.lanes = programs * self.size
        self.lane_index = np.arange(self.lanes)
        self.program_of = self.lane_index // self.size  # in this chunk
        self.gid = (first * self.size + self.lane_index).astype(np.int32)
        self.program_id = (first + self.program_of).astype(np.int32)
        self.lane_of_warp = self.lane_index & 31
        self._special = self._special_registers()
        self._registers: dict[str, Array] = {}
        # The time of each program's last barrier, of each warp's last barrier or shuffle, and of its last barrier.
        self.epoch, self.warp_epoch = np.zeros(programs, np.int32), np.zeros(-(-self.lanes // 32), np.int32)
        self.synced = self.warp_epoch
        self.space = -(-max(grid.shared, 16) // 1024) * 1024
        self.memory = memory
        fences_matter = any(i.opcode == "wgmma" for i in program.instructions)
        granule = program.granules["shared"]
        self.shared = EmulatedMemory("shared", self.space, programs, granule, fences_matter=fences_matter)
        self.copies: list[Flight] = []
        self.products: list[Flight] = []
        self.copy_group, self.product_group = np.zeros(self.lanes, np.int32), np.zeros(self.lanes, np.int32)
        self.early: Array | None = np.ones(self.lanes, bool) if grid.dependent else None
        self.held: dict[str, Array] = {}  # registers of wgmma on their way: [warp groups]
        self.now = program.instructions[0]
        self.place = 0
        self.set_mask(np.ones(self.lanes, bool))

    def _special_registers(self) -> dict[str, Array]:
        """PTX ISA 10."""
        x, y, _ = self.grid.size
        program = self.program_id.astype(np.uint32)
        thread = (self.lane_index % self.size).astype(np.uint32)
        zero, one = np.zeros(1, np.uint32), np.ones(1, np.uint32)
        grid = {f"%nctaid.{axis}": np.array([n], np.uint32) for axis, n in zip("xyz", self.grid.size, strict=True)}
        return grid | {
            "%tid.x": thread,
            "%tid.y": zero,
            "%tid.z": zero,
            "%ntid.x": np.array([self.size], np.uint32),
            "%ntid.y": one,
            "%ntid.z": one,
            "%ctaid.x": program % np.uint32(x),
            "%ctaid.y": program // np.uint32(x) % np.uint32(y),
            "%ctaid.z": program // np.uint32(x * y),
            "%laneid": thread & np.uint32(31),
            "%warpid": thread >> np.uint32(5),
        }

    # ------------------------------------------------------------ masks

    def set_mask(self, mask: Array) -> None:
        """The lanes that are at this instruction from here on."""
        self.mask = mask
        self.count = int(np.count_nonzero(mask))
        self.full = self.count == self.lanes
        self._active: Array | None = self.lane_index if self.full else None

    @property
    def active(self) -> Array:
        """Indices of the lanes that are here."""
        if self._active is None:
            self._active = np.flatnonzero(self.mask)
        return self._active

    def guarded(self, instruction: PtxInstruction) -> Array:
        """[lanes]: those that are here and pass the instruction's guard."""
        if instruction.guard is None:
            return self.mask
        passes = np.broadcast_to(self.register(instruction.guard, _BOOL), (self.lanes,))
        here: Array = self.mask & (~passes if instruction.negated else passes)
        return here

    def whole_warps(self) -> Array:
        """Numbers of the warps that are here; reports those of which only a part is."""
        if self.full:
            return np.arange(self.lanes // 32)
        here = self.mask.reshape(-1, 32)
        some = here.any(axis=1)
        if (some & ~here.all(axis=1)).any():
            self.report("divergent warp", int((some & ~here.all(axis=1)).sum()))
        return np.flatnonzero(some)

    # ------------------------------------------------------------ registers

    def register(self, name: str, dtype: np.dtype[Any]) -> Array:
        """[lanes] or [1] of `dtype`: a register's bits, of which a narrower dtype takes the lowest."""
        value = self._registers.get(name)
        if value is None:
            value = self._special.get(name)
            if value is None:
                # LLVM packs bytes that it does not care for beside others, and takes them out again.
                if self.now.opcode not in _PACKING:
                    self.report("unwritten register", 1, name)
                value = np.array([_POISON[dtype.itemsize]], UNSIGNED[dtype.itemsize])
        if value.dtype is dtype:
            return value
        if value.dtype.itemsize != dtype.itemsize:
            if value.dtype is _BOOL or dtype is _BOOL:
                return value.astype(dtype)
            value = value.view(UNSIGNED[value.dtype.itemsize]).astype(UNSIGNED[dtype.itemsize])
        return value.view(dtype)

    def write(self, name: str, value: Array) -> None:
        """Sets a register where lanes are here; "_" takes nothing."""
        if name == "_":
            return
        if not self.full:
            old = self._registers.get(name)
            if old is None:
                poison = value.dtype is not _BOOL and _POISON[value.dtype.itemsize]
                unsigned = UNSIGNED[value.dtype.itemsize]
                old = np.array([poison], unsigned if value.dtype is not _BOOL else _BOOL)
            value = np.where(self.mask, value, old if old.dtype is value.dtype else old.view(value.dtype))
        self._registers[name] = value

    def active_values(self, value: Array) -> Array:
        """What a reader gave, of the lanes that are here: [active]."""
        if self.full and len(value) == self.lanes:
            return value
        return np.broadcast_to(value, (self.lanes,))[self.active]

    def write_active(self, name: str, value: Array) -> None:
        """Sets a register from [active] values."""
        if self.full:
            self.write(name, value)
        elif name != "_":
            whole = np.zeros(self.lanes, value.dtype)
            whole[self.active] = value
            self.write(name, whole)

    # ------------------------------------------------------------ accesses

    def access(self, start: Array, size: int, lanes: Array, *, wide: bool = False) -> LaneAccess:
        """What a memory notes of these lanes' accesses at byte positions of its own."""
        told = (self.gid, self.program_id, self.program_of)
        gid, program, epoch = told if lanes is self.lane_index else (array.take(lanes) for array in told)
        return LaneAccess(
            start,
            size,
            gid,
            program,
            self.epoch.take(epoch),
            self.warp_epoch.take(lanes >> 5),
            self.synced.take(lanes >> 5),
            self.place,
            wide,
        )

    def made_now(self, access: LaneAccess, lanes: Array) -> LaneAccess:
        """An earlier access of these lanes as if they made it now."""
        epoch = self.epoch[self.program_of[lanes]]
        return replace(access, epoch=epoch, warp_epoch=self.warp_epoch[lanes >> 5])

    def waited(self) -> None:
        """The lanes that are here have waited for the launches before this one."""
        if self.early is not None:
            early = self.early & ~self.mask
            self.early = early if early.any() else None

    def without_wait(self) -> int:
        """How many programs no thread has waited of."""
        if self.early is None:
            return 0
        return int(self.early.reshape(self.programs, self.size).all(axis=1).sum())

    def report(self, kind: str, count: int = 1, detail: str = "") -> None:
        """A finding at this instruction."""
        self.findings.add(kind, self.now, int(count), detail)

"""Counts of what was executed: instructions by class and source line, bytes, sectors, bank conflicts, divergence.

They are counts of PTX. ptxas drops its moves and computes addresses otherwise; what a warp accesses and where it
branches stays.

Global memory moves in sectors of 32 bytes: a warp's access takes as many as it touches (CUDA C++ Best Practices
Guide, "Coalesced Access to Global Memory"). The fewest are those that its distinct bytes fill.

Shared memory has 32 banks of 4 bytes. A wavefront takes one word from each bank, for all lanes that want that
word. Lanes that want different words of one bank need a wavefront each: a conflict (CUDA C++ Programming Guide,
"Shared Memory" of compute capability 5.x and later). A warp with 8 bytes a lane is served in halves, with 16 bytes
in quarters. A matrix of ldmatrix is eight rows of 16 bytes, and so one wavefront without conflicts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .findings import lines_of
from .program import PtxInstruction, PtxProgram
from .ptx_classes import CLASSES, class_of_ptx, multiply_adds_of

Array = NDArray[Any]
SECTOR_BYTES = 32
# What a wavefront of shared memory moves: 32 banks of 4 bytes.
WAVEFRONT_BYTES = 128
_BANK_BYTES = 4
WARP = 32


@dataclass
class Executions:
    """How often instructions were executed: by warps, by lanes, and how many are in the code.

    A warp none of whose lanes pass the guard is not counted.
    """

    warps: int = 0
    lanes: int = 0
    code: int = 0

    @property
    def lanes_per_warp(self) -> float:
        """Of 32: how many lanes took part in an execution."""
        return self.lanes / max(self.warps, 1)

    def add(self, other: Executions) -> None:
        self.warps += other.warps
        self.lanes += other.lanes
        self.code += other.code


@dataclass
class Accesses:
    """Accesses to global or shared memory.

    warps    accesses of a warp, `bytes` what its lanes ask for
    touched  32-byte sectors of global memory, wavefronts of shared memory
    least    the fewest that the same bytes could take
    """

    warps: int = 0
    bytes: int = 0
    touched: int = 0
    least: int = 0

    @property
    def efficiency(self) -> float:
        """least / touched: coalescing of global memory; 1 without bank conflicts of shared memory."""
        return self.least / self.touched if self.touched else 1.0

    def add(self, other: Accesses) -> None:
        self.warps += other.warps
        self.bytes += other.bytes
        self.touched += other.touched
        self.least += other.least


class Counted(Protocol):
    """Of the threads that execute an instruction: which they are, how many, and the instruction's index."""

    mask: Array
    count: int
    place: int

    @property
    def active(self) -> Array: ...


class Tallies:
    """What a launch executed: `instructions` of threads; all else only where `detailed`.

    programs  of the launch; `launches`: several, where they were added together
    """

    def __init__(self, program: PtxProgram, *, detailed: bool = False, programs: int = 1) -> None:
        self.program, self.detailed, self.programs, self.launches = program, detailed, programs, 1
        self.instructions = 0
        count = len(program.instructions) if detailed else 0
        # By the instruction's index.
        self._warps, self._lanes, self._splits = [0] * count, [0] * count, [0] * count
        self._accesses: dict[tuple[int, str, str], Accesses] = {}
        self._place = 0
        self._mask: Array | None = None
        self._warps_here = 0

    # ------------------------------------------------------------ while a kernel runs

    def executed(self, threads: Counted) -> None:
        """The lanes that are here execute the instruction that they are at."""
        self.instructions += threads.count
        if not self.detailed:
            return
        self._place = threads.place
        self._warps[self._place] += self._warps_of(threads)
        self._lanes[self._place] += threads.count

    def branched(self, taken: Array, staying: Array) -> None:
        """The instruction just executed sends some lanes elsewhere."""
        if self.detailed:
            split = _any_of_warps(taken) & _any_of_warps(staying)
            self._splits[self._place] += int(split.sum())

    def accessed(
        self, threads: Counted, space: str, what: str, start: Array, size: int, lanes: Array | None = None
    ) -> None:
        """Lanes "read", "write" or change ("atomic") `size` bytes each at byte positions that size divides.

        space: "global" or "shared". lanes: [start] whose accesses they are; of all that are here, unless told.
        """
        if not self.detailed or not len(start):
            return
        lanes = threads.active if lanes is None else lanes
        found = self._accesses_at(threads.place, space, what)
        found.warps += int(_distinct(lanes // WARP).size)
        found.bytes += size * len(start)
        touched, least = (sectors if space == "global" else wavefronts)(lanes, start, size)
        found.touched += touched
        found.least += least

    def matmul_read(self, threads: Counted, nbytes: int) -> None:
        """Matmuls of warp groups read their operands from shared memory, which no lane asks for."""
        if self.detailed:
            self._accesses_at(threads.place, "shared", "matmul").bytes += nbytes

    def _accesses_at(self, place: int, space: str, what: str) -> Accesses:
        return self._accesses.setdefault((place, space, what), Accesses())

    def _warps_of(self, threads: Counted) -> int:
        """How many warps have lanes here. A mask lasts for many instructions."""
        if threads.mask is not self._mask:
            self._mask = threads.mask
            self._warps_here = int(_any_of_warps(threads.mask).sum())
        return self._warps_here

    # ------------------------------------------------------------ afterwards

    def add(self, other: Tallies) -> None:
        """Adds another launch of the same code."""
        if other.program is not self.program:
            raise ValueError(f"{other.program.name} is other code than {self.program.name}")
        self.instructions += other.instructions
        self.programs += other.programs
        self.launches += other.launches
        for own, others in (
            (self._warps, other._warps),
            (self._lanes, other._lanes),
            (self._splits, other._splits),
        ):
            own[:] = [a + b for a, b in zip(own, others, strict=True)]
        for key, accesses in other._accesses.items():
            self._accesses_at(*key).add(accesses)

    @property
    def executions(self) -> Executions:
        """Of all instructions."""
        return Executions(sum(self._warps), sum(self._lanes), len(self._warps))

    def by_class(self) -> dict[str, Executions]:
        """In the order of CLASSES, without those that the code has not."""
        return self._grouped(class_of_ptx, CLASSES)

    def by_line(self) -> dict[str, Executions]:
        """By the line of the kernel's source ("kernel.py:86 in kernel.py:334"), the most executed first."""
        lines = self._grouped(lambda i: lines_of(i.source), ())
        return dict(sorted(lines.items(), key=lambda item: -item[1].warps))

    def accesses(self) -> dict[tuple[str, str], Accesses]:
        """By (space, what): ("global", "read"), ("shared", "write"), ("shared", "matmul"), ..."""
        return self._grouped_accesses(lambda i, space, what: (space, what))

    def accesses_by_line(self) -> dict[tuple[str, str, str], Accesses]:
        """By (line of the kernel's source, space, what), the most wasteful first."""
        found = self._grouped_accesses(lambda i, space, what: (lines_of(i.source), space, what))
        return dict(sorted(found.items(), key=lambda item: item[1].least - item[1].touched))

    def lanes_by_ptx_line(self) -> dict[int, int]:
        """By the line of the PTX: how many lanes executed its instructions."""
        found: dict[int, int] = {}
        for i, lanes in zip(self.program.instructions, self._lanes, strict=False):
            found[i.line] = found.get(i.line, 0) + lanes
        return found

    @property
    def splits(self) -> int:
        """How often a branch sent lanes of one warp apart."""
        return sum(self._splits)

    def splits_by_line(self) -> dict[str, int]:
        """The branches that did, by the line of the kernel's source."""
        found: dict[str, int] = {}
        for i, count in zip(self.program.instructions, self._splits, strict=True):
            if count:
                line = lines_of(i.source)
                found[line] = found.get(line, 0) + count
        return found

    @property
    def multiply_adds(self) -> int:
        """Of matrix instructions, those on padding included."""
        each = zip(self.program.instructions, self._warps, strict=True)
        return int(sum(warps * multiply_adds_of(i) for i, warps in each if warps))

    def _executions(self, place: int) -> Executions:
        return Executions(self._warps[place], self._lanes[place], 1)

    def _grouped(self, key: Callable[[PtxInstruction], str], order: Iterable[str]) -> dict[str, Executions]:
        found: dict[str, Executions] = {name: Executions() for name in order}
        for place, i in enumerate(self.program.instructions[: len(self._warps)]):
            found.setdefault(key(i), Executions()).add(self._executions(place))
        return {name: executions for name, executions in found.items() if executions.code}

    def _grouped_accesses(self, key: Callable[[PtxInstruction, str, str], Any]) -> dict[Any, Accesses]:
        found: dict[Any, Accesses] = {}
        for (place, space, what), accesses in sorted(self._accesses.items()):
            found.setdefault(key(self.program.instructions[place], space, what), Accesses()).add(accesses)
        return found


# ---------------------------------------------------------------- what an access takes


def sectors(lanes: Array, start: Array, size: int) -> tuple[int, int]:
    """(sectors that accesses to global memory touch, the fewest that their bytes fill), warp by warp.

    lanes: [accesses] numbers of the threads; start: [accesses] byte positions, which size, at most
    32, divides.
    """
    warp = lanes // WARP
    touched, _ = _distinct_in(warp, start // SECTOR_BYTES)
    number, _ = _distinct_in(warp, start // size)
    return touched.size, int((-(-np.bincount(number) * size // SECTOR_BYTES)).sum())


def wavefronts(lanes: Array, start: Array, size: int) -> tuple[int, int]:
    """(wavefronts of accesses to shared memory, the fewest that their bytes take). Arguments as of `sectors`.

    Up to 4 bytes a lane, a warp at a time; 8 bytes, a half; 16 bytes, a quarter.
    """
    wide = max(size, _BANK_BYTES)
    at_once = WAVEFRONT_BYTES // wide
    number, cells = _distinct_in(lanes // at_once, start // wide)
    groups = int(number[-1]) + 1
    counts = np.bincount(number * at_once + cells % at_once, minlength=at_once * groups)
    # Lanes that are served together never want more than all banks: one wavefront is the least.
    return int(counts.reshape(-1, at_once).max(axis=1).sum()), groups


def _distinct_in(group: Array, position: Array) -> tuple[Array, Array]:
    """The distinct positions of each group: ([distinct] the number of their group, from 0; the positions)."""
    # One number of both: positions are less than the step.
    step = int(position.max()) + 1
    pairs = _distinct(group * step + position)
    groups = pairs // step
    return np.cumsum(_begins(groups)) - 1, pairs % step


def _distinct(values: Array) -> Array:
    """np.unique, without what it costs for few values."""
    ordered = np.sort(values)
    return ordered[_begins(ordered)]


def _begins(ordered: Array) -> Array:
    """[values]: where one differs from the one before."""
    return np.append(True, ordered[1:] != ordered[:-1])


def _any_of_warps(mask: Array) -> Array:
    return np.asarray(mask.reshape(-1, WARP).any(axis=1))

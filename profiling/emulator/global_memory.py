"""The tensors of a launch in one emulated global memory, of which only what they cover is legal."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..options import CaseError
from .lane_accesses import LaneAccess, WatchedThreads
from .memory import EmulatedMemory
from .poison import poisoned

Array = NDArray[Any]
# Addresses start here: an integer that is taken for one lies outside.
BASE = 1 << 36
# Bytes between storages, so that an access just past the end of one is in none.
GUARD = 4096
# Of programs and places: more than one.
_SEVERAL = -1


@dataclass
class _Region:
    """A storage in the memory's bytes.

    stored   whether the kernel may store there: if not, its reads need not be noted
    covered  whether tensors cover all of it, and `known` whether all of it is initialised
    """

    begin: int
    size: int
    tensor: Tensor
    stored: bool
    covered: bool = False
    known: bool = False

    @property
    def raw(self) -> Array:
        """The storage's bytes, shared with torch."""
        empty = torch.empty(0, dtype=torch.uint8)
        raw: Array = empty.set_(self.tensor.untyped_storage()).numpy()
        return raw


class GlobalMemory(EmulatedMemory):
    """Copies of the storages of `tensors`, with room between them.

    stored  whether the kernel may store to a tensor, by its position in `tensors`; `names`: the arguments' names

    Elements that are poisoned (poison.py) are uninitialised.
    CaseError for tensors whose storages overlap without being the same.
    """

    def __init__(
        self, tensors: Sequence[Tensor], stored: Sequence[bool], granule: int, names: Sequence[str] = ()
    ) -> None:
        self._named = list(zip(names, tensors, strict=False))
        self._regions: dict[int, _Region] = {}
        end = GUARD
        for tensor, is_stored in zip(tensors, stored, strict=True):
            storage = tensor.untyped_storage()
            key = storage.data_ptr()
            if key in self._regions and self._regions[key].size == storage.nbytes():
                self._regions[key].stored |= is_stored
                continue
            self._check_apart(key, storage.nbytes())
            # Of the alignment that the storage has: kernels are specialized by it.
            begin = -(-end // 256) * 256 + key % 256
            self._regions[key] = _Region(begin, storage.nbytes(), tensor, is_stored)
            end = begin + storage.nbytes() + GUARD
        granule = min([granule, *(tensor.element_size() for tensor in tensors)])
        super().__init__("global", end, 1, granule)
        count = self.total // granule
        self.legal = np.zeros(count, bool)
        # By granule: a program's number + 1, 0 for none. A place in the code + 1 that the last reads were at.
        self._writing_program, self._reading_program = np.zeros(count, np.int32), np.zeros(count, np.int32)
        self._read_place = np.zeros(count, np.int32)
        self._last_reads: dict[int, LaneAccess] = {}
        for region in self._regions.values():
            self.bytes[region.begin : region.begin + region.size] = region.raw
            self.written[self._span(region)] = True
        for tensor in tensors:
            self.legal[self._granules_of(tensor)] = True
            unwritten = poisoned(tensor)
            if unwritten.any():
                granules = self._elements_of(tensor, list(zip(tensor.shape, tensor.stride(), strict=True)))
                self.written[granules[unwritten.numpy().ravel()]] = False
        self._order = sorted(self._regions.values(), key=lambda region: region.begin)
        self._begins = [region.begin for region in self._order]
        for region in self._order:
            span = self._span(region)
            region.covered, region.known = bool(self.legal[span].all()), bool(self.written[span].all())
        # The region of an access is asked for twice: when it is located, and when it is noted.
        self._asked: tuple[Array | None, _Region | None] = (None, None)

    def _check_apart(self, key: int, size: int) -> None:
        for other, region in self._regions.items():
            if key < other + region.size and other < key + size:
                raise CaseError("two tensors share memory, and not one storage: they cannot be emulated together")

    def _span(self, region: _Region) -> slice:
        return slice(region.begin // self.granule, -(-(region.begin + region.size) // self.granule))

    def address(self, tensor: Tensor) -> int:
        """What a kernel takes for the tensor's data pointer."""
        region = self._regions[tensor.untyped_storage().data_ptr()]
        return BASE + region.begin + int(tensor.storage_offset()) * tensor.element_size()

    def _granules_of(self, tensor: Tensor) -> Array | slice:
        """Index of the granules that a tensor has elements in."""
        element, dense = tensor.element_size(), 1
        # Dimensions of stride 0 have the same elements again.
        sizes = [
            (n if stride else min(n, 1), stride) for n, stride in zip(tensor.shape, tensor.stride(), strict=True)
        ]
        for n, stride in sorted(sizes, key=lambda size: size[1]):
            dense *= n if n == 1 or stride == dense else 0
        if dense:
            begin = self.address(tensor) - BASE
            return slice(begin // self.granule, -(-(begin + dense * element) // self.granule))
        return self._elements_of(tensor, sizes).ravel()

    def _elements_of(self, tensor: Tensor, sizes: Sequence[tuple[int, int]]) -> Array:
        """[elements, granules of each] of a tensor of these (sizes, strides)."""
        index = np.zeros(1, np.int64)
        for n, stride in sizes:
            index = (index[:, None] + np.arange(n) * stride).ravel()
        each = np.arange(0, tensor.element_size(), self.granule)
        start: Array = self.address(tensor) - BASE + index[:, None] * tensor.element_size() + each
        return start // self.granule

    def told(self, byte: int) -> str:
        """As a pointer to elements: "x_ptr + 1000 of shape [1000]", by the argument that begins before it."""
        near = [(self.address(tensor) - BASE, name, tensor) for name, tensor in self._named if tensor.numel()]
        before = [found for found in near if found[0] <= byte] or near
        if not before or not -GUARD <= byte < self.size + GUARD:
            return f"address {byte + BASE:#x}, far from all tensors"
        begin, name, tensor = max(before, key=lambda found: found[0])
        elements, rest = divmod(byte - begin, tensor.element_size())
        where = f"{name} {'-' if elements < 0 else '+'} {abs(elements)}{f' and {rest} bytes' if rest else ''}"
        strides = "" if tensor.is_contiguous() else f", strides {list(tensor.stride())}"
        return f"{where} of shape {list(tensor.shape)}{strides}"

    def copy_back(self) -> None:
        """Stores the bytes into the tensors."""
        for region in self._order:
            if region.stored:
                region.raw[:] = self.bytes[region.begin : region.begin + region.size]

    # ------------------------------------------------------------ accesses

    def outside(self, start: Array, size: int) -> Array:
        """[lanes]: whether any byte is covered by no tensor."""
        region = self._region(start, size)
        if region is not None and region.covered:
            return np.zeros(len(start), bool)
        outside: Array = (start < 0) | (start > self.size - size)
        count = max(size // self.granule, 1)
        first = np.where(outside, 0, start) // (count * self.granule)
        legal: Array = np.asarray(self.legal.reshape(-1, count).take(first, axis=0).all(axis=1))
        return outside | ~legal

    def _region(self, start: Array, size: int) -> _Region | None:
        """The storage that all lanes access, if it is one."""
        asked, region = self._asked
        if asked is start:
            return region
        found = None
        if len(start):
            number = bisect.bisect_right(self._begins, int(start.min())) - 1
            if number >= 0:
                region = self._order[number]
                found = region if int(start.max()) + size <= region.begin + region.size else None
        self._asked = (start, found)
        return found

    def is_plain(self, start: Array, size: int) -> bool:
        """Whether a read is of a storage that is initialised and not stored to: it need not be noted."""
        region = self._region(start, size)
        return region is not None and region.known and not region.stored

    def saw_read(self, access: LaneAccess, threads: WatchedThreads) -> None:
        region = self._region(access.start, access.size)
        if region is not None and not region.stored:
            if not region.known:
                self.check_written(access, threads)
            return
        super().saw_read(access, threads)
        self._last_reads[access.place] = access
        if threads.launched == 1:
            return
        mine = access.program[:, None] + 1
        writer = self._of(self._writing_program, access)
        self._programs_race(
            "read of what another program wrote", (writer != 0) & (writer != mine), access, threads
        )
        reader = self._of(self._reading_program, access)
        if (reader == mine).all():
            return
        new = np.where((reader == 0) | (reader == mine), mine, _SEVERAL)
        self._spread(self._reading_program, access, new)
        clash = self._of(self._reading_program, access) != new
        if clash.any():
            self._reading_program[access.granules(self.granule)[clash]] = _SEVERAL

    def saw_write(
        self, access: LaneAccess, threads: WatchedThreads, differs: Callable[[], Array] | None = None
    ) -> None:
        self._expect_stores(access)
        if threads.launched > 1 and not access.atomic:
            mine = access.program[:, None] + 1
            reader = self._of(self._reading_program, access)
            race = (reader != 0) & (reader != mine)
            self._programs_race("write of what another program reads", race, access, threads)
            writer = self._of(self._writing_program, access)
            race = (writer != 0) & (writer != mine)
            if differs is not None and race.any():
                race &= differs()
            self._programs_race("write of what another program wrote", race, access, threads)
            self._spread(self._writing_program, access, mine)
        super().saw_write(access, threads, differs)

    def _expect_stores(self, access: LaneAccess) -> None:
        """Storages that are stored to though the kernel was not seen to."""
        region = self._region(access.start, access.size)
        if region is None:
            for number in np.unique(np.searchsorted(self._begins, access.start, "right") - 1):
                self._order[max(int(number), 0)].stored = True
        else:
            region.stored = True

    def check_in_flight(self, access: LaneAccess, threads: WatchedThreads) -> None:
        """No asynchronous instruction that is known writes global memory."""

    def passed_barrier(self) -> None:
        super().passed_barrier()
        self._last_reads.clear()

    def _programs_race(self, what: str, race: Array, access: LaneAccess, threads: WatchedThreads) -> None:
        if not race.any():
            return
        race = race & (access.granules(self.granule) < self.sink)
        if race.any():
            program = access.program[race.any(axis=1)][0]
            where = self.told(access.granules(self.granule)[race][0] * self.granule)
            threads.report("race of programs", race.sum(), f"{what}: program {program} at {where}")

    # ------------------------------------------------------------ what lanes of no use read

    def _enter_read(self, access: LaneAccess) -> None:
        # Before the stamps are entered, which tell whether the reads until now are of the same epoch.
        old = self._of(self._read_place, access)
        other = self._is_recent(access) & (old != access.place + 1)
        self._spread(self._read_place, access, np.where(other, _SEVERAL, access.place + 1))
        super()._enter_read(access)

    def _excused(self, access: LaneAccess) -> Array:
        """Whether the writer read the granule itself, by the instruction that all its readers read it by.

        Triton gives lanes that a tile has no elements for those of others, and lets only the first of them store:
        the others may read what that has overwritten, and use it for nothing. A scalar that all threads read and
        one overwrites looks the same, and is excused too.
        """
        places = self._of(self._read_place, access)
        excused = np.zeros(places.shape, bool)
        granules = access.granules(self.granule)
        for place in np.unique(places[places > 0]):
            read = self._last_reads.get(int(place) - 1)
            if read is None:
                continue
            own = np.searchsorted(read.gid, access.gid).clip(max=len(read.gid) - 1)
            first = (read.start[own] // self.granule)[:, None]
            inside = (granules >= first) & (granules < first + max(read.size // self.granule, 1))
            excused |= (places == place) & inside & (read.gid[own] == access.gid)[:, None]
        return excused

"""The tensors of a launch in one emulated global memory, of which only what they cover is legal."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .memory import NOBODY, SEVERAL, Access, EmulatedMemory
from .poison import poisoned

if TYPE_CHECKING:
    from .threads import Threads

Array = NDArray[Any]
# Addresses start here: an integer that is taken for one lies outside.
BASE = 1 << 36
# Bytes between storages, so that an access just past the end of one is in none.
GUARD = 4096


@dataclass
class _Region:
    """A storage in the memory's bytes. `stored`: the kernel may store there. `plain`: all of it may be read."""

    begin: int
    size: int
    tensor: Tensor
    stored: bool
    plain: bool = False

    @property
    def raw(self) -> Array:
        """The storage's bytes, shared with torch."""
        empty = torch.empty(0, dtype=torch.uint8)
        raw: Array = empty.set_(self.tensor.untyped_storage()).numpy()
        return raw


class GlobalMemory(EmulatedMemory):
    """Copies of the storages of `tensors`, with room between them.

    stored  whether the kernel may store to a tensor, by its position in `tensors`

    Elements that are poisoned (poison.py) are uninitialised.
    """

    def __init__(self, tensors: Sequence[Tensor], stored: Sequence[bool], granule: int) -> None:
        self._regions: dict[int, _Region] = {}
        end = GUARD
        for tensor, is_stored in zip(tensors, stored, strict=True):
            storage = tensor.untyped_storage()
            key = storage.data_ptr()
            if key in self._regions:
                self._regions[key].stored |= is_stored
                continue
            # Of the alignment that the storage has: kernels are specialized by it.
            begin = -(-end // 256) * 256 + key % 256
            self._regions[key] = _Region(begin, storage.nbytes(), tensor, is_stored)
            end = begin + storage.nbytes() + GUARD
        granule = min([granule, *(tensor.element_size() for tensor in tensors)])
        super().__init__("global", end, 1, granule)
        count = self.total // granule
        self.legal = np.zeros(count, bool)
        self._writing_program, self._reading_program = (np.full(count, NOBODY, np.int32) for _ in range(2))
        for key, region in self._regions.items():
            self.bytes[region.begin : region.begin + region.size] = region.raw
            self.written[self._span(region)] = True
        for tensor in tensors:
            granules = self.granules_of(tensor)
            self.legal[granules] = True
            unwritten = poisoned(tensor)
            if unwritten.any():
                elements = unwritten.numpy().ravel()
                self.written[granules.reshape(len(elements), -1)[elements]] = False
        self._order = sorted(self._regions.values(), key=lambda region: region.begin)
        self._begins = [region.begin for region in self._order]
        for region in self._order:
            span = self._span(region)
            region.plain = not region.stored and bool((self.legal[span] & self.written[span]).all())

    def _span(self, region: _Region) -> slice:
        return slice(region.begin // self.granule, -(-(region.begin + region.size) // self.granule))

    def address(self, tensor: Tensor) -> int:
        """What a kernel takes for the tensor's data pointer."""
        region = self._regions[tensor.untyped_storage().data_ptr()]
        return BASE + region.begin + tensor.storage_offset() * tensor.element_size()

    def granules_of(self, tensor: Tensor) -> Array:
        """The granules that a tensor has elements in."""
        index = np.zeros(1, np.int64)
        for count, stride in zip(tensor.shape, tensor.stride(), strict=True):
            index = (index[:, None] + np.arange(count) * stride).ravel()
        begin = self._regions[tensor.untyped_storage().data_ptr()].begin
        start = begin + (index + tensor.storage_offset()) * tensor.element_size()
        each = np.arange(0, tensor.element_size(), self.granule)
        return ((start[:, None] + each) // self.granule).ravel()

    def copy_back(self) -> None:
        """Stores the bytes into the tensors."""
        for region in self._order:
            if region.stored:
                region.raw[:] = self.bytes[region.begin : region.begin + region.size]

    # ------------------------------------------------------------ accesses

    def outside(self, start: Array, size: int) -> Array:
        """[lanes]: whether any byte is covered by no tensor."""
        if self._plain_region(start, size):
            return np.zeros(len(start), bool)
        outside = (start < 0) | (start + size > self.size)
        first = np.where(outside, 0, start) // self.granule
        legal = self.legal[first]
        for k in range(1, max(size // self.granule, 1)):
            legal &= self.legal[first + k]
        return outside | ~legal

    def _plain_region(self, start: Array, size: int) -> bool:
        """Whether all lanes read a storage that is initialised and is not stored to: nothing needs to be noted."""
        if not len(start):
            return True
        lowest = int(start.min())
        number = bisect.bisect_right(self._begins, lowest) - 1
        if number < 0:
            return False
        region = self._order[number]
        return region.plain and int(start.max()) + size <= region.begin + region.size

    def saw_read(self, access: Access, threads: Threads) -> None:
        if self._plain_region(access.start, access.size):
            return
        super().saw_read(access, threads)
        granules = access.granules(self.granule)
        writer, program = self._writing_program[granules], access.program[:, None]
        race = (writer >= 0) & (writer != program)
        self._programs_race("read of what another program wrote", granules, race, threads)
        reader = self._reading_program[granules]
        new = np.where((reader == NOBODY) | (reader == program), program, SEVERAL)
        self._reading_program[granules] = new
        clash = self._reading_program[granules] != new
        self._reading_program[granules[clash]] = SEVERAL

    def arrived(self, access: Access) -> None:
        super().arrived(access)
        self._writing_program[access.granules(self.granule)] = access.program[:, None]

    def check_in_flight(self, granules: Array, threads: Threads) -> None:
        """No asynchronous instruction that is known accesses global memory later than when it is issued."""

    def saw_write(self, access: Access, threads: Threads, differs: Any = None) -> None:
        granules = access.granules(self.granule)
        reader, writer = self._reading_program[granules], self._writing_program[granules]
        program = access.program[:, None]
        race = (reader != NOBODY) & (reader != program)
        self._programs_race("write of what another program reads", granules, race, threads)
        race = (writer >= 0) & (writer != program)
        if race.any() and differs is not None:
            race &= differs()[:, None]
        self._programs_race("write of what another program wrote", granules, race, threads)
        super().saw_write(access, threads, differs)

    def _programs_race(self, what: str, granules: Array, race: Array, threads: Threads) -> None:
        race = race & (granules < self.sink)
        if race.any():
            threads.report("race of programs", race.sum(), what)

"""Bytes of global or shared memory, and who wrote and read each granule since the last barrier.

A granule is the narrowest access of the kernel. Two accesses conflict where they are by different threads, one is a
write, and no barrier orders them: threads of a program between two barriers of it (a warp's between two of its own
`bar.warp.sync` too), threads of different programs always, in global memory.

Accesses are noted as they come, and looked at only when one comes that may conflict with them: between two barriers
a kernel mostly reads or mostly writes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from .threads import Threads

Array = NDArray[Any]
NOBODY, SEVERAL = -1, -2
# Bytes behind the end that out-of-bounds accesses are sent to.
SINK = 256


@dataclass(frozen=True, slots=True)
class Access:
    """Lanes that access memory at once.

    start   [lanes] byte positions
    size    bytes of each lane
    gid     [lanes] the threads' numbers in the launch, `warp` and `program` theirs
    epoch   [lanes] barriers that each thread's program has passed, `warp_epoch` those of its warp as well
    place   the instruction's index: lanes of one are at the same place of the code
    wide    by no thread for itself, as a wgmma reads: its own warp's writes are not ordered before it either
    """

    start: Array
    size: int
    gid: Array
    program: Array
    epoch: Array
    warp_epoch: Array
    place: int
    wide: bool = False

    def granules(self, granule: int) -> Array:
        """[lanes, granules of an access]."""
        first = self.start // granule
        count = max(self.size // granule, 1)
        return first[:, None] if count == 1 else first[:, None] + np.arange(count)


class EmulatedMemory:
    """`spaces` memories of `size` bytes each, behind one another: one global memory, or the programs' shared ones.

    fences_matter  whether a wgmma may read it, past what a thread's own stores have reached
    """

    def __init__(self, name: str, size: int, spaces: int, granule: int, *, fences_matter: bool = False) -> None:
        self.name, self.size, self.granule, self.fences_matter = name, size, granule, fences_matter
        self.total = -(-size * spaces // SINK) * SINK + SINK
        self.bytes = np.full(self.total, 0xFF, np.uint8)
        self.written = np.zeros(self.total // granule, bool)
        # Granules from here on are the sink: what goes there is out of bounds, and nothing else is told of it.
        self.sink = (self.total - SINK) // granule
        self.written[self.sink :] = True
        self.copying = np.zeros(self.total // granule, np.int16)  # by cp.async on their way
        self.multiplying = np.zeros(self.total // granule, np.int16)  # by wgmma on their way
        self.unfenced = np.zeros(self.total // granule, bool)  # stored, and not yet seen by the async proxy
        self._noted_reads: list[Access] = []
        self._noted_writes: list[Access] = []
        self._last_reads: dict[int, Access] = {}
        # Stores that all have passed a barrier since, kept for a fence that not all threads execute.
        self._stored_before: list[Access] = []
        count = self.total // granule
        # By granule: the thread, its epochs and its place in the code; SEVERAL where threads of a kind differ.
        self._writer, self._reader = np.full(count, NOBODY, np.int32), np.full(count, NOBODY, np.int32)
        self._reading_warp = np.full(count, NOBODY, np.int32)
        self._read_place = np.full(count, NOBODY, np.int32)
        self._write_epoch, self._read_epoch = np.full(count, -1, np.int32), np.full(count, -1, np.int32)
        self._write_warp_epoch, self._read_warp_epoch = self._write_epoch.copy(), self._read_epoch.copy()

    # ------------------------------------------------------------ bytes

    def gather(self, start: Array, dtype: np.dtype[Any]) -> Array:
        """One element at each byte position, which is aligned to it."""
        return self.bytes.view(dtype)[start // dtype.itemsize]

    def scatter(self, start: Array, value: Array) -> None:
        self.bytes.view(value.dtype)[start // value.dtype.itemsize] = value

    def put(self, access: Access, words: list[Array], threads: Threads) -> None:
        """Stores [lanes] words behind one another, after the checks of a write."""
        width = words[0].dtype.itemsize

        def differs() -> Array:
            places = enumerate(words)
            return np.logical_or.reduce([self.gather(access.start + k * width, w.dtype) != w for k, w in places])

        self.saw_write(access, threads, differs)
        for number, word in enumerate(words):
            self.scatter(access.start + number * width, np.ascontiguousarray(word))
        lost = differs() & (access.start < self.sink * self.granule)
        if lost.any():
            threads.report(
                "conflicting stores",
                lost.sum(),
                f"thread {access.gid[lost][0] % threads.size}, {self.name} memory",
            )

    # ------------------------------------------------------------ who reads and writes

    def passed_barrier(self) -> None:
        """All threads of all programs passed a barrier: what was noted conflicts with nothing in a program."""
        if self.fences_matter:
            self._stored_before += self._noted_writes
        self._noted_reads.clear()
        self._noted_writes.clear()
        self._last_reads.clear()

    def saw_read(self, access: Access, threads: Threads) -> None:
        """Reports what is wrong with a read, and notes it."""
        granules = access.granules(self.granule)
        unwritten = ~self.written[granules]
        if unwritten.any():
            first = granules[unwritten][0] * self.granule % self.size
            threads.report("uninitialised", unwritten.sum(), f"byte {first} of {self.name} memory")
        if threads.copies and self.copying[granules].any():
            threads.report("copy not awaited", (self.copying[granules] > 0).sum(), f"read of {self.name} memory")
        if access.wide and self.unfenced[granules].any():
            threads.report("missing fence", self.unfenced[granules].sum(), f"{self.name} memory")
        self._settle(self._noted_writes, self._settle_write)
        recent = self._write_epoch[granules] == access.epoch[:, None]
        if recent.any():
            self._report_read(granules, recent, access, threads)
        self._noted_reads.append(access)
        self._last_reads[access.place] = access

    def fenced(self, threads: Threads) -> None:
        """A proxy fence by the threads that are here: of their own stores, and of what was stored before a barrier."""
        if threads.full:
            self._stored_before.clear()
            self.unfenced[:] = False
            return
        self._settle(self._stored_before, self._settle_write)
        self._settle(self._noted_writes, self._settle_write)
        known = self._writer >= 0
        lane = np.where(known, self._writer - threads.gid[0], 0)
        program = threads.program_of[lane]
        here = threads.mask.reshape(threads.programs, threads.size).any(axis=1)
        visible = (self._write_epoch < threads.epoch[program]) | threads.mask[lane]
        self.unfenced &= ~(known & visible & here[program])

    def _report_read(self, granules: Array, recent: Array, access: Access, threads: Threads) -> None:
        writer = self._writer[granules]
        gid = access.gid[:, None]
        race = recent & (writer >= 0) & (writer != gid) & (writer // threads.size == gid // threads.size)
        if not access.wide:
            # A warp's own writes are ordered by its own barriers.
            race &= (writer >> 5 != gid >> 5) | (self._write_warp_epoch[granules] == access.warp_epoch[:, None])
        self._race("read after write", granules, race, writer, gid, threads)

    def saw_write(self, access: Access, threads: Threads, differs: Callable[[], Array] | None = None) -> None:
        """Reports what is wrong with a write, and notes it.

        `differs`: which lanes change what is there, asked before the write; those that do not race harmlessly.
        """
        granules = access.granules(self.granule)
        self.check_in_flight(granules, threads)
        self._settle(self._noted_reads, self._settle_read)
        self._settle(self._noted_writes, self._settle_write)
        self._check_after_read(granules, access, threads)
        recent = self._write_epoch[granules] == access.epoch[:, None]
        if recent.any():
            writer, gid = self._writer[granules], access.gid[:, None]
            race = recent & (writer >= 0) & (writer != gid) & (writer // threads.size == gid // threads.size)
            race &= (writer >> 5 != gid >> 5) | (self._write_warp_epoch[granules] == access.warp_epoch[:, None])
            if differs is not None and race.any():
                race &= differs()[:, None]
            self._race("write after write", granules, race, writer, gid, threads)
        self.arrived(access)

    def check_overwritten(self, access: Access, threads: Threads) -> None:
        """The checks of a write by a copy that has only been issued: what it overwrites may still be read."""
        granules = access.granules(self.granule)
        self.check_in_flight(granules, threads)
        self._settle(self._noted_reads, self._settle_read)
        self._check_after_read(granules, access, threads)

    def arrived(self, access: Access) -> None:
        """Notes a write without checking it: that of a copy, when it is awaited."""
        granules = access.granules(self.granule)
        self.written[granules] = True
        self.unfenced[granules] = True
        self._noted_writes.append(access)

    def read_until_now(self, access: Access) -> None:
        """Notes a read without checking it: that of a wgmma, when it is awaited."""
        self._noted_reads.append(access)

    def check_in_flight(self, granules: Array, threads: Threads) -> None:
        """Reports a write to what an asynchronous instruction still reads or writes."""
        if threads.products and self.multiplying[granules].any():
            threads.report(
                "matmul not awaited", (self.multiplying[granules] > 0).sum(), f"write to {self.name} memory"
            )
        if threads.copies and self.copying[granules].any():
            threads.report("copy not awaited", (self.copying[granules] > 0).sum(), f"write to {self.name} memory")

    def _check_after_read(self, granules: Array, access: Access, threads: Threads) -> None:
        recent = self._read_epoch[granules] == access.epoch[:, None]
        if not recent.any():
            return
        reader, warp = self._reader[granules], self._reading_warp[granules]
        gid = access.gid[:, None]
        same_warp = warp == gid >> 5
        race = recent & (reader != gid) & (reader != NOBODY)
        race &= ~same_warp | (self._read_warp_epoch[granules] == access.warp_epoch[:, None])
        if race.any():
            race &= ~self._is_replica(granules, access)
        self._race("write after read", granules, race, reader, gid, threads)

    def _is_replica(self, granules: Array, access: Access) -> Array:
        """Whether the writer read the granule itself, by the instruction that all its readers read it by.

        Triton gives lanes that a tile has no elements for those of others, and lets only the first of them store:
        the others may read what that has overwritten, and use it for nothing.
        """
        places = self._read_place[granules]
        replica = np.zeros(granules.shape, bool)
        for place in np.unique(places[places >= 0]):
            read = self._last_reads.get(int(place))
            if read is None:
                continue
            order = np.argsort(read.gid)
            at = np.clip(np.searchsorted(read.gid, access.gid, sorter=order), 0, len(order) - 1)
            own = order[at]
            first = (read.start[own] // self.granule)[:, None]
            inside = (granules >= first) & (granules < first + max(read.size // self.granule, 1))
            replica |= (places == place) & inside & (read.gid[own] == access.gid)[:, None]
        return replica

    def _race(
        self, what: str, granules: Array, race: Array, first: Array, second: Array, threads: Threads
    ) -> None:
        race = race & (granules < self.sink)
        if race.any():
            one, other = first[race][0], np.broadcast_to(second, race.shape)[race][0]
            who = "several threads" if one == SEVERAL else f"thread {one % threads.size}"
            byte = granules[race][0] * self.granule % self.size
            threads.report(
                "race", race.sum(), f"{what}: byte {byte} of {self.name} memory, {who} and {other % threads.size}"
            )

    # ------------------------------------------------------------ what was noted

    def _settle(self, noted: list[Access], settle: Callable[[Access], None]) -> None:
        for access in noted:
            settle(access)
        noted.clear()

    def _settle_write(self, access: Access) -> None:
        granules = access.granules(self.granule)
        self._writer[granules] = access.gid[:, None]
        self._write_epoch[granules] = access.epoch[:, None]
        self._write_warp_epoch[granules] = access.warp_epoch[:, None]

    def _settle_read(self, access: Access) -> None:
        granules = access.granules(self.granule)
        epoch = access.epoch[:, None]
        stale = self._read_epoch[granules] != epoch
        gid = np.broadcast_to(access.gid[:, None], granules.shape)
        place = np.full(granules.shape, access.place, np.int32)
        for owners, value in ((self._reader, gid), (self._reading_warp, gid >> 5), (self._read_place, place)):
            old = owners[granules]
            new = np.where(stale | (old == value), value, SEVERAL)
            owners[granules] = new
            # Lanes of this access that read the same.
            clash = owners[granules] != new
            owners[granules[clash]] = SEVERAL
        if access.wide:
            self._reader[granules], self._reading_warp[granules] = SEVERAL, SEVERAL
        self._read_epoch[granules] = epoch
        self._read_warp_epoch[granules] = access.warp_epoch[:, None]

"""Bytes of global or shared memory, and who wrote and read each granule since the last barrier.

A granule is the narrowest access of the kernel. Two accesses race where they are by different threads, one is a
write, and nothing orders them: no barrier of their program, nor of the warp where both are in one.

    read     races with the last write
    write    races with every read, and with the last write unless it stores what is there already
    atomic   as a write, but not with another atomic

An access is noted with the time of the last barrier before it: of the warp's (`bar.warp.sync`), or the program's,
which is one for all its warps. A later access is ordered after it if its own program passed one at a later time.

Accesses are noted as they come, and entered by granule only when one comes that may race with them: between two
barriers a kernel mostly reads or mostly writes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .lane_accesses import ATOMIC, GID, THREADS, TIME, WARPS, AccessNotes, LaneAccess, WatchedThreads, begin_of

Array = NDArray[Any]
# Bytes behind the end that out-of-bounds accesses are sent to.
SINK = 256
# Numbers of so many bytes: numpy moves them faster than rows of bytes, 16 of them as a complex number.
BLOCKS = {**{size: np.dtype(f"u{size}") for size in (1, 2, 4, 8)}, 16: np.dtype(np.complex128)}
# Notes at most, where no barrier makes them obsolete.
_NOTES = 256


@functools.cache
def _repeated(value: int, count: int) -> Any:
    """The number of `count` bytes that are all `value`."""
    return np.full(count, value, np.uint8).view(BLOCKS[count])[0]


class EmulatedMemory:
    """`spaces` memories of `size` bytes each, behind one another: one global memory, or the programs' shared ones.

    fences_matter  whether a wgmma may read it, past what a thread's own stores have reached
    """

    def __init__(self, name: str, size: int, spaces: int, granule: int, *, fences_matter: bool = False) -> None:
        self.name, self.size, self.granule, self.fences_matter = name, size, granule, fences_matter
        self.total = -(-size * spaces // SINK) * SINK + SINK
        self.bytes = np.full(self.total, 0xFF, np.uint8)
        count = self.total // granule
        self.written = np.zeros(count, bool)
        # Granules from here on are the sink: what goes there is out of bounds, and nothing else is told of it.
        self.sink = (self.total - SINK) // granule
        self.written[self.sink :] = True
        self.copying = np.zeros(count, np.int16)  # by cp.async on their way
        self.multiplying = np.zeros(count, np.int16)  # by wgmma on their way
        self.unfenced = np.zeros(count, bool)  # stored, and not yet seen by the async proxy
        self._reads, self._writes = AccessNotes(count), AccessNotes(count)
        # How many of the noted writes all threads have passed a barrier since; they are kept for a fence.
        self._before_barrier = 0

    # ------------------------------------------------------------ bytes

    def gather(self, start: Array, dtype: np.dtype[Any]) -> Array:
        """One element at each byte position, which is aligned to it."""
        return self.bytes.view(dtype).take(start >> (dtype.itemsize.bit_length() - 1))

    def scatter(self, start: Array, value: Array) -> None:
        self.bytes.view(value.dtype)[start >> (value.dtype.itemsize.bit_length() - 1)] = value

    def put(self, access: LaneAccess, words: list[Array], threads: WatchedThreads) -> None:
        """Stores [lanes] words behind one another, after the checks of a write."""
        block = np.ascontiguousarray(words[0]) if len(words) == 1 else np.stack(words, axis=1)
        block = block.view(BLOCKS[access.size]).reshape(-1)

        def differs() -> Array:
            """[lanes, granules]: what the write changes."""
            old: Array = self.gather(access.start, block.dtype).view(np.uint8)
            shape = len(block), max(access.size // self.granule, 1), -1
            changed: Array = np.asarray(np.not_equal(old, block.view(np.uint8)).reshape(shape).any(axis=2))
            return changed

        self.saw_write(access, threads, differs)
        self.scatter(access.start, block)
        compared = np.dtype(f"u{min(access.size, 8)}")
        if (self.gather(access.start, block.dtype).view(compared) != block.view(compared)).any():
            lost = differs().any(axis=1) & (access.start < self.sink * self.granule)
            if lost.any():
                threads.report(
                    "conflicting stores",
                    lost.sum(),
                    f"thread {access.gid[lost][0] % threads.size} at {self.told(access.start[lost][0])}",
                )

    def told(self, byte: int) -> str:
        """Where a byte position is, in words."""
        return f"byte {byte % self.size} of {self.name} memory"

    # ------------------------------------------------------------ by granule

    def _rows(self, access: LaneAccess) -> tuple[int, Array]:
        """(granules of each lane, [lanes] which of all rows of so many granules)."""
        size = max(access.size, self.granule)
        return size // self.granule, access.start >> (size.bit_length() - 1)

    def _of(self, told: Array, access: LaneAccess) -> Array:
        """[lanes, granules of an access] of an array by granule."""
        count, rows = self._rows(access)
        return told.reshape(-1, count).take(rows, axis=0)

    def _set(self, told: Array, access: LaneAccess, value: int) -> None:
        """Sets an array of bytes by granule where an access is."""
        count, rows = self._rows(access)
        told.view(BLOCKS[count])[rows] = _repeated(value, count)

    def _spread(self, told: Array, access: LaneAccess, values: Array) -> None:
        """Sets an array by granule to [lanes, granules of an access, or 1]; the last lane's stay."""
        count, rows = self._rows(access)
        told.reshape(-1, count)[rows] = values

    # ------------------------------------------------------------ who reads and writes

    def passed_barrier(self) -> None:
        """All threads of all programs passed a barrier: what was noted conflicts with nothing in a program."""
        self._reads.passed_barrier(keep=False)
        self._writes.passed_barrier(keep=self.fences_matter)
        self._before_barrier = len(self._writes.noted)

    def saw_read(self, access: LaneAccess, threads: WatchedThreads) -> None:
        """Reports what is wrong with a read, and notes it."""
        self.check_written(access, threads)
        if threads.copies and (flying := self._of(self.copying, access) > 0).any():
            threads.report("copy not awaited", flying.sum(), f"read of {self.name} memory")
        if access.wide and (unfenced := self._of(self.unfenced, access)).any():
            threads.report("missing fence", unfenced.sum(), f"{self.name} memory")
        self._check_after_write("read after write", access, threads, None)
        self.read_until_now(access)

    def check_written(self, access: LaneAccess, threads: WatchedThreads) -> None:
        written = self._of(self.written, access)
        if not written.all():
            first = access.granules(self.granule)[~written][0] * self.granule
            threads.report("uninitialised", (~written).sum(), self.told(first))

    def read_until_now(self, access: LaneAccess) -> None:
        """Notes a read without checking it: that of a wgmma, when it is awaited."""
        if len(self._reads.noted) == _NOTES:
            self._enter_reads()
        self._reads.add(access)

    def saw_write(
        self, access: LaneAccess, threads: WatchedThreads, differs: Callable[[], Array] | None = None
    ) -> None:
        """Reports what is wrong with a write, and notes it.

        `differs`: [lanes, granules or 1] what changes, asked before the write; what does not races harmlessly.
        """
        self.check_overwritten(access, threads, differs)
        self.arrived(access)

    def check_overwritten(
        self, access: LaneAccess, threads: WatchedThreads, differs: Callable[[], Array] | None = None
    ) -> None:
        """The checks of a write, without noting it: of a copy that has only been issued."""
        self.check_in_flight(access, threads)
        self._check_after_read(access, threads)
        self._check_after_write("write after write", access, threads, differs)

    def arrived(self, access: LaneAccess) -> None:
        """Notes a write without checking it: that of a copy, when it is awaited."""
        self._set(self.written, access, 1)
        if self.fences_matter:
            self._set(self.unfenced, access, 1)
        if len(self._writes.noted) == _NOTES:
            self._enter_writes()
        self._writes.add(access)

    def fenced(self, threads: WatchedThreads) -> None:
        """A proxy fence by the threads that are here: of their stores, and of those before the last barrier."""
        if threads.full:
            del self._writes.noted[: self._before_barrier]
            self._writes.ticked = max(self._writes.ticked - self._before_barrier, 0)
            self._before_barrier = 0
            self.unfenced[:] = False
            return
        self._enter_writes()
        places = np.flatnonzero(self.unfenced)
        stamp = self._writes.stamps[places]
        lane = (stamp & GID) - int(threads.gid[0])
        program = threads.program_of[lane]
        here: Array = np.asarray(threads.mask.reshape(threads.programs, threads.size).any(axis=1))
        before = stamp < begin_of(threads.epoch)[program, 0]
        self.unfenced[places] = ~((before | threads.mask[lane]) & here[program])

    def check_in_flight(self, access: LaneAccess, threads: WatchedThreads) -> None:
        """Reports a write to what an asynchronous instruction still reads or writes."""
        for flying, told, kind in (
            (threads.products, self.multiplying, "matmul not awaited"),
            (threads.copies, self.copying, "copy not awaited"),
        ):
            if flying and (there := self._of(told, access) > 0).any():
                threads.report(kind, there.sum(), f"write to {self.name} memory")

    # ------------------------------------------------------------ races

    def _touches(self, notes: AccessNotes, access: LaneAccess) -> bool:
        """Whether there was an access since the barrier to any granule of this one."""
        if not notes.since_barrier:
            return False
        self._tick_all(notes)
        return bool((self._of(notes.ticks, access) == notes.tick).any())

    def _tick_all(self, notes: AccessNotes) -> None:
        for noted in notes.noted[notes.ticked :]:
            self._set(notes.ticks, noted, notes.tick)
        notes.ticked = len(notes.noted)

    def _check_after_write(
        self, what: str, access: LaneAccess, threads: WatchedThreads, differs: Callable[[], Array] | None
    ) -> None:
        if not self._touches(self._writes, access):
            return
        self._enter_writes()
        stamp = self._of(self._writes.stamps, access)
        race = self._unordered(stamp, access, access.synced, threads)
        if access.atomic:
            race &= stamp & ATOMIC == 0
        if differs is not None and race.any():
            race &= differs()
        self._race(what, race, stamp & ~ATOMIC, access, threads)

    def _check_after_read(self, access: LaneAccess, threads: WatchedThreads) -> None:
        if not self._touches(self._reads, access):
            return
        self._enter_reads()
        stamp = self._of(self._reads.stamps, access)
        # A warp's shuffle hands on what its lanes have read: what it is computed from is stored after it.
        race = self._unordered(stamp, access, access.warp_epoch, threads)
        if race.any():
            race &= np.logical_not(self._excused(access))
        self._race("write after read", race, stamp, access, threads)

    def _unordered(self, stamp: Array, access: LaneAccess, since: Array, threads: WatchedThreads) -> Array:
        """[lanes, granules]: whether nothing orders an access after the earlier one that a stamp tells of.

        since: [lanes] what orders a warp's own lanes happened then.
        """
        recent: Array = stamp >= begin_of(access.epoch)
        if not recent.any():
            return recent
        gid, other = access.gid[:, None], stamp & GID
        recent &= other // threads.size == gid // threads.size
        if access.wide:
            return recent
        warp = (other >> 5 == gid >> 5) & (stamp & WARPS == 0)
        thread = (other == gid) & (stamp & THREADS == 0)
        recent &= ~(warp & (thread | (stamp < begin_of(since))))
        return recent

    def _excused(self, access: LaneAccess) -> Array | bool:
        """[lanes, granules]: what a write may overwrite though others read it."""
        return False

    def _race(self, what: str, race: Array, stamp: Array, access: LaneAccess, threads: WatchedThreads) -> None:
        if not race.any():
            return
        granules = access.granules(self.granule)
        race = race & (granules < self.sink)
        if race.any():
            first, second = stamp[race][0], access.gid[race.any(axis=1)][0]
            who = "several threads" if first & THREADS else f"thread {(first & GID) % threads.size}"
            where = self.told(granules[race][0] * self.granule)
            threads.report("race", race.sum(), f"{what}: {who} and thread {second % threads.size} at {where}")

    # ------------------------------------------------------------ what was noted

    def _enter_writes(self) -> None:
        for access in self._writes.noted:
            self._spread(self._writes.stamps, access, access.stamps())
        self._tick_all(self._writes)
        self._writes.entered()
        self._before_barrier = 0

    def _enter_reads(self) -> None:
        for access in self._reads.noted:
            self._enter_read(access)
        self._tick_all(self._reads)
        self._reads.entered()

    def _is_recent(self, access: LaneAccess) -> Array:
        """[lanes, granules]: whether reads that were entered are of the epoch of this one."""
        recent: Array = self._of(self._reads.stamps, access) >= begin_of(access.epoch)
        return recent

    def _enter_read(self, access: LaneAccess) -> None:
        """Adds readers by granule: one or more threads of the last time, one or more warps since a barrier."""
        old, new = self._of(self._reads.stamps, access), access.stamps()
        recent = self._is_recent(access)
        if recent.any():
            warps = recent & (((old ^ new) & GID >> 5 << 5 != 0) | (old & WARPS != 0))
            threads = recent & (old >> TIME == new >> TIME) & (old & (GID | THREADS) != new & (GID | THREADS))
            new = new | warps * (WARPS | THREADS) | threads * THREADS
        new = np.broadcast_to(new, old.shape)
        self._spread(self._reads.stamps, access, new)
        # Lanes of this access that read the same: the last one's stamp is there.
        last = self._of(self._reads.stamps, access)
        clash = last != new
        if clash.any():
            granules, mine, last = access.granules(self.granule)[clash], new[clash], last[clash] | THREADS
            self._reads.stamps[granules] = last
            far = (mine ^ last) & GID >> 5 << 5 != 0
            self._reads.stamps[granules[far]] = last[far] | WARPS

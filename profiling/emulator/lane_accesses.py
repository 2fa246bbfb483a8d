"""Accesses of lanes to memory, what is noted of each, and what a memory asks of the threads that access it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
# A stamp is an int64: the time + 1 (0 is never), three flags, and a thread's number in the launch.
TIME = 34
ATOMIC = 1 << 33  # the write was atomic
WARPS, THREADS = 1 << 32, 1 << 31  # of reads: threads of several warps did; several threads did at that time
GID = THREADS - 1


@dataclass(frozen=True, slots=True)
class LaneAccess:
    """Lanes that access memory at once.

    start   [lanes] byte positions, which the size divides
    size    bytes of each lane: a power of two
    gid     [lanes] the threads' numbers in the launch, in order; `program` theirs
    epoch   [lanes] when each thread's program last passed a barrier, `synced` its warp, and `warp_epoch` its warp
            a barrier or a shuffle
    place   the instruction's index: lanes of one are at the same place of the code
    wide    by no thread for itself, as a wgmma reads: its own warp's writes are not ordered before it either
    atomic  does not race with others that are
    """

    start: Array
    size: int
    gid: Array
    program: Array
    epoch: Array
    warp_epoch: Array
    synced: Array
    place: int
    wide: bool = False
    atomic: bool = False

    def granules(self, granule: int) -> Array:
        """[lanes, granules of an access]."""
        first = self.start // granule
        count = max(self.size // granule, 1)
        return first[:, None] if count == 1 else first[:, None] + np.arange(count)

    def of(self, some: Array) -> LaneAccess:
        """Those of some of the lanes."""
        fields = ("start", "gid", "program", "epoch", "warp_epoch", "synced")
        return replace(self, **{name: getattr(self, name)[some] for name in fields})

    def stamps(self) -> Array:
        """[lanes, 1]: what is noted of each lane."""
        flags = (self.atomic and ATOMIC) | (self.wide and WARPS | THREADS)
        return begin_of(self.warp_epoch) | flags | self.gid[:, None]


def begin_of(epoch: Array) -> Array:
    """[lanes, 1]: the least stamp that is not older."""
    return (epoch.astype(np.int64) + 1 << TIME)[:, None]


class WatchedThreads(Protocol):
    """What a memory asks of the threads that access it; see `Threads`."""

    size: int
    programs: int
    launched: int
    program_of: Array
    gid: Array
    mask: Array
    full: bool
    epoch: Array
    copies: list[Any]
    products: list[Any]

    def report(self, kind: str, count: int = 1, detail: str = "") -> None: ...


class AccessNotes:
    """The reads or the writes since all threads passed a barrier.

    noted   accesses that are not entered yet: by granule, nothing tells of them but their ticks
    ticks   by granule: `tick` where there was an access since the barrier, of those that are `ticked`
    stamps  by granule: who accessed it last, of those that were entered
    """

    def __init__(self, count: int) -> None:
        self.noted: list[LaneAccess] = []
        self.ticked = 0
        self.since_barrier = False
        self.ticks, self.tick = np.zeros(count, np.uint8), 1
        self.stamps = np.zeros(count, np.int64)

    def add(self, access: LaneAccess) -> None:
        self.noted.append(access)
        self.since_barrier = True

    def entered(self) -> None:
        self.noted.clear()
        self.ticked = 0

    def passed_barrier(self, keep: bool) -> None:
        if self.since_barrier:
            self.tick += 1
            if self.tick == 256:
                self.ticks[:], self.tick = 0, 1
        self.since_barrier = False
        if keep:
            self.ticked = len(self.noted)
        else:
            self.entered()

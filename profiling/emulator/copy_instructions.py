"""Asynchronous copies from global to shared memory, and fences: cp.async, fence (PTX ISA 9.7.9.25, 9.7.13.4)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from .instruction_set import Action, executes, reader
from .memory_instructions import address_of, locate
from .program import PtxInstruction, UnknownInstruction
from .threads import Flight, Threads


@executes("cp")
def _copy(i: PtxInstruction) -> Action | None:
    if i.modifiers[:2] == ("async", "commit_group"):
        return _commit
    if i.modifiers[:2] == ("async", "wait_group"):
        left = int(i.operand(0))
        return lambda threads: _wait(threads, left)
    if i.modifiers[:2] == ("async", "wait_all"):
        return lambda threads: _wait(threads, -1)
    if i.modifiers[0] != "async" or i.modifiers[1] not in ("ca", "cg"):
        return None
    return _asynchronous_copy(i)


def _asynchronous_copy(i: PtxInstruction) -> Action:
    """cp.async.ca.shared.global [to], [from], bytes, bytes copied: the rest is zeros."""
    to, source = address_of(i, 0, "shared"), address_of(i, 1, "global")
    size = int(i.operand(2), 0)
    copied = reader(i.operand(3), "u32") if len(i.operands) > 3 else None

    def copy(threads: Threads) -> None:
        lanes = threads.active
        shared, start = locate(threads, "shared", to(threads), size, lanes, "copy to")
        data = np.zeros((len(lanes), size), np.uint8)
        some = np.ones(len(lanes), bool)
        if copied is not None:
            counts = threads.active_values(copied(threads))
            some = counts > 0
            if (some & (counts != size)).any():
                raise UnknownInstruction(f"{i.text}: copies part of its bytes")
        if some.any():
            giving = lanes[some]
            memory, place = locate(threads, "global", source(threads)[some], size, giving, "copy")
            memory.saw_read(threads.access(place, size, giving), threads)
            threads.tallies.accessed(threads, "global", "read", place, size)
            data[some] = memory.bytes[place[:, None] + np.arange(size)]
        access = threads.access(start, size, lanes)
        granules = access.granules(shared.granule)
        shared.check_overwritten(access, threads)
        np.add.at(shared.copying, granules.ravel(), 1)
        threads.tallies.accessed(threads, "shared", "write", start, size)
        threads.copies.append(Flight(lanes, threads.copy_group[lanes], {"access": access, "data": data}))

    return copy


def _commit(threads: Threads) -> None:
    threads.copy_group[threads.active] += 1


def _wait(threads: Threads, left: int) -> None:
    """Finishes a thread's copies but those of its last `left` groups; -1: those not yet committed too."""
    flying = []
    for flight in threads.copies:
        done = threads.mask[flight.lanes] & (flight.group < threads.copy_group[flight.lanes] - left)
        if done.any():
            _arrive(threads, flight, done)
        if not done.all():
            flying.append(_part(flight, ~done))
    threads.copies = flying


def _arrive(threads: Threads, flight: Flight, done: np.ndarray) -> None:
    part = _part(flight, done)
    access, shared, lanes = part.detail["access"], threads.shared, part.lanes
    np.add.at(shared.copying, access.granules(shared.granule).ravel(), -1)
    shared.bytes[access.start[:, None] + np.arange(access.size)] = part.detail["data"]
    # Until now others' reads were reported as of a copy on its way; from here on it is this thread's write.
    program = threads.program_of[lanes]
    shared.arrived(replace(access, epoch=threads.epoch[program], warp_epoch=threads.warp_epoch[lanes >> 5]))


def _part(flight: Flight, lanes: np.ndarray) -> Flight:
    """The flight of some of its lanes."""
    if lanes.all():
        return flight
    access = flight.detail["access"]
    fields = ("start", "gid", "program", "epoch", "warp_epoch")
    access = replace(access, **{name: getattr(access, name)[lanes] for name in fields})
    return Flight(
        flight.lanes[lanes], flight.group[lanes], {"access": access, "data": flight.detail["data"][lanes]}
    )


@executes("fence", "membar")
def _fence(i: PtxInstruction) -> Action | None:
    """A proxy fence makes stores visible to the asynchronous proxy: a thread's own, and those before its barrier."""
    if i.opcode == "fence" and i.modifiers[0] == "proxy":
        return _proxy_fence if i.modifiers[1] == "async" else None
    # Orders memory between threads, which in lock step is so.
    return lambda threads: None


def _proxy_fence(threads: Threads) -> None:
    threads.shared.fenced(threads)

"""Asynchronous copies from global to shared memory, and fences: cp.async, fence (PTX ISA 9.7.9.25, 9.7.13.4)."""

from __future__ import annotations

import numpy as np

from .instruction_set import Action, Array, executes, reader
from .memory import BLOCKS
from .memory_instructions import address_of, locate
from .program import PtxInstruction, UnknownInstruction
from .threads import Flight, Threads

# Of the dtype of counts: numpy adds another by a path that is forty times as slow.
_ONE = np.int16(1)


@executes("cp")
def _copy(i: PtxInstruction) -> Action | None:
    if i.modifiers[:2] == ("async", "commit_group"):
        return _commit
    if i.modifiers[:2] == ("async", "wait_group"):
        left = int(i.operand(0), 0)
        return lambda threads: _wait(threads, left)
    if i.modifiers[:2] == ("async", "wait_all"):
        return lambda threads: _wait(threads, -1)
    if i.modifiers[0] != "async" or i.modifiers[1] not in ("ca", "cg"):
        return None  # cp.async.bulk, cp.async.mbarrier
    return _asynchronous_copy(i)


def _asynchronous_copy(i: PtxInstruction) -> Action | None:
    """cp.async.ca.shared.global [to], [from], bytes{, bytes copied | predicate: none is}: the rest is zeros."""
    if len(i.operands) not in (3, 4) or "cache_hint" in i.text:
        return None
    to, source = address_of(i, 0, "shared"), address_of(i, 1, "global")
    size = int(i.operand(2), 0)
    if size not in (4, 8, 16):
        return None
    last = i.operand(3) if len(i.operands) == 4 else str(size)
    ignores = last.startswith("%") and i.bytes_of(last) == 1
    told = reader(last, "pred" if ignores else "u32")

    def copy(threads: Threads) -> None:
        lanes = threads.active
        shared, start = locate(threads, "shared", to(threads), size, lanes, "copy to")
        counts = threads.active_values(told(threads))
        copied = ~counts if ignores else counts == size
        if not ignores and (counts[~copied] != 0).any():
            raise UnknownInstruction(f"line {i.line}: {i.text}: copies part of its bytes")
        data = np.zeros(len(lanes), BLOCKS[size])
        if copied.all():
            data = _copied(threads, source(threads), size, lanes)
        elif copied.any():
            data[copied] = _copied(threads, source(threads)[copied], size, lanes[copied])
        access = threads.access(start, size, lanes)
        shared.check_overwritten(access, threads)
        np.add.at(shared.copying, access.granules(shared.granule).ravel(), _ONE)
        threads.tallies.accessed(threads, "shared", "write", start, size)
        threads.copies.append(Flight(lanes, threads.copy_group[lanes], {"access": access, "data": data}))

    return copy


def _copied(threads: Threads, address: Array, size: int, lanes: Array) -> Array:
    """[lanes] bytes of global memory, in one number each. They are read when the copy is issued."""
    memory, start = locate(threads, "global", address, size, lanes, "copy")
    if not threads.memory.is_plain(start, size):
        memory.saw_read(threads.access(start, size, lanes), threads)
    threads.tallies.accessed(threads, "global", "read", start, size, lanes)
    return memory.gather(start, BLOCKS[size])


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


def _arrive(threads: Threads, flight: Flight, done: Array) -> None:
    part = _part(flight, done)
    access, shared, lanes = part.detail["access"], threads.shared, part.lanes
    np.add.at(shared.copying, access.granules(shared.granule).ravel(), -_ONE)
    shared.scatter(access.start, part.detail["data"])
    # Until now others' reads were reported as of a copy on its way; from here on it is this thread's write.
    shared.arrived(threads.made_now(access, lanes))


def _part(flight: Flight, lanes: Array) -> Flight:
    """The flight of some of its lanes."""
    if lanes.all():
        return flight
    detail = {"access": flight.detail["access"].of(lanes), "data": flight.detail["data"][lanes]}
    return Flight(flight.lanes[lanes], flight.group[lanes], detail)


@executes("fence", "membar")
def _fence(i: PtxInstruction) -> Action | None:
    """A proxy fence shows stores to the asynchronous proxy: those of its threads, and those before a barrier."""
    if i.opcode == "fence" and i.modifiers[0] == "proxy":
        spaces = {(): True, ("shared__cta",): True, ("global",): False}
        if i.modifiers[1] != "async" or i.modifiers[2:] not in spaces:
            return None
        return _proxy_fence if spaces[i.modifiers[2:]] else _nothing
    if i.opcode == "fence" and i.modifiers[0] not in ("sc", "acq_rel", "acquire", "release"):
        return None
    return _nothing


def _proxy_fence(threads: Threads) -> None:
    threads.shared.fenced(threads)


def _nothing(threads: Threads) -> None:
    """Orders memory between threads, which in lock step is so."""

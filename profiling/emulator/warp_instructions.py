"""Threads together: barriers, shuffles, votes and reductions of a warp (PTX ISA 9.7.9.6, 9.7.13)."""

from __future__ import annotations

import numpy as np

from .instruction_set import Action, Array, executes, reader, reads
from .program import PtxInstruction
from .threads import Threads


@executes("bar", "barrier")
def _barrier(i: PtxInstruction) -> Action | None:
    modifiers = [modifier for modifier in i.modifiers if modifier not in ("cta", "aligned")]
    if modifiers == ["warp", "sync"]:
        return _warp_barrier
    # One barrier for all threads; a second operand would be a number of them.
    if modifiers != ["sync"] or len(i.operands) != 1:
        return None
    return _program_barrier


def _program_barrier(threads: Threads) -> None:
    here = threads.mask.reshape(threads.programs, threads.size)
    some = here.any(axis=1)
    if (some & ~here.all(axis=1)).any():
        threads.report("divergent barrier", int((some & ~here.all(axis=1)).sum()))
    # New arrays: accesses that were noted keep the old ones.
    threads.epoch = threads.epoch + some.astype(np.int32)
    warps = np.repeat(some, threads.size // 32).astype(np.int32)
    threads.warp_epoch = threads.warp_epoch + warps
    if threads.full:
        threads.shared.passed_barrier()
        threads.memory.passed_barrier()


def _warp_barrier(threads: Threads) -> None:
    epochs = threads.warp_epoch.copy()
    epochs[threads.whole_warps()] += 1
    threads.warp_epoch = epochs


@executes("shfl")
def _shuffle(i: PtxInstruction) -> Action | None:
    """shfl.sync.{up,down,bfly,idx}.b32 d|p, a, b, c, members: c holds a segment mask and a clamp."""
    if i.modifiers[0] != "sync" or i.kind != "b32":
        return None
    mode = i.modifiers[1]
    result, _, inside_too = i.operand(0).partition("|")
    source, offset, clamp = reads(i, "b32", "u32", "u32")

    def shuffle(threads: Threads) -> None:
        threads.whole_warps()
        lane = threads.lane_of_warp
        by, limit = offset(threads).astype(np.int64) & 31, clamp(threads).astype(np.int64)
        segment, bound = limit >> 8 & 31, limit & 31
        last = lane & segment | bound & ~segment
        partner: Array = {
            "bfly": lambda: lane ^ by,
            "idx": lambda: lane & segment | by & ~segment,
            "down": lambda: lane + by,
            "up": lambda: lane - by,
        }[mode]()
        inside = partner >= last if mode == "up" else partner <= last
        partner = np.where(inside, partner, lane)
        values = np.broadcast_to(source(threads), (threads.lanes,))
        threads.write(result, values[(threads.lane_index & ~31) + partner])
        if inside_too:
            threads.write(inside_too, np.broadcast_to(inside, (threads.lanes,)))

    return shuffle


@executes("redux")
def _reduce(i: PtxInstruction) -> Action | None:
    operations = {
        **{"add": np.add, "min": np.minimum, "max": np.maximum},
        **{"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor},
    }
    if i.modifiers[0] != "sync" or i.kind not in ("s32", "u32", "b32"):
        return None
    operation, result = operations[i.modifiers[1]], i.operand(0)
    (source,) = reads(i, i.kind)

    def reduce(threads: Threads) -> None:
        threads.whole_warps()
        values = np.broadcast_to(source(threads), (threads.lanes,)).reshape(-1, 32)
        threads.write(result, np.repeat(operation.reduce(values, axis=1, dtype=values.dtype), 32))

    return reduce


@executes("vote")
def _vote(i: PtxInstruction) -> Action | None:
    if i.modifiers[0] != "sync" or i.modifiers[1] not in ("ballot", "any", "all"):
        return None
    mode, result = i.modifiers[1], i.operand(0)
    negated = i.operand(1).startswith("!")
    source = reader(i.operand(1).lstrip("!"), "pred")

    def vote(threads: Threads) -> None:
        threads.whole_warps()
        passes = np.broadcast_to(source(threads), (threads.lanes,)).reshape(-1, 32) ^ negated
        if mode == "ballot":
            bits = (passes.astype(np.uint64) << np.arange(32, dtype=np.uint64)).sum(axis=1).astype(np.uint32)
            threads.write(result, np.repeat(bits, 32))
        else:
            threads.write(result, np.repeat(passes.any(axis=1) if mode == "any" else passes.all(axis=1), 32))

    return vote

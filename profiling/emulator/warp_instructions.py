"""Threads together: barriers, shuffles, votes and reductions of a warp (PTX ISA 9.7.9.6, 9.7.13)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from .instruction_set import Action, Array, executes, literal, reader, reads
from .program import DTYPES, PtxInstruction, UnknownInstruction
from .threads import Threads

# The operand that names the lanes of a warp which take part: all.
_ALL = np.uint32(0xFFFFFFFF)


def of_whole_warp(i: PtxInstruction, members: int, action: Action) -> Action | None:
    """An action of all lanes of a warp, which the operand `members` has to name. None for a literal of others."""
    text = i.operand(members)
    if not text.startswith("%"):
        return action if literal(text, DTYPES["b32"])[0] == _ALL else None
    named = reader(text, "b32")

    def act(threads: Threads) -> None:
        if (threads.active_values(named(threads)) != _ALL).any():
            raise UnknownInstruction(f"line {i.line}: {i.text}: not for all lanes of a warp")
        action(threads)

    return act


@executes("bar", "barrier")
def _barrier(i: PtxInstruction) -> Action | None:
    modifiers = [modifier for modifier in i.modifiers if modifier not in ("cta", "aligned")]
    if modifiers == ["warp", "sync"]:
        return of_whole_warp(i, 0, _warp_barrier)
    # One barrier for all threads; a second operand would be a number of them.
    if modifiers != ["sync"] or len(i.operands) != 1:
        return None
    return _program_barrier


def _program_barrier(threads: Threads) -> None:
    here = threads.mask.reshape(threads.programs, threads.size)
    some: Array = np.asarray(here.any(axis=1))
    parts = int((some & ~here.all(axis=1)).sum())
    if parts:
        threads.report("divergent barrier", parts)
    # A time that none of the program's warps has had. New arrays: accesses that were noted keep the old ones.
    warps = threads.warp_epoch.reshape(threads.programs, -1)
    threads.epoch = np.where(some, warps.max(axis=1) + 1, threads.epoch)
    threads.warp_epoch = np.where(some[:, None], threads.epoch[:, None], warps).ravel()
    threads.synced = np.where(some[:, None], threads.epoch[:, None], threads.synced.reshape(warps.shape)).ravel()
    if threads.full:
        threads.shared.passed_barrier()
        threads.memory.passed_barrier()


def _warp_barrier(threads: Threads) -> None:
    warps, synced = threads.whole_warps(), threads.synced.copy()
    _pass_time(threads, warps)
    synced[warps] = threads.warp_epoch[warps]
    threads.synced = synced


def _pass_time(threads: Threads, warps: Array) -> None:
    epochs = threads.warp_epoch.copy()
    epochs[warps] += 1
    threads.warp_epoch = epochs


@executes("shfl")
def _shuffle(i: PtxInstruction) -> Action | None:
    """shfl.sync.{up,down,bfly,idx}.b32 d|p, a, b, c, members: c holds a segment mask and a clamp."""
    if len(i.modifiers) != 3 or i.modifiers[0] != "sync" or i.modifiers[1] not in _PARTNERS or i.kind != "b32":
        return None
    mode = i.modifiers[1]
    result, _, inside_too = i.operand(0).partition("|")
    source, offset, clamp = reads(i, "b32", "u32", "u32")
    constant = None
    if not any(i.operand(k).startswith("%") for k in (2, 3)):
        constant = _partners(mode, np.arange(32), *(literal(i.operand(k), DTYPES["u32"]) for k in (2, 3)))

    def shuffle(threads: Threads) -> None:
        _pass_time(threads, threads.whole_warps())
        values = np.broadcast_to(source(threads), (threads.lanes,))
        if constant is not None:
            partner, inside = constant
            threads.write(result, values.reshape(-1, 32).take(partner, axis=1).ravel())
            inside = np.tile(inside, threads.lanes // 32) if inside_too else inside
        else:
            partner, inside = _partners(mode, threads.lane_of_warp, offset(threads), clamp(threads))
            threads.write(result, values.take(threads.lane_index - threads.lane_of_warp + partner))
        if inside_too:
            threads.write(inside_too, inside)

    return of_whole_warp(i, 4, shuffle)


_PARTNERS: Mapping[str, Callable[[Array, Array, Array], Array]] = {
    "bfly": lambda lane, by, segment: lane ^ by,
    "idx": lambda lane, by, segment: lane & segment | by & ~segment,
    "down": lambda lane, by, segment: lane + by,
    "up": lambda lane, by, segment: lane - by,
}


def _partners(mode: str, lane: Array, offset: Array, clamp: Array) -> tuple[Array, Array]:
    """(the lane of its warp that each takes the value of, whether that is in its segment: else it is itself)."""
    by, limit = offset.astype(np.int64) & 31, clamp.astype(np.int64)
    segment, bound = limit >> 8 & 31, limit & 31
    last = lane & segment | bound & ~segment
    partner = _PARTNERS[mode](lane, by, segment)
    inside = partner >= last if mode == "up" else partner <= last
    return np.where(inside, partner, lane), inside


_REDUCTIONS: Mapping[str, np.ufunc] = {
    **{"add": np.add, "min": np.minimum, "max": np.maximum},
    **{"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor},
}


@executes("redux")
def _reduce(i: PtxInstruction) -> Action | None:
    """redux.sync.op.type d, a, members. Integers; of bits and, or and xor."""
    if len(i.modifiers) != 3 or i.modifiers[0] != "sync" or i.modifiers[1] not in _REDUCTIONS:
        return None
    if i.kind not in (("b32",) if i.modifiers[1] in ("and", "or", "xor") else ("s32", "u32")):
        return None
    operation, result = _REDUCTIONS[i.modifiers[1]], i.operand(0)
    (source,) = reads(i, i.kind)

    def reduce(threads: Threads) -> None:
        threads.whole_warps()
        values = np.broadcast_to(source(threads), (threads.lanes,)).reshape(-1, 32)
        threads.write(result, np.repeat(operation.reduce(values, axis=1, dtype=values.dtype), 32))

    return of_whole_warp(i, 2, reduce)


_VOTES: Mapping[str, Callable[[Array], Any]] = {
    "ballot": lambda passes: np.packbits(passes, axis=1, bitorder="little").view("<u4")[:, 0],
    "any": lambda passes: passes.any(axis=1),
    "all": lambda passes: passes.all(axis=1),
    "uni": lambda passes: (passes == passes[:, :1]).all(axis=1),
}


@executes("vote")
def _vote(i: PtxInstruction) -> Action | None:
    """vote.sync.{all,any,uni}.pred and vote.sync.ballot.b32 d, {!}p, members."""
    if len(i.modifiers) != 3 or i.modifiers[0] != "sync" or i.modifiers[1] not in _VOTES:
        return None
    if i.kind != ("b32" if i.modifiers[1] == "ballot" else "pred"):
        return None
    count, result = _VOTES[i.modifiers[1]], i.operand(0)
    negated = i.operand(1).startswith("!")
    source = reader(i.operand(1).lstrip("!"), "pred")

    def vote(threads: Threads) -> None:
        threads.whole_warps()
        passes = np.broadcast_to(source(threads), (threads.lanes,)).reshape(-1, 32)
        threads.write(result, np.repeat(count(passes ^ negated), 32))

    return of_whole_warp(i, 2, vote)

"""Runs a compiled launch: all programs, some at a time, by the least program counter first.

Threads that branched apart go on in turns: those with the least program counter execute until they reach the next
group, which they join. That is one legal order of many; what depends on another is what the checks look for.
Programs that wait for others among those do not wait for ever: see `_run`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

# Imported for what they register.
from . import (  # noqa: F401
    bit_instructions,
    conversion_instructions,
    copy_instructions,
    float_instructions,
    integer_instructions,
    matrix_instructions,
    memory_instructions,
    move_instructions,
    warp_instructions,
    wgmma_instructions,
)
from .findings import Findings
from .global_memory import GlobalMemory
from .instruction_set import CONTROL, Action, Array, action_of
from .numerics import Numerics
from .program import PtxInstruction, PtxProgram, UnknownInstruction, parse_ptx
from .tallies import Tallies
from .threads import LaunchGrid, Threads

# Lanes at once: as many as keep a register in a core's cache.
LANES = 8192
# Turns that threads in a loop take before others have one.
PATIENCE = 32


@dataclass(frozen=True)
class Code:
    """A program with what executes each of its instructions; None for branches and returns."""

    program: PtxProgram
    actions: tuple[Action | None, ...]


def code_of(ptx: str) -> Code:
    """Reads a kernel. UnknownInstruction names what the emulator does not execute."""
    program = parse_ptx(ptx)
    for i in program.instructions:
        if i.opcode == "bra" and i.operand(0) not in program.labels:
            raise UnknownInstruction(f"line {i.line}: {i.text}: no such label")
    return Code(program, tuple(None if i.opcode in CONTROL else action_of(i) for i in program.instructions))


def run(
    code: Code,
    grid: LaunchGrid,
    memory: GlobalMemory,
    findings: Findings,
    tallies: Tallies,
    numerics: Numerics,
) -> None:
    """Runs all programs of a launch on `memory`, and adds to findings and tallies."""
    at_once = max(LANES // code.program.threads, 1)
    for first in range(0, grid.programs, at_once):
        programs = min(at_once, grid.programs - first)
        threads = Threads(code.program, grid, first, programs, memory, numerics, findings, tallies)
        memory.passed_barrier()
        with np.errstate(all="ignore"):
            _run(code, threads)
        if threads.copies or threads.products:
            threads.report("unfinished", 1, "cp.async" if threads.copies else "wgmma")
        if without := threads.without_wait():
            threads.report("no wait", without)


def _run(code: Code, threads: Threads) -> None:
    """Runs the threads of a chunk until all have returned.

    A program in a loop that waits for another has the least program counter, and the other would never go on:
    after so many turns those do that are furthest, if they are whole programs.
    """
    waiting: dict[int, Array] = {0: threads.mask}
    may_wait = any(map(_asks_others, code.program.instructions))
    turns = 0
    while waiting:
        place = min(waiting)
        turns = turns + 1 if may_wait and len(waiting) > 1 else 0
        if turns > PATIENCE:
            turns = 0
            furthest = max(waiting)
            here = waiting[furthest].reshape(threads.programs, threads.size)
            if (here.all(axis=1) == here.any(axis=1)).all():
                place = furthest
        threads.set_mask(waiting.pop(place))
        _run_until(code, threads, place, waiting)


def _asks_others(i: PtxInstruction) -> bool:
    """Whether an instruction may be what a loop waits by, for what other programs store."""
    return i.opcode == "atom" or (
        i.opcode == "ld" and not {"volatile", "acquire", "relaxed"}.isdisjoint(i.modifiers)
    )


def _run_until(code: Code, threads: Threads, place: int, waiting: dict[int, Array]) -> None:
    """Runs these lanes to a branch, a return, or where others wait; there they wait too."""
    instructions, actions, tallies = code.program.instructions, code.actions, threads.tallies
    others = min((other for other in waiting if other > place), default=len(instructions))
    while True:
        i, action = instructions[place], actions[place]
        threads.now, threads.place = i, place
        if threads.held:
            _check_held(threads, i)
        if action is None:
            _branch(threads, i, place, code.program.labels, waiting)
            return
        if i.guard is None:
            tallies.executed(threads)
            action(threads)
        else:
            _run_guarded(threads, i, action)
        place += 1
        if place >= others:
            _wait(waiting, place, threads.mask)
            return


def _run_guarded(threads: Threads, i: PtxInstruction, action: Action) -> None:
    here = threads.mask
    passing = threads.guarded(i)
    if passing.any():
        threads.set_mask(passing)
        threads.tallies.executed(threads)
        action(threads)
        threads.set_mask(here)


def _branch(
    threads: Threads, i: PtxInstruction, place: int, labels: Mapping[str, int], waiting: dict[int, Array]
) -> None:
    taken = threads.guarded(i)
    staying = threads.mask & ~taken
    threads.tallies.executed(threads)
    threads.tallies.branched(taken, staying)
    if i.opcode == "bra" and taken.any():
        _wait(waiting, labels[i.operand(0)], taken)
    if staying.any():
        _wait(waiting, place + 1, staying)


def _wait(waiting: dict[int, Array], place: int, lanes: Array) -> None:
    waiting[place] = waiting[place] | lanes if place in waiting else lanes


def _check_held(threads: Threads, i: PtxInstruction) -> None:
    """Registers of a wgmma on its way may not be touched before its wait (PTX ISA 9.7.15.7.1).

    A `mov` is let pass, and its result held too: Triton copies accumulators between the matmul and the wait that
    ties them, and ptxas makes one register of both.
    """
    touched = threads.held.keys() & i.registers
    if not touched or i.opcode == "wgmma":
        return
    here: Array = np.asarray(threads.guarded(i).reshape(-1, 128).any(axis=1))
    touched = {name for name in touched if (threads.held[name] & here).any()}
    if i.opcode != "mov":
        for name in touched:
            threads.report("matmul not awaited", 1, f"register {name}")
    elif touched & set(i.values(1)):
        for flight in threads.products:
            if touched & set(flight.detail["registers"]):
                flight.detail["registers"] += i.values(0)
        for name in i.values(0):
            threads.held[name] = threads.held.get(name, False) | here

"""Loads, stores and atomics of global and shared memory: ld, st, atom, red (PTX ISA 9.7.9, 9.7.13).

And griddepcontrol, which orders a dependent launch after those before it: until a thread has waited, it may access
no global memory.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np

from .global_memory import BASE
from .instruction_set import Action, Array, Reader, executes, form, reader
from .memory import BLOCKS, EmulatedMemory
from .program import DTYPES, UNSIGNED, PtxInstruction, UnknownInstruction
from .threads import Threads

_ADDRESS = re.compile(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\w+))?\s*\]")


def space_of(i: PtxInstruction) -> str | None:
    """ "global", "shared", "param"; None for another or for a generic address."""
    named = {"global": "global", "shared": "shared", "shared__cta": "shared", "param": "param"}
    return next((named[modifier] for modifier in i.modifiers if modifier in named), None)


def address_of(i: PtxInstruction, index: int, space: str) -> Reader:
    """Reads an operand like [%rd1+16] as int64: [active lanes]."""
    found = _ADDRESS.fullmatch(i.operand(index))
    if found is None:
        raise UnknownInstruction(i.text)
    base, offset = found[1], int(found[2] or "0", 0)
    if not base.startswith("%"):
        # An array in shared memory; all start at 0.
        return lambda threads: np.full(len(threads.active), offset, np.int64)
    read = reader(base, "u64" if space == "global" else "u32")

    def address(threads: Threads) -> Array:
        values = threads.active_values(read(threads)).astype(np.int64)
        return values + offset if offset else values

    return address


def locate(
    threads: Threads, space: str, address: Array, size: int, lanes: Array, what: str
) -> tuple[EmulatedMemory, Array]:
    """(memory, byte positions in it). Reports what is misaligned or outside, which goes to the memory's end."""
    memory = threads.memory if space == "global" else threads.shared
    if (address & (size - 1)).any():
        misaligned = address & (size - 1) != 0
        threads.report(
            "misaligned",
            misaligned.sum(),
            f"{what} of {size} bytes at {_told(threads, memory, address[misaligned][0])}",
        )
        address = address & -size
    if space == "global":
        start = address - BASE
        outside = threads.memory.outside(start, size)
        if threads.early is not None and what != "prefetch":
            _check_waited(threads, address, lanes, what)
    else:
        program = threads.program_of if lanes is threads.lane_index else threads.program_of.take(lanes)
        start = address + program * threads.space
        # Of a negative address, the highest bit is set.
        outside = address.view(np.uint64) >= max(threads.grid.shared - size + 1, 0)
    if outside.any():
        lane = lanes[outside][0]
        threads.report(
            "out of bounds",
            outside.sum(),
            f"{what} of {size} bytes by thread {lane % threads.size} of program {threads.program_id[lane]} at "
            f"{_told(threads, memory, address[outside][0])}",
        )
        start = np.where(outside, memory.total - 64, start)
    return memory, start


def _check_waited(threads: Threads, address: Array, lanes: Array, what: str) -> None:
    assert threads.early is not None
    early = threads.early.take(lanes)
    if early.any():
        kind = "early read" if what in ("read", "copy") else "early write"
        lane = lanes[early][0]
        threads.report(
            kind,
            early.sum(),
            f"{what} by thread {lane % threads.size} of program {threads.program_id[lane]} at "
            f"{_told(threads, threads.memory, address[early][0])}",
        )


def _told(threads: Threads, memory: EmulatedMemory, address: int) -> str:
    return memory.told(int(address) - BASE) if memory is threads.memory else f"byte {address} of shared memory"


@executes("ld")
def _load(i: PtxInstruction) -> Action | None:
    space, kind = space_of(i), i.kind
    if space is None or kind not in DTYPES:
        return None
    if space == "param":
        return _load_parameter(i)
    names = i.values(0)
    size = DTYPES[kind].itemsize * len(names)
    if size not in BLOCKS:
        return None
    address = address_of(i, 1, space)
    widened = [_register_kind(i, name, kind) for name in names]

    def load(threads: Threads) -> None:
        lanes = threads.active
        memory, start = locate(threads, space, address(threads), size, lanes, "read")
        if space == "shared" or not threads.memory.is_plain(start, size):
            memory.saw_read(threads.access(start, size, lanes), threads)
        threads.tallies.accessed(threads, space, "read", start, size)
        words = memory.gather(start, BLOCKS[size]).view(DTYPES[kind])
        if len(names) > 1:
            words = np.ascontiguousarray(words.reshape(-1, len(names)).T)
        for name, dtype, word in zip(names, widened, words.reshape(len(names), -1), strict=True):
            threads.write_active(name, word if dtype is word.dtype else word.astype(dtype))

    return load


def _register_kind(i: PtxInstruction, name: str, kind: str) -> np.dtype[np.generic]:
    """What a register takes, which may be wider than what is loaded: a signed type is extended (PTX ISA 9.4.1)."""
    dtype = DTYPES[kind]
    if name == "_" or i.bytes_of(name) == dtype.itemsize:
        return dtype
    if dtype.kind not in "ui" or i.bytes_of(name) < dtype.itemsize:
        raise UnknownInstruction(i.text)
    return UNSIGNED[i.bytes_of(name)]


def _load_parameter(i: PtxInstruction) -> Action | None:
    found = _ADDRESS.fullmatch(i.operand(1))
    if found is None or found[2] or found[1].startswith("%"):
        return None
    name, parameter, dtype = i.operand(0), found[1], DTYPES[i.kind]
    to = _register_kind(i, name, i.kind)

    def load(threads: Threads) -> None:
        value = threads.grid.parameters.get(parameter)
        if value is None:
            raise UnknownInstruction(f"line {i.line}: {i.text}: no such parameter")
        bits = value.view(UNSIGNED[value.dtype.itemsize]).astype(UNSIGNED[dtype.itemsize]).view(dtype)
        threads.write(name, bits if to is dtype else bits.astype(to))

    return load


@executes("st")
def _store(i: PtxInstruction) -> Action | None:
    space = space_of(i)
    if space is None or space == "param" or i.kind not in DTYPES:
        return None
    width = DTYPES[i.kind].itemsize
    values = [reader(name, f"b{8 * width}") for name in i.values(1)]
    size = width * len(values)
    if size not in BLOCKS:
        return None
    address = address_of(i, 0, space)

    def store(threads: Threads) -> None:
        lanes = threads.active
        memory, start = locate(threads, space, address(threads), size, lanes, "write")
        words = [threads.active_values(value(threads)) for value in values]
        memory.put(threads.access(start, size, lanes), words, threads)
        threads.tallies.accessed(threads, space, "write", start, size)

    return store


# ---------------------------------------------------------------- atomics

_ATOMIC: dict[str, Callable[[Array, Array], Array]] = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "exch": lambda old, new: new,
}


@executes("atom", "red")
def _atomic(i: PtxInstruction) -> Action | None:
    """One lane after the other where they access the same, in the order of their numbers: one legal order of many.

    Atomics race with nothing but other accesses of the same program.
    """
    space = space_of(i)
    operation = next((m for m in i.modifiers if m in (*_ATOMIC, "cas")), None)
    if space is None or space == "param" or operation is None or i.kind not in DTYPES:
        return None
    at = 1 if i.opcode == "atom" else 0
    count = 2 if operation == "cas" else 1
    # Of 16-bit floats only the bits are held here.
    if len(i.operands) != at + 1 + count or i.kind in ("f16", "bf16", "f16x2", "bf16x2") or "cache_hint" in i.text:
        return None
    address = address_of(i, at, space)
    dtype = DTYPES[i.kind]
    operands = [reader(i.operand(k), i.kind) for k in range(at + 1, len(i.operands))]

    def atomic(threads: Threads) -> None:
        lanes = threads.active
        memory, start = locate(threads, space, address(threads), dtype.itemsize, lanes, "atomic")
        values = [threads.active_values(operand(threads)) for operand in operands]
        access = replace(threads.access(start, dtype.itemsize, lanes), atomic=True)
        memory.check_written(access, threads)
        memory.saw_write(access, threads)
        old = np.empty(len(lanes), dtype)
        for some in _without_repeats(start):
            found = old[some] = memory.gather(start[some], dtype)
            given = [value[some] for value in values]
            if operation == "cas":
                made = np.where(found == given[0], given[1], found)
            else:
                made = _ATOMIC[operation](found, given[0])
            memory.scatter(start[some], made)
        threads.tallies.accessed(threads, space, "atomic", start, dtype.itemsize)
        if i.opcode == "atom":
            threads.write_active(i.operand(0), old)

    return atomic


def _without_repeats(start: Array) -> Iterator[Array]:
    """Lanes in groups that access each place once: the first lanes that access a place, the second ones, ..."""
    order = np.argsort(start, kind="stable")
    placed = start[order]
    begins = np.flatnonzero(np.r_[True, placed[1:] != placed[:-1]])
    ends = np.r_[begins[1:], len(start)]
    while len(begins):
        yield order[begins]
        begins += 1
        left = begins < ends
        begins, ends = begins[left], ends[left]


@executes("createpolicy")
def _make_policy(i: PtxInstruction) -> Action:
    """How a cache is to keep what an access brings: no matter here."""
    name, nothing = i.operand(0), np.zeros(1, np.uint64)
    return lambda threads: threads.write(name, nothing)


@executes("griddepcontrol")
def _control_dependents(i: PtxInstruction) -> Action | None:
    """`wait` returns at once in a launch that is not a dependent one, as on a GPU."""
    if i.operands or i.modifiers not in (("wait",), ("launch_dependents",)):
        return None
    if i.modifiers == ("wait",):
        return Threads.waited
    return lambda threads: None


@executes("prefetch")
def _prefetch(i: PtxInstruction) -> Action | None:
    """To the L2 cache, which later writes reach: nothing is read, and it need not wait."""
    if form(i, r"global\.L2(__evict_\w+)?") is None:
        return None
    address = address_of(i, 0, "global")

    def prefetch(threads: Threads) -> None:
        locate(threads, "global", address(threads), 1, threads.active, "prefetch")

    return prefetch

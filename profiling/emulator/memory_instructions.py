"""Loads, stores and atomics of global and shared memory: ld, st, atom, red (PTX ISA 9.7.9, 9.7.13)."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from .global_memory import BASE
from .instruction_set import Action, Array, Reader, executes, literal, reader
from .memory import EmulatedMemory
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
        return threads.active_values(read(threads)).astype(np.int64) + offset

    return address


def locate(
    threads: Threads, space: str, address: Array, size: int, lanes: Array, what: str
) -> tuple[EmulatedMemory, Array]:
    """(memory, byte positions in it). Reports what is misaligned or outside, which goes to the memory's end."""
    memory = threads.memory if space == "global" else threads.shared
    misaligned = address % size != 0 if size & (size - 1) == 0 else np.zeros(len(address), bool)
    if misaligned.any():
        threads.report(
            "misaligned", misaligned.sum(), f"{what} of {size} bytes at {address[misaligned][0]:#x}, {space} memory"
        )
        address = address - address % size
    if space == "global":
        start = address - BASE
        outside = threads.memory.outside(start, size)
    else:
        start = address + threads.program_of[lanes] * threads.space
        outside = (address < 0) | (address + size > threads.grid.shared)
    if outside.any():
        lane = lanes[outside][0]
        threads.report(
            "out of bounds",
            outside.sum(),
            f"{what} of {size} bytes by thread {lane % threads.size} of program {threads.program_id[lane]} at "
            f"{address[outside][0]:#x}, {space} memory",
        )
        start = np.where(outside, memory.total - 64, start)
    return memory, start


@executes("ld")
def _load(i: PtxInstruction) -> Action | None:
    space, kind = space_of(i), i.kind
    if space is None:
        return None
    if space == "param":
        return _load_parameter(i)
    names = i.values(0)
    width = DTYPES[kind].itemsize
    size = width * len(names)
    address = address_of(i, 1, space)
    # A register may be wider than what is loaded: a signed type is extended (PTX ISA 9.4.1).
    widened = [(name, _register_kind(i, name, kind)) for name in names]

    def load(threads: Threads) -> None:
        lanes = threads.active
        memory, start = locate(threads, space, address(threads), size, lanes, "read")
        memory.saw_read(threads.access(start, size, lanes), threads)
        threads.tallies.accessed(threads, space, "read", start, size)
        words = [memory.gather(start + k * width, DTYPES[kind]) for k in range(len(names))]
        for (name, dtype), word in zip(widened, words, strict=True):
            threads.write_active(name, word if dtype is word.dtype else word.astype(dtype))

    return load


def _register_kind(i: PtxInstruction, name: str, kind: str) -> np.dtype[np.generic]:
    if name == "_" or i.bytes_of(name) == DTYPES[kind].itemsize:
        return DTYPES[kind]
    return DTYPES[("s" if kind[0] == "s" else "u") + str(8 * i.bytes_of(name))]


def _load_parameter(i: PtxInstruction) -> Action | None:
    found = _ADDRESS.fullmatch(i.operand(1))
    if found is None or found[2] or found[1].startswith("%"):
        return None
    name, parameter, dtype = i.operand(0), found[1], DTYPES[i.kind]
    to = _register_kind(i, name, i.kind)

    def load(threads: Threads) -> None:
        value = threads.grid.parameters[parameter]
        bits = value.view(UNSIGNED[value.dtype.itemsize]).astype(UNSIGNED[dtype.itemsize]).view(dtype)
        threads.write(name, bits if to is dtype else bits.astype(to))

    return load


@executes("st")
def _store(i: PtxInstruction) -> Action | None:
    space = space_of(i)
    if space is None or space == "param":
        return None
    width = DTYPES[i.kind].itemsize
    values = [reader(name, f"b{8 * width}") for name in i.values(1)]
    size = width * len(values)
    address = address_of(i, 0, space)

    def store(threads: Threads) -> None:
        lanes = threads.active
        memory, start = locate(threads, space, address(threads), size, lanes, "write")
        words = [threads.active_values(value(threads)) for value in values]
        memory.put(threads.access(start, size, lanes), words, threads)
        threads.tallies.accessed(threads, space, "write", start, size)

    return store


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
    """One lane after the other, in the order of their numbers: one legal order of many.

    Atomics race with nothing, and are not noted as accesses; the memory must be written before.
    """
    space = space_of(i)
    operation = next((m for m in i.modifiers if m in (*_ATOMIC, "cas")), None)
    if space is None or space == "param" or operation is None or i.kind not in DTYPES or "noftz" in i.modifiers:
        return None
    at = 1 if i.opcode == "atom" else 0
    if isinstance(i.operands[at + 1], tuple):
        return None
    address = address_of(i, at, space)
    dtype = DTYPES[i.kind]
    operands = [reader(i.operand(k), i.kind) for k in range(at + 1, len(i.operands))]

    def atomic(threads: Threads) -> None:
        lanes = threads.active
        memory, start = locate(threads, space, address(threads), dtype.itemsize, lanes, "atomic")
        values = [threads.active_values(operand(threads)) for operand in operands]
        granules = start // memory.granule
        if not memory.written[granules].all():
            threads.report("uninitialised", int((~memory.written[granules]).sum()), "atomic")
        cells = memory.bytes.view(dtype)
        old = np.empty(len(lanes), dtype)
        for k, cell in enumerate(start // dtype.itemsize):
            old[k] = cells[cell]
            if operation == "cas":
                if old[k] == values[0][k]:
                    cells[cell] = values[1][k]
            else:
                cells[cell] = _ATOMIC[operation](old[k], values[0][k])
        threads.tallies.accessed(threads, space, "write", start, dtype.itemsize)
        if i.opcode == "atom":
            threads.write_active(i.operand(0), old)

    return atomic


def array_base(i: PtxInstruction) -> Action | None:
    """`mov` of the address of an array in shared memory: 0."""
    name, kind = i.operand(0), i.kind
    zero = literal("0", DTYPES[kind])
    return lambda threads: threads.write(name, zero)

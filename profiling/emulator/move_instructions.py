"""Predicates, selections and moves: setp of integers, selp, mov, cvta (PTX ISA 9.7.6, 9.7.9)."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import numpy as np

from .instruction_set import Action, Array, Reader, computes, executes, form, literal, reader, reads, sources
from .program import DTYPES, UNSIGNED, PtxInstruction, UnknownInstruction
from .threads import Threads

# ---------------------------------------------------------------- predicates


def predicate(text: str) -> Reader:
    """Reads a predicate, which "!" before it negates."""
    if text.startswith("!"):
        read = reader(text[1:], "pred")
        return lambda threads: ~read(threads)
    return reader(text, "pred")


@executes("selp")
def _select(i: PtxInstruction) -> Action | None:
    if not form(i, r"[bus](16|32|64)|f32|f64"):
        return None
    result, (a, b, p) = i.operand(0), sources(i, i.kind, i.kind, "pred")

    def select(threads: Threads) -> None:
        which = p(threads)
        if len(which) == 1:
            threads.write(result, np.atleast_1d(a(threads) if which[0] else b(threads)))
        else:
            threads.write(result, np.where(which, a(threads), b(threads)))

    return select


_COMPARISONS: Mapping[str, Callable[[Array, Array], Array]] = {
    **{"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater},
    **{"ge": np.greater_equal, "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal},
}


@executes("setp")
def _compare(i: PtxInstruction) -> Action | None:
    found = form(
        i, r"(?P<test>eq|ne|lt|le|gt|ge|lo|ls|hi|hs)\.(?:(?P<join>and|or|xor)\.)?(?P<kind>[bus](16|32|64))"
    )
    if found is None:
        return None
    test, kind = found["test"], found["kind"]
    if (kind[0] == "b" and test not in ("eq", "ne")) or (test[0] in "lh" and test[1] in "osi" and kind[0] != "u"):
        return None
    return sets_predicate(i, _COMPARISONS[test], kind, found["join"])


def sets_predicate(
    i: PtxInstruction, test: Callable[[Array, Array], Array], kind: str, join: str | None
) -> Action:
    """setp: p of `p|q` becomes the test, q its opposite, both joined to a further predicate."""
    result, _, opposite = i.operand(0).partition("|")
    if len(i.operands) != (4 if join else 3):
        raise UnknownInstruction(i.text)
    if join is None and not opposite:
        return computes(i, test, kind, kind)
    a, b = reads(i, kind, kind)
    third = predicate(i.operand(3)) if join else None
    joined = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}[join or "and"]

    def compare(threads: Threads) -> None:
        value = test(a(threads), b(threads))
        other = ~value
        if third is not None:
            c = third(threads)
            value, other = joined(value, c), joined(other, c)
        threads.write(result, value)
        if opposite:
            threads.write(opposite, other)

    return compare


# ---------------------------------------------------------------- moves


@executes("mov")
def _move(i: PtxInstruction) -> Action | None:
    if not form(i, r"[bus](16|32|64)|f32|f64|pred") or len(i.operands) != 2:
        return None
    to, source = i.operands
    if isinstance(to, tuple):
        return _unpack(i)
    if isinstance(source, tuple):
        return _pack(i)
    if re.fullmatch(r"[A-Za-z_$][\w$]*", source):
        return _move_address(i)
    read = reader(source, i.kind)
    return lambda threads: threads.write(to, read(threads))


def _unpack(i: PtxInstruction) -> Action:
    names, source, whole = i.values(0), reader(i.operand(1), i.kind), UNSIGNED[DTYPES[i.kind].itemsize]
    part = UNSIGNED[whole.itemsize // len(names)]
    first, *others = names
    shifts = [np.array(8 * part.itemsize * k, whole) for k in range(1, len(names))]

    def unpack(threads: Threads) -> None:
        bits = source(threads).view(whole)
        threads.write(first, bits.astype(part))
        for name, shift in zip(others, shifts, strict=True):
            threads.write(name, (bits >> shift).astype(part))

    return unpack


def _pack(i: PtxInstruction) -> Action:
    names, result, whole = i.values(1), i.operand(0), UNSIGNED[DTYPES[i.kind].itemsize]
    bits = 8 * whole.itemsize // len(names)
    first, *others = [reader(name, f"b{bits}") for name in names]
    shifts = [np.array(bits * k, whole) for k in range(1, len(names))]

    def pack(threads: Threads) -> None:
        value = first(threads).astype(whole)
        for read, shift in zip(others, shifts, strict=True):
            value = value | read(threads).astype(whole) << shift
        threads.write(result, value)

    return pack


def _move_address(i: PtxInstruction) -> Action:
    """The address of an array in shared memory: all start at 0."""
    name, result, zero = i.operand(1), i.operand(0), literal("0", DTYPES[i.kind])

    def move(threads: Threads) -> None:
        if name not in threads.program.shared:
            raise UnknownInstruction(f"line {i.line}: {i.text}: no array in shared memory")
        threads.write(result, zero)

    return move


@executes("cvta")
def _generic_address(i: PtxInstruction) -> Action | None:
    """An address stays what it is: no instruction here takes a generic one."""
    if not form(i, r"(to\.)?(global|shared|shared__cta|const|param)\.u(32|64)"):
        return None
    return computes(i, lambda x: x, i.kind)

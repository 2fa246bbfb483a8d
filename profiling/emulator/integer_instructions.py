"""Arithmetic of integers (PTX ISA 9.7.1)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from .instruction_set import Action, Array, computes, executes, form, literal, sources
from .numerics import some
from .program import DTYPES, PtxInstruction
from .threads import Threads

_INTEGER = r"(?P<kind>[us](?:16|32|64))"
_SIGNED = r"(?P<kind>s(?:16|32|64))"


def twice(kind: str) -> str:
    """The type of a product that keeps all bits: s64 for s32."""
    return f"{kind[0]}{2 * int(kind[1:])}"


@executes("add", "sub")
def _add(i: PtxInstruction) -> Action | None:
    if not form(i, _INTEGER):
        return None
    return computes(i, np.add if i.opcode == "add" else np.subtract, i.kind, i.kind)


@executes("mul")
def _multiply(i: PtxInstruction) -> Action | None:
    found = form(i, r"(?P<part>lo|hi|wide)\." + _INTEGER)
    if found is None:
        return None
    function = _product(i.kind, found["part"])
    return None if function is None else computes(i, function, i.kind, i.kind)


def _product(kind: str, part: str) -> Callable[[Array, Array], Array] | None:
    """The low half of a product, its high half or all of it; None for all of a 64-bit one."""
    dtype = DTYPES[kind]
    if part == "lo":
        return np.multiply
    if kind.endswith("64"):
        return partial(_high_half, signed=kind[0] == "s") if part == "hi" else None
    wide = DTYPES[twice(kind)]

    def whole(x: Array, y: Array) -> Array:
        return np.multiply(x.astype(wide), y.astype(wide))

    shift = np.array(8 * dtype.itemsize, wide)
    return whole if part == "wide" else lambda x, y: np.right_shift(whole(x, y), shift).astype(dtype)


def _high_half(x: Array, y: Array, signed: bool) -> Array:
    """The upper 64 bits of a product of 64-bit integers, by halves of 32 bits."""
    half, low = np.uint64(32), np.uint64(0xFFFFFFFF)
    a, b = x.view(np.uint64), y.view(np.uint64)
    middle = (a >> half) * (b & low) + ((a & low) * (b & low) >> half)
    other = (a & low) * (b >> half) + (middle & low)
    high: Array = (a >> half) * (b >> half) + (middle >> half) + (other >> half)
    if signed:
        # A negative x is 2^64 more as unsigned, and adds y to the upper half.
        high = high - np.where(x < 0, b, np.uint64(0)) - np.where(y < 0, a, np.uint64(0))
    return high.view(x.dtype)


@executes("mad")
def _multiply_add(i: PtxInstruction) -> Action | None:
    found = form(i, r"(?P<part>lo|hi|wide)\." + _INTEGER)
    if found is None:
        return None
    product = _product(i.kind, found["part"])
    if product is None:
        return None
    added = twice(i.kind) if found["part"] == "wide" else i.kind
    return computes(i, lambda x, y, z: np.add(product(x, y), z), i.kind, i.kind, added)


@executes("sad")
def _sum_of_differences(i: PtxInstruction) -> Action | None:
    if not form(i, _INTEGER):
        return None
    return computes(i, lambda x, y, z: np.where(x < y, y - x, x - y) + z, i.kind, i.kind, i.kind)


@executes("div", "rem")
def _divide(i: PtxInstruction) -> Action | None:
    """Rounds to zero; a remainder has the sign of the dividend. All bits are set where the divisor is zero."""
    if not form(i, _INTEGER):
        return None
    result, dtype, remainder = i.operand(0), DTYPES[i.kind], i.opcode == "rem"
    quotient = _quotient if dtype.itemsize == 8 else _quotient_by_float
    a, b = sources(i, i.kind, i.kind)
    zero, one, ones = np.zeros((), dtype), np.ones((), dtype), literal("-1", dtype)

    def divide(threads: Threads) -> None:
        x, y = a(threads), b(threads)
        by_zero = y == zero
        failed = some(by_zero)
        if failed:
            here = int(threads.active_values(np.atleast_1d(by_zero)).sum())
            if here:
                threads.report("division by zero", here, i.operand(2))
            y = np.where(by_zero, one, y)
        value = quotient(x, y)
        if remainder:
            value = x - value * y
        threads.write(result, np.where(by_zero, ones, value) if failed else value)

    return divide


def _quotient(x: Array, y: Array) -> Array:
    # numpy rounds down; what is left here has no remainder.
    return np.floor_divide(x - np.fmod(x, y), y) if x.dtype.kind == "i" else np.floor_divide(x, y)


def _quotient_by_float(x: Array, y: Array) -> Array:
    """Of up to 32 bits: 53 are enough for a quotient to be cut off rightly, and numpy's is five times slower."""
    whole = np.trunc(x.astype(np.float64) / y.astype(np.float64))
    # By way of 64 bits, for the least s32 by -1.
    return whole.astype(np.int64).astype(x.dtype)


@executes("min", "max")
def _extreme(i: PtxInstruction) -> Action | None:
    found = form(i, rf"(?P<relu>relu\.)?{_INTEGER}")
    # relu is for s32 of single values alone.
    if found is None or (found["relu"] and i.kind != "s32"):
        return None
    pick = np.minimum if i.opcode == "min" else np.maximum
    if not found["relu"]:
        return computes(i, pick, i.kind, i.kind)
    return computes(i, lambda x, y: np.maximum(pick(x, y), np.int32(0)), i.kind, i.kind)


@executes("abs", "neg")
def _sign(i: PtxInstruction) -> Action | None:
    if not form(i, _SIGNED):
        return None
    return computes(i, np.absolute if i.opcode == "abs" else np.negative, i.kind)

"""Bits of registers: logic, shifts, fields, bytes, counts (PTX ISA 9.7.1, 9.7.8, 9.7.9.7)."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce

import numpy as np

from .instruction_set import Action, Array, computes, executes, form, literal, reader, reads, sources
from .numerics import some
from .program import DTYPES, PtxInstruction, UnknownInstruction
from .threads import Threads

_BITS = r"(?P<kind>pred|b16|b32|b64)"


@executes("and", "or", "xor")
def _bitwise(i: PtxInstruction) -> Action | None:
    if not form(i, _BITS):
        return None
    function = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[i.opcode]
    return computes(i, function, i.kind, i.kind)


@executes("not")
def _not(i: PtxInstruction) -> Action | None:
    return computes(i, np.invert, i.kind) if form(i, _BITS) else None


@executes("cnot")
def _logical_not(i: PtxInstruction) -> Action | None:
    if not form(i, r"b16|b32|b64"):
        return None
    dtype = DTYPES[i.kind]
    return computes(i, lambda x: (x == 0).astype(dtype), i.kind)


@executes("shl", "shr")
def _shift(i: PtxInstruction) -> Action | None:
    """A count of as many bits as there are, or more, leaves zeros or copies of the sign."""
    left = i.opcode == "shl"
    if not form(i, r"b16|b32|b64" if left else r"[bus](16|32|64)"):
        return None
    dtype = DTYPES[i.kind]
    shift = np.left_shift if left else np.right_shift
    count = i.operand(2)
    if not count.startswith("%"):
        # numpy clears a value, or fills it with its sign, at counts past its width.
        by = np.array(min(int(literal(count, DTYPES["u32"])[0]), 8 * dtype.itemsize), dtype)
        result, source = i.operand(0), reader(i.operand(1), i.kind)
        return lambda threads: threads.write(result, shift(source(threads), by))
    most = np.uint32(8 * dtype.itemsize)
    return computes(i, lambda x, n: shift(x, np.minimum(n, most).astype(dtype)), i.kind, "u32")


@executes("shf")
def _funnel_shift(i: PtxInstruction) -> Action | None:
    """The upper or lower half of two registers, c the upper, shifted to the left or right."""
    found = form(i, r"(?P<way>l|r)\.(?P<mode>clamp|wrap)\.b32")
    if found is None:
        return None
    wrap, left = found["mode"] == "wrap", found["way"] == "l"

    def shifted(low: Array, high: Array, count: Array) -> Array:
        by = (count & np.uint32(31) if wrap else np.minimum(count, np.uint32(32))).astype(np.uint64)
        both = low.astype(np.uint64) | high.astype(np.uint64) << np.uint64(32)
        return ((both << by) >> np.uint64(32) if left else both >> by).astype(np.uint32)

    return computes(i, shifted, "b32", "b32", "u32")


@executes("bfe")
def _extract(i: PtxInstruction) -> Action | None:
    """`length` bits from `start` on; above them zeros, or copies of the last one that is taken or exists."""
    if not form(i, r"[us](32|64)"):
        return None
    dtype = DTYPES[i.kind]
    if any(place.startswith("%") for place in map(i.operand, (2, 3))):
        return computes(i, lambda x, *place: _field(x, *_field_shifts(dtype, *place)), i.kind, "u32", "u32")
    up, down, empty = _field_shifts(dtype, *(literal(i.operand(k), DTYPES["u32"]) for k in (2, 3)))
    result, source = i.operand(0), reader(i.operand(1), i.kind)
    if len(i.operands) != 4:
        raise UnknownInstruction(i.text)
    return lambda threads: threads.write(result, _field(source(threads), up, down, empty))


def _field_shifts(dtype: np.dtype[np.generic], start: Array, length: Array) -> tuple[Array, Array, Array]:
    """How far to the left and then to the right a bit field is shifted, and whether it has no bits."""
    width = 8 * dtype.itemsize
    start, length = start & np.uint32(255), length & np.uint32(255)
    empty = length == 0
    if dtype.kind == "u":
        empty = empty | (start >= width)
    start = np.minimum(start, np.uint32(width - 1))
    taken = np.minimum(length, np.uint32(width) - start)
    up = np.uint32(width) - start - taken
    return np.asarray(up, dtype), np.asarray(up + start, dtype), np.asarray(empty)


def _field(x: Array, up: Array, down: Array, empty: Array) -> Array:
    field = x << up >> down
    return np.where(empty, x.dtype.type(0), field) if some(empty) else field


@executes("bfi")
def _insert(i: PtxInstruction) -> Action | None:
    """The lowest `length` bits of a, at `start` in b."""
    if not form(i, r"b32|b64"):
        return None
    dtype = DTYPES[i.kind]
    result = i.operand(0)
    a, b, start, length = sources(i, i.kind, i.kind, "u32", "u32")

    def insert(threads: Threads) -> None:
        x, y = a(threads), b(threads)
        at = np.minimum(start(threads) & np.uint32(255), 8 * dtype.itemsize).astype(dtype)
        count = np.minimum(length(threads) & np.uint32(255), 8 * dtype.itemsize).astype(dtype)
        mask = ~(~np.zeros_like(count) << count) << at
        threads.write(result, y & ~mask | x << at & mask)

    return insert


@executes("lop3")
def _logic(i: PtxInstruction) -> Action | None:
    """Any function of three bits, by its table of truth."""
    if i.modifiers != ("b32",) or len(i.operands) != 5:
        return None
    result, table = i.operand(0), int(i.operand(4), 0)
    a, b, c = reads(i, "b32", "b32", "b32")

    def logic(threads: Threads) -> None:
        x, y, z = a(threads), b(threads), c(threads)
        value = np.zeros(1, np.uint32)
        for k in range(8):
            if table >> k & 1:
                value = value | (x if k & 4 else ~x) & (y if k & 2 else ~y) & (z if k & 1 else ~z)
        threads.write(result, value)

    return logic


@executes("prmt")
def _permute(i: PtxInstruction) -> Action | None:
    """Bytes of b and a by the digits of a selector; a digit's highest bit copies the byte's sign."""
    if i.modifiers != ("b32",):
        return None
    if not i.operand(3).startswith("%"):
        selector = int(literal(i.operand(3), DTYPES["u32"])[0])
        if not selector & 0x8888:
            return computes(i, _chosen_bytes(selector), "b32", "b32", "b32")
    return computes(i, _bytes_by_selector, "b32", "b32", "b32")


def _chosen_bytes(selector: int) -> Callable[[Array, Array, Array], Array]:
    """Bytes that move equally far are moved together."""
    masks: dict[tuple[int, int], int] = {}
    for k in range(4):
        digit = selector >> 4 * k & 7
        move = (digit >> 2, 8 * (k - (digit & 3)))
        masks[move] = masks.get(move, 0) | 0xFF << 8 * k
    moves = [
        (word, np.array(abs(by), np.uint32), by < 0, np.array(mask, np.uint32))
        for (word, by), mask in masks.items()
    ]

    def permute(x: Array, y: Array, _: Array) -> Array:
        parts = [((x, y)[word] >> by if right else (x, y)[word] << by) & mask for word, by, right, mask in moves]
        # Of the shape of both, though it may be made of one.
        return reduce(np.bitwise_or, parts, np.zeros(np.broadcast_shapes(x.shape, y.shape), np.uint32))

    return permute


def _bytes_by_selector(x: Array, y: Array, selector: Array) -> Array:
    x, y, selector = np.broadcast_arrays(np.atleast_1d(x), y, selector)
    both = np.stack([x, y], axis=1).view(np.uint8)  # [lanes, 8]
    digit = selector[:, None] >> np.arange(0, 16, 4, dtype=np.uint32)
    taken = np.take_along_axis(both, (digit & np.uint32(7)).astype(np.intp), axis=1)
    signs = (taken.view(np.int8) >> np.int8(7)).view(np.uint8)
    return np.where(digit & np.uint32(8), signs, taken).view(np.uint32).ravel()


@executes("clz", "popc", "brev")
def _count(i: PtxInstruction) -> Action | None:
    """Leading zeros and set bits as u32; brev: the bits in reverse."""
    if not form(i, r"b32|b64"):
        return None
    bits = 8 * DTYPES[i.kind].itemsize

    def each_bit(x: Array) -> Array:
        """[lanes, bits], the highest first."""
        big_endian = np.ascontiguousarray(x.astype(x.dtype.newbyteorder(">")))
        return np.unpackbits(big_endian.view(np.uint8).reshape(-1, bits // 8), axis=1)

    def count(x: Array) -> Array:
        found = each_bit(x)
        if i.opcode == "popc":
            ones: Array = np.add.reduce(found, axis=1, dtype=np.uint32)
            return ones
        if i.opcode == "clz":
            return np.where(found.any(axis=1), found.argmax(axis=1), bits).astype(np.uint32)
        reverse: Array = np.packbits(found, axis=1, bitorder="little").view(x.dtype).ravel()
        return reverse

    return computes(i, count, i.kind)

"""Integers, bits, predicates and moves (PTX ISA 9.7.1, 9.7.6, 9.7.8, 9.7.9)."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial, reduce

import numpy as np

from .instruction_set import Action, Array, Reader, computes, executes, form, literal, reader, reads, sources
from .numerics import some
from .program import DTYPES, UNSIGNED, PtxInstruction, UnknownInstruction
from .threads import Threads

_INTEGER = r"(?P<kind>[us](?:16|32|64))"
_SIGNED = r"(?P<kind>s(?:16|32|64))"
_BITS = r"(?P<kind>pred|b16|b32|b64)"


def twice(kind: str) -> str:
    """The type of a product that keeps all bits: s64 for s32."""
    return f"{kind[0]}{2 * int(kind[1:])}"


# ---------------------------------------------------------------- arithmetic


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


# ---------------------------------------------------------------- bits


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

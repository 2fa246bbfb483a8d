"""Matrices of a warp: ldmatrix, stmatrix, movmatrix, mma.sync (PTX ISA 9.7.14).

A warp holds a matrix in blocks of 8 rows of 16 bytes, one in a register: lane 4 g + t has the t-th 4 bytes of row
g. Arrays of registers here are [registers, lanes]. A transposition makes matrices of them, without index arrays.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .accumulation import integer_matmul, matmul
from .instruction_set import Action, Array, executes, reader
from .memory_instructions import address_of, locate, space_of
from .numerics import Numerics, bf16_values, f16_values, tf32_values
from .program import DTYPES, UNSIGNED, PtxInstruction
from .threads import Threads

# Sixteen bytes at once: numpy gathers them fastest as one number.
SIXTEEN_BYTES = np.dtype(np.complex128)


# ---------------------------------------------------------------- types


def _e4m3_table() -> Array:
    """The values of the 256 codes: 4 bits of exponent (bias 7), 3 of mantissa, no infinity (OCP 8-bit formats)."""
    code = np.arange(256)
    exponent, mantissa = code >> 3 & 15, code & 7
    size = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10))
    size[code & 127 == 127] = np.nan
    return np.where(code < 128, size, -size).astype(np.float32)


_TABLES = {
    "e4m3": _e4m3_table(),
    "e5m2": (np.arange(256, dtype=np.uint16) << 8).view(np.float16).astype(np.float32),
    "s8": np.arange(256, dtype=np.uint8).view(np.int8).astype(np.float32),
    "u8": np.arange(256).astype(np.float32),
}
_BYTES = {"bf16": 2, "f16": 2, "tf32": 4, **dict.fromkeys(_TABLES, 1)}
_INTEGERS = ("s8", "u8")
# Results and the operands that they are of.
_MULTIPLIED = {
    "f32": ("bf16", "f16", "tf32", "e4m3", "e5m2"),
    "f16": ("f16", "e4m3", "e5m2"),
    "s32": _INTEGERS,
}


def _values(kind: str, bits: Array, numerics: Numerics) -> Array:
    """float32 values of operands that are given as unsigned integers of their size."""
    if kind == "bf16":
        return bf16_values(bits)
    if kind == "f16":
        return f16_values(bits)
    if kind == "tf32":
        return tf32_values(bits, numerics)
    values: Array = _TABLES[kind][bits]
    return values


@dataclass(frozen=True, slots=True)
class MatmulTypes:
    """The types of d = a b + c: those of a and b in PTX, and `result` of c and d.

    saturates   whether int32 is clamped to its ends
    warp_group  whether it is a wgmma
    """

    result: str
    a: str
    b: str
    saturates: bool = False
    warp_group: bool = False

    @property
    def known(self) -> bool:
        return self.a in _MULTIPLIED.get(self.result, ()) and (self.a == self.b or self.b in _INTEGERS)

    @property
    def element(self) -> int:
        """Bytes of an operand's element."""
        return _BYTES[self.a]

    @property
    def accumulators(self) -> np.dtype[Any]:
        """What a register of c and d is read as: two float16 as uint32."""
        return DTYPES["b32" if self.result == "f16" else self.result]

    def multiply(self, a: Array, b: Array, c: Array | None, threads: Threads, *, negative: bool = False) -> Array:
        """a b + c, or c - a b: bits of a [..., M, K] and of b transposed, [..., N, K]; c [..., M, N] or None."""
        left = _values(self.a, a, threads.numerics)
        right = _values(self.b, b, threads.numerics).swapaxes(-1, -2)
        if negative:
            left = -left
        if self.result == "s32":
            return integer_matmul(left, right, c, self.saturates)
        return matmul(
            left,
            right,
            c,
            self.a,
            threads.numerics,
            threads.program.arch,
            result=self.result,
            warp_group=self.warp_group,
        )


# ---------------------------------------------------------------- fragments


def of_whole(size: int, action: Action) -> Action:
    """An action of whole warps (32 threads) or warp groups (128): parts are reported, and do nothing."""

    def act(threads: Threads) -> None:
        if threads.full and threads.size % size == 0:
            action(threads)
            return
        if threads.size % size:
            threads.report("divergent warp", 1, f"programs of {threads.size} threads, not of whole {size}")
            return
        here = threads.mask.reshape(-1, size)
        whole = here.all(axis=1)
        parts = int((here.any(axis=1) & ~whole).sum())
        if parts:
            threads.report("divergent warp", parts, f"{threads.now.opcode} needs {size} threads together")
        if whole.any():
            outside = threads.mask
            threads.set_mask(np.repeat(whole, size))
            action(threads)
            threads.set_mask(outside)

    return act


def registers(threads: Threads, names: Sequence[str], dtype: np.dtype[Any]) -> Array:
    """[registers, active lanes]."""
    values = np.empty((len(names), len(threads.active)), dtype)
    for row, name in zip(values, names, strict=True):
        row[:] = threads.active_values(threads.register(name, dtype))
    return values


def write_registers(threads: Threads, names: Sequence[str], values: Array) -> None:
    """Sets registers from [registers, active lanes]."""
    for name, row in zip(names, values, strict=True):
        threads.write_active(name, row)


def rows_by_k(words: Array, element: int) -> Array:
    """Matrix A [warps, 16, K] of elements of so many bytes, as bits, from uint32 [registers, lanes].

    Register 2 kb + h holds rows 8 h to 8 h + 7 and the kb-th 16 bytes of K (PTX ISA 9.7.14.5.7 and following).
    """
    blocks, warps, each = len(words) // 2, words.shape[1] // 32, 4 // element
    parts = words.view(UNSIGNED[element]).reshape(blocks, 2, warps, 8, 4 * each)
    return parts.transpose(2, 1, 3, 0, 4).reshape(warps, 16, blocks * 4 * each)


def columns_by_k(words: Array, element: int) -> Array:
    """Matrix B, transposed: [warps, 8, K]. Register kb holds the kb-th 16 bytes of K."""
    blocks, warps, each = len(words), words.shape[1] // 32, 4 // element
    parts = words.view(UNSIGNED[element]).reshape(blocks, warps, 8, 4 * each)
    return parts.transpose(1, 2, 0, 3).reshape(warps, 8, blocks * 4 * each)


def accumulators(values: Array) -> Array:
    """Matrix C [warps, 16, N] from [registers, lanes] of 32-bit elements, or of float16 pairs as uint32.

    Of each 8 columns a lane holds columns 2 t and 2 t + 1 of row g, then those of row g + 8.
    """
    warps = values.shape[1] // 32
    if values.dtype == np.uint32:
        blocks = len(values) // 2
        halves = values.view(np.float16).reshape(blocks, 2, warps, 8, 4, 2)
        return halves.transpose(2, 1, 3, 0, 4, 5).reshape(warps, 16, 8 * blocks)
    blocks = len(values) // 4
    return values.reshape(blocks, 2, 2, warps, 8, 4).transpose(3, 1, 4, 0, 5, 2).reshape(warps, 16, 8 * blocks)


def accumulator_registers(matrix: Array) -> Array:
    """[registers, lanes] of a matrix [warps, 16, N]: 32-bit elements as they are, float16 in pairs as uint32."""
    warps, _, n = matrix.shape
    parts = matrix.reshape(warps, 2, 8, n // 8, 4, 2)
    if matrix.dtype == np.float16:
        return np.ascontiguousarray(parts.transpose(3, 1, 0, 2, 4, 5)).view(np.uint32).reshape(n // 4, warps * 32)
    return parts.transpose(3, 1, 5, 0, 2, 4).reshape(n // 2, warps * 32)


# ---------------------------------------------------------------- ldmatrix, stmatrix, movmatrix


@executes("ldmatrix")
def _load_matrices(i: PtxInstruction) -> Action | None:
    """Lanes give addresses of rows of 8 elements of 16 bits; eight rows are a matrix, and fill a register."""
    names = i.values(0)
    if "m8n8" not in i.modifiers or i.kind != "b16" or space_of(i) != "shared":
        return None
    count, transposed, address = len(names), "trans" in i.modifiers, address_of(i, 1, "shared")

    def load(threads: Threads) -> None:
        lanes, starts = _rows_given(threads, address(threads), count)
        memory, start = locate(threads, "shared", starts, 16, lanes, "read")
        memory.saw_read(threads.access(start, 16, lanes), threads)
        threads.tallies.accessed(threads, "shared", "read", start, 16, lanes)
        tiles = memory.gather(start, SIXTEEN_BYTES).view(np.uint16).reshape(-1, count, 8, 8)
        tiles = tiles.transpose(1, 0, 3, 2) if transposed else tiles.transpose(1, 0, 2, 3)
        write_registers(threads, names, np.ascontiguousarray(tiles).view(np.uint32).reshape(count, -1))

    return of_whole(32, load)


@executes("stmatrix")
def _store_matrices(i: PtxInstruction) -> Action | None:
    names = i.values(1)
    if "m8n8" not in i.modifiers or i.kind != "b16" or space_of(i) != "shared":
        return None
    count, transposed, address = len(names), "trans" in i.modifiers, address_of(i, 0, "shared")

    def store(threads: Threads) -> None:
        lanes, starts = _rows_given(threads, address(threads), count)
        memory, start = locate(threads, "shared", starts, 16, lanes, "write")
        tiles = registers(threads, names, DTYPES["b32"]).view(np.uint16).reshape(count, -1, 8, 8)
        tiles = tiles.transpose(1, 0, 3, 2) if transposed else tiles.transpose(1, 0, 2, 3)
        words = np.ascontiguousarray(tiles).view(np.uint32).reshape(-1, 4)
        memory.put(threads.access(start, 16, lanes), list(words.T), threads)
        threads.tallies.accessed(threads, "shared", "write", start, 16, lanes)

    return of_whole(32, store)


def _rows_given(threads: Threads, address: Array, count: int) -> tuple[Array, Array]:
    """(lanes, their addresses): a warp's first 8, 16 or 32 lanes, for 1, 2 or 4 matrices. Others are ignored."""
    given = 8 * count
    return threads.active.reshape(-1, 32)[:, :given].ravel(), address.reshape(-1, 32)[:, :given].ravel()


@executes("movmatrix")
def _transpose_matrix(i: PtxInstruction) -> Action | None:
    """The transposed of one matrix of 8x8 16-bit elements."""
    if i.modifiers != ("sync", "aligned", "m8n8", "trans", "b16"):
        return None
    result, source = i.operand(0), reader(i.operand(1), "b32")

    def move(threads: Threads) -> None:
        words = np.ascontiguousarray(threads.active_values(source(threads)))
        tiles = words.view(np.uint16).reshape(-1, 8, 8).transpose(0, 2, 1)
        threads.write_active(result, np.ascontiguousarray(tiles).view(np.uint32).ravel())

    return of_whole(32, move)


# ---------------------------------------------------------------- mma


@executes("mma")
def _multiply(i: PtxInstruction) -> Action | None:
    """mma.sync.aligned.m16n8kK.row.col.{types of D, A, B, C} d, a, b, c: d = a b + c, all in registers."""
    form = re.fullmatch(
        r"sync\.aligned\.m16n8k(\d+)\.row\.col(\.satfinite)?\.(\w+)\.(\w+)\.(\w+)\.(\w+)", ".".join(i.modifiers)
    )
    if form is None:
        return None
    depth, saturates, result, kind, other, summed = int(form[1]), bool(form[2]), *form.groups()[2:]
    types = MatmulTypes(result, kind, other, saturates)
    if not types.known or result != summed:
        return None
    names, a_names, b_names, c_names = (i.values(k) for k in range(4))
    element = types.element
    if (len(a_names), len(b_names)) != (depth * element // 8, depth * element // 16):
        return None

    def multiply(threads: Threads) -> None:
        a = rows_by_k(registers(threads, a_names, DTYPES["b32"]), element)
        b = columns_by_k(registers(threads, b_names, DTYPES["b32"]), element)
        c = accumulators(registers(threads, c_names, types.accumulators))
        write_registers(threads, names, accumulator_registers(types.multiply(a, b, c, threads)))

    return of_whole(32, multiply)

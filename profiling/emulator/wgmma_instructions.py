"""Matmuls of a warp group: wgmma.mma_async, its fence, commit_group and wait_group (PTX ISA 9.7.15).

A wgmma is computed when it is issued. Until it is awaited, its registers are held, and the shared memory that it
reads is watched.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

import numpy as np

from .instruction_set import Action, Array, Reader, executes, reader
from .matrix_instructions import (
    SIXTEEN_BYTES,
    MatmulTypes,
    accumulator_registers,
    accumulators,
    of_whole,
    registers,
    rows_by_k,
    write_registers,
)
from .memory_instructions import locate
from .program import DTYPES, UNSIGNED, PtxInstruction, UnknownInstruction
from .threads import Flight, Threads

GROUP = 128
# Of the dtype of counts: numpy adds another by a path that is forty times as slow.
_ONE = np.int16(1)


@executes("wgmma")
def _wgmma(i: PtxInstruction) -> Action | None:
    match i.modifiers[0]:
        case "fence":
            # Orders registers before a wgmma, which in lock step they are.
            return lambda threads: None
        case "commit_group":
            return of_whole(GROUP, _commit)
        case "wait_group":
            left = int(i.operand(0))
            return of_whole(GROUP, lambda threads: _wait(threads, left))
        case "mma_async":
            return _asynchronous_matmul(i)
    return None


# ---------------------------------------------------------------- matrices in shared memory


@functools.lru_cache(maxsize=16384)
def matrix_rows(descriptor: int, rows: int, transposed: bool) -> tuple[Array, int]:
    """(where a matrix's 16-byte rows of core matrices lie in a program's shared memory, the last one's end).

    Not transposed (K-major): [rows, 2], the 32 bytes of K that an instruction takes. Transposed (MN-major), of
    16-bit elements: [16 of K, rows / 8]. Rows are those of A, or the columns of B. PTX ISA 9.7.15.5.1.
    """
    if descriptor >> 49 & 7:
        raise UnknownInstruction(f"base offset of the matrix descriptor {descriptor:#x}")
    start, leading, stride = ((descriptor >> bit & 0x3FFF) << 4 for bit in (0, 16, 32))
    # Bytes of a row in the pattern of a swizzle: none has core matrices of 16 bytes.
    width = {0: 16, 1: 128, 2: 64, 3: 32}[descriptor >> 62 & 3]
    if transposed:
        k, eight = np.arange(16)[:, None], np.arange(rows // 8)[None, :]
        across = width // 16
        if width == 16:
            at = k % 8 * 16 + k // 8 * leading + eight * stride
        else:
            at = k % 8 * width + k // 8 * stride + eight % across * 16 + eight // across * leading
    else:
        row, half = np.arange(rows)[:, None], np.arange(2)[None, :]
        at = row % 8 * width + row // 8 * stride + half * (leading if width == 16 else 16)
    at = at + start
    # The swizzle exchanges the 16-byte rows of a line of `width` bytes, by the number of the 128 bytes it is in.
    at = at ^ ((at >> 7 & (width // 16 - 1)) << 4)
    return at, int(at.max()) + 16


@dataclass(frozen=True)
class SharedMatrix:
    """An operand that a descriptor tells of: `rows` of A, or columns of B, of 32 bytes of K."""

    descriptor: Reader
    rows: int
    element: int
    transposed: bool

    def places(self, threads: Threads) -> Array:
        """[warp groups, 16-byte rows] byte positions in the programs' shared memory."""
        heads = threads.active[::GROUP]
        given = self.descriptor(threads)
        values = given if len(given) == 1 else threads.active_values(given).reshape(-1, GROUP)
        if (values != values[..., :1]).any():
            threads.report("differing descriptor", int((values != values[..., :1]).any(axis=1).sum()))
        values = np.broadcast_to(values[..., 0], heads.shape)
        spaces = threads.program_of[heads] * threads.space
        first = int(values[0])
        if (values == first).all():
            return self._placed(threads, first, heads, spaces)
        places = np.empty((len(heads), self.rows * 2), np.int64)
        for value in np.unique(values):
            some = values == value
            places[some] = self._placed(threads, int(value), heads[some], spaces[some])
        return places

    def _placed(self, threads: Threads, descriptor: int, heads: Array, spaces: Array) -> Array:
        at, end = matrix_rows(descriptor, self.rows, self.transposed)
        if end > threads.grid.shared:
            lanes = np.repeat(heads, at.size)
            return locate(threads, "shared", np.tile(at.ravel(), len(heads)), 16, lanes, "matmul")[1].reshape(
                len(heads), -1
            )
        return spaces[:, None] + at.ravel()

    def bits(self, threads: Threads, places: Array) -> Array:
        """[warp groups, rows, K] as unsigned integers."""
        bits = threads.shared.gather(places, SIXTEEN_BYTES).view(UNSIGNED[self.element])
        if self.transposed:
            return bits.reshape(len(places), 16, self.rows).transpose(0, 2, 1)
        return bits.reshape(len(places), self.rows, -1)


# ---------------------------------------------------------------- the matmul


def _asynchronous_matmul(i: PtxInstruction) -> Action | None:
    """wgmma.mma_async.sync.aligned.m64nNkK.{types of D, A, B} d, a, b, scale of d, signs, transpositions.

    Integers have no signs, only 16-bit floats can be transposed, and only in shared memory.
    """
    form = re.fullmatch(
        r"mma_async\.sync\.aligned\.m64n(\d+)k(\d+)\.(\w+)\.(\w+)\.(\w+)(\.satfinite)?", ".".join(i.modifiers)
    )
    if form is None:
        return None
    columns, depth = int(form[1]), int(form[2])
    types = MatmulTypes(form[3], form[4], form[5], bool(form[6]), warp_group=True)
    if not types.known or depth * types.element != 32:
        return None
    names, in_registers = i.values(0), isinstance(i.operands[1], tuple)
    flags = [int(i.operand(k)) for k in range(4, len(i.operands))]
    signs = 0 if types.result == "s32" else 2
    transpositions = (1 if in_registers else 2) if types.element == 2 else 0
    if len(flags) != signs + transpositions:
        return None
    negative = signs == 2 and flags[0] * flags[1] < 0
    *trans_a, trans_b = [bool(flag) for flag in flags[signs:]] or [False]
    a_names = i.values(1) if in_registers else ()
    a_shared = (
        SharedMatrix(reader(i.operand(1), "u64"), 64, types.element, any(trans_a)) if not in_registers else None
    )
    b_shared = SharedMatrix(reader(i.operand(2), "u64"), columns, types.element, trans_b)
    scale = reader(i.operand(3), "pred")
    held = tuple(dict.fromkeys((*names, *a_names)))

    def multiply(threads: Threads) -> None:
        places = b_places = b_shared.places(threads)
        if a_shared is None:
            words = registers(threads, a_names, DTYPES["b32"])
            a = rows_by_k(words, types.element).reshape(len(places), 64, -1)
        else:
            a_places = a_shared.places(threads)
            a = a_shared.bits(threads, a_places)
            places = np.concatenate((a_places, b_places), axis=1)
        b = b_shared.bits(threads, b_places)
        c = _accumulated(threads, names, types, threads.active_values(scale(threads)))
        _issue(threads, places, held)
        d = types.multiply(a, b, c, threads, negative=negative)
        write_registers(threads, names, accumulator_registers(d.reshape(-1, 16, columns)))

    return of_whole(GROUP, multiply)


def _accumulated(threads: Threads, names: tuple[str, ...], types: MatmulTypes, scale: Array) -> Array | None:
    """[warp groups, 64, N]: what the product is added to; None where the instruction's scale of D is 0."""
    if not scale.any():
        return None
    values = registers(threads, names, types.accumulators)
    if not scale.all():
        values = np.where(scale, values, values.dtype.type(0))
    matrix = accumulators(values)
    return matrix.reshape(-1, 64, matrix.shape[-1])


# ---------------------------------------------------------------- on their way


def _issue(threads: Threads, places: Array, held: tuple[str, ...]) -> None:
    """Notes what a wgmma reads, [warp groups, 16-byte rows], and the registers that it holds."""
    heads, shared = threads.active[::GROUP], threads.shared
    access = threads.access(places.ravel(), 16, np.repeat(heads, places.shape[1]), wide=True)
    shared.saw_read(access, threads)
    threads.tallies.matmul_read(threads, 16 * places.size)
    np.add.at(shared.multiplying, access.granules(shared.granule).ravel(), _ONE)
    detail = {"access": access, "registers": held}
    threads.products.append(Flight(heads, threads.product_group[heads], detail))
    _hold(threads, heads, held)


def _hold(threads: Threads, heads: Array, names: tuple[str, ...]) -> None:
    groups = np.zeros(threads.lanes // GROUP, bool)
    groups[heads // GROUP] = True
    for name in names:
        old = threads.held.get(name)
        threads.held[name] = groups if old is None else old | groups


def _commit(threads: Threads) -> None:
    threads.product_group[threads.active] += 1


def _wait(threads: Threads, left: int) -> None:
    """Finishes the wgmma of a warp group but those of its last `left` groups and those not yet committed."""
    flying = []
    for flight in threads.products:
        done = threads.mask[flight.lanes] & (flight.group < threads.product_group[flight.lanes] - left)
        if done.any():
            _finish(threads, _part(flight, done))
        if not done.all():
            flying.append(_part(flight, ~done))
    if len(flying) == len(threads.products) and all(a is b for a, b in zip(flying, threads.products, strict=True)):
        return
    threads.products = flying
    threads.held = {}
    for flight in flying:
        _hold(threads, flight.lanes, flight.detail["registers"])


def _finish(threads: Threads, flight: Flight) -> None:
    access, shared = flight.detail["access"], threads.shared
    np.add.at(shared.multiplying, access.granules(shared.granule).ravel(), -_ONE)
    # Writes until now were reported as of what a wgmma reads; from here on they race with a read of this epoch.
    lanes = np.repeat(flight.lanes, len(access.start) // len(flight.lanes))
    shared.read_until_now(threads.made_now(access, lanes))


def _part(flight: Flight, some: Array) -> Flight:
    """The flight of some of its warp groups."""
    if some.all():
        return flight
    access = flight.detail["access"]
    access = access.of(np.repeat(some, len(access.start) // len(some)))
    return Flight(flight.lanes[some], flight.group[some], {**flight.detail, "access": access})

"""Weights that every program of a launch reads, asked for before they are needed.

A step reads each weight once, so it comes from memory, not from the L2 cache. A program that reads weights piece
by piece waits for each piece. Here each program first asks for its share of all pieces, so that all of them are
soon in the L2 cache, which the programs share.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

from ._launch import Chip, ceil_div, next_power_of_two
from ._triton import is_interpreted, jit, tl

_LINE_BYTES = 128


@jit
def prefetch_share(ptr, size, LINES: tl.constexpr):
    """Asks for this program's LINES lines of `size` elements to come into the L2 cache."""
    if LINES > 0:
        ELEMENTS: tl.constexpr = 1024 // ptr.dtype.element_ty.primitive_bitwidth
        lines = tl.program_id(0) * LINES + tl.arange(0, LINES)
        _prefetch(ptr + tl.minimum(lines * ELEMENTS, size - 1))


@jit
def _prefetch(ptrs):
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;",
        "=r,l",
        [ptrs.to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


def lines_of_a_program(size: int, itemsize: int, programs: int, kernel: Any, chip: Chip) -> int:
    """LINES of `prefetch_share`: 0 where there is no such instruction."""
    if is_interpreted(kernel) or not chip.arch.startswith("sm_"):
        return 0
    return next_power_of_two(ceil_div(ceil_div(size * itemsize, _LINE_BYTES), programs))

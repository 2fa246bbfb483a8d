"""Dimensions that are no powers of two, in tiles that must be: one or two parts, each a power of two.

A tensor of such a dimension is a tuple of tensors in a kernel, one for each part; PART_2 is 0 for none. All but
the last part are full.
"""

# Branches on constants are statements: Triton decides them when it compiles, and expressions it does not.
# ruff: noqa: SIM108
# mypy: disable-error-code="no-untyped-def, assignment"

from __future__ import annotations

from ._launch import next_power_of_two
from ._triton import jit, tl


def parts(size: int) -> tuple[int, int]:
    """The one (then 0) or two different powers of two, at least 16, of the least sum that holds `size`."""
    single = max(next_power_of_two(size), 16)
    larger = single // 2
    smaller = max(next_power_of_two(size - larger), 16)
    return (larger, smaller) if larger > smaller else (single, 0)


def padded(size: int) -> int:
    """What a dimension of `size` takes in a tile."""
    return sum(parts(size))


@jit
def part_columns(PART_1: tl.constexpr, PART_2: tl.constexpr):
    """The indices of a dimension, part by part."""
    if PART_2 == 0:
        columns = (tl.arange(0, PART_1),)
    else:
        columns = (tl.arange(0, PART_1), PART_1 + tl.arange(0, PART_2))
    return columns


@jit
def _load_part(ptrs, mask_rows, columns, SIZE: tl.constexpr, PADDED: tl.constexpr):
    """One part; a mask only where it is needed, since a part without one is loaded in longer pieces."""
    if mask_rows is None and not PADDED:
        part = tl.load(ptrs)
    elif mask_rows is None:
        part = tl.load(ptrs, mask=columns < SIZE, other=0.0)
    elif not PADDED:
        part = tl.load(ptrs, mask=mask_rows[:, None], other=0.0)
    else:
        part = tl.load(ptrs, mask=mask_rows[:, None] & (columns < SIZE), other=0.0)
    return part


@jit
def load_parts(row_ptrs, mask_rows, SIZE: tl.constexpr, PART_1: tl.constexpr, PART_2: tl.constexpr):
    """[rows, part] of each part of a dimension of SIZE; zeros in masked rows (None: no mask) and padding."""
    columns = part_columns(PART_1, PART_2)
    parts = ()
    for i in tl.static_range(len(columns)):
        c = columns[i][None, :]
        PADDED = i == len(columns) - 1 and PART_1 + PART_2 > SIZE
        parts += (_load_part(row_ptrs[:, None] + c, mask_rows, c, SIZE, PADDED),)
    return parts


@jit
def row_ptrs(ptr, rows, stride, ALIGN: tl.constexpr):
    """Pointers to rows; `stride` is a multiple of ALIGN elements, which the compiler cannot see of 40."""
    offsets = rows.to(tl.int64) * stride
    if ALIGN > 1:
        offsets = tl.multiple_of(offsets, [ALIGN])
    return ptr + offsets

"""Launch configurations of `attention`: which tile serves which head dimension, before a tuner has measured it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ._launch import Chip, ceil_div, next_power_of_two
from ._parts import padded

# Up to so many keys a program can hold them all.
MAX_SHORT_KEYS = 128


@dataclass(frozen=True)
class AttentionConfig:
    """A tile of block_m queries and block_n keys; block_n 0: all keys are one tile, for query_tiles tiles.

    polynomial   how many of every eight exponentials are a polynomial on the multiply-add units
    matrix_sums  whether row sums are matmuls with ones instead of additions (16-bit dtypes)
    ahead        whether the next tile's scores are computed during the exponentials: for whole tiles, no mask
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    polynomial: int = 0
    matrix_sums: bool = False
    query_tiles: int = 1
    ahead: bool = False


_Table = Sequence[tuple[int, Sequence[AttentionConfig]]]


def _tiles(
    block_m: int,
    block_n: int,
    num_warps: int,
    polynomial: int = 0,
    sums: bool = False,
    *,
    stages: int = 2,
    ahead: bool = False,
) -> AttentionConfig:
    return AttentionConfig(block_m, block_n, num_warps, stages, polynomial, sums, ahead=ahead)


# By architecture and padded head dimension: tiles from many queries to few. Not measured. No tile spills.
# Those of sm_90 follow a schedule simulation of the machine code (docs/attention.md says how far to trust it).
# Up to 96, two or three programs share a multiprocessor, and their matmuls and exponentials overlap. Above 96 one
# program fits, so scores are computed ahead; `ahead` stands only where the machine code shows the overlap.
# Three stages: with two, a program waits at once for the copy of the next tile. Up to 32 exponentials are the
# limit, so one in eight is a polynomial. Up to 48 row sums are matmuls.
_HALF: Mapping[str, _Table] = {
    "sm_90": (
        (32, (_tiles(64, 128, 4, 1, True, stages=3),)),
        (48, (_tiles(128, 64, 4, 0, True, stages=3), _tiles(64, 64, 4, 0, True, stages=3))),
        (64, (_tiles(128, 64, 4, stages=3), _tiles(64, 64, 4, stages=3))),
        (96, (_tiles(128, 64, 8, stages=3), _tiles(64, 64, 4, stages=3))),
        (128, (_tiles(128, 64, 8, stages=3, ahead=True), _tiles(64, 64, 4, stages=3, ahead=True))),
        (192, (_tiles(128, 64, 8, stages=3, ahead=True), _tiles(64, 64, 4, stages=3))),
        (256, (_tiles(128, 32, 8, stages=3, ahead=True), _tiles(64, 64, 8))),
        (384, (_tiles(128, 16, 8, stages=3), _tiles(64, 32, 8))),
    ),
    "sm_80": (
        (16, (_tiles(64, 128, 4, 1, True, stages=3),)),
        (48, (_tiles(128, 64, 8, 0, True, stages=3), _tiles(64, 64, 4, 0, True, stages=3))),
        (96, (_tiles(128, 64, 8, stages=3), _tiles(64, 64, 4, stages=3))),
        (128, (_tiles(128, 32, 8, stages=3), _tiles(64, 32, 4, stages=3))),
        (160, (_tiles(128, 32, 8), _tiles(64, 32, 4, stages=3))),
        (192, (_tiles(128, 16, 8),)),
        (256, (_tiles(64, 64, 8), _tiles(64, 32, 8))),
        (384, (_tiles(64, 16, 8),)),
    ),
    "gfx942": (
        (16, (_tiles(64, 128, 4),)),
        (96, (_tiles(128, 64, 8), _tiles(64, 64, 4))),
        (256, (_tiles(128, 32, 8), _tiles(64, 32, 4))),
        (384, (AttentionConfig(64, 32, 8, 1),)),
    ),
    # Others may have less than 100 KiB of shared memory.
    "": (
        (16, (_tiles(64, 128, 4, 0, True),)),
        (64, (_tiles(64, 64, 4),)),
        (128, (_tiles(64, 32, 4),)),
        (192, (_tiles(64, 32, 8),)),
        (256, (_tiles(64, 32, 8),)),
        (384, (_tiles(64, 16, 8),)),
    ),
}
# Float32 runs on the multiply-add units, whose operands are registers.
_FLOAT32: _Table = (
    (48, (_tiles(32, 32, 4),)),
    (96, (_tiles(64, 32, 8),)),
    (256, (_tiles(32, 16, 8),)),
    (384, (AttentionConfig(32, 16, 8, 1),)),
)
_TF32: _Table = (
    (64, (_tiles(64, 64, 4),)),
    (128, (_tiles(64, 32, 4),)),
    (384, (AttentionConfig(32, 16, 8, 1), AttentionConfig(16, 16, 4, 1))),
)
# For padded head dimensions from 33 to 48 on sm_90 where 128 queries by 4 warps spill: rows that are not whole
# pieces of 16 bytes (triton 3.9.0), and masks of every tile, at 36 with two stages (triton 3.6.0).
_FEWER_48 = _tiles(64, 128, 4, 0, True, stages=3)
# The largest padded head dimension whose keys and values a program can hold without spills.
_SHORT = {"sm_90": 192, "sm_80": 192, "gfx942": 80, "": 128}


def default_config(
    queries: int, keys: int, dim: int, heads: int, itemsize: int, chip: Chip, *, tf32: bool, has_mask: bool
) -> AttentionConfig:
    """The tile for `heads` heads (of all samples) of `dim`, on a chip that nothing was measured on."""
    arch = _known(chip.arch)
    if itemsize == 2 and keys <= MAX_SHORT_KEYS and padded(dim) <= _SHORT[arch]:
        tiles = ceil_div(queries, 64)
        # Several tiles for each load of the keys, and four programs for each multiprocessor.
        query_tiles = min(max(tiles * heads // (4 * chip.multiprocessors), 1), tiles, 16)
        one_tile = AttentionConfig(64, 0, 4, 2, matrix_sums=arch != "gfx942" and padded(dim) <= 64)
        return replace(one_tile, query_tiles=next_power_of_two(query_tiles + 1) // 2)
    choices = _choices(_HALF[arch] if itemsize == 2 else _TF32 if tf32 else _FLOAT32, dim)
    if arch == "sm_90" and itemsize == 2:
        if 32 < padded(dim) <= 48 and has_mask:
            return replace(_FEWER_48, num_stages=2)
        if _spills_48(dim):
            return _FEWER_48
        if 160 < padded(dim) <= 192 and has_mask:
            # 64 queries by 4 warps spill.
            return choices[0]
    # A mask of every tile takes registers that the largest dimensions have not.
    few_registers = has_mask and padded(dim) > 192
    filling = (c for c in choices if ceil_div(queries, c.block_m) * heads >= chip.multiprocessors)
    return choices[-1] if few_registers else next(filling, choices[-1])


def _spills_48(dim: int) -> bool:
    return 32 < padded(dim) <= 48 and dim % 8 != 0


def _known(arch: str) -> str:
    return arch if arch in _HALF else ""


def _choices(table: _Table, dim: int) -> Sequence[AttentionConfig]:
    return next(configs for largest, configs in table if padded(dim) <= largest)


# Queries and keys of a tile, and warps, that a tuner tries.
_HALF_SHAPES = (
    *((64, 128, 4), (128, 64, 4), (128, 128, 8), (64, 64, 4), (128, 64, 8), (256, 64, 8), (256, 64, 16)),
    *((64, 64, 8), (64, 32, 4), (128, 32, 8), (256, 32, 16), (64, 32, 8), (128, 16, 8)),
)
_FLOAT32_SHAPES = ((32, 32, 4), (64, 32, 4), (64, 64, 4), (64, 32, 8), (32, 32, 8), (32, 16, 8), (64, 16, 8))


def candidate_configs(
    queries: int, keys: int, dim: int, itemsize: int, shared_bytes: int = 227 * 1024
) -> list[AttentionConfig]:
    """What a tuner tries: tiles whose accumulators and buffers fit registers and shared memory.

    The most promising first, for a search that is cut short: the defaults of sm_90, then their tiles in other
    variants, then the rest.
    """
    width, is_half = padded(dim), itemsize == 2
    rows = max(next_power_of_two(queries), 64)
    # Matmuls for row sums, and polynomials, where tensor cores or issue slots are left for them.
    options: tuple[tuple[int, bool], ...] = ((0, False),)
    if is_half and width <= 96:
        options = ((0, True), (1, True)) if width <= 48 else ((0, True), (0, False))
    found = []
    if is_half and keys <= MAX_SHORT_KEYS:
        found += [
            AttentionConfig(m, 0, warps, stages, 0, sums, tiles)
            for m, warps in ((64, 4), (128, 8))
            for stages in (2, 3)
            for tiles in (1, 2, 4, 8, 16)
            for sums in sorted({sums for _, sums in options}, reverse=width <= 64)
            if m * tiles <= rows and (2 * padded(keys) + stages * m) * width * itemsize <= shared_bytes
        ]
    for m, n, warps in _HALF_SHAPES if is_half else _FLOAT32_SHAPES:
        # Float32 values of a thread: accumulators, scores, and the exponentials once more as operands.
        scores = m * n // (32 * warps)
        values = m * width // (32 * warps) + scores + scores * itemsize // 4
        fitting = (s for s in (3, 2, 1) if (m + 2 * s * n) * width * itemsize <= shared_bytes)
        stages = next(fitting, None)
        if stages is None or m > rows or n > max(2 * keys, 32) or values > 208:
            continue
        found += [AttentionConfig(m, n, warps, stages, *option) for option in options]
        # With more or fewer than 64 queries a warp group, ptxas serializes matmuls that run ahead.
        if is_half and values + scores <= 208 and m == 16 * warps:
            found += [AttentionConfig(m, n, warps, stages, *option, ahead=True) for option in options]
    tables = (_HALF["sm_90"],) if is_half else (_FLOAT32, _TF32)
    choices = [_FEWER_48] if is_half and _spills_48(dim) else []
    choices += [config for table in tables for config in _choices(table, dim)]
    defaults = [config for config in choices if config.block_m <= rows]
    tiles = {(config.block_m, config.block_n, config.num_warps) for config in defaults}
    # All keys as one tile stay in front: where that is possible it is the default.
    found.sort(key=lambda c: c.block_n != 0 and (c.block_m, c.block_n, c.num_warps) not in tiles)
    short = [config for config in found if config.block_n == 0]
    return list(dict.fromkeys([*short, *defaults, *found]))

"""Attention's loop beside its bound: what a pass computes and moves, and the least cycles that this can take."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ldmperf.kernels import Launch

from ..machines import Machine, bound_cycles, exponential_cycles, matrix_cycles, padded_head_dim

# What L2 hands out at once.
_SECTOR = 32
# Tiles of different sizes are compared by so many scores.
_SCORES = 128 * 128


@dataclass(frozen=True)
class ScoreTile:
    """What one pass of the loop computes: block_m queries by block_n keys of one head.

    padded        the head dimension as the kernel holds it
    keys          those of block_n that there are: fewer where a short context is held in a larger tile
    polynomial    of every eight exponentials, how many are polynomials
    bits          of an element of q, k and v
    passes        of a program
    l2_bytes      of whole sectors that a program asks of L2, shared by its passes
    memory_bytes  a pass's share of the bytes of all tensors: what has to come from memory and go there
    """

    head_dim: int
    padded: int
    block_m: int
    block_n: int
    keys: int
    polynomial: int
    bits: int
    passes: int
    l2_bytes: float
    memory_bytes: float

    @property
    def per_16384(self) -> float:
        """Cycles of a pass times this are cycles of 128 x 128 scores."""
        return _SCORES / (self.block_m * self.keys)


@dataclass(frozen=True)
class TileBound:
    """The least cycles of a pass by unit, and the longer of the two with padding: the bound.

    matrix_unpadded and matrix: both matmuls, of the head dimension and of the next multiple of 16.
    exponential: those that are not polynomials.
    """

    matrix_unpadded: float
    matrix: float
    exponential: float
    cycles: float
    unit: str


def score_tile(launch: Launch) -> ScoreTile | None:
    """The tile of an attention launch, read from the arguments by their names; None of another operator's launch.

    The head dimension is held in PART_1 and PART_2, or in BLOCK_D.
    """
    if launch.operator != "attention":
        return None
    given = launch.arguments
    # A kernel that holds all keys walks over queries, another one over keys.
    short = "KEYS_1" in given
    block_m, block_n = given["BLOCK_M"], given["KEYS_1"] + given["KEYS_2"] if short else given["BLOCK_N"]
    passes = given["QUERY_TILES"] if short else -(-given["keys"] // block_n)
    query_rows = block_m * (_row_bytes(given["q_ptr"]) + _row_bytes(given["out_ptr"]))
    key_rows = min(block_n, given["keys"]) * (_row_bytes(given["k_ptr"]) + _row_bytes(given["v_ptr"]))
    program = passes * query_rows + key_rows if short else query_rows + passes * key_rows
    return ScoreTile(
        head_dim=given["HEAD_DIM"],
        padded=sum(given.get(name, 0) for name in ("PART_1", "PART_2", "BLOCK_D")),
        block_m=block_m,
        block_n=block_n,
        keys=min(block_n, given["keys"]),
        polynomial=given.get("POLYNOMIAL", 0),
        bits=8 * given["q_ptr"].element_size(),
        passes=passes,
        l2_bytes=program / passes,
        memory_bytes=launch.nbytes / launch.programs / passes,
    )


def tile_bound(tile: ScoreTile, machine: Machine) -> TileBound | None:
    """The analytic bound of a pass. None for float32, whose matmuls take another unit or rate."""
    if tile.bits != 16:
        return None
    scores = (tile.block_m, tile.keys)
    cycles, unit = bound_cycles(*scores, tile.head_dim, tile.polynomial, machine)
    return TileBound(
        matrix_unpadded=matrix_cycles(*scores, tile.head_dim, machine),
        matrix=matrix_cycles(*scores, padded_head_dim(tile.head_dim), machine),
        exponential=exponential_cycles(*scores, tile.polynomial, machine),
        cycles=cycles,
        unit=unit,
    )


def beside_its_bound(
    tile: ScoreTile, machine: Machine, cycles: Mapping[str, float], passes: int = 1
) -> dict[str, Any]:
    """The tile, its bound and the predicted `cycles` of `passes` passes as plain values.

    distance: the busiest unit's cycles over the bound; 1 is the least.
    """
    bound = tile_bound(tile, machine)
    cycles = {unit: value / passes for unit, value in cycles.items()}
    return {
        "tile": dataclasses.asdict(tile),
        "cycles_per_16384_scores": {unit: round(tile.per_16384 * value, 1) for unit, value in cycles.items()},
        "bound": None if bound is None else dataclasses.asdict(bound),
        "distance": None if bound is None else round(max(cycles.values()) / bound.cycles, 4),
    }


def _row_bytes(rows: Tensor) -> float:
    """Bytes of the sectors that a row [D] of [B, N, H, D] lies in, on average over tokens and heads.

    16 tokens tell: from there on an address repeats modulo a sector.
    """
    size = rows.element_size()
    length = rows.shape[3] * size
    starts = [
        (rows.storage_offset() + n * rows.stride(1) + h * rows.stride(2)) * size
        for n in range(min(rows.shape[1], 16))
        for h in range(rows.shape[2])
    ]
    sectors = sum((start + length - 1) // _SECTOR - start // _SECTOR + 1 for start in starts)
    return _SECTOR * sectors / len(starts)

"""Launch configurations of `linear`, and the prediction whether fusing pays, until a tuner has measured both."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ._launch import LAUNCH_NS, Chip, ceil_div, next_power_of_two
from ._parts import padded

# Elements of a row that a program can keep beside its accumulators, in 16 bits and in 32, by architecture: what
# registers and shared memory hold.
_MAX_ROW = {"sm_90": (512, 128), "sm_80": (256, 128), "gfx942": (128, 64), "": (128, 64)}
# Assumed, for choosing only; bench/tune.py measures instead. What an H200 reaches per ns: FLOP of cuBLAS and of
# our matmuls, bytes of memory, bytes of the L2 cache.
_CUBLAS_FLOP_PER_NS = 0.8 * 742e3
_FLOP_PER_NS = 0.6 * 742e3
_BYTES_PER_NS = 4070.0
_L2_BYTES_PER_NS = 5500.0
# Of a program that keeps its rows, measured on an H200: ns for each channel of a row, and for each element of the
# weight that a multiprocessor takes.
_KEPT_ROW_NS, _KEPT_WEIGHT_NS = 9.3, 0.076


@dataclass(frozen=True)
class LinearConfig:
    """A tile of block_m rows and block_n columns, block_k channels at a time.

    block_k 0: a program normalizes its rows and keeps them for tiles_n tiles of columns. With another a norm is a
    launch of its own.
    """

    block_m: int
    block_n: int
    block_k: int
    tiles_n: int
    num_warps: int
    num_stages: int

    def __post_init__(self) -> None:
        if self.block_k and self.tiles_n != 1:
            raise ValueError(f"only programs that keep their rows take several tiles of columns; got {self}")


@dataclass(frozen=True)
class LinearShape:
    """What a configuration depends on; `columns` are those of the result."""

    rows: int
    channels: int
    columns: int
    gated: bool
    normed: bool
    itemsize: int


def keeps_rows(channels: int, itemsize: int, arch: str) -> bool:
    """Whether a program can keep whole rows, so that their norm needs no launch of its own."""
    of_half, of_float = _MAX_ROW.get(arch, _MAX_ROW[""])
    width = padded(channels)
    # The widest rows leave no registers for the masks of a padding.
    fits = width <= 384 or width == channels
    return fits and width <= {2: of_half, 4: of_float}.get(itemsize, 0)


_Tiles = tuple[LinearConfig, ...]


def _tiles(*sizes: tuple[int, int, int, int, int]) -> _Tiles:
    """(block_m, block_n, block_k, num_warps, num_stages), from many rows and columns to few."""
    return tuple(LinearConfig(m, n, k, 1, warps, stages) for m, n, k, warps, stages in sizes)


# By architecture, for 16 bits: for a gated matmul, twice as wide as its result, and for a plain one.
_GATED: Mapping[str, _Tiles] = {
    "sm_90": _tiles((128, 128, 64, 8, 3), (128, 64, 64, 8, 4), (64, 64, 64, 4, 4), (64, 32, 64, 4, 4)),
    "sm_80": _tiles((128, 64, 32, 8, 4), (64, 64, 32, 4, 4), (64, 32, 64, 4, 4)),
    "gfx942": _tiles((128, 64, 32, 8, 2), (64, 64, 32, 4, 2), (64, 32, 32, 4, 2)),
    "": _tiles((64, 64, 32, 4, 3), (64, 32, 32, 4, 3)),
}
_PLAIN: Mapping[str, _Tiles] = {
    "sm_90": _tiles(
        *((128, 256, 64, 8, 3), (128, 128, 64, 8, 4), (128, 64, 64, 4, 4), (64, 64, 64, 4, 4), (64, 32, 64, 4, 4))
    ),
    "sm_80": _tiles((128, 128, 32, 4, 4), (128, 64, 32, 4, 4), (64, 64, 32, 4, 4)),
    "gfx942": _tiles((128, 128, 32, 8, 2), (64, 64, 32, 4, 2)),
    "": _tiles((64, 64, 32, 4, 3), (64, 32, 32, 4, 3)),
}
_FLOAT32 = _tiles((64, 32, 32, 8, 2), (32, 32, 32, 4, 2))


@functools.cache
def default_config(shape: LinearShape, chip: Chip) -> LinearConfig:
    """The tile for a chip that nothing was measured on: of those that fill it the one predicted to be fastest."""
    return min(_defaults(shape, chip), key=lambda config: _merged_ns(shape, config, chip))


@functools.cache
def predicted_to_gain(shape: LinearShape, chip: Chip) -> bool:
    """Whether the kernels are predicted to be faster than torch's matmul with norm and gate beside it."""
    if shape.itemsize != 2:
        return False
    merged, separate = merged_and_separate_ns(shape, chip)
    return merged < separate


def merged_and_separate_ns(shape: LinearShape, chip: Chip) -> tuple[float, float]:
    """(of the kernels, of torch's matmul with norm and gate beside it)."""
    return min(_merged_ns(shape, config, chip) for config in _defaults(shape, chip)), _separate_ns(shape)


def predicted_ns(shape: LinearShape, chip: Chip) -> float:
    """What the faster of both is predicted to take."""
    return min(merged_and_separate_ns(shape, chip))


def _defaults(shape: LinearShape, chip: Chip) -> list[LinearConfig]:
    """Of each kind that can serve, the largest tile that fills the chip."""
    if shape.itemsize == 4:
        choices: Sequence[LinearConfig] = _FLOAT32
    else:
        table = _GATED if shape.gated else _PLAIN
        choices = table.get(chip.arch, table[""])
    filling = (c for c in choices if _programs(shape, c) >= chip.multiprocessors)
    found = [next(filling, choices[-1])]
    if shape.normed and keeps_rows(shape.channels, shape.itemsize, chip.arch):
        found.insert(0, _keeping_rows(shape, chip))
    return found


def _weight_rows(shape: LinearShape) -> int:
    return shape.columns * (2 if shape.gated else 1)


def _flop(shape: LinearShape) -> float:
    return 2.0 * shape.rows * shape.channels * _weight_rows(shape)


def _norm_ns(shape: LinearShape) -> float:
    """A layer norm's launch, which reads and writes its rows."""
    return LAUNCH_NS + 2 * shape.rows * shape.channels * shape.itemsize / _BYTES_PER_NS if shape.normed else 0.0


def _matmul_ns(shape: LinearShape, flop_per_ns: float, result_columns: int) -> float:
    moved = (shape.rows + _weight_rows(shape)) * shape.channels + shape.rows * result_columns
    return LAUNCH_NS + max(_flop(shape) / flop_per_ns, moved * shape.itemsize / _BYTES_PER_NS)


def _separate_ns(shape: LinearShape) -> float:
    total = _norm_ns(shape) + _matmul_ns(shape, _CUBLAS_FLOP_PER_NS, _weight_rows(shape))
    if shape.gated:
        total += LAUNCH_NS + 3 * shape.rows * shape.columns * shape.itemsize / _BYTES_PER_NS
    return total


def _merged_ns(shape: LinearShape, config: LinearConfig, chip: Chip) -> float:
    matmul = _matmul_ns(shape, _FLOP_PER_NS, shape.columns)
    if config.block_k:
        return _norm_ns(shape) + matmul
    # The weight passes from the L2 cache once for each tile of rows.
    streamed = ceil_div(shape.rows, config.block_m) * _weight_rows(shape) * shape.channels * shape.itemsize
    tile = config.block_n * shape.channels * (2 if shape.gated else 1)
    tiles = max(_programs(shape, config) / chip.multiprocessors, config.tiles_n)
    alone = _KEPT_ROW_NS * shape.channels + _KEPT_WEIGHT_NS * tiles * tile
    return max(matmul, LAUNCH_NS + streamed / _L2_BYTES_PER_NS, LAUNCH_NS + alone)


def _keeping_rows(shape: LinearShape, chip: Chip) -> LinearConfig:
    """As many tiles of columns for each norm of a program's rows as leave the chip filled."""
    width, is_half = padded(shape.channels), shape.itemsize == 2
    # Every program reads its part of the weight: of wide rows it takes more, lest the L2 cache be the limit.
    is_tall = is_half and 128 < width <= 320 and 2 * ceil_div(shape.rows, 128) >= 0.9 * chip.multiprocessors
    block_m = (128 if is_tall else 64) if is_half else 32
    num_warps = 4 if width <= 128 and is_half else 8
    # A weight's tile has all channels, and is held twice over: one is on its way.
    widest = 64 if is_half and width * block_m <= (256 if shape.gated else 384) * 64 else 32
    row_tiles = ceil_div(shape.rows, block_m)
    sizes = [size for size in (64, 32) if size <= widest and shape.columns % size == 0] or [widest]
    # Where rows are wide, one program fills a multiprocessor.
    wanted = 0.9 * chip.multiprocessors * (2 if width <= 128 else 1)
    block_n = next((n for n in sizes if row_tiles * ceil_div(shape.columns, n) >= wanted), sizes[-1])
    tiles = ceil_div(shape.columns, block_n)
    divisors = (d for d in range(tiles, 0, -1) if tiles % d == 0)
    tiles_n = next((d for d in divisors if row_tiles * tiles // d >= wanted), 1)
    return LinearConfig(block_m, block_n, 0, tiles_n, num_warps, num_stages=2)


def _programs(shape: LinearShape, config: LinearConfig) -> int:
    return ceil_div(shape.rows, config.block_m) * ceil_div(shape.columns, config.block_n)


# Rows and columns of a tile, and warps, that a tuner tries: for programs that keep their rows, and, with channels,
# for those that do not.
_KEEPING_SHAPES = (
    *((64, 64, 4), (64, 64, 8), (64, 32, 4), (64, 32, 8), (64, 128, 8)),
    *((128, 64, 8), (128, 32, 8), (128, 64, 16)),
)
_SHAPES = (
    *((128, 256, 64, 8), (128, 128, 64, 8), (128, 128, 64, 4), (128, 64, 64, 4), (128, 64, 64, 8)),
    *((64, 128, 64, 4), (64, 64, 64, 4), (64, 32, 64, 4), (256, 64, 64, 8), (128, 64, 128, 8), (64, 64, 128, 4)),
)
_FLOAT32_SHAPES = ((64, 32, 32, 8), (32, 32, 32, 4), (64, 64, 32, 8))


def candidate_configs(shape: LinearShape, chip: Chip, shared_bytes: int = 227 * 1024) -> list[LinearConfig]:
    """What a tuner tries: tiles whose accumulators and buffers fit registers and shared memory."""
    accumulators = 2 if shape.gated else 1
    rows, columns = next_power_of_two(shape.rows), next_power_of_two(shape.columns)
    found = []
    if shape.normed and keeps_rows(shape.channels, shape.itemsize, chip.arch):
        width = padded(shape.channels)
        for m, n, warps in _KEEPING_SHAPES:
            # Float32 values of a thread: the rows, and the accumulators.
            values = (m * width + accumulators * m * n) // (32 * warps)
            buffers = (m + 2 * accumulators * n) * width * shape.itemsize
            tiles = ceil_div(shape.columns, n)
            if values > 224 or buffers > shared_bytes or m > max(rows, 64) or n > max(columns, 32):
                continue
            found += [
                LinearConfig(m, n, 0, tiles_n, warps, 2)
                for tiles_n in sorted({1, 2, 4, 8, ceil_div(tiles, 2), tiles})
                if tiles % tiles_n == 0
            ]
    for m, n, k, warps in _SHAPES if shape.itemsize == 2 else _FLOAT32_SHAPES:
        per_stage = (m + accumulators * n) * k * shape.itemsize
        if accumulators * m * n // (32 * warps) > 160 or m > max(rows, 64) or n > max(columns, 32):
            continue
        found += [LinearConfig(m, n, k, 1, warps, s) for s in (3, 4) if s * per_stage <= shared_bytes]
    return found

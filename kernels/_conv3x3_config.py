"""Launch configurations of `conv3x3`, and the prediction whether it pays, until a tuner has measured both.

Both rest on one model of a GEMM's time. A multiprocessor takes its programs in rounds of as many as it holds. Each
has a fixed cost and its passes; a pass is limited by the tensor cores, by the L2 cache or by its own latency.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

from ._launch import LAUNCH_NS, Chip, ceil_div, next_power_of_two

# Assumed, for choosing only; bench/tune.py measures instead. Of an H200: cycles per ns, multiply-adds per cycle of
# a multiprocessor, bytes per ns of the memory, and bytes per cycle that a multiprocessor gets of the L2 cache.
_CYCLES_PER_NS = 1.75
_PRODUCTS_PER_CYCLE = 2048
_BYTES_PER_NS = 4070.0
_L2_BYTES_PER_CYCLE = 64.0
# What a clear gain is: this share of cuDNN's time.
_CLEAR = 0.25
_MIN_CHANNELS = 16
# Elements of an image from which group norm takes its statistics in a launch of their own.
_OWN_STATISTICS = 2**18
# Of a multiprocessor: shared memory in bytes, by architecture, and 32-bit registers.
_SHARED_BYTES = {"sm_90": 227 * 1024, "sm_80": 163 * 1024, "gfx942": 64 * 1024}
_REGISTERS = 65536


@dataclass(frozen=True)
class Conv3x3Config:
    """A tile of block_m pixels and block_n channels of the result, block_k channels of x at a time.

    splits: the programs that share a tile's passes. With more than one, a second launch sums what they found.
    """

    block_m: int
    block_n: int
    block_k: int
    splits: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Conv3x3Shape:
    """What a configuration depends on.

    height, width: of the result, with `upsample` of x. pointwise: channels of the 1x1 convolutions that are added.
    packed: four 2x2 convolutions stand for one 3x3 of an enlarged image. residual, statistics: whether they are.
    """

    batch: int
    height: int
    width: int
    channels: int
    columns: int
    stride: int
    upsample: bool
    packed: bool
    pointwise: tuple[int, ...]
    residual: bool
    statistics: bool
    itemsize: int

    @property
    def rows(self) -> int:
        """Pixels of the result; with `upsample`, of one phase."""
        return self.batch * self.height * self.width

    @property
    def phases(self) -> int:
        """With `upsample`, parities of a pixel's row and column."""
        return 4 if self.upsample else 1

    @property
    def taps(self) -> int:
        """Of the window, along an axis."""
        return 2 if self.packed else 3

    @property
    def result_bytes(self) -> int:
        return self.rows * self.phases * self.columns * self.itemsize

    def passes(self, block_k: int) -> int:
        """Of a tile, through all taps and channels."""
        return self.taps**2 * ceil_div(self.channels, block_k) + sum(ceil_div(c, block_k) for c in self.pointwise)


_Tiles = tuple[tuple[int, int, int, int, int], ...]

# (block_m, block_n, block_k, num_warps, num_stages) for 16 bits, by architecture: tiles whose code has no spills
# and no serialized wgmma. 128 x 256 on Hopper and 128 x 128 on Ampere spill: 64-bit offsets beside accumulators.
_TILES: Mapping[str, _Tiles] = {
    "sm_90": (
        *((128, 128, 64, 8, 4), (128, 64, 64, 4, 4), (64, 128, 64, 4, 4), (64, 64, 64, 4, 4), (64, 32, 64, 4, 4)),
        *((64, 64, 128, 4, 3), (64, 32, 128, 4, 3), (64, 64, 32, 4, 4), (64, 32, 32, 4, 4), (64, 64, 16, 4, 4)),
    ),
    "sm_80": (
        *((128, 64, 32, 4, 4), (64, 64, 64, 4, 4), (64, 64, 32, 4, 4), (64, 32, 64, 4, 4), (64, 32, 32, 4, 4)),
        (64, 64, 16, 4, 4),
    ),
    "": (
        *((128, 128, 32, 8, 2), (128, 64, 32, 4, 2), (64, 64, 64, 4, 2), (64, 64, 32, 4, 2), (64, 32, 64, 4, 2)),
        (64, 32, 32, 4, 2),
        (64, 64, 16, 4, 2),
    ),
}
# What a tuner tries beside them.
_MORE_TILES: Mapping[str, _Tiles] = {
    "sm_90": (
        (128, 128, 64, 8, 3),
        (128, 64, 64, 8, 4),
        (64, 64, 64, 8, 4),
        (64, 128, 128, 4, 3),
        (64, 64, 64, 4, 6),
    ),
    "sm_80": ((128, 64, 64, 4, 3), (64, 64, 64, 8, 4), (64, 128, 32, 4, 4)),
    "": ((128, 128, 64, 4, 2), (128, 64, 64, 4, 2)),
}
_FLOAT32_TILES: _Tiles = ((64, 32, 16, 8, 2), (64, 32, 16, 4, 2))
_SPLITS = (1, 2, 3, 4, 6, 8, 12, 16)
# Passes that a split keeps at least: fewer do not fill its pipeline.
_MIN_PASSES = 4


def _fitting(shape: Conv3x3Shape, tiles: _Tiles) -> list[Conv3x3Config]:
    """Those not far larger than the result, and whose block of channels has no more than x."""
    rows, columns = max(next_power_of_two(shape.rows), 64), max(next_power_of_two(shape.columns), 32)
    found = [
        Conv3x3Config(m, n, k, splits, warps, stages)
        for m, n, k, warps, stages in tiles
        if m <= rows and n <= columns and k <= max(shape.channels, 16)
        for splits in _SPLITS
        if splits == 1 or shape.passes(k) // splits >= _MIN_PASSES
    ]
    return found or [Conv3x3Config(64, 32, 16, 1, 4, 2)]


def _tiles_of(chip: Chip, table: Mapping[str, _Tiles]) -> _Tiles:
    return table.get(chip.arch, table[""])


@functools.cache
def default_config(shape: Conv3x3Shape, chip: Chip) -> Conv3x3Config:
    """The configuration for a chip that nothing was measured on: the one predicted to be fastest."""
    tiles = _tiles_of(chip, _TILES) if shape.itemsize == 2 else _FLOAT32_TILES
    return min(_fitting(shape, tiles), key=lambda config: _own_ns(shape, config, chip))


def candidate_configs(shape: Conv3x3Shape, chip: Chip, most: int = 40) -> list[Conv3x3Config]:
    """What a tuner tries, at most so many: those predicted to be fastest."""
    tiles = _FLOAT32_TILES
    if shape.itemsize == 2:
        tiles = (*_tiles_of(chip, _TILES), *_tiles_of(chip, _MORE_TILES))
    return sorted(_fitting(shape, tiles), key=lambda config: _own_ns(shape, config, chip))[:most]


@functools.cache
def predicted_to_gain(shape: Conv3x3Shape, chip: Chip) -> bool:
    """Whether the kernels are predicted to be clearly faster than torch's convolution with all beside it.

    False where the model was compared with no measurement: for other chips than Hopper and float32; and for so few
    channels that most of a tile would be empty, as of the first and the last convolution of a network.
    """
    few = min(shape.channels, shape.columns) < _MIN_CHANNELS
    if few or shape.itemsize != 2 or chip.arch != "sm_90":
        return False
    own, others = predicted_ns(shape, chip)
    return others - own >= _CLEAR * _cudnn_ns(shape, chip)


def predicted_ns(shape: Conv3x3Shape, chip: Chip) -> tuple[float, float]:
    """(of the kernels, of torch's convolution with all beside it)."""
    own = _own_ns(shape, default_config(shape, chip), chip)
    return own, _cudnn_ns(shape, chip) + _beside_ns(shape)


@dataclass(frozen=True)
class _Gemm:
    """What the model knows of an implementation.

    fixed, split_ns: of a program, in cycles, and of a split of the passes. busy: the share of the tensor cores'
    rate. l2: bytes per ns. load, beside: cycles that a program alone on a multiprocessor cannot hide.
    """

    fixed: float
    split_ns: float
    busy: float
    l2: float
    load: float
    beside: float

    def ns(
        self, shape: Conv3x3Shape, config: Conv3x3Config, chip: Chip, *, passes: int, rows: int, tiles: int
    ) -> float:
        """Of a launch with `tiles` tiles in all, and of the sum of partial sums behind it."""
        programs, m, n, k = tiles * config.splits, config.block_m, config.block_n, config.block_k
        each = ceil_div(programs, chip.multiprocessors)
        held = min(each, _held(shape, config, chip))
        matmul = m * n * k / _PRODUCTS_PER_CYCLE
        share = min(_L2_BYTES_PER_CYCLE, self.l2 / min(programs, chip.multiprocessors) / _CYCLES_PER_NS)
        traffic = (m + n) * k * shape.itemsize / share
        a_pass = max(
            held * max(matmul / self.busy, traffic), self.load / (config.num_stages - 1), matmul + self.beside
        )
        total = each / held * (ceil_div(passes, config.splits) * a_pass + self.fixed) / _CYCLES_PER_NS
        total = max(total, _moved_ns(shape))
        if config.splits > 1:
            total += self.split_ns + 2 * config.splits * rows * shape.columns * 4 / self.l2
        return total


# Fitted: within a sixth (RMS) of 63 times on an H200: of 33 calls of 866M, and of 15 of 39M and 145M in two
# configurations each (bench/results/nvidia-h200/2026-11-27-3cc7722-kernels.jsonl, 2026-11-27-cda03e3-alone.json).
_OWN = _Gemm(fixed=8700, split_ns=700, busy=0.53, l2=14800, load=550, beside=120)
# Fitted: within 6% of the time of cuDNN's kernels in a step of 39M, 866M and 2B parameters, less that of the first
# convolution (bench/results/nvidia-h200/2026-11-27-82b9cee.jsonl).
_CUDNN = _Gemm(fixed=7000, split_ns=4000, busy=0.9, l2=10000, load=0, beside=0)
_CUDNN_TILES: _Tiles = (
    *((64, 64, 64, 4, 5), (128, 64, 64, 4, 4), (64, 128, 64, 4, 4), (128, 128, 64, 8, 4)),
    *((256, 128, 64, 8, 4), (128, 256, 64, 8, 4), (256, 64, 64, 8, 4)),
)


def _held(shape: Conv3x3Shape, config: Conv3x3Config, chip: Chip) -> int:
    """Programs that a multiprocessor holds, by shared memory and a guess of the registers of a thread."""
    shared = config.num_stages * (config.block_m + config.block_n) * config.block_k * shape.itemsize + 1024
    threads = 32 * config.num_warps
    registers = min(255, 64 + 1.5 * config.block_m * config.block_n / threads)
    by_shared = _SHARED_BYTES.get(chip.arch, _SHARED_BYTES["gfx942"]) // shared
    return max(1, min(by_shared, int(_REGISTERS / (threads * registers))))


def _moved_ns(shape: Conv3x3Shape) -> float:
    """A launch that only reads and writes what has to be."""
    weights = shape.columns * (shape.taps**2 * shape.channels + sum(shape.pointwise))
    read = shape.rows * shape.stride**2 * shape.channels + shape.rows * shape.phases * sum(shape.pointwise)
    return LAUNCH_NS / 2 + ((weights + read) * shape.itemsize + shape.result_bytes) / _BYTES_PER_NS


def _own_ns(shape: Conv3x3Shape, config: Conv3x3Config, chip: Chip) -> float:
    tiles = shape.phases * ceil_div(shape.rows, config.block_m) * ceil_div(shape.columns, config.block_n)
    passes = shape.passes(config.block_k)
    return _OWN.ns(shape, config, chip, passes=passes, rows=shape.rows * shape.phases, tiles=tiles)


def _cudnn_ns(shape: Conv3x3Shape, chip: Chip) -> float:
    """The 3x3 convolution alone, of an enlarged image nine taps."""
    rows = shape.rows * shape.phases

    def of(config: Conv3x3Config) -> float:
        tiles = ceil_div(rows, config.block_m) * ceil_div(shape.columns, config.block_n)
        passes = 9 * ceil_div(shape.channels, config.block_k)
        return _CUDNN.ns(shape, config, chip, passes=passes, rows=rows, tiles=tiles)

    return min(
        of(Conv3x3Config(m, n, k, splits, warps, stages))
        for m, n, k, warps, stages in _CUDNN_TILES
        if m < max(2 * rows, 128) and n < max(2 * shape.columns, 128)
        for splits in (1, 2, 4)
    )


def _beside_ns(shape: Conv3x3Shape) -> float:
    """The launches that the kernel spares: of the residual sum, of the 1x1 convolutions and of statistics."""
    image = shape.result_bytes
    total = LAUNCH_NS + 3 * image / _BYTES_PER_NS if shape.residual else 0.0
    for channels in shape.pointwise:
        total += LAUNCH_NS + (2 * image + image / shape.columns * channels) / _BYTES_PER_NS
    if shape.statistics and image // shape.batch // shape.itemsize >= _OWN_STATISTICS:
        total += LAUNCH_NS + image / _BYTES_PER_NS
    return total

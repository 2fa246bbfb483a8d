"""Launch configurations of `transformer_tail` and `transformer_front`, and the predictions whether they pay."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from ._launch import LAUNCH_NS, Chip, ceil_div, next_power_of_two
from ._linear_config import LinearShape, predicted_ns
from ._parts import padded, parts

# What registers hold beside a tile of rows.
MAX_KEYS = 128
MAX_HEAD_DIM = 32
# The widest row that a program keeps, padded, by the bytes of an element: beyond it float32 spills.
_MAX_ROW = {2: 128, 4: 96}
# Assumed, for choosing only; bench/tune.py measures instead. What an H200 does per ns: bytes of memory,
# exponentials, and a front's instructions of a multiprocessor whose schedulers have one warp each, or more. So few
# of one warp, as most instructions need the result of the one before.
_BYTES_PER_NS = 4070.0
_EXPONENTIALS_PER_NS = 3870.0
_ALONE_PER_NS = 2.6
_TOGETHER_PER_NS = 4.6


@dataclass(frozen=True)
class TransformerTailConfig:
    """A tile of block_m rows, which takes block_j channels of the feed-forward and so many heads at a time."""

    block_m: int
    block_j: int
    heads_at_once: int
    num_warps: int
    num_stages: int


class TailShape(NamedTuple):
    """What a configuration depends on; `inner` channels of the feed-forward."""

    batch: int
    tokens: int
    channels: int
    heads: int
    keys: int
    inner: int
    itemsize: int
    statistics: bool


def keeps_row(channels: int, itemsize: int) -> bool:
    """Whether registers hold a tile of rows of so many channels."""
    return channels > 0 and padded(channels) <= _MAX_ROW.get(itemsize, 0)


def default_tail(shape: TailShape, chip: Chip) -> TransformerTailConfig:
    """The fastest on an H200 of those that do not spill: by the rows that fill the chip."""
    at_once = min(next_power_of_two(shape.heads), 8)
    if shape.itemsize == 4:
        return TransformerTailConfig(16, 32, 1, 8, 2)
    width = padded(shape.channels)
    block_m = _filling(shape.batch, shape.tokens, _fitting(shape.channels, chip), chip)
    if block_m == 64:
        return TransformerTailConfig(64, 64, 1, 4, 3 if width < 128 else 2)
    return TransformerTailConfig(block_m, 64, at_once, 4 if width <= 64 else 8, 2 if block_m == 32 else 3)


def tail_candidates(shape: TailShape, chip: Chip) -> list[TransformerTailConfig]:
    """What a tuner tries."""
    default = default_tail(shape, chip)
    if shape.itemsize == 4:
        return [default, replace(default, block_j=16)]
    # Statistics are by the default's tile, whatever is tuned.
    tiles = [default.block_m] if shape.statistics else _fitting(shape.channels, chip)
    at_once = min(next_power_of_two(shape.heads), 8)
    found = [
        TransformerTailConfig(m, block_j, heads, num_warps, stages)
        for m in tiles
        for block_j in (64, 32)
        for heads, num_warps in ([(1, 4)] if m == 64 else [(at_once, 4), (at_once, 8)])
        for stages in (2, 3)
    ]
    return list(dict.fromkeys([default, *found]))


def _fitting(channels: int, chip: Chip) -> list[int]:
    """The rows of a tile with which next to nothing spills, from many to few. Narrow ones are faster in fewer."""
    _, part_2 = parts(channels)
    tall = [64] if chip.arch == "sm_90" and padded(channels) > 64 else []
    return [*tall, *([] if part_2 else [32]), 16]


def _filling(batch: int, tokens: int, fitting: Sequence[int], chip: Chip) -> int:
    """The most of these rows that leave a program for each multiprocessor, or the fewest."""
    filling = (m for m in fitting if batch * ceil_div(tokens, m) >= 0.9 * chip.multiprocessors)
    return next(filling, fitting[-1])


# By rows of a tile, ns of a program alone on a multiprocessor: fixed, and for each channel of a row. Measured on
# an H200 with 8 heads, 77 keys and 4 times as many inner channels.
_TAIL_NS: Mapping[int, tuple[float, float]] = {64: (4000.0, 214.0), 32: (1300.0, 130.0), 16: (4000.0, 82.0)}
# What two programs of a multiprocessor take together.
_TWO_PROGRAMS = 1.5
# What the operators one after the other take in a step, beside their predictions: 1.5 and 1.8 at 39M and 145M.
_IN_A_STEP = 1.5


@functools.cache
def tail_predicted_to_gain(shape: TailShape, chip: Chip) -> bool:
    """Whether the kernel is predicted to be faster than the operators one after the other."""
    if shape.itemsize != 2 or not shape.tokens * shape.batch * shape.keys * shape.heads:
        return False
    merged, separate = tail_predicted_ns(shape, chip)
    return merged < separate


def tail_predicted_ns(shape: TailShape, chip: Chip) -> tuple[float, float]:
    """(of the kernel, of the operators one after the other)."""
    return _fused_ns(shape, default_tail(shape, chip).block_m, chip), _separate_ns(shape, chip)


def _fused_ns(shape: TailShape, block_m: int, chip: Chip) -> float:
    fixed, of_a_channel = _TAIL_NS[block_m]
    work = shape.heads * shape.keys / (8 * 77) + shape.inner / (4 * shape.channels)
    ns = fixed + of_a_channel * shape.channels * work / 2
    programs = shape.batch * ceil_div(shape.tokens, block_m)
    if block_m == 64 or programs <= chip.multiprocessors:
        return LAUNCH_NS + ceil_div(programs, chip.multiprocessors) * ns
    return LAUNCH_NS + ceil_div(programs, 2 * chip.multiprocessors) * _TWO_PROGRAMS * ns


def _separate_ns(shape: TailShape, chip: Chip) -> float:
    rows, channels = shape.batch * shape.tokens, shape.channels
    attention_ns = max(
        rows * shape.heads * shape.keys / _EXPONENTIALS_PER_NS,
        2 * rows * channels * shape.itemsize / _BYTES_PER_NS,
    )
    plain = LinearShape(rows, channels, channels, gated=False, normed=False, itemsize=shape.itemsize)
    matmuls = (
        *(plain, plain, plain),
        replace(plain, channels=shape.inner),
        replace(plain, normed=True),
        replace(plain, columns=shape.inner, gated=True, normed=True),
    )
    return _IN_A_STEP * (LAUNCH_NS + attention_ns + sum(predicted_ns(one, chip) for one in matmuls))


@dataclass(frozen=True)
class TransformerFrontConfig:
    """A tile of block_m rows, which takes block_n columns of the last matmul at a time."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


class FrontShape(NamedTuple):
    """What a configuration depends on; `tiles` of the statistics, 0 for none."""

    batch: int
    tokens: int
    channels: int
    columns: int
    tiles: int
    itemsize: int


def default_front(shape: FrontShape, chip: Chip) -> TransformerFrontConfig:
    """The largest tile that fills the chip and does not spill."""
    if shape.itemsize == 4:
        return TransformerFrontConfig(16, 32, 8, 2)
    block_m = _filling(shape.batch, shape.tokens, _front_fitting(shape.channels, chip), chip)
    return TransformerFrontConfig(block_m, 64, 4, 2)


def _front_fitting(channels: int, chip: Chip) -> list[int]:
    """The rows of a tile with which nothing spills, from many to few."""
    return [64, 32, 16] if padded(channels) <= (128 if chip.arch == "sm_90" else 96) else [32, 16]


def front_candidates(shape: FrontShape, chip: Chip) -> list[TransformerFrontConfig]:
    """What a tuner tries."""
    if shape.itemsize == 4:
        return [TransformerFrontConfig(16, n, 8, 2) for n in (32, 16)]
    return [
        TransformerFrontConfig(m, n, 4, stages)
        for m in _front_fitting(shape.channels, chip)
        for n in (64, 32)
        for stages in (2, 3)
    ]


@functools.cache
def front_predicted_to_gain(shape: FrontShape, chip: Chip) -> bool:
    """Whether the kernel is predicted to be faster than the operators one after the other."""
    if shape.itemsize != 2 or not shape.tokens * shape.batch * shape.tiles:
        return False
    merged, separate = front_predicted_ns(shape, chip)
    return merged < separate


def front_predicted_ns(shape: FrontShape, chip: Chip) -> tuple[float, float]:
    """(of the kernel, of the operators one after the other)."""
    block_m = default_front(shape, chip).block_m
    # Instructions of a warp, counted in the code for sm_90: beside the last matmul, and for 64 columns of it.
    fixed = 1200 + 12 * shape.channels if block_m > 16 else 900 + 9 * shape.channels
    of_a_warp = fixed + 100 * ceil_div(shape.columns, 64)
    rounds = ceil_div(shape.batch * ceil_div(shape.tokens, block_m), chip.multiprocessors)
    fused_ns = LAUNCH_NS + rounds * 4 * of_a_warp / (_ALONE_PER_NS if rounds == 1 else _TOGETHER_PER_NS)
    rows, channels = shape.batch * shape.tokens, shape.channels
    norm_ns = LAUNCH_NS + 2 * rows * channels * shape.itemsize / _BYTES_PER_NS
    plain = LinearShape(rows, channels, channels, gated=False, normed=False, itemsize=shape.itemsize)
    last = replace(plain, columns=shape.columns, normed=True)
    return fused_ns, norm_ns + predicted_ns(plain, chip) + predicted_ns(last, chip)

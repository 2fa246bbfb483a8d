"""Launch configurations of `transformer_tail`, and the prediction whether it pays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from ._launch import Chip, ceil_div

# What registers hold beside a tile of rows.
MAX_KEYS = 128
MAX_HEAD_DIM = 32


@dataclass(frozen=True)
class TransformerTailConfig:
    """A tile of block_m rows, which takes block_j channels of the feed-forward at a time."""

    block_m: int
    block_j: int
    num_warps: int
    num_stages: int


class TailShape(NamedTuple):
    """What a configuration depends on."""

    batch: int
    tokens: int
    channels: int
    heads: int
    keys: int
    inner: int
    itemsize: int
    statistics: bool


def max_channels(itemsize: int, arch: str) -> int:
    """Of a row that a program can keep."""
    return 128 if itemsize == 2 else 64


def default_tail(shape: TailShape, chip: Chip) -> TransformerTailConfig:
    """The tile for a chip that nothing was measured on."""
    if shape.itemsize == 4:
        return TransformerTailConfig(32, 32, 4, 2)
    fills = shape.batch * ceil_div(shape.tokens, 64) >= chip.multiprocessors // 2
    return TransformerTailConfig(64 if fills else 32, 64, 4, 2)


def tail_candidates(shape: TailShape, chip: Chip) -> list[TransformerTailConfig]:
    """What a tuner tries."""
    default = default_tail(shape, chip)
    found = [TransformerTailConfig(m, j, 4, stages) for m in (64, 32) for j in (64, 32) for stages in (2, 3)]
    return [
        default,
        *(c for c in found if c != default and (not shape.statistics or c.block_m == default.block_m)),
    ]


def tail_predicted_to_gain(shape: TailShape, chip: Chip) -> bool:
    return shape.itemsize == 2

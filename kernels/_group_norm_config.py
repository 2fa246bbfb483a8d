"""Launch configurations of `group_norm_silu`: groups and pixels of a program, in one launch or two."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass, replace

from ._launch import LAUNCH_NS, NO_GPU, Chip, ceil_div, next_power_of_two


@dataclass(frozen=True)
class GroupNormConfig:
    """A program takes `groups` groups and tiles of `block_hw` pixels; `chunks` programs share an image's bundle of
    groups in two launches, or in one where statistics are given; 0 is one launch that computes them."""

    groups: int
    block_hw: int
    chunks: int
    num_warps: int


@dataclass(frozen=True)
class GroupNormShape:
    """What a configuration depends on.

    interleaved  a pixel's channels lie side by side (channels-last)
    given        statistics come with the image
    """

    batch: int
    pixels: int
    num_groups: int
    group_channels: int
    element_size: int
    interleaved: bool
    given: bool = False


# For choosing only, and rough: a multiprocessor's pace over cached elements, and how long it waits for a tile.
# bench/tune.py measures instead.
_ELEMENTS_PER_NS = 20.0
_TILE_NS = 500.0
# What a multiprocessor holds of these kernels at about 100 registers a thread, 16 elements of a tile each.
_RESIDENT_WARPS = 16
_THREAD_ELEMENTS = 16


@functools.cache
def default_config(shape: GroupNormShape, chip: Chip) -> GroupNormConfig:
    """The cheapest configuration by a rough cost: of one launch or two, with fewer or more groups to a program."""
    return _cheapest(shape, chip)[1]


def predicted_ns(shape: GroupNormShape, chip: Chip) -> tuple[float, float]:
    """(with the statistics that are given, without)."""
    return _cheapest(shape, chip)[0], _cheapest(replace(shape, given=False), chip)[0]


def _cheapest(shape: GroupNormShape, chip: Chip) -> tuple[float, GroupNormConfig]:
    options = [_bundled(shape, groups, chip) for groups in _bundles(shape)]
    return min((option for pair in options for option in pair), key=lambda option: (option[0], -option[1].groups))


def _bundles(shape: GroupNormShape) -> list[int]:
    """How many groups a program may take: rows of 32 bytes or more in whole 16-byte pieces, where possible."""
    if not shape.interleaved:
        return [1]
    counts = range(1, shape.num_groups + 1)
    width = [count * shape.group_channels * shape.element_size for count in counts]
    limit = max(512, next_power_of_two(shape.group_channels))
    for fits in (lambda w: w % 16 == 0 and w >= 32, lambda w: w % 16 == 0, lambda w: True):
        found = [
            n
            for n, w in zip(counts, width, strict=True)
            if fits(w) and next_power_of_two(n * shape.group_channels) <= limit
        ]
        if found:
            return found
    return [1]


def _bundled(shape: GroupNormShape, groups: int, chip: Chip) -> list[tuple[float, GroupNormConfig]]:
    """(cost in ns, configuration) of one program to a bundle and of several, with `groups` groups a program."""
    block_c = next_power_of_two(groups * shape.group_channels)
    bundles = shape.batch * ceil_div(shape.num_groups, groups)
    all_pixels = next_power_of_two(shape.pixels)
    options = []

    def cost(programs: int, warps: int, tiles: int, elements: float) -> float:
        """Programs of so many tiles one after the other and so many elements of work."""
        rounds = ceil_div(programs, chip.multiprocessors * max(_RESIDENT_WARPS // warps, 1))
        share = max(programs / chip.multiprocessors, 1.0)
        return LAUNCH_NS + max(rounds * tiles * _TILE_NS, share * elements / _ELEMENTS_PER_NS)

    if block_c * all_pixels <= 16384:
        warps = min(max(block_c * all_pixels // 1024, 1), 16)
        one = cost(bundles, warps, 1, 2.0 * block_c * all_pixels)
        options.append((one, GroupNormConfig(groups, all_pixels, 0, warps)))
    for warps in (4, 8):
        block_hw = max(32 * warps * _THREAD_ELEMENTS // block_c, 1)
        tiles = ceil_div(shape.pixels, block_hw)
        one = cost(bundles, warps, 2 * tiles, 3.0 * tiles * block_hw * block_c)
        options.append((one, GroupNormConfig(groups, block_hw, 0, warps)))
        for chunks in (4, 8, 16, 32, 64, 128):
            if chunks > tiles:
                break
            # The membership of channels in groups, and every chunk's statistics, twice as wide as elements.
            merge = 3.0 * block_c * next_power_of_two(groups) + 6.0 * chunks * groups
            work = ceil_div(tiles, chunks) * block_hw * block_c
            total = cost(bundles * chunks, warps, ceil_div(tiles, chunks) + 1, 2.0 * work + merge)
            if not shape.given:
                total += cost(bundles * chunks, warps, ceil_div(tiles, chunks), work + merge)
            options.append((total, GroupNormConfig(groups, block_hw, chunks, warps)))
    return options


def candidate_configs(shape: GroupNormShape) -> list[GroupNormConfig]:
    """What a tuner tries: the four bundles of groups that waste the fewest lanes, in tiles of several sizes."""

    def lanes(groups: int) -> int:
        return ceil_div(shape.num_groups, groups) * next_power_of_two(groups * shape.group_channels)

    configs = [default_config(shape, NO_GPU)]
    for groups in sorted(_bundles(shape), key=lambda n: (lanes(n), n))[:4]:
        block_c = next_power_of_two(groups * shape.group_channels)
        for warps, thread_elements in itertools.product((2, 4, 8, 16), (16, 32)):
            block_hw = min(max(32 * warps * thread_elements // block_c, 1), next_power_of_two(shape.pixels))
            if block_c * block_hw < 32 * warps * 8:
                continue
            tiles = ceil_div(shape.pixels, block_hw)
            configs += [GroupNormConfig(groups, block_hw, n, warps) for n in (0, 8, 16, 32, 64) if n <= tiles]
    return list(dict.fromkeys(configs))

"""The way of an activation through the network: levels of modules, read as a tuple of stops."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import zip_longest
from typing import Any, NamedTuple, cast

from torch import nn

from .blocks import Resample, ResBlock, Transformer


class Level(nn.Module):
    """The modules of one resolution: ResBlocks, a transformer behind each or none of them, and a resampling."""

    def __init__(
        self,
        resblocks: Iterable[ResBlock],
        transformers: Iterable[nn.Module],
        downsample: Resample | None,
        upsample: Resample | None,
    ) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(resblocks)
        self.transformers = nn.ModuleList(transformers)
        self.downsample = downsample
        self.upsample = upsample


class Stop(NamedTuple):
    """A ResBlock and what follows it: a transformer, a resampling, or neither.

    pops      takes the skip that was pushed last, beside the activation
    pushes    its result is a skip, and that of its resampling is another
    enlarges  its result is written at the size of the next skip, before the resampling
    """

    resblock: ResBlock
    transformer: Transformer | None
    resample: Resample | None
    pops: bool
    pushes: bool
    enlarges: bool


def route(down: Iterable[Level], middle: Iterable[Level], up: Iterable[Level]) -> tuple[Stop, ...]:
    """The stops between the first convolution and the last norm, in the order in which they run."""
    stops: list[Stop] = []
    for levels, pops, pushes in ((down, False, True), (middle, False, False), (up, True, False)):
        for level in levels:
            stops += stops_of(level, pops=pops, pushes=pushes)
    return tuple(stops)


def stops_of(level: Level, *, pops: bool = False, pushes: bool = False) -> Iterator[Stop]:
    """The stops of a level; those of a network without skips neither pop nor push."""
    last = len(level.resblocks) - 1
    blocks = zip_longest(level.resblocks, level.transformers)
    for i, (resblock, transformer) in enumerate(cast(Any, blocks)):
        resample = None if i < last else level.upsample or level.downsample
        enlarges = resample is not None and level.upsample is not None
        yield Stop(resblock, transformer, resample, pops, pushes, enlarges)

"""Counts of what was executed: instructions by class, bytes by space, conflicts, sectors, divergence."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from .program import PtxProgram

if TYPE_CHECKING:
    from .threads import Threads

Array = NDArray[Any]


class Tallies:
    """To be written."""

    def __init__(self, program: PtxProgram, *, detailed: bool = False) -> None: ...

    def executed(self, threads: Threads) -> None: ...

    def branched(self, taken: Array, staying: Array) -> None: ...

    def accessed(self, threads: Threads, space: str, what: str, start: Array, size: int) -> None: ...

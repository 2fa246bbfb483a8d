"""Two commits measured on one kind of machine, case by case, as a table for a page."""

from __future__ import annotations

from dataclasses import dataclass

from ..terminal.layout import Grid


@dataclass(frozen=True)
class SideBySide:
    """A comparison of A and B.

    title   which commits, and the machine
    shared  what all its cases share, in words
    grid    a row for each case and metric, with its verdict
    lists   heading and names of cases that have no row: failed, or in one of the two only
    notes   what a reader has to know beside the rows
    """

    title: str
    shared: str
    grid: Grid
    lists: tuple[tuple[str, tuple[str, ...]], ...]
    notes: tuple[str, ...]

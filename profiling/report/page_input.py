"""What a page of records shows, decided before anything is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..figures.derived import Overview
from ..terminal.layout import Grid
from .sources import Sources

if TYPE_CHECKING:
    from ..claims.verdict import ClaimVerdicts
    from ..compare.history import History
    from ..compare.side_by_side import SideBySide
    from ..figures.headline import Headline
    from .quality_curves import QualityCurves


@dataclass(frozen=True)
class GridSection:
    """A table with its title, and a note on how to read it where one is needed: kernels, compiled launches."""

    title: str
    grid: Grid
    note: str = ""


@dataclass(frozen=True)
class PageInput:
    """All that `write_page` (one file) and `write_report` (a folder, with charts) show.

    overview        the trajectories in sections; without rows where there are none
    judged          the paper's claims by these records; empty where scipy is not installed
    headline        the first sentence; null where no two networks were timed alike
    sources         what was put together, the commits, the command and the files
    history         times over commits; null where no case was measured on several
    side_by_side    two commits case by case, one for each kind of machine that has exactly two
    quality         curves of quality in closed worlds; null where no record has any
    sections        tables of kernels, of compiled launches and of qualities
    rejected_lines  lines of the files that are no whole record
    """

    overview: Overview
    judged: Sequence[ClaimVerdicts] = ()
    headline: Headline | None = None
    sources: Sources = field(default_factory=Sources)
    history: History | None = None
    side_by_side: tuple[SideBySide, ...] = ()
    quality: QualityCurves | None = None
    sections: tuple[GridSection, ...] = ()
    rejected_lines: int = 0

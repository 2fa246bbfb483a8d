"""Times over commits as values: cases, their points, and their table."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from ..figures.derived import Spread
from ..measure.intervals import Interval
from ..terminal.layout import MISSING, Grid, number
from .metrics import METRICS

# What is judged from commit to commit.
METRIC = METRICS["ms_per_step"]


@dataclass(frozen=True)
class HistoryPoint:
    """A case on a commit.

    commit   "7d35813", "7d35813 with uncommitted changes", "unknown commit"
    at       when the commit was made; where that is not recorded, when its first record was started
    step_ms  of a model evaluation: the median over runs of their medians, and of their p20 and p80
    runs     how many runs have a time
    verdict  SAME, FASTER, SLOWER or AMBIGUOUS against the point before; empty for the first
    ratio    over the point before, with its interval; null for the first and where there is none
    why      why a step is AMBIGUOUS
    flags    what makes its time not that of a free GPU
    """

    commit: str
    at: datetime
    step_ms: Spread
    runs: int
    verdict: str = ""
    ratio: Interval | None = None
    why: str = ""
    flags: str = ""

    @property
    def is_changed(self) -> bool:
        """Whether the case was faster or slower on the commit before."""
        return self.verdict in (METRIC.less, METRIC.more)


@dataclass(frozen=True)
class CaseHistory:
    """A case on two commits or more of one kind of machine, the oldest first.

    name     network and backend, and what sets the case apart from the others in the history
    machine  the kind of machine in words; empty where all cases are of one
    """

    name: str
    case_id: str
    machine: str
    points: tuple[HistoryPoint, ...]


@dataclass(frozen=True)
class History:
    """The cases that were measured on several commits. shared: what all of them share, in words."""

    series: tuple[CaseHistory, ...]
    shared: str
    notes: tuple[str, ...]

    @property
    def changed(self) -> tuple[tuple[CaseHistory, HistoryPoint], ...]:
        """The steps that were faster or slower."""
        return tuple((series, point) for series in self.series for point in series.points if point.is_changed)

    def grid(self) -> Grid:
        """A row for each case on each commit."""
        rows = tuple(
            (
                series.name,
                series.machine or MISSING,
                point.commit,
                f"{point.at:%Y-%m-%d %H:%M}",
                number(point.step_ms.p50),
                f"{number(point.step_ms.p20)}..{number(point.step_ms.p80)}",
                str(point.runs),
                MISSING if point.ratio is None else f"{point.ratio.value:.3f}",
                MISSING if point.ratio is None else f"{point.ratio.low:.3f} to {point.ratio.high:.3f}",
                point.verdict or MISSING,
                point.why or MISSING,
                point.flags or MISSING,
            )
            for series in self.series
            for point in series.points
        )
        headings = (
            *("case", "machine", "commit", "at", "ms per step", "p20..p80", "runs", "over the one before"),
            *("95% interval", "verdict", "why", "flags"),
        )
        return Grid(headings, rows, ("case", "machine", "commit", "at", "verdict", "why", "flags")).without_empty()

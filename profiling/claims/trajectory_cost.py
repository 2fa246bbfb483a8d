"""What a trajectory of one network costs as a function of its steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..figures.derived import Row, alike, names_by_size
from ..figures.lines import Line, fit_line
from ..figures.text import joined


@dataclass(frozen=True)
class TrajectoryCost:
    """Wall ms of a trajectory of one network: its medians where they were measured, else a line.

    The line goes through the medians; with a single step count it goes through zero, as if nothing of the time
    were fixed, and who tells of it says so. Steps are model evaluations.
    """

    rows: tuple[Row, ...]
    line: Line

    @classmethod
    def of(cls, rows: Sequence[Row]) -> TrajectoryCost | None:
        """Of rows that differ in steps only; null without a time, or where more steps take no more time."""
        medians = {
            row.record.evaluations: row.record.wall_ms.p50
            for row in rows
            if row.record.wall_ms is not None and row.record.evaluations
        }
        if not medians:
            return None
        line = fit_line(medians.items(), relative=True)
        if line is None:
            (steps, median), *_ = medians.items()
            line = Line(median / steps, 0.0, None)
        timed = tuple(row for row in rows if row.record.wall_ms is not None)
        return cls(timed, line) if line.slope > 0 and math.isfinite(line.slope) else None

    @property
    def medians(self) -> dict[int, float]:
        """Median wall ms by the evaluations that were measured, the fewest first."""
        measured = {row.record.evaluations or 0: row.record.wall_ms.p50 for row in self.rows if row.record.wall_ms}
        return dict(sorted(measured.items()))

    def ms(self, steps: float) -> float:
        """Wall ms of so many steps: measured, or on the line."""
        measured = self.medians.get(int(steps)) if steps == int(steps) else None
        return self.line.at(steps) if measured is None else measured

    def steps_within(self, ms: float) -> float:
        """The steps that take so long on the line, not rounded."""
        return max(self.line.x_at(ms), 0.0)

    def is_measured(self, steps: int) -> bool:
        return steps in self.medians

    def label(self, *steps: int) -> str:
        """ " (predicted from 4, 20 steps)" where the time of one of these comes from the line; else empty."""
        if all(count in self.medians for count in steps):
            return ""
        counts = list(self.medians)
        assumed = " as if nothing were fixed" if len(counts) == 1 else ""
        noun = "step" if counts == [1] else "steps"
        return f" (predicted from {joined(map(str, counts))} {noun}{assumed})"


def costs_by_size(rows: Sequence[Row]) -> dict[str, TrajectoryCost]:
    """The cost of each network with a time, the smallest first, out of rows that differ in network and steps."""
    found: dict[str, TrajectoryCost] = {}
    for of_network in alike(rows, "steps"):
        cost = TrajectoryCost.of(of_network)
        if cost is not None:
            found[of_network[0].name] = cost
    return {name: found[name] for name in names_by_size(rows) if name in found}


def by_conditions(rows: Sequence[Row], *but: str) -> list[list[Row]]:
    """Rows with a time in groups of like conditions: they differ in the network, and in these fields besides."""
    return alike((row for row in rows if row.record.wall_ms is not None), "unet", "weights_sha256", *but)

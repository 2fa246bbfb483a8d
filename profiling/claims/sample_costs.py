"""What a sample of known quality costs: FLOPs as its record has them, or time as the profiler measured it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from ..figures.derived import Overview, Row, alike
from ..figures.phrases import phrases_of
from ..figures.text import joined
from .closed_worlds import ClosedWorld, QualityCell
from .trajectory_cost import TrajectoryCost
from .verdict import doubts

# Whose times stand in for those of a sampler without any: a step of it is one evaluation, too.
STAND_IN = "ddim"
# What records call the sampler of a generator of one pass.
_ONE_PASS = "none"
# Network, sampler and whether the model sees an unconditional half too.
_Timed = tuple[str, str, bool]


class BudgetUnit(Protocol):
    """What a budget is counted in.

    unit         of a cost
    conditions   name and phrase of what all costs share
    """

    @property
    def unit(self) -> str: ...
    @property
    def conditions(self) -> Mapping[str, str]: ...

    def cost(self, cell: QualityCell) -> float | None:
        """Of one image; null where it is not known."""

    def notes(self, cells: Iterable[QualityCell]) -> list[str]:
        """What a reader has to know of the costs of these cells."""

    def stand_ins(self, cells: Iterable[QualityCell]) -> list[str]:
        """Of these the notes on costs that are those of something else."""


@dataclass(frozen=True)
class FlopBudget:
    """GFLOP of all forwards of an image."""

    unit: str = "GFLOP per image"
    conditions: Mapping[str, str] = field(default_factory=lambda: {"budget": "FLOPs"})

    def cost(self, cell: QualityCell) -> float | None:
        return cell.gflop_per_image or None

    def notes(self, cells: Iterable[QualityCell]) -> list[str]:
        return []

    def stand_ins(self, cells: Iterable[QualityCell]) -> list[str]:
        return []


@dataclass(frozen=True)
class TimeBudget:
    """Wall ms of an image, under one set of conditions of the profiler."""

    batch: int
    conditions: Mapping[str, str]
    costs: Mapping[_Timed, TrajectoryCost]
    unit: str = "ms per image"

    def cost(self, cell: QualityCell) -> float | None:
        """Measured, or on the line over steps; networks that share a trajectory add their steps, and it begins
        once."""
        found = [self._of(name, cell) for name, _ in cell.takes]
        known = [cost for cost in found if cost is not None]
        if not known or len(known) < len(found):
            return None
        if len(known) == 1:
            ms = known[0].ms(cell.steps)
        else:
            steps = (steps for _, steps in cell.takes)
            ms = max(0.0, *(cost.line.intercept for cost in known))
            ms += sum(cost.line.slope * count for cost, count in zip(known, steps, strict=True))
        return ms / self.batch if ms > 0 else None

    def notes(self, cells: Iterable[QualityCell]) -> list[str]:
        cells = list(cells)
        costs = {
            id(cost): (cost, cell) for cell in cells for name, _ in cell.takes if (cost := self._of(name, cell))
        }
        predicted = any(
            len(cell.takes) > 1 or not cost.is_measured(cell.steps)
            for cell in cells
            for name, _ in cell.takes
            if (cost := self._of(name, cell)) is not None
        )
        return [
            *self.stand_ins(cells),
            *(["some times are predicted from other step counts"] if predicted else []),
            *doubts(row for cost, _ in costs.values() for row in cost.rows),
        ]

    def stand_ins(self, cells: Iterable[QualityCell]) -> list[str]:
        cells = [cell for cell in cells if self.cost(cell) is not None]
        borrowed = [c for c in cells for name, _ in c.takes if (name, c.sampler, c.guided) not in self.costs]
        samplers = sorted({cell.sampler for cell in borrowed} - {_ONE_PASS})
        passes = sorted({cell.network for cell in borrowed if cell.sampler == _ONE_PASS})
        students = any(cell.kind == "distilled" for cell in cells)
        return [
            *([f"{STAND_IN}'s times stand in for those of {joined(samplers)}"] if samplers else []),
            *([f"a step of {STAND_IN} stands in for the pass of {joined(passes)}"] if passes else []),
            *(["distilled networks take the times of their teachers' steps"] if students else []),
        ]

    def _of(self, network: str, cell: QualityCell) -> TrajectoryCost | None:
        own = self.costs.get((network, cell.sampler, cell.guided))
        return own or self.costs.get((network, STAND_IN, cell.guided))


def budget_units(world: ClosedWorld, times: Overview) -> list[BudgetUnit]:
    """FLOPs, then the time of each set of conditions under which two networks of the family were timed."""
    labels = {name for record in world.records for name, _ in record.takes}
    rows = [
        row
        for row in times.rows
        if row.record.wall_ms is not None and row.case.task == world.task and row.case.label in labels
    ]
    units: list[BudgetUnit] = [FlopBudget()]
    for group in alike(rows, "unet", "weights_sha256", "sampler", "steps", "guidance_scale"):
        costs = _costs(group)
        if len({network for network, _, _ in costs if network in world.networks}) > 1:
            units.append(TimeBudget(group[0].case.batch, _conditions(group[0], times), costs))
    return units


def _costs(rows: Sequence[Row]) -> dict[_Timed, TrajectoryCost]:
    """Of each network, sampler and guidedness: at the rate with the most step counts, of several the lowest."""
    by_rate: dict[_Timed, dict[float, list[Row]]] = {}
    for row in rows:
        place = (row.case.label, row.case.sampler, row.case.guided)
        by_rate.setdefault(place, {}).setdefault(row.case.guidance_scale, []).append(row)
    found = {}
    for place, rates in by_rate.items():
        rate = min(rates, key=lambda rate: (-len({row.case.steps for row in rates[rate]}), rate))
        cost = TrajectoryCost.of(rates[rate])
        if cost is not None:
            found[place] = cost
    return found


def _conditions(row: Row, times: Overview) -> dict[str, str]:
    phrases = phrases_of(row, times.environments)
    batch = row.case.batch
    unit = f"ms per image, batch {batch}" if batch > 1 else f"ms, batch {batch}"
    said = {"budget": joined((unit, phrases["device"])), "backend": row.case.backend}
    names = ("environment", "dtype", "latent")
    return said | {name: phrases[name] for name in names if phrases.get(name)}

"""Budgets in a closed world: what each network affords at the cost of some steps of the largest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..figures.derived import Overview
from ..measure.intervals import Interval, each_of, extreme_interval
from . import limits
from .closed_worlds import QUALITY_METRICS, Cells, ClosedWorld, QualityCell, QualityMetric
from .pooled_figures import PooledFigure, contrast
from .sample_costs import BudgetUnit, budget_units

# Costs that are equal but for rounding.
_ROUNDED = 1 + 1e-9


@dataclass(frozen=True)
class AffordedCell:
    """What a network has at a budget: the cell, and its figure."""

    cell: QualityCell
    figure: PooledFigure


@dataclass(frozen=True)
class BudgetRow:
    """A budget, in steps of the reference and in the unit, with what each network affords.

    advantages   of each smaller network: the reference's number less its own, above 0 where the smaller is better.
                 All of them hold together at 95 %
    """

    steps: int
    cost: float
    reference: AffordedCell
    smaller: Mapping[str, AffordedCell]
    advantages: Mapping[str, Interval]
    saturated: tuple[str, ...]

    @property
    def best(self) -> str:
        """The smaller network with the largest advantage."""
        return max(self.advantages, key=lambda name: self.advantages[name].value)

    @property
    def winner(self) -> AffordedCell:
        return self.smaller[self.best] if self.advantages[self.best].value > 0 else self.reference

    @property
    def largest_advantage(self) -> Interval:
        """The best of several is chosen by the same samples that judge it: a bound over all of them."""
        return extreme_interval(max, list(self.advantages.values()))

    def advantage_at(self, confidence: float) -> Interval:
        """The same at another confidence, of one of several budgets."""
        together = each_of(len(self.smaller), confidence)
        found = [_advantage(self.reference, of, together) for of in self.smaller.values()]
        return extreme_interval(max, found, confidence)

    @property
    def decided(self) -> str:
        """Who is better beyond noise: "smaller", "reference" or "open"."""
        found = self.largest_advantage
        if not found.confidence or found.low <= 0 < found.high:
            return "open"
        return "smaller" if found.low > 0 else "reference"

    @property
    def cells(self) -> list[QualityCell]:
        return [*(of.cell for of in self.smaller.values()), self.reference.cell]

    @property
    def figures(self) -> list[PooledFigure]:
        return [self.reference.figure, *(of.figure for of in self.smaller.values())]


@dataclass(frozen=True)
class BudgetSet:
    """The budgets of one set of conditions; at each of the rows two networks have a cell."""

    world: ClosedWorld
    sampler: str
    unit: BudgetUnit
    metric: QualityMetric
    rows: list[BudgetRow]


def budget_sets(worlds: Sequence[ClosedWorld], shown: Overview, task: str) -> Iterable[BudgetSet]:
    """Those of the worlds of a task that have a budget; the overview has the times of the same networks."""
    for world in worlds:
        if world.task != task:
            continue
        units = budget_units(world, shown)
        for sampler in world.samplers:
            cells = world.cells(sampler)
            for unit in units:
                for metric in QUALITY_METRICS:
                    if rows := budget_rows(world, cells, unit, metric):
                        yield BudgetSet(world, sampler, unit, metric, rows)


def budget_rows(world: ClosedWorld, cells: Cells, unit: BudgetUnit, metric: QualityMetric) -> list[BudgetRow]:
    """A row for each budget that the largest network has a cell and a cost at; none without a smaller network."""
    *smaller, reference = cells
    rows = []
    for steps in limits.QUALITY_BUDGETS:
        base = cells[reference].get(steps)
        cost = None if base is None else unit.cost(base)
        own = None if cost is None else _afforded(world, cells[reference], unit, metric, cost)
        if cost is None or own is None:
            continue
        found = {name: _afforded(world, cells[name], unit, metric, cost) for name in smaller}
        having = {name: of for name, of in found.items() if of is not None}
        if not having:
            continue
        together = each_of(len(having))
        advantages = {name: _advantage(own, of, together) for name, of in having.items()}
        saturated = tuple(name for name in having if _has_no_more(cells[name], unit, cost))
        rows.append(BudgetRow(steps, cost, own, having, advantages, saturated))
    return rows


def _advantage(large: AffordedCell, small: AffordedCell, confidence: float) -> Interval:
    return contrast((large.figure, small.figure), lambda one, other: one - other, confidence)


def _afforded(
    world: ClosedWorld, of_network: Mapping[int, QualityCell], unit: BudgetUnit, metric: QualityMetric, most: float
) -> AffordedCell | None:
    return best_or_longest(world, _within(of_network.values(), unit, metric, most), metric)


def best_or_longest(
    world: ClosedWorld, cells: Sequence[AffordedCell], metric: QualityMetric
) -> AffordedCell | None:
    """The cell that is best on held-out prompts; without these that of the most steps."""
    chosen = best_on_held_out(world, cells, metric)
    return chosen or max(cells, key=lambda of: of.cell.steps, default=None)


def _within(
    cells: Iterable[QualityCell], unit: BudgetUnit, metric: QualityMetric, most: float
) -> list[AffordedCell]:
    """The cells whose cost is known and within this one."""
    affordable = [cell for cell in cells if (cost := unit.cost(cell)) is not None and cost <= most * _ROUNDED]
    return figured(affordable, metric)


def figured(cells: Iterable[QualityCell], metric: QualityMetric) -> list[AffordedCell]:
    """The cells that have a figure, with it."""
    return [AffordedCell(cell, figure) for cell in cells if (figure := metric.figure(cell)) is not None]


def best_on_held_out(
    world: ClosedWorld, cells: Sequence[AffordedCell], metric: QualityMetric
) -> AffordedCell | None:
    """The cell of the best figure on held-out prompts; null unless all were judged on them.

    The best on the prompts that judge it would look better than it is.
    """
    numbers = []
    for of in cells:
        held_out = world.held_out(of.cell)
        figure = None if held_out is None else metric.figure(held_out)
        if figure is None:
            return None
        numbers.append(figure.number)
    # Of two that are alike the one with fewer steps.
    ordered = sorted(zip(numbers, cells, strict=True), key=lambda each: (each[0], each[1].cell.steps))
    return ordered[0][1] if ordered else None


def _has_no_more(of_network: Mapping[int, QualityCell], unit: BudgetUnit, cost: float) -> bool:
    """Whether the budget affords one step more than the most that were measured."""
    most = max(of_network)
    dearest = unit.cost(of_network[most])
    return dearest is not None and dearest * (most + 1) / most <= cost * _ROUNDED


def best_other(
    world: ClosedWorld, others: Iterable[QualityCell], unit: BudgetUnit, metric: QualityMetric, most: float
) -> AffordedCell | None:
    """The best cell within a cost of generators that are none of the family: told, not judged.

    On held-out prompts; on those that judge it where some were not judged on these.
    """
    within = _within(others, unit, metric, most)
    chosen = best_on_held_out(world, within, metric)
    return chosen or min(within, key=lambda of: (of.figure.number, of.cell.network), default=None)


@dataclass(frozen=True)
class StitchedRow:
    """A budget, in steps of the largest network, with the best single network and the best stitched trajectory.

    Both are the best on held-out prompts. `advantage`: the single one's number less the stitched one's, at the
    trainings that both have.
    """

    steps: int
    cost: float
    single: AffordedCell
    stitched: AffordedCell
    advantage: Interval


def stitched_rows(world: ClosedWorld, sampler: str, unit: BudgetUnit, metric: QualityMetric) -> list[StitchedRow]:
    """A row for each budget at which both were judged, and held out."""
    cells = world.cells(sampler)
    single = [cell for of in cells.values() for cell in of.values()]
    stitched = [cell for cell in world.others(sampler) if cell.kind == "stitched"]
    *_, reference = cells
    rows = []
    for steps in limits.QUALITY_BUDGETS:
        base = cells[reference].get(steps)
        cost = None if base is None else unit.cost(base)
        if cost is None:
            continue
        best, shared = (
            best_on_held_out(world, _within(of, unit, metric, cost), metric) for of in (single, stitched)
        )
        beside = None if best is None or shared is None else at_seeds_of(shared, best, metric)
        if best is not None and shared is not None and beside is not None:
            advantage = contrast((beside, shared.figure), lambda one, two: one - two)
            rows.append(StitchedRow(steps, cost, AffordedCell(best.cell, beside), shared, advantage))
    return rows


def at_seeds_of(other: AffordedCell, winner: AffordedCell, metric: QualityMetric) -> PooledFigure | None:
    """The winner's figure at the trainings that the other one has: a lucky training would look like an advance.

    Null where it has none of these.
    """
    cell = winner.cell.at_seeds(other.cell.seeds)
    return None if cell is None else metric.figure(cell)

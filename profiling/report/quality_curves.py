"""Curves of quality in closed worlds: cells over their cost, the best at each budget, sweeps of the guidance."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from ..claims.closed_worlds import (
    QUALITY_METRICS,
    ClosedWorld,
    QualityCell,
    QualityMetric,
    closed_worlds,
    of_the_same_seeds,
)
from ..claims.pooled_figures import DIFFERENCE, PooledFigure, contrast
from ..claims.sample_costs import BudgetUnit, budget_units
from ..figures.derived import Overview
from ..measure.intervals import Interval
from ..quality import QualityRecord

# No distance: the share of a caption's factors that the judge reads right.
ALIGNMENT = QualityMetric("alignment", "alignment", DIFFERENCE)
METRICS = (*QUALITY_METRICS, ALIGNMENT)


@dataclass(frozen=True)
class CurvePoint:
    """A cell at its place on a curve.

    at         its cost in the curve's unit, or its guidance rate
    figures    by the fields of the metrics that it has
    intervals  of the same, in the metric's own numbers
    """

    cell: QualityCell
    at: float
    figures: Mapping[str, PooledFigure]
    intervals: Mapping[str, Interval]

    @property
    def kind(self) -> str:
        return self.cell.records[0].case.kind


@dataclass(frozen=True)
class CostCurves:
    """All generators of a world at what an image of theirs costs, under one sampler, the cheapest first.

    without_cost  the networks of which no cell's cost is known; distilled ones are called so
    """

    world: ClosedWorld
    sampler: str
    unit: BudgetUnit
    points: tuple[CurvePoint, ...]
    without_cost: tuple[str, ...] = ()


@dataclass(frozen=True)
class GuidanceCurves:
    """The networks of a world over their guidance rates, with one sampler, step count and split of the prompts."""

    world: ClosedWorld
    sampler: str
    steps: int
    split: str
    points: tuple[CurvePoint, ...]


@dataclass(frozen=True)
class QualityCurves:
    """What a page draws of quality; false where there is nothing."""

    costs: tuple[CostCurves, ...] = ()
    guidance: tuple[GuidanceCurves, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.costs or self.guidance)

    @property
    def series(self) -> tuple[str, ...]:
        """What has a colour and a mark: networks of text-to-image, the smallest first, then the other kinds, then
        networks of other tasks.

        Those of a task never share a panel with those of another: theirs are the marks that may be there twice.
        """
        curves: list[CostCurves | GuidanceCurves] = [*self.costs, *self.guidance]
        networks = [(of.world.task == "t2i", name) for of in curves for name in of.world.networks]
        kinds = sorted({point.kind for of in curves for point in of.points} - {"diffusion"})
        first, last = ([name for is_first, name in networks if is_first == wanted] for wanted in (True, False))
        return tuple(dict.fromkeys((*first, *kinds, *last)))


def quality_curves(records: Iterable[QualityRecord], times: Overview) -> QualityCurves:
    """Of tuned cells on test prompts the curves over FLOPs, and over each time of the same networks; the sweeps.

    times: trajectories, of which those labelled as a network is tell its time.
    """
    costs: list[CostCurves] = []
    guidance: list[GuidanceCurves] = []
    for world in closed_worlds(records):
        units = budget_units(world, times)
        for sampler in world.samplers:
            family = [cell for of_network in world.cells(sampler).values() for cell in of_network.values()]
            placed = [curve_point(cell, 0.0) for cell in (*family, *world.others(sampler))]
            curves = (_cost_curves(world, sampler, unit, placed) for unit in units)
            costs += [of for of in curves if of.points]
            guidance += _sweeps(world, sampler)
    return QualityCurves(tuple(costs), tuple(guidance))


def curve_point(cell: QualityCell, at: float) -> CurvePoint:
    """With every metric that all seeds of the cell have a number of."""
    found = {metric.field: metric.figure(cell) for metric in METRICS}
    figures = {field: figure for field, figure in found.items() if figure is not None}
    return CurvePoint(cell, at, figures, {field: pooled_interval(figure) for field, figure in figures.items()})


def pooled_interval(figure: PooledFigure) -> Interval:
    """The mean over seeds and its 95 % interval over replicates and seeds, in the figure's own numbers.

    The mean is that of the metric's scale: of a logarithm the geometric one.
    """
    found, back = contrast((figure,), lambda number: number), figure.scale.back
    return Interval(back(found.low), back(found.value), back(found.high), found.confidence)


def frontier(points: Iterable[CurvePoint], field: str) -> tuple[CurvePoint, ...]:
    """The points that none at the same cost or less equals or beats, the cheapest first; less is better."""
    found: list[CurvePoint] = []
    having = [point for point in points if field in point.intervals]
    for point in sorted(having, key=lambda point: (point.at, point.intervals[field].value, *_name(point))):
        if not found or point.intervals[field].value < found[-1].intervals[field].value:
            found.append(point)
    return tuple(found)


def _cost_curves(world: ClosedWorld, sampler: str, unit: BudgetUnit, points: Sequence[CurvePoint]) -> CostCurves:
    """Of the points whose cost is known."""
    costs = [(unit.cost(point.cell), point) for point in points]
    found = [replace(point, at=cost) for cost, point in costs if cost is not None]
    having = {_label(point) for point in found}
    without = dict.fromkeys(_label(point) for point in points if _label(point) not in having)
    ordered = sorted(found, key=lambda point: (point.at, *_name(point)))
    return CostCurves(world, sampler, unit, tuple(ordered), tuple(without))


def _name(point: CurvePoint) -> tuple[str, str, int]:
    return point.cell.network, point.kind, point.cell.steps


def _label(point: CurvePoint) -> str:
    """A distilled network has the name of its teacher."""
    is_shared = point.kind == "distilled"
    return f"{point.kind} {point.cell.network}" if is_shared else point.cell.network


def _sweeps(world: ClosedWorld, sampler: str) -> list[GuidanceCurves]:
    """Of each step count and split the networks with two rates or more."""
    grouped: dict[tuple[int, str], dict[str, list[QualityCell]]] = {}
    for cell in world.guided_cells(sampler):
        place = (cell.steps, cell.records[0].case.split)
        grouped.setdefault(place, {}).setdefault(cell.network, []).append(cell)
    found = []
    for (steps, split), by_network in sorted(grouped.items()):
        sweeps = [of_the_same_seeds(by_network.get(name, ())) for name in world.networks]
        if cells := [cell for of in sweeps if len(of) > 1 for cell in of]:
            points = tuple(curve_point(cell, cell.guidance_scale) for cell in cells)
            found.append(GuidanceCurves(world, sampler, steps, split, points))
    return found

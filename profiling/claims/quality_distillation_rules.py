"""Distilled networks in a closed world: their order, and the undistilled one that is as good as the largest.

The paper counts costs in steps of the largest network, one forward each, with guidance or without: cost 8 is some
60 steps of the 83M. So a budget here is the cost of so many guided steps of the undistilled largest network, which
buys a smaller one as many guided steps as the paper's cost does. What a student's own steps cost stands beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..figures.derived import Overview
from ..figures.text import times
from ..measure.intervals import Interval, each_of, extreme_interval
from ..terminal.layout import MISSING, Grid, number
from ..terminal.visible import counted
from . import limits
from .budget_words import advantage_text, judged_text
from .catalogue import Claim
from .closed_worlds import QUALITY_METRICS, Cells, ClosedWorld, QualityCell, QualityMetric
from .pair_orders import figure_table, shared_order, shared_pairs
from .pooled_figures import PooledFigure, contrast
from .quality_budgets import BudgetRow, budget_rows
from .quality_verdict import cells_grid, conditions_of, figure_text, quality_verdict, unmeasured_quality
from .sample_costs import BudgetUnit, FlopBudget, budget_units
from .verdict import Judged, Verdict

_STEPS = limits.DISTILLED_STEPS
# The paper's range: at its end a smaller network is as good.
_COST = int(limits.DISTILLED_COSTS[1])


@dataclass(frozen=True)
class Students:
    """The distilled networks of a world under one sampler, and the undistilled ones of the same training seeds.

    distilled    by network: the student of `DISTILLED_STEPS`
    """

    world: ClosedWorld
    sampler: str
    distilled: Mapping[str, QualityCell]
    undistilled: Cells

    @property
    def largest(self) -> str:
        return [*self.world.networks, *self.undistilled][-1]

    def beside(self, cell: QualityCell, student: QualityCell) -> QualityCell | None:
        """An undistilled cell at the trainings that the student has: it came out of one of them."""
        return cell.at_seeds(student.seeds)

    def as_good(self, name: str, metric: QualityMetric) -> QualityCell | None:
        """The undistilled cell of the fewest steps that is as good as its student; null where none is."""
        student = self.distilled[name]
        figure = metric.figure(student)
        for _, cell in sorted(self.undistilled.get(name, {}).items()):
            own = self.beside(cell, student)
            found = None if own is None else metric.figure(own)
            if figure is not None and found is not None and found.number <= figure.number:
                return cell
        return None


def quality_distillation(claim: Claim, worlds: Sequence[ClosedWorld], shown: Overview) -> list[Verdict]:
    """Whether students have the order of their teachers, and whether an undistilled smaller network at the paper's
    cost is as good as the distilled largest one: two questions, each with verdicts of its own."""
    found = []
    for world in worlds:
        for sampler in world.samplers_of("distilled") if world.task == "t2i" else ():
            cells = world.cells(sampler, "distilled")
            distilled = {name: of[_STEPS] for name, of in cells.items() if _STEPS in of and name in world.networks}
            students = Students(world, sampler, distilled, world.cells(sampler))
            if not distilled:
                needs = f"students of {counted(_STEPS, 'step')}, of the networks that are there undistilled"
                used = [cell for of in cells.values() for cell in of.values()]
                said = conditions_of(world, sampler, None)
                found.append(unmeasured_quality(claim, needs, said, cells_grid(cells), used))
                continue
            for metric in QUALITY_METRICS:
                found.append(_order(claim, students, metric))
            for unit in budget_units(world, shown):
                for metric in QUALITY_METRICS:
                    found.append(_match(claim, students, unit, metric))
    return found


def _order(claim: Claim, of: Students, metric: QualityMetric) -> Verdict:
    said = conditions_of(of.world, of.sampler, metric) | {"question": "order of sizes"}
    pairs_of = {}
    for name, student in of.distilled.items():
        own = of.undistilled.get(name, {}).get(_STEPS)
        if (teacher := None if own is None else of.beside(own, student)) is not None:
            pairs_of[name] = (teacher, student)
    cells = [cell for pair in pairs_of.values() for cell in pair]
    series: dict[str, Cells] = {
        "undistilled": {name: {_STEPS: teacher} for name, (teacher, _) in pairs_of.items()},
        "distilled": {name: {_STEPS: student} for name, (_, student) in pairs_of.items()},
    }
    figures = {name: figure_table(cells_of, metric) for name, cells_of in series.items()}
    pairs = shared_pairs(figures, of.world.networks)
    order = shared_order(figures, pairs)
    grid = _students_grid(of, metric, FlopBudget())
    if order is None:
        open_ = f"; none of {counted(len(pairs), 'pair')} does" if pairs else ""
        needs = f"two networks, distilled and not, with {counted(_STEPS, 'step')}, that differ beyond noise{open_}"
        return unmeasured_quality(claim, needs, said, grid, cells or list(of.distilled.values()))
    names = [name for name in of.world.networks if any(name in pair for pair in pairs)]
    best = {
        series: ", ".join(sorted(names, key=lambda name: (table[name, _STEPS].number, name)))
        for series, table in figures.items()
    }
    sentence = (
        f"{order.share.value:.0%} of {counted(order.count, 'pair')} of networks that differ beyond noise, "
        f"distilled or not, have the same order both ways at {counted(_STEPS, 'step')} (interval "
        f"{order.share.low:.0%} to {order.share.high:.0%}; above {limits.SAME_ORDER:.0%} holds); the best first: "
        f"distilled {best['distilled']}, undistilled {best['undistilled']}"
    )
    judged = Judged("share of pairs in the same order", order.share, limits.SAME_ORDER, above=True)
    return quality_verdict(claim, judged, sentence, said, grid, cells, order.decided_by)


def _match(claim: Claim, of: Students, unit: BudgetUnit, metric: QualityMetric) -> Verdict:
    said = conditions_of(of.world, of.sampler, metric) | dict(unit.conditions)
    said |= {"question": f"undistilled smaller at cost {_COST}"}
    grid, largest = _students_grid(of, metric, unit), of.largest
    student = of.distilled.get(largest)
    figure = None if student is None else metric.figure(student)
    rows = (
        {row.steps: row for row in budget_rows(of.world, of.undistilled, unit, metric)} if of.undistilled else {}
    )
    beside = {} if student is None or figure is None else _beside(of, student, figure, rows, metric)
    if student is None or figure is None or _COST not in beside:
        missing = (
            f"the {largest} distilled to {counted(_STEPS, 'step')}"
            if figure is None
            else f"{counted(_COST, 'step')} of the undistilled {largest} and a smaller network of the same seeds"
        )
        return unmeasured_quality(claim, missing, said, grid, list(of.distilled.values()))
    found, best, cell = beside[_COST].advantage, beside[_COST].best, beside[_COST].cell
    its = beside[_COST].figures[best]
    first = min((steps for steps, one in beside.items() if one.advantage.value >= 0), default=None)
    first_at = f"at the cost of {counted(first, 'step')} first" if first else "at none of the budgets"
    own, price = unit.cost(student), rows[_COST].cost
    paid = "" if own is None else f", {times(price / own)} the cost of the student"
    sentence = (
        f"at the cost of {counted(_COST, 'step')} of the undistilled {largest}{paid}, the best undistilled "
        f"smaller network, the {best} with {counted(cell.steps, 'step')}, has a {metric.name} of "
        f"{figure_text(its)}, the {largest} distilled to {_STEPS} of {figure_text(figure)} "
        f"({judged_text(metric.scale, found, beside[_COST].bound, 'the undistilled one is as good')}); "
        f"a smaller one is as good {first_at}; {_speedup(of, largest, unit, metric)}"
    )
    cells = [student, *(one.cell for one in beside.values())]
    judged = Judged(
        f"{metric.name}: the distilled {largest}'s beside the best undistilled smaller's", found, 0.0, above=True
    )
    notes = unit.notes([student, rows[_COST].reference.cell, cell])
    return quality_verdict(
        claim, judged, sentence, said, grid, cells, [figure, *beside[_COST].figures.values()], notes
    )


@dataclass(frozen=True)
class BesideStudent:
    """The undistilled smaller networks at a budget, beside the largest network's student.

    advantage   of the best of them, a bound over all
    """

    best: str
    cell: QualityCell
    figures: Mapping[str, PooledFigure]
    advantage: Interval

    @property
    def bound(self) -> str:
        return f"a bound over {counted(len(self.figures), 'smaller network')}"


def _beside(
    of: Students,
    student: QualityCell,
    figure: PooledFigure,
    rows: Mapping[int, BudgetRow],
    metric: QualityMetric,
) -> dict[int, BesideStudent]:
    """By budget, where a smaller network has the student's seeds."""
    found = {}
    for steps, row in rows.items():
        cells = {name: of.beside(one.cell, student) for name, one in row.smaller.items()}
        known = {name: cell for name, cell in cells.items() if cell is not None}
        figures = {name: own for name, cell in known.items() if (own := metric.figure(cell)) is not None}
        if figures:
            together = each_of(len(figures))
            over = {
                name: contrast((figure, own), lambda large, small: large - small, together)
                for name, own in figures.items()
            }
            best = max(over, key=lambda name: over[name].value)
            found[steps] = BesideStudent(best, known[best], figures, extreme_interval(max, list(over.values())))
    return found


def _speedup(of: Students, name: str, unit: BudgetUnit, metric: QualityMetric) -> str:
    """ "the student's 4 steps are as good as 16 of its undistilled network, 8.00x their speed"."""
    cell, student = of.as_good(name, metric), of.distilled[name]
    if cell is None:
        most = max(of.undistilled.get(name, {0: student}))
        return f"the student's {_STEPS} steps are better than its undistilled network's up to {most}"
    price, own = unit.cost(cell), unit.cost(student)
    faster = "" if price is None or own is None else f", {times(price / own)} their speed"
    return f"the student's {_STEPS} steps are as good as {cell.steps} of its undistilled network{faster}"


def _students_grid(of: Students, metric: QualityMetric, unit: BudgetUnit) -> Grid:
    """A row for each student, and one of real samples."""
    rows = []
    for name, student in of.distilled.items():
        own = of.undistilled.get(name, {}).get(_STEPS)
        teacher = None if own is None else of.beside(own, student)
        figures = [None if cell is None else metric.figure(cell) for cell in (student, teacher)]
        gain = MISSING
        if figures[0] is not None and figures[1] is not None:
            gain = advantage_text(metric.scale, contrast((figures[1], figures[0]), lambda one, other: one - other))
        as_good, cost = of.as_good(name, metric), unit.cost(student)
        price = None if as_good is None else unit.cost(as_good)
        rows.append(
            (
                name,
                *(MISSING if figure is None else figure_text(figure) for figure in figures),
                *(gain, number(cost), MISSING if as_good is None else str(as_good.steps), number(price)),
                MISSING if price is None or cost is None else times(price / cost),
            )
        )
    if (real := of.world.real(metric)) is not None:
        rows.append(("real samples", f"{real:.4g}", *[MISSING] * 6))
    headings = (
        *("network", f"{metric.name}, distilled to {_STEPS}", f"undistilled with {_STEPS}", "gain", unit.unit),
        *("undistilled steps as good", f"their {unit.unit}", "speed-up"),
    )
    return Grid(headings, tuple(rows), ("network", "gain")).without_empty()

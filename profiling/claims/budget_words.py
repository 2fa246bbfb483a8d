"""Budgets of a closed world in words and figures: an advantage, the pair that it is of, a row for each budget."""

from __future__ import annotations

from collections.abc import Sequence

from ..figures.text import joined, times
from ..measure.intervals import Interval
from ..terminal.layout import MISSING, Grid, number
from ..terminal.visible import counted
from .closed_worlds import ClosedWorld, QualityMetric
from .pooled_figures import LOGARITHM, Scale
from .quality_budgets import BudgetRow, at_seeds_of, best_other
from .quality_verdict import figure_text
from .sample_costs import BudgetUnit
from .verdict import interval_text


def pair_text(metric: QualityMetric, at: BudgetRow) -> str:
    """ "the best smaller network, the w8 with 25 steps, has a KID of 0.1, the w32 with 3 of 0.2"."""
    small, large = at.smaller[at.best], at.reference
    return (
        f"the best smaller network, the {at.best} with {counted(small.cell.steps, 'step')}, has a {metric.name} "
        f"of {figure_text(small.figure)}, the {large.cell.network} with {large.cell.steps} of "
        f"{figure_text(large.figure)}"
    )


def saturated_text(at: BudgetRow) -> str:
    """Begins with a semicolon; empty where no network has too few steps for the budget."""
    if not at.saturated:
        return ""
    least = joined(f"the {name} at {at.smaller[name].cell.steps}" for name in at.saturated)
    return (
        f"; the budget affords more steps than were measured of {joined(at.saturated)}; "
        f"these are taken here: {least} steps"
    )


def bound_text(at: BudgetRow) -> str:
    return f"a bound over {counted(len(at.advantages), 'smaller network')}"


def judged_text(scale: Scale, found: Interval, bound: str, outcome: str) -> str:
    """ "1.80x, interval 1.50x to 2.10x, a bound over 4 networks; above 1 the smaller is better"."""
    of_all = f", {bound}" if found.confidence else ""
    return f"{advantage_text(scale, found)}{of_all}; above {'1' if scale is LOGARITHM else '0'} {outcome}"


def measure_text(scale: Scale, over: str, under: str) -> str:
    return f"log of {over}'s over {under}'s" if scale is LOGARITHM else f"{over}'s less {under}'s"


def number_text(scale: Scale, found: float) -> str:
    """ "1.80x" of logarithms, "0.01" of differences."""
    return times(scale.back(found)) if scale is LOGARITHM else f"{found:.3g}"


def advantage_text(scale: Scale, found: Interval) -> str:
    """ "1.80x, interval 1.50x to 2.10x" of logarithms, "0.01, interval ..." of differences; without replicates
    there is no interval."""
    value = number_text(scale, found.value)
    if not found.confidence:
        return f"{value}, no interval"
    if scale is LOGARITHM:
        return f"{value}, interval {number_text(scale, found.low)} to {number_text(scale, found.high)}"
    return f"{value}, interval {interval_text(found)}"


def turned(found: Interval) -> Interval:
    """Of the same difference the other way round."""
    return Interval(-found.high, -found.value, -found.low, found.confidence)


def notes_on_others(
    world: ClosedWorld, sampler: str, unit: BudgetUnit, metric: QualityMetric, rows: Sequence[BudgetRow]
) -> list[str]:
    """On the costs of generators of other kinds that `budget_grid` tells of."""
    others = world.others(sampler)
    best = [best_other(world, others, unit, metric, row.cost) for row in rows]
    return unit.stand_ins(of.cell for of in best if of is not None)


def budget_grid(
    world: ClosedWorld, sampler: str, unit: BudgetUnit, metric: QualityMetric, rows: Sequence[BudgetRow]
) -> Grid:
    """A row for each budget, and one of real samples."""
    reference = rows[0].reference.cell.network
    headings = (
        *(
            f"steps of {reference}",
            unit.unit,
            f"{metric.name} of {reference}",
            "with steps",
            "best smaller",
            "its steps",
        ),
        *(f"its {metric.name}", "advantage", "better", "best of another kind", f"that one's {metric.name}"),
        "the better single one's at its seeds",
    )
    others = world.others(sampler)
    cells: list[tuple[str, ...]] = []
    for row in rows:
        small = row.smaller[row.best]
        other = best_other(world, others, unit, metric, row.cost)
        beside = None if other is None else at_seeds_of(other, row.winner, metric)
        better = {"smaller": row.best, "reference": reference, "open": "open"}[row.decided]
        cells.append(
            (
                *(str(row.steps), number(row.cost), figure_text(row.reference.figure)),
                *(str(row.reference.cell.steps), row.best, str(small.cell.steps), figure_text(small.figure)),
                *(advantage_text(metric.scale, row.largest_advantage), better),
                MISSING if other is None else f"{other.cell.network} ({other.cell.kind})",
                MISSING if other is None else figure_text(other.figure),
                MISSING if beside is None else figure_text(beside),
            )
        )
    real = world.real(metric)
    if real is not None:
        blank = (MISSING,) * (len(headings) - 3)
        cells.append(("real samples", MISSING, f"{real:.4g}", *blank))
    words = ("best smaller", "advantage", "better", "best of another kind")
    return Grid(headings, tuple(cells), words).without_empty()

"""Which network is best at a budget, in a closed world: by FLOPs, and by the wall clock where it was measured."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..figures.derived import Overview
from ..figures.text import joined, times
from ..measure.intervals import Interval, extreme_interval
from ..terminal.layout import MISSING, Grid, number
from ..terminal.visible import counted
from . import limits
from .catalogue import Claim
from .closed_worlds import QUALITY_METRICS, ClosedWorld, QualityMetric
from .pooled_figures import LOGARITHM, Scale
from .quality_budgets import BudgetRow, at_seeds_of, best_other, budget_rows
from .quality_verdict import conditions_of, figure_text, quality_verdict, unmeasured_quality
from .sample_costs import BudgetUnit, budget_units
from .verdict import Judged, Verdict, interval_text


def quality_small_wins(claim: Claim, worlds: Sequence[ClosedWorld], shown: Overview) -> list[Verdict]:
    """Whether the best smaller network is better than the largest at the cost of the paper's 3 steps of it."""
    return [
        _small_wins(claim, world, sampler, unit, metric, rows)
        for world, sampler, unit, metric, rows in _judgeable(worlds, shown)
    ]


def quality_large_wins(claim: Claim, worlds: Sequence[ClosedWorld], shown: Overview) -> list[Verdict]:
    """Whether the largest network is better than each smaller one at the largest budget."""
    return [
        _large_wins(claim, world, sampler, unit, metric, rows[-1])
        for world, sampler, unit, metric, rows in _judgeable(worlds, shown)
    ]


_Set = tuple[ClosedWorld, str, BudgetUnit, QualityMetric, list[BudgetRow]]


def _judgeable(worlds: Sequence[ClosedWorld], shown: Overview) -> Iterable[_Set]:
    """Each set of conditions with a budget at which two networks have a cell."""
    for world in worlds:
        units = budget_units(world, shown)
        for sampler in world.samplers if world.task == "t2i" else ():
            cells = world.cells(sampler)
            for unit in units:
                for metric in QUALITY_METRICS:
                    if rows := budget_rows(world, cells, unit, metric):
                        yield world, sampler, unit, metric, rows


def _small_wins(
    claim: Claim, world: ClosedWorld, sampler: str, unit: BudgetUnit, metric: QualityMetric, rows: list[BudgetRow]
) -> Verdict:
    said = conditions_of(world, sampler, metric) | dict(unit.conditions)
    grid = _budget_grid(world, sampler, unit, metric, rows)
    cells = [cell for row in rows for cell in row.cells]
    reference, steps = rows[0].reference.cell.network, limits.BUDGET_STEPS[0]
    wins = [row.steps for row in rows if row.decided == "smaller"]
    losses = [row.steps for row in rows if row.decided == "reference"]
    reach = f", up to that of {counted(wins[-1], 'step')} of the {reference}" if wins else ""
    told = (
        f"a smaller network is better beyond noise at {len(wins)} of {counted(len(rows), 'budget')}{reach}, "
        f"the {reference} at {len(losses)}"
    )
    at = next((row for row in rows if row.steps == steps), None)
    if at is None:
        needs = f"{counted(steps, 'step')} of the {reference}, the paper's budget; {told}"
        return unmeasured_quality(claim, needs, said, grid, cells)
    found = at.largest_advantage
    sentence = (
        f"at the cost of {counted(steps, 'step')} of the {reference}, {_pair(metric, at)} "
        f"({_advantage(metric.scale, found)}, {_bound(at)}; {_limit_text(metric.scale)} the smaller is better); "
        f"{told}"
    )
    name = f"{metric.name}: {_measure(metric.scale, reference, 'the best smaller')}"
    judged = Judged(name, found, 0.0, above=True)
    return quality_verdict(claim, judged, sentence, said, grid, cells, at.figures, unit.notes(at.cells))


def _large_wins(
    claim: Claim, world: ClosedWorld, sampler: str, unit: BudgetUnit, metric: QualityMetric, at: BudgetRow
) -> Verdict:
    said = conditions_of(world, sampler, metric) | dict(unit.conditions)
    reference = at.reference.cell.network
    # Its advantage over each; the least decides.
    over = [Interval(-i.high, -i.value, -i.low, i.confidence) for i in at.advantages.values()]
    found = extreme_interval(min, over)
    sentence = (
        f"at the cost of {counted(at.steps, 'step')} of the {reference}, the largest budget, {_pair(metric, at)} "
        f"({_advantage(metric.scale, found)}, {_bound(at)}; {_limit_text(metric.scale)} the {reference} is better)"
    )
    if at.saturated:
        least = joined(f"the {name} at {at.smaller[name].cell.steps}" for name in at.saturated)
        sentence += (
            f"; the budget affords more steps than were measured of {joined(at.saturated)}; "
            f"these are taken here: {least} steps"
        )
    grid = _budget_grid(world, sampler, unit, metric, [at])
    name = f"{metric.name}: {_measure(metric.scale, 'the best smaller', reference)}"
    judged = Judged(name, found, 0.0, above=True)
    return quality_verdict(claim, judged, sentence, said, grid, at.cells, at.figures, unit.notes(at.cells))


def _pair(metric: QualityMetric, at: BudgetRow) -> str:
    small, large = at.smaller[at.best], at.reference
    return (
        f"the best smaller network, the {at.best} with {counted(small.cell.steps, 'step')}, has a {metric.name} "
        f"of {figure_text(small.figure)}, the {large.cell.network} with {large.cell.steps} of "
        f"{figure_text(large.figure)}"
    )


def _bound(at: BudgetRow) -> str:
    return f"a bound over {counted(len(at.advantages), 'smaller network')}"


def _measure(scale: Scale, over: str, under: str) -> str:
    return f"log of {over}'s over {under}'s" if scale is LOGARITHM else f"{over}'s less {under}'s"


def _limit_text(scale: Scale) -> str:
    return "above 1" if scale is LOGARITHM else "above 0"


def _advantage(scale: Scale, found: Interval) -> str:
    """ "1.80x, interval 1.50x to 2.10x" of logarithms, "0.01, interval ..." of differences."""
    if scale is LOGARITHM:
        low, value, high = (times(scale.back(number)) for number in (found.low, found.value, found.high))
        return f"{value}, interval {low} to {high}"
    return f"{found.value:.3g}, interval {interval_text(found)}"


def _budget_grid(
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
                *(_advantage(metric.scale, row.largest_advantage), better),
                MISSING if other is None else f"{other.cell.network} ({other.cell.records[0].case.kind})",
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

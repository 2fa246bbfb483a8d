"""Which network is best at a budget, in a closed world: by FLOPs, and by the wall clock where it was measured."""

from __future__ import annotations

from collections.abc import Sequence

from ..figures.derived import Overview
from ..measure.intervals import extreme_interval
from ..terminal.visible import counted
from . import limits
from .budget_words import (
    bound_text,
    budget_grid,
    judged_text,
    measure_text,
    notes_on_others,
    pair_text,
    saturated_text,
    turned,
)
from .catalogue import Claim
from .closed_worlds import ClosedWorld
from .quality_budgets import BudgetRow, BudgetSet, budget_sets
from .quality_verdict import conditions_of, quality_verdict, unmeasured_quality
from .verdict import Judged, Verdict


def quality_small_wins(claim: Claim, worlds: Sequence[ClosedWorld], shown: Overview) -> list[Verdict]:
    """Whether the best smaller network is better than the largest at the cost of the paper's 3 steps of it."""
    return [_small_wins(claim, of) for of in budget_sets(worlds, shown, "t2i")]


def quality_large_wins(claim: Claim, worlds: Sequence[ClosedWorld], shown: Overview) -> list[Verdict]:
    """Whether the largest network is better than each smaller one at the largest budget."""
    return [_large_wins(claim, of, of.rows[-1]) for of in budget_sets(worlds, shown, "t2i")]


def _small_wins(claim: Claim, of: BudgetSet) -> Verdict:
    world, sampler, unit, metric, rows = of.world, of.sampler, of.unit, of.metric, of.rows
    said = conditions_of(world, sampler, metric) | dict(unit.conditions)
    grid = budget_grid(world, sampler, unit, metric, rows)
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
        f"at the cost of {counted(steps, 'step')} of the {reference}, {pair_text(metric, at)} "
        f"({judged_text(metric.scale, found, bound_text(at), 'the smaller is better')}); {told}"
    )
    notes = (*unit.notes(at.cells), *notes_on_others(world, sampler, unit, metric, rows))
    name = f"{metric.name}: {measure_text(metric.scale, reference, 'the best smaller')}"
    judged = Judged(name, found, 0.0, above=True)
    return quality_verdict(claim, judged, sentence, said, grid, cells, at.figures, notes)


def _large_wins(claim: Claim, of: BudgetSet, at: BudgetRow) -> Verdict:
    world, sampler, unit, metric = of.world, of.sampler, of.unit, of.metric
    said = conditions_of(world, sampler, metric) | dict(unit.conditions)
    reference = at.reference.cell.network
    # Its advantage over each; the least decides.
    found = extreme_interval(min, [turned(over) for over in at.advantages.values()])
    sentence = (
        f"at the cost of {counted(at.steps, 'step')} of the {reference}, the largest budget, "
        f"{pair_text(metric, at)} "
        f"({judged_text(metric.scale, found, bound_text(at), f'the {reference} is better')}){saturated_text(at)}"
    )
    grid = budget_grid(world, sampler, unit, metric, [at])
    notes = (*unit.notes(at.cells), *notes_on_others(world, sampler, unit, metric, [at]))
    name = f"{metric.name}: {measure_text(metric.scale, 'the best smaller', reference)}"
    judged = Judged(name, found, 0.0, above=True)
    return quality_verdict(claim, judged, sentence, said, grid, at.cells, at.figures, notes)

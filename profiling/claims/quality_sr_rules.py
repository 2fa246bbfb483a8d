"""Super-resolution in a closed world: who is best at small budgets, and who at large ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..figures.derived import Overview
from ..measure.intervals import Interval, each_of, extreme_interval
from ..terminal.visible import counted
from . import limits
from .budget_words import budget_grid, judged_text, notes_on_others, pair_text, saturated_text, turned
from .catalogue import Claim
from .closed_worlds import ClosedWorld
from .quality_budgets import BudgetRow, BudgetSet, budget_sets
from .quality_verdict import conditions_of, finding_of, quality_verdict, rank_of, unmeasured_quality
from .verdict import Judged, Verdict

_LIMIT = limits.SR_STEPS


@dataclass(frozen=True)
class BudgetHalf:
    """The budgets on one side of the limit, and at each by how much better the network is that the claim names.

    winner   in words
    """

    winner: str
    rows: Mapping[int, BudgetRow]
    advantages: Mapping[int, Interval]

    @property
    def at(self) -> int:
        """The budget that decides: a lost one rather than an open one, then that of the least advantage."""
        return min(self.advantages, key=lambda steps: rank_of(self.advantages[steps]))

    @property
    def told(self) -> str:
        """ "a smaller network at 8 of 8 budgets, the w32 at 0"."""
        found = [finding_of(interval) for interval in self.advantages.values() if interval.confidence]
        won, lost = (found.count(finding) for finding in ("holds", "does not hold"))
        budgets = counted(len(self.rows), "budget")
        return f"{self.winner} is better beyond noise at {won} of {budgets}, worse at {lost}"


def quality_sr_small_wins(claim: Claim, worlds: Sequence[ClosedWorld], shown: Overview) -> list[Verdict]:
    """Whether the best smaller network is better than the largest at each budget up to 20 steps of it, and the
    largest better than each smaller one beyond."""
    return [_both_halves(claim, of) for of in budget_sets(worlds, shown, "sr")]


def _both_halves(claim: Claim, of: BudgetSet) -> Verdict:
    world, sampler, unit, metric = of.world, of.sampler, of.unit, of.metric
    said = conditions_of(world, sampler, metric) | dict(unit.conditions)
    grid = budget_grid(world, sampler, unit, metric, of.rows)
    cells = [cell for row in of.rows for cell in row.cells]
    reference = of.rows[0].reference.cell.network
    found = _halves(of.rows, reference)
    told = "; ".join(f"{place} {_LIMIT} steps of the {reference} {half.told}" for place, half in found.items())
    missing = [place for place in ("up to", "beyond") if place not in found]
    decides = min(found, key=lambda place: rank_of(found[place].advantages[found[place].at]))
    half = found[decides]
    judged = Judged(
        f"{metric.name}: least advantage of the smaller up to {_LIMIT} steps, of the {reference} beyond",
        extreme_interval(min, [interval for one in found.values() for interval in one.advantages.values()]),
        0.0,
        above=True,
    )
    if missing and not (judged.interval.confidence and judged.finding == "does not hold"):
        needs = f"a budget {missing[0]} {_LIMIT} steps of the {reference}; {told}"
        return unmeasured_quality(claim, needs, said, grid, cells)
    at = half.rows[half.at]
    smaller = counted(len(at.smaller), "smaller network")
    bound = f"a bound over {smaller} and {counted(len(of.rows), 'budget')}"
    text = judged_text(metric.scale, half.advantages[half.at], bound, f"{half.winner} is better")
    sentence = (
        f"{told}; the budgets {decides} {_LIMIT} steps decide, at the cost of {counted(half.at, 'step')}: "
        f"{pair_text(metric, at)} ({text})"
    )
    notes = (*unit.notes(cells), *notes_on_others(world, sampler, unit, metric, of.rows))
    if missing:
        sentence += f"; there is no budget {missing[0]} {_LIMIT} steps, which would change nothing"
    sentence += saturated_text(at)
    decided_by = [figure for row in of.rows for figure in row.figures]
    return quality_verdict(claim, judged, sentence, said, grid, cells, decided_by, notes)


def _halves(rows: Sequence[BudgetRow], reference: str) -> dict[str, BudgetHalf]:
    """Those that have a budget; all advantages hold together."""
    together = each_of(len(rows))
    found = {}
    for place, winner, is_small in (("up to", "a smaller network", True), ("beyond", f"the {reference}", False)):
        of = {row.steps: row for row in rows if (row.steps <= _LIMIT) == is_small}
        advantages = {steps: row.advantage_at(together) for steps, row in of.items()}
        if not is_small:
            advantages = {steps: turned(interval) for steps, interval in advantages.items()}
        if of:
            found[place] = BudgetHalf(winner, of, advantages)
    return found

"""What a budget of wall-clock time affords, beside what the paper's cost affords. Quality is not judged here."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..figures.derived import Overview, Row
from ..figures.text import short_ratio, times
from ..paper import paper_sizes
from ..terminal.layout import MISSING, Grid, number
from ..trajectory.case import Task
from . import limits
from .catalogue import Claim
from .cost_rules import paper_ratio, paper_ratio_range
from .trajectory_cost import TrajectoryCost, by_conditions, costs_by_size
from .verdict import Evidence, Verdict


def small_wins_at_budget(claim: Claim, shown: Overview) -> list[Verdict]:
    """The steps that each size affords in the time of some steps of the 866M, beside the paper's."""
    return _affordable(claim, shown, "t2i", ("83M", limits.BUDGET_STEPS[0]))


def sr_small_wins_below_20(claim: Claim, shown: Overview) -> list[Verdict]:
    """The same for super-resolution: without guidance, with the low-resolution latent concatenated."""
    return _affordable(claim, shown, "sr", (None, limits.SR_STEPS))


def _families(shown: Overview, task: Task) -> list[tuple[list[Row], dict[str, TrajectoryCost]]]:
    """Groups of like conditions that have at least two of the paper's sizes, with the cost of each."""
    found = []
    for group in by_conditions(shown.rows, "steps"):
        rows = [row for row in group if row.name in paper_sizes() and row.case.task == task]
        costs = costs_by_size(rows)
        if len(costs) > 1:
            found.append(([row for row in rows if row.name in costs], costs))
    return found


def _affordable(claim: Claim, shown: Overview, task: Task, told: tuple[str | None, int]) -> list[Verdict]:
    """A table for each set of conditions; `told`: the size (or the smallest) and the budget that are quoted."""
    found = []
    for rows, costs in _families(shown, task):
        reference = limits.REFERENCE if limits.REFERENCE in costs else list(costs)[-1]
        afford = {
            name: {
                steps: _Afforded.of(name, cost, reference, costs[reference], steps)
                for steps in limits.BUDGET_STEPS
            }
            for name, cost in costs.items()
        }
        first, last = limits.BUDGET_STEPS[0], limits.BUDGET_STEPS[-1]
        cells = [
            (
                name,
                ", ".join(map(str, costs[name].medians)),
                *(f"{_whole(budget.here)} of {_whole(budget.paper)}" for budget in of.values()),
                *(_share(of[steps].kept) for steps in (first, last)),
            )
            for name, of in afford.items()
        ]
        headings = (
            *("size", "steps measured", *(f"{steps} of {reference}" for steps in limits.BUDGET_STEPS)),
            *(f"advantage left at {steps}" for steps in (first, last)),
        )
        grid = Grid(headings, tuple(cells), ("size", "steps measured"))
        wanted, steps = told
        size = wanted if wanted in costs and reference == limits.REFERENCE else next(iter(costs))
        quoted = afford[size][steps]
        sentence = (
            f"in the time of {steps} steps of the {reference} the {size} affords {_whole(quoted.here)}, where the "
            f"paper's cost says {_whole(quoted.paper)}: {_share(quoted.kept)} of the advantage in steps is left"
            f"{costs[reference].label(steps) or costs[size].label(_whole(quoted.here))}"
        )
        found.append(Evidence(claim, rows, shown.environments, grid, list(costs)).undecidable(sentence))
    return found


@dataclass(frozen=True)
class _Afforded:
    """The steps of a size that take as long as `budget` steps of the reference, here and by the paper's cost.

    papers: by the paper's cost as it is printed, and by the most and the least that its rounding allows.
    """

    budget: int
    here: float
    papers: tuple[float, float, float]

    @classmethod
    def of(cls, name: str, cost: TrajectoryCost, reference: str, base: TrajectoryCost, steps: int) -> _Afforded:
        here = steps if name == reference else cost.steps_within(base.ms(steps))
        low, high = paper_ratio_range(name, reference)
        return cls(steps, here, (steps / paper_ratio(name, reference), steps / high, steps / low))

    @property
    def paper(self) -> float:
        return self.papers[0]

    @property
    def kept(self) -> tuple[float, float] | None:
        """The share of the paper's further steps that is left, within its rounding; null where it has none."""
        further = [paper - self.budget for paper in self.papers]
        if min(further) <= 0:
            return None
        shares = [(self.here - self.budget) / more for more in further]
        return min(shares), max(shares)


def _share(kept: tuple[float, float] | None) -> str:
    if kept is None:
        return MISSING
    low, high = (f"{share:.0%}" for share in kept)
    return "none" if kept[1] <= 0 else low if low == high else f"{low} to {high}"


def _whole(steps: float) -> int:
    """The whole steps in it, of which a rounding error takes none away."""
    return math.floor(steps + 1e-9)


def large_wins_relaxed(claim: Claim, shown: Overview) -> list[Verdict]:
    """What the next size up costs at 50 steps, beside the paper's price and its FID."""
    steps, found = limits.RELAXED_STEPS, []
    for rows, costs in _families(shown, "t2i"):
        names = list(costs)
        cells = []
        for name, larger in zip(names, [*names[1:], None], strict=True):
            ms = costs[name].ms(steps)
            price = paper = MISSING
            fid = f"{paper_sizes()[name].fid:.2f}"
            if larger is not None:
                price = times(costs[larger].ms(steps) / ms) if ms > 0 else MISSING
                paper = times(paper_ratio(larger, name))
                fid += f" to {paper_sizes()[larger].fid:.2f}"
            source = "measured" if costs[name].is_measured(steps) else "predicted"
            cells.append((name, number(ms), source, larger or MISSING, price, paper, fid))
        headings = ("size", f"ms at {steps} steps", "by", "next", "its price", "in the paper", "paper's FID")
        grid = Grid(headings, tuple(cells), ("size", "by", "next", "paper's FID"))
        first, last = names[0], names[-1]
        whole = costs[last].ms(steps) / costs[first].ms(steps) if costs[first].ms(steps) > 0 else None
        label = costs[first].label(steps) or costs[last].label(steps)
        sentence = (
            f"at {steps} steps the {last} takes {times(whole)} the time of the {first}{label}, where the paper's "
            f"cost says {times(paper_ratio(last, first))} and its FID {paper_sizes()[last].fid:.2f} instead of "
            f"{paper_sizes()[first].fid:.2f}"
        )
        found.append(Evidence(claim, rows, shown.environments, grid, names).undecidable(sentence))
    return found


def distillation_keeps_trend(claim: Claim, shown: Overview) -> list[Verdict]:
    """The 866M at 4 steps against the 83M at N steps: where they take the same time, and the paper's N."""
    found = []
    small, large, few = limits.DISTILLED_RIVAL, limits.REFERENCE, limits.DISTILLED_STEPS
    for rows, costs in _families(shown, "t2i"):
        if small not in costs or large not in costs or costs[large].ms(few) <= 0:
            continue
        time = costs[large].ms(few)
        cross = costs[small].steps_within(time)
        cost_of_one = paper_sizes()[small].normalized_cost
        matching = [round(cost / cost_of_one) for cost in limits.DISTILLED_COSTS]
        counts = sorted({few, max(int(cross), 1), round(few / cost_of_one), *matching})
        cells = [
            (
                str(steps),
                number(costs[small].ms(steps)),
                "measured" if costs[small].is_measured(steps) else "predicted",
                times(costs[small].ms(steps) / time),
                times(steps * cost_of_one / few),
            )
            for steps in counts
        ]
        headings = (f"steps of {small}", "ms", "by", f"over {few} steps of {large}", "in the paper")
        grid = Grid(headings, tuple(cells), ("by",))
        shares = [times(costs[small].ms(steps) / time) for steps in matching]
        sentence = (
            f"{few} steps of the {large} take as long as {short_ratio(cross)} of the {small}, "
            f"{few / cost_of_one:.0f} by the paper's cost; the {matching[0]} to {matching[1]} steps at which the "
            f"paper finds them alike take {shares[0]} to {shares[1]} of that time"
            f"{costs[large].label(few) or costs[small].label(*matching)}"
        )
        pair = [row for row in rows if row.name in (small, large)]
        found.append(Evidence(claim, pair, shown.environments, grid, [small, large]).undecidable(sentence))
    return found

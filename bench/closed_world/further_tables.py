"""The tables of further systems in docs/closed-world.md from a study's records, for bench/readme.py."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from ldmperf.profiling.claims.closed_worlds import ClosedWorld, QualityCell, closed_worlds
from ldmperf.profiling.claims.quality_budgets import StitchedRow, best_or_longest, figured, stitched_rows
from ldmperf.profiling.claims.quality_rival_rules import RIVAL_KINDS
from ldmperf.profiling.claims.sample_costs import BudgetUnit, budget_units
from ldmperf.profiling.figures import overview
from ldmperf.profiling.quality import Generator
from ldmperf.profiling.record_files import gather

from . import cells as grid
from .tables import (
    FRECHET,
    SAMPLER,
    budgets,
    frontier,
    noise_text,
    quality_text,
    range_text,
    span_text,
    table,
    unit_text,
)

# With what weights a network of super-resolution began.
_BEGINNINGS: Mapping[Generator, str] = {"diffusion": "text-to-image", "scratch": "drawn"}
# The steps that every network of super-resolution was sampled with.
_SHARED_STEPS = grid.SUPER_RESOLVED_BRIEFLY[0]
# Of generators that have no table of their own.
_KINDS: Mapping[Generator, str] = {"distilled": "distilled", **RIVAL_KINDS}


def tables(path: Path) -> str:
    """Other generators, stitched trajectories, super-resolution: those that the records have."""
    found = gather([path])
    worlds = {world.task: world for world in closed_worlds(found.qualities)}
    times = overview(found.trajectories)
    parts = []
    if "t2i" in worlds:
        units = budget_units(worlds["t2i"], times)
        parts += [_others(worlds["t2i"], units), _stitched(worlds["t2i"], units)]
    if "sr" in worlds:
        units = budget_units(worlds["sr"], times)
        parts += [_pretrained(worlds["sr"]), frontier(worlds["sr"]), budgets(worlds["sr"], units)]
    return "\n\n".join(part for part in parts if part)


def _others(world: ClosedWorld, units: Sequence[BudgetUnit]) -> str:
    """Each network of another kind, with the least cost at which one of the family is as good."""
    cells: dict[tuple[Generator, str], list[QualityCell]] = {}
    for cell in world.others(SAMPLER):
        if cell.kind in _KINDS:
            cells.setdefault((cell.kind, cell.network), []).append(cell)
    family = [cell for of in world.cells(SAMPLER).values() for cell in of.values()]
    rows = []
    for (kind, name), of in sorted(cells.items(), key=lambda each: (each[0][0], each[1][0].parameters or 0)):
        best = best_or_longest(world, figured(of, FRECHET), FRECHET)
        if best is None:
            continue
        cell = best.cell
        costs = [_least(cell, family, unit) for unit in units]
        rows.append([_KINDS[kind], name, f"{cell.parameters or 0:,}", str(cell.steps), quality_text(cell), *costs])
    if not rows:
        return ""
    heads = ["kind", "network", "parameters", "evaluations", "Frechet distance; alignment", *map(unit_text, units)]
    title = (
        "**Other kinds of generators**: Frechet distance, share of factors read right, guidance. By FLOPs and by "
        "each clock: what they cost, and the cheapest network of the family that is as good, with its cost over "
        "theirs."
    )
    return f"{textwrap.fill(title, 125)}\n\n{table(heads, rows)}"


def _least(cell: QualityCell, family: Sequence[QualityCell], unit: BudgetUnit) -> str:
    cost = unit.cost(cell)
    own = FRECHET.figure(cell)
    if cost is None or own is None:
        return "-"
    beside = [there for of in family if (there := of.at_seeds(cell.seeds)) is not None]
    as_good = [
        (its, of.cell)
        for of in figured(beside, FRECHET)
        if of.figure.number <= own.number and (its := unit.cost(of.cell)) is not None
    ]
    told = f"{cost:.3g} {unit.unit.split()[0]}"
    if not as_good:
        return f"{told}<br>none is as good"
    its, best = min(as_good, key=lambda each: each[0])
    return f"{told}<br>{best.network} at {best.steps}: {its / cost:.2f} times"


def _stitched(world: ClosedWorld, units: Sequence[BudgetUnit]) -> str:
    """At each budget the best stitched trajectory beside the best single network, chosen on held-out prompts."""
    by_unit = [{row.steps: row for row in stitched_rows(world, SAMPLER, unit, FRECHET)} for unit in units]
    if not any(by_unit):
        return ""
    *_, widest = world.cells(SAMPLER)
    steps = sorted({number for rows in by_unit for number in rows})
    rows = [[str(number), *(_beside(of.get(number)) for of in by_unit)] for number in steps]
    counts = "; ".join(
        f"{unit_text(unit)} at {sum(row.advantage.value > 0 for row in of.values())} of {len(of)} budgets, "
        f"{sum(row.advantage.low > 0 for row in of.values())} beyond noise"
        for unit, of in zip(units, by_unit, strict=True)
    )
    noise = noise_text(row.stitched.cell for of in by_unit for row in of.values())
    title = (
        f"**Stitched trajectories**: at the cost of so many steps of {widest}, the best of them and the best "
        "single network, chosen on held-out prompts, and by what factor the stitched one is better (below 1: "
        f"worse); in bold the one that is better beyond the noise of {noise}. The stitched one is better {counts}."
    )
    return f"{textwrap.fill(title, 125)}\n\n{table([f'steps of {widest}', *map(unit_text, units)], rows)}"


def _beside(row: StitchedRow | None) -> str:
    if row is None:
        return "-"
    stitched = f"{row.stitched.cell.network}, {row.stitched.figure.value:.2f}"
    single = f"{row.single.cell.network} at {row.single.cell.steps}, {row.single.figure.value:.2f}"
    if row.advantage.low > 0:
        stitched = f"**{stitched}**"
    elif row.advantage.high < 0:
        single = f"**{single}**"
    return f"{stitched}<br>{single}<br>{span_text(row.advantage)}"


def _pretrained(world: ClosedWorld) -> str:
    """Super-resolution by length of training, from text-to-image's weights and from drawn ones."""
    of = {
        (name, kind): world.trainings(name, SAMPLER, _SHARED_STEPS, kind)
        for name in world.networks
        for kind in _BEGINNINGS
    }
    lengths = sorted({length for cells_of in of.values() for length in cells_of})
    rows = [
        [name, _BEGINNINGS[kind], *(range_text(by[n]) if n in by else "-" for n in lengths)]
        for (name, kind), by in of.items()
    ]
    heads = ["network", "began with weights", *(f"{number} steps of training" for number in lengths)]
    title = (
        f"**Super-resolution**: the Frechet distance at {_SHARED_STEPS} steps, with its 95% interval over "
        f"{noise_text(cell for by in of.values() for cell in by.values())}, by the length of fine-tuning."
    )
    return f"{textwrap.fill(title, 125)}\n\n{table(heads, rows)}"

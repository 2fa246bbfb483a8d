"""The tables of docs/closed-world.md from a study's records, for bench/readme.py."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path

from ldmperf.profiling.claims.closed_worlds import QUALITY_METRICS, ClosedWorld, QualityCell, closed_worlds
from ldmperf.profiling.claims.limits import BUDGET_STEPS
from ldmperf.profiling.claims.pooled_figures import PooledFigure, contrast
from ldmperf.profiling.claims.quality_budgets import BudgetRow, at_seeds_of, best_other, budget_rows
from ldmperf.profiling.claims.quality_rival_rules import RIVAL_KINDS
from ldmperf.profiling.claims.sample_costs import BudgetUnit, TimeBudget, budget_units
from ldmperf.profiling.figures import overview
from ldmperf.profiling.figures.best import by_time
from ldmperf.profiling.figures.phrases import processor_name
from ldmperf.profiling.figures.text import joined
from ldmperf.profiling.measure.conditions import commit
from ldmperf.profiling.measure.intervals import Interval
from ldmperf.profiling.record_files import gather

from . import cells as grid

SAMPLER = "ddim"
FRECHET = QUALITY_METRICS[0]


def tables(path: Path) -> str:
    """All of them in markdown: what was measured, the cost of a step, the frontier, who is best at each budget."""
    found = gather([path])
    (world,) = [world for world in closed_worlds(found.qualities) if world.task == "t2i"]
    times = overview(found.trajectories)
    units = budget_units(world, times)
    parts = [_measured(world), _costs(world, units), frontier(world), _factors(world), budgets(world, units)]
    return "\n\n".join(part for part in parts if part)


def _measured(world: ClosedWorld) -> str:
    environment = world.records[0].environment
    commits = dict.fromkeys(commit(record.environment) for record in by_time(world.records))
    cells = [cell for of in world.cells(SAMPLER).values() for cell in of.values()]
    seeds = {len(cell.records) for cell in cells}
    where = f"{'commit' if len(commits) == 1 else 'commits'} {joined(commits)}"
    counts = (
        f"{min(cell.samples for cell in cells)} samples and {' or '.join(map(str, sorted(seeds)))} training seeds"
    )
    text = (
        f"**Measured**: {processor_name(environment)}, float32, one thread a process, {where}; {SAMPLER}, "
        f"guidance tuned; {counts} a cell. Real samples against real: a Frechet distance of "
        f"{world.real(FRECHET):.2f}; the judge reads {100 * (world.ceiling or 0):.1f}% of their factors right. "
        f"{_took(world)}"
    )
    return textwrap.fill(text, 125)


def _took(world: ClosedWorld) -> str:
    """Minutes from the first record of the family to the last, of choosing guidance and of judging at it."""
    parts, family = [], [r for r in world.records if (r.case.kind, r.case.sampler) == ("diffusion", SAMPLER)]
    for what, split in (("guidance was chosen", "held-out"), ("cells were judged", "test")):
        of = [r for r in family if r.case.split == split]
        times = [r.started_at for r in of if r.tuned or split == "held-out"]
        if times:
            parts.append(f"{what} within {(max(times) - min(times)).total_seconds() / 60:.0f} minutes")
    return f"By the records' clocks {joined(parts)}." if parts else ""


def _costs(world: ClosedWorld, units: Sequence[BudgetUnit]) -> str:
    """A guided step of each network over that of the widest, by each unit."""
    timed = [unit for unit in units if isinstance(unit, TimeBudget)]
    heads = ["network", "parameters", "GFLOP", *(f"ms of a guided step, {batch_text(unit)}" for unit in timed)]
    heads += ["FLOPs over the widest's", *(f"time, {batch_text(unit)}" for unit in timed)]
    by_name = {name: next(iter(of.values())).records[0] for name, of in world.cells(SAMPLER).items()}
    flops = {name: (record.gflop_per_image or 0) / record.case.steps for name, record in by_name.items()}
    flops = {name: value / (2 if by_name[name].case.guided else 1) for name, value in flops.items()}
    slopes = {
        name: [unit.costs[name, SAMPLER, True].line.slope / unit.batch for unit in timed] for name in by_name
    }
    *_, widest = by_name
    rows = []
    for name, record in by_name.items():
        shares = [mine / its for mine, its in zip(slopes[name], slopes[widest], strict=True)]
        cells_of = [name, f"{record.parameters:,}", f"{flops[name]:.4f}", *(f"{ms:.3g}" for ms in slopes[name])]
        rows.append([*cells_of, f"{flops[name] / flops[widest]:.2f}", *(f"{share:.2f}" for share in shares)])
    return table(heads, rows)


def frontier(world: ClosedWorld) -> str:
    """Each network's Frechet distance and alignment over its steps."""
    cells = world.cells(SAMPLER)
    steps = sorted({number for of in cells.values() for number in of})
    rows = [
        [name, *(quality_text(of[number]) if number in of else "-" for number in steps)]
        for name, of in cells.items()
    ]
    title = (
        "**Quality by steps**: the Frechet distance with its 95% interval over "
        f"{noise_text(cell for of in cells.values() for cell in of.values())}; the share of factors read right; "
        "the guidance."
    )
    return f"{textwrap.fill(title, 125)}\n\n{table(['network', *map(str, steps)], rows)}"


def noise_text(cells: Iterable[QualityCell]) -> str:
    """What the intervals of these cells are over: one training tells nothing of how trainings differ."""
    counts = {len(cell.seeds) for cell in cells}
    if counts == {1}:
        return "samples alone (one training seed)"
    return "samples and seeds" if 1 not in counts else "samples, and over seeds where there are several"


def quality_text(cell: QualityCell) -> str:
    """Frechet distance, alignment and guidance."""
    right = [record.alignment.value for record in cell.records if record.alignment is not None]
    if FRECHET.figure(cell) is None or not right:
        return "-"
    return f"{range_text(cell)}<br>{100 * sum(right) / len(right):.0f}%, at {cell.guidance_scale:g}"


def range_text(cell: QualityCell) -> str:
    """The Frechet distance with its interval."""
    figure = FRECHET.figure(cell)
    if figure is None:
        return "-"
    return span_text(contrast((figure,), lambda number: number), mark="**")


def span_text(found: Interval, mark: str = "") -> str:
    """ "1.05 (1.01 to 1.09)" of logarithms of Frechet distances, or of what two of them are apart."""
    low, value, high = (FRECHET.scale.back(number) for number in (found.low, found.value, found.high))
    return f"{mark}{value:.2f}{mark} ({low:.2f} to {high:.2f})"


def _factors(world: ClosedWorld) -> str:
    """The share of each factor that the judge reads right at one number of steps; "" where no record has it."""
    _, steps = grid.VARIED
    found = {name: of[steps] for name, of in world.cells(SAMPLER).items() if steps in of}
    noise = noise_text(found.values())
    if real := world.real_records:
        found["real scenes"] = QualityCell(tuple(real[:1]))
    records = [record for cell in found.values() for record in cell.records]
    names = list(dict.fromkeys(name for record in records for name in record.factors))
    if not names:
        return ""
    rows = [[network, *(_share(cell.factor(name)) for name in names)] for network, cell in found.items()]
    title = (
        f"**Alignment of each factor** at {steps} steps: the share that the judge reads right, in percent, with "
        f"its 95% interval over {noise}. The records do not tell whether the seeds err on the same "
        "samples; the interval takes it that they do, and is the wider for it."
    )
    return f"{textwrap.fill(title, 125)}\n\n{table(['network', *names], rows)}"


def _share(figure: PooledFigure | None) -> str:
    if figure is None:
        return "-"
    found = contrast((figure,), lambda number: number)
    low, value, high = (100 * figure.scale.back(number) for number in (found.low, found.value, found.high))
    return f"**{value:.1f}** ({low:.1f} to {high:.1f})"


def budgets(world: ClosedWorld, units: Sequence[BudgetUnit]) -> str:
    """Who is best at the cost of some steps of the widest, by FLOPs and by each clock, one beside the other."""
    cells, others = world.cells(SAMPLER), world.others(SAMPLER)
    by_unit = [{row.steps: row for row in budget_rows(world, cells, unit, FRECHET)} for unit in units]
    *_, widest = cells
    heads = [f"steps of {widest}", *(unit_text(unit) for unit in units)]
    steps = sorted({number for rows in by_unit for number in rows})
    rows = [
        [
            str(number),
            *(_winner(world, rows.get(number), unit, others) for unit, rows in zip(units, by_unit, strict=True)),
        ]
        for number in steps
    ]
    title = (
        f"**Who is best at a budget**, the cost of so many steps of {widest}: the better of {widest} and the best "
        f"narrower network, with its steps and Frechet distance, and by what factor the narrower one is better "
        f"(below 1: worse), with a bound over all of them and over "
        f"{noise_text(cell for of in by_unit for row in of.values() for cell in row.cells)}; in italics where the "
        "interval holds 1. In a third line a better generator of another kind within the budget, beside the "
        "better network at the same training seeds."
    )
    return f"{textwrap.fill(title, 125)}\n\n{table(heads, rows)}"


def _winner(world: ClosedWorld, row: BudgetRow | None, unit: BudgetUnit, others: Sequence[QualityCell]) -> str:
    if row is None:
        return "-"
    best = row.winner
    name = f"{best.cell.network} at {best.cell.steps}, {best.figure.value:.2f}"
    name = f"*{name}*" if row.decided == "open" else f"**{name}**"
    other = best_other(world, others, unit, FRECHET, row.cost)
    beside = ""
    its = None if other is None else at_seeds_of(other, best, FRECHET)
    if other is not None and its is not None and other.figure.number < its.number:
        kind = RIVAL_KINDS.get(other.cell.kind, other.cell.kind)
        beside = f"<br>{kind} {other.cell.network}: {other.figure.value:.2f}, beside {its.value:.2f}"
    return f"{name}<br>{span_text(row.largest_advantage)}{beside}"


def unit_text(unit: BudgetUnit) -> str:
    return f"by the time of {batch_text(unit)}" if isinstance(unit, TimeBudget) else "by FLOPs"


def batch_text(unit: TimeBudget) -> str:
    return "an image alone" if unit.batch == 1 else f"an image in a batch of {unit.batch}"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}", *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join(lines)


def sentence(path: Path) -> str:
    """What the study proves, for README: who is best at a budget, by FLOPs and by the clock."""
    found = gather([path])
    (world,) = [world for world in closed_worlds(found.qualities) if world.task == "t2i"]
    units = budget_units(world, overview(found.trajectories))
    cells = world.cells(SAMPLER)
    *narrower, widest = cells
    rows = {unit_text(unit): budget_rows(world, cells, unit, FRECHET) for unit in units}
    leads = [f"{sum(_leads(row) for row in of)} of {len(of)} budgets {name}" for name, of in rows.items()]
    beyond = [str(sum(row.decided == "smaller" for row in of)) for of in rows.values()]
    steps = BUDGET_STEPS[0]
    at = [f"{name} {_beside(row)}" for name, of in rows.items() for row in of if row.steps == steps]
    seeds = len(next(iter(cells[widest].values())).records)
    most = max(row.steps for of in rows.values() for row in of)
    text = (
        f"**In a closed world a narrower network has the best samples at {joined(leads)}; beyond the noise of "
        f"samples and training seeds at {joined(beyond)}.** A budget is the cost of 1 to {most} steps of the "
        f"widest of {len(narrower) + 1} networks, trained here with {seeds} seeds each; the best has the least "
        f"Frechet distance. At the paper's budget, {steps} steps of the widest: {'; '.join(at)}. This is true of "
        "scenes of six factors in latents of 8x8, on a CPU; it says nothing of the paper's networks ([the "
        "study](docs/closed-world.md))."
    )
    return textwrap.fill(text, 125, break_on_hyphens=False)


def _leads(row: BudgetRow) -> bool:
    return row.winner is not row.reference


def _beside(row: BudgetRow) -> str:
    """The best narrower network beside the widest."""
    small, widest = row.smaller[row.best].cell, row.reference.cell.network
    times, _, span = span_text(row.largest_advantage).partition(" ")
    return (
        f"{small.network} affords {small.steps} steps, and the Frechet distance of {widest} is {times} times that "
        f"of {small.network} {span}"
    )

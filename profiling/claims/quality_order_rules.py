"""Orders of networks in a closed world: the same under every sampler, and better with more training compute."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..figures.derived import Overview
from ..figures.lines import least_squares
from ..figures.text import joined
from ..measure.intervals import Interval
from ..terminal.layout import MISSING, Grid, number
from ..terminal.visible import counted
from . import limits
from .catalogue import Claim
from .closed_worlds import (
    QUALITY_METRICS,
    Cells,
    ClosedWorld,
    QualityCell,
    QualityMetric,
    of_the_same_seeds,
)
from .pair_orders import FigureTable, NetworkPair, figure_table, shared_order, shared_pairs
from .pooled_figures import LOGARITHM, PooledFigure, contrast
from .quality_budgets import BudgetRow, budget_rows
from .quality_verdict import cells_grid, conditions_of, figure_text, quality_verdict, unmeasured_quality
from .sample_costs import FlopBudget
from .verdict import Judged, Verdict, interval_text


def quality_sampler_independent(claim: Claim, worlds: Sequence[ClosedWorld], shown: Overview) -> list[Verdict]:
    """Whether two networks have the same order at the same steps, whatever the sampler."""
    found = []
    for world in worlds:
        cells = {name: world.cells(name) for name in world.samplers} if world.task == "t2i" else {}
        if len(cells) == 1:
            found.append(_one_sampler(claim, world, cells))
        shared = _at_shared_seeds(cells)
        for metric in QUALITY_METRICS:
            figures = {name: figure_table(of, metric) for name, of in shared.items()}
            if pairs := shared_pairs(figures, world.networks):
                found.append(_same_order(claim, world, metric, cells, shared, figures, pairs))
    return found


def _at_shared_seeds(cells: Mapping[str, Cells]) -> dict[str, Cells]:
    """By sampler the cells that all samplers have, at the training seeds that all of these have.

    With other seeds a network is another one, and its order is not the sampler's doing.
    """
    found: dict[str, dict[str, dict[int, QualityCell]]] = {sampler: {} for sampler in cells}
    places = [{(name, steps) for name, of in cells_of.items() for steps in of} for cells_of in cells.values()]
    for name, steps in sorted(set.intersection(*places)) if places else ():
        there = of_the_same_seeds([cells_of[name][steps] for cells_of in cells.values()])
        if len(there) == len(cells):
            for sampler, cell in zip(cells, there, strict=True):
                found[sampler].setdefault(name, {})[steps] = cell
    return dict(found)


def _one_sampler(claim: Claim, world: ClosedWorld, cells: Mapping[str, Cells]) -> Verdict:
    """What is missing is neither times nor another metric."""
    ((sampler, of),) = cells.items()
    used = [cell for of_network in of.values() for cell in of_network.values()]
    needs = f"quality under a second sampler, at the same steps; there is none but {sampler}'s"
    return unmeasured_quality(claim, needs, conditions_of(world, sampler, None), cells_grid(of), used)


def _same_order(
    claim: Claim,
    world: ClosedWorld,
    metric: QualityMetric,
    cells: Mapping[str, Cells],
    shared: Mapping[str, Cells],
    figures: Mapping[str, FigureTable],
    pairs: Sequence[NetworkPair],
) -> Verdict:
    """`shared` and the figures are at the seeds that all samplers have, `cells` at all."""
    samplers = list(figures)
    said = conditions_of(world, None, metric) | {"samplers": " and ".join(samplers)}
    grid = _order_grid(world, metric, cells, figures, pairs)
    used = [shared[sampler][name][steps] for sampler in samplers for steps, *names in pairs for name in names]
    order = shared_order(figures, pairs)
    if order is None:
        needs = f"two networks that differ beyond noise; none of {counted(len(pairs), 'pair')} does"
        return unmeasured_quality(claim, needs, said, grid, used)
    sentence = (
        f"{order.share.value:.0%} of {counted(order.count, 'pair')} of networks that differ beyond noise under "
        f"one sampler have the same order under another ({joined(samplers)}; interval {order.share.low:.0%} to "
        f"{order.share.high:.0%}; above {limits.SAME_ORDER:.0%} holds)"
    )
    judged = Judged("share of pairs in the same order", order.share, limits.SAME_ORDER, above=True)
    return quality_verdict(claim, judged, sentence, said, grid, used, order.decided_by)


def _order_grid(
    world: ClosedWorld,
    metric: QualityMetric,
    cells: Mapping[str, Cells],
    figures: Mapping[str, FigureTable],
    pairs: Sequence[NetworkPair],
) -> Grid:
    """By step count: the networks under each sampler, the best first, and who wins at the FLOPs of the largest."""
    rows = {sampler: _by_budget(world, cells[sampler], metric) for sampler in figures}
    networks = {
        steps: [n for n in world.networks if any(p[0] == steps and n in p for p in pairs)] for steps, *_ in pairs
    }
    lines = []
    for steps in sorted(networks.keys() | {steps for of in rows.values() for steps in of}):
        line = [str(steps)]
        for sampler, of in figures.items():
            names = networks.get(steps, [])
            order = [name for _, name in sorted((of[name, steps].number, name) for name in names)]
            row = rows[sampler].get(steps)
            winner = MISSING if row is None else f"{row.winner.cell.network} with {row.winner.cell.steps}"
            line += [", ".join(order) or MISSING, winner]
        lines.append(tuple(line))
    named = [(f"best first, {sampler}", f"wins at that budget, {sampler}") for sampler in figures]
    headings = ("steps", *(heading for pair in named for heading in pair))
    return Grid(headings, tuple(lines), headings[1:])


def _by_budget(world: ClosedWorld, cells: Cells, metric: QualityMetric) -> dict[int, BudgetRow]:
    return {row.steps: row for row in budget_rows(world, cells, FlopBudget(), metric)}


def quality_scales(claim: Claim, worlds: Sequence[ClosedWorld], shown: Overview) -> list[Verdict]:
    """The slope of quality over training compute, across networks at the most steps that all have."""
    found = []
    for world in worlds:
        for sampler in world.samplers:
            cells = world.cells(sampler)
            for metric in QUALITY_METRICS:
                at = _at_most_steps(cells, metric)
                if len(at) > 1:
                    found.append(_scaling(claim, world, sampler, metric, at))
    return found


def _at_most_steps(cells: Cells, metric: QualityMetric) -> dict[str, tuple[QualityCell, float, PooledFigure]]:
    """Cell, training GFLOP and figure of each network at the most steps that all of these have."""
    having = {
        name: {
            steps: (cell, gflop, figure)
            for steps, cell in of.items()
            if (gflop := _training_gflop(cell)) and (figure := metric.figure(cell)) is not None
        }
        for name, of in cells.items()
    }
    having = {name: of for name, of in having.items() if of}
    shared = set.intersection(*map(set, having.values())) if having else set()
    return {name: of[max(shared)] for name, of in having.items()} if shared else {}


def _training_gflop(cell: QualityCell) -> float | None:
    known = [record.training_gflop for record in cell.records if record.training_gflop]
    return math.fsum(known) / len(known) if len(known) == len(cell.records) else None


def _slope_of(gflops: Sequence[float]) -> Callable[..., Any]:
    """Of a metric's numbers over the logarithm of these."""
    xs = [math.log(gflop) for gflop in gflops]

    def slope(*numbers: Any) -> Any:
        return least_squares(xs, numbers, [1.0] * len(xs))[0]

    return slope


def _scaling(
    claim: Claim,
    world: ClosedWorld,
    sampler: str,
    metric: QualityMetric,
    at: Mapping[str, tuple[QualityCell, float, PooledFigure]],
) -> Verdict:
    from scipy import stats

    said = conditions_of(world, sampler, metric)
    cells, gflops, figures = (list(column) for column in zip(*at.values(), strict=True))
    steps = cells[0].steps
    rows = []
    for name, (_, gflop, figure) in at.items():
        own = _own_slope(world, name, sampler, steps, metric)
        told = MISSING if own is None else f"{own.value:.3g} ({interval_text(own)})"
        rows.append((name, number(gflop), figure_text(figure), told))
    if (real := world.real(metric)) is not None:
        rows.append(("real samples", MISSING, f"{real:.4g}", MISSING))
    headings = ("network", "training GFLOP", metric.name, "slope over its own training")
    grid = Grid(headings, tuple(rows), ("network",)).without_empty()
    if len(set(gflops)) < limits.FEWEST_NETWORKS:
        needs = f"{limits.FEWEST_NETWORKS} networks of different training compute with {counted(steps, 'step')}"
        return unmeasured_quality(claim, needs, said, grid, cells)
    found = contrast(figures, _slope_of(gflops))
    numbers = [figure.number for figure in figures]
    rank = float(stats.spearmanr(gflops, numbers).statistic) if len(set(numbers)) > 1 else math.nan
    if metric.scale is LOGARITHM:
        change = f"goes as training compute to the power of {found.value:.3g}"
    else:
        change = f"changes by {found.value:.3g} when training compute grows by a factor of e,"
    correlation = f"rank correlation {rank:.2f}" if math.isfinite(rank) else "no rank correlation"
    sentence = (
        f"at {counted(steps, 'step')} the {metric.name} {change} over {counted(len(at), 'network')} "
        f"(interval {interval_text(found)}; below 0 more compute is better; {correlation})"
    )
    judged = Judged("slope over the log of training compute", found, 0.0)
    return quality_verdict(claim, judged, sentence, said, grid, cells, figures)


def _own_slope(
    world: ClosedWorld, network: str, sampler: str, steps: int, metric: QualityMetric
) -> Interval | None:
    """Of one network over its own training; null with fewer than two lengths of it."""
    points = [
        (gflop, figure)
        for cell in world.trainings(network, sampler, steps).values()
        if (gflop := _training_gflop(cell)) and (figure := metric.figure(cell)) is not None
    ]
    if len({gflop for gflop, _ in points}) < 2:
        return None
    return contrast([figure for _, figure in points], _slope_of([gflop for gflop, _ in points]))

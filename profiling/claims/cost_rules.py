"""Cost beside what FLOPs say: over sizes (time, energy) and over steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..figures.derived import Overview, Row, alike, names_by_size, ratio, step_samples
from ..figures.lines import fit_line, least_squares
from ..figures.text import short_ratio, times
from ..measure.intervals import FEWEST, Interval, each_of, extreme_interval, medians_interval, ratio_interval
from ..paper import paper_sizes
from ..terminal.layout import MISSING, Grid, number
from . import limits
from .catalogue import Claim
from .trajectory_cost import by_conditions
from .verdict import Evidence, Judged, Verdict, interval_text


def cost_proportional(claim: Claim, shown: Overview) -> list[Verdict]:
    """Times over that of the 866M (of the largest size measured, where it is not there) beside the paper's."""
    found = []
    for group in by_conditions(shown.rows):
        sizes = {row.name: row for row in group if row.name in paper_sizes() and row.record.evaluations}
        names = names_by_size(sizes.values())
        if len(names) > 1:
            found.append(_cost_verdict(claim, [sizes[name] for name in names], shown))
    return found


def _cost_verdict(claim: Claim, rows: list[Row], shown: Overview) -> Verdict:
    reference = next((row for row in rows if row.name == limits.REFERENCE), rows[-1])
    others = [row for row in rows if row is not reference]
    together = each_of(len(others))
    cells, factors = [], {}
    for row in rows:
        here = ratio(row.record.ms_per_step, reference.record.ms_per_step)
        paper = paper_ratio(row.name, reference.name)
        spread = ratio_interval(step_samples(row), step_samples(reference), together)
        if row is not reference and spread is not None and spread.low > 0:
            factors[row.name] = off_by(spread, *paper_ratio_range(row.name, reference.name))
        cells.append(
            (
                row.name,
                number(row.record.ms_per_step),
                short_ratio(here),
                MISSING if row is reference or spread is None else interval_text(spread),
                short_ratio(paper),
                times(ratio(here, paper)),
                times(factors[row.name].value) if row.name in factors else MISSING,
            )
        )
    headings = (
        *("size", "ms per step", f"over {reference.name}", "interval", "in the paper", "here over paper"),
        "beyond its rounding",
    )
    grid = Grid(headings, tuple(cells), ("size",))
    evidence = Evidence(claim, rows, shown.environments, grid, [row.name for row in rows])
    if len(factors) < len(others):
        return evidence.decided(None, "")
    judged = Judged("worst factor off", extreme_interval(max, list(factors.values())), limits.COST_FACTOR)
    return evidence.decided(judged, _cost_sentence(judged, factors, rows, reference))


def _cost_sentence(judged: Judged, factors: dict[str, Interval], rows: list[Row], reference: Row) -> str:
    worst = max((row for row in rows if row.name in factors), key=lambda row: factors[row.name].value)
    here = ratio(worst.record.ms_per_step, reference.record.ms_per_step)
    paper = paper_ratio(worst.name, reference.name)
    mean = sum(factor.value for factor in factors.values()) / len(factors)
    stands_in = reference.name != limits.REFERENCE
    return (
        f"a step of the {worst.name} takes {short_ratio(here)} of the {reference.name}'s time, where the paper's "
        f"cost says {short_ratio(paper)}; beyond what the cost's rounding allows this is off by a factor of "
        f"{short_ratio(judged.interval.value)}, the worst of the sizes (interval "
        f"{interval_text(judged.interval)}; up to {limits.COST_FACTOR:.2f} holds), and {short_ratio(mean)} in the "
        f"mean{f'; the {limits.REFERENCE}, whose cost is 1 in the paper, has no time here' if stands_in else ''}"
    )


def paper_ratio(name: str, reference: str) -> float:
    """The paper's normalized cost of a size over another's."""
    return paper_sizes()[name].normalized_cost / paper_sizes()[reference].normalized_cost


def paper_ratio_range(name: str, reference: str) -> tuple[float, float]:
    """The least and the largest ratio that the paper's two decimals allow."""
    (low, high), (least, most) = (
        (cost - half, cost + half)
        for size in (name, reference)
        for cost, half in [
            (paper_sizes()[size].normalized_cost, 0.0 if size == limits.REFERENCE else limits.ROUNDING)
        ]
    )
    return low / most, high / least


def off_by(here: Interval, low: float, high: float) -> Interval:
    """The factor by which a positive number lies outside of a range; 1 inside."""

    def factor(value: float) -> float:
        return max(value / high, low / value, 1.0)

    ends = factor(here.low), factor(here.high)
    is_inside = here.low <= high and here.high >= low
    return Interval(1.0 if is_inside else min(ends), factor(here.value), max(ends), here.confidence)


def magnitude(here: Interval) -> Interval:
    """The number without its sign."""
    ends = abs(here.low), abs(here.high)
    low = 0.0 if here.low <= 0 <= here.high else min(ends)
    return Interval(low, abs(here.value), max(ends), here.confidence)


def steps_linear(claim: Claim, shown: Overview) -> list[Verdict]:
    """Lines of wall ms over evaluations, with the distance of the times from them, for each network."""
    found = []
    for group in by_conditions(shown.rows, "steps"):
        series = {
            rows[0].name: sorted(rows, key=lambda row: row.record.evaluations or 0)
            for rows in alike(group, "steps")
            if len({row.record.evaluations for row in rows}) >= limits.FEWEST_STEP_COUNTS
        }
        if series:
            found.append(_line_verdict(claim, {n: series[n] for n in names_by_size(group) if n in series}, shown))
    return found


def _line_verdict(claim: Claim, series: dict[str, list[Row]], shown: Overview) -> Verdict:
    rows = [row for of in series.values() for row in of]
    together = each_of(len(rows))
    cells, distances, fixed = [], {}, {}
    for name, of in series.items():
        xs = [row.record.evaluations or 0 for row in of]
        walls = [row.record.wall_ms for row in of if row.record.wall_ms is not None]
        line = fit_line(zip(xs, (wall.p50 for wall in walls), strict=True), relative=True)
        assert line is not None
        if (distance := _distance(xs, [wall.samples for wall in walls], together)) is not None:
            distances[name] = distance
        # Rounding leaves a little of a fixed part of zero.
        fixed_ms = 0.0 if abs(line.intercept) < 1e-9 * abs(line.slope) else line.intercept
        fixed[name] = ratio(fixed_ms, line.slope)
        cells.append(
            (
                name,
                ", ".join(map(str, xs)),
                number(line.slope),
                number(fixed_ms),
                short_ratio(fixed[name]),
                MISSING if line.r2 is None else f"{line.r2:.5f}",
                f"{distances[name].value:.1%}" if name in distances else MISSING,
            )
        )
    headings = ("size", "steps", "ms per step", "fixed ms", "fixed in steps", "R²", "farthest from the line")
    evidence = Evidence(
        claim, rows, shown.environments, Grid(headings, tuple(cells), ("size", "steps")), list(series)
    )
    if len(distances) < len(series):
        return evidence.decided(None, "")
    judged = Judged(
        "farthest from the line", extreme_interval(max, list(distances.values())), limits.LINE_DEVIATION
    )
    name = max(distances, key=lambda name: distances[name].value)
    steps = sorted({row.record.evaluations or 0 for row in rows})
    parts = [value for value in fixed.values() if value is not None]
    return evidence.decided(
        judged,
        f"times of {steps[0]} to {steps[-1]} steps lie within {judged.interval.value:.1%} of a line over the "
        f"steps, farthest with the {name} (interval {interval_text(judged.interval, '{:.1%}')}; up to "
        f"{limits.LINE_DEVIATION:.0%} holds); the line starts at a fixed part as long as {_range(parts)} steps, "
        "of which the paper's cost has none",
    )


def _distance(xs: Sequence[float], samples: Sequence[Sequence[float]], confidence: float) -> Interval | None:
    """How far the farthest of the medians lies from their line; null where a time may be zero."""
    found = []
    for place in range(len(xs)):
        of_place = medians_interval(samples, lambda *ys, at=place: line_deviations(xs, ys)[at], confidence)
        if of_place is None:
            return None
        found.append(magnitude(of_place))
    return extreme_interval(max, found, confidence)


def line_deviations(xs: Sequence[float], ys: Sequence[Any]) -> list[Any]:
    """How far the line (`fit_line`, relative) is above each time, as a share of it; of arrays elementwise."""
    slope, intercept = least_squares(xs, ys, [(ys[0] / y) ** 2 for y in ys])
    return [(intercept + slope * x - y) / y for x, y in zip(xs, ys, strict=True)]


def _range(values: Sequence[float]) -> str:
    if not values:
        return MISSING
    low, high = short_ratio(min(values)), short_ratio(max(values))
    return low if low == high else f"{low} to {high}"


def energy_proportional(claim: Claim, shown: Overview) -> list[Verdict]:
    """Joules of a step over GFLOP of a forward, size by size: the line's R2, and the smallest over the largest."""
    found = []
    for group in by_conditions(shown.rows):
        sizes = {row.name: row for row in group if _has_energy(row)}
        rows = [sizes[name] for name in names_by_size(sizes.values())]
        if len(rows) >= limits.FEWEST_ENERGIES:
            found.append(_energy_verdict(claim, rows, shown))
    return found


def _has_energy(row: Row) -> bool:
    energy = row.record.energy
    is_known = energy is not None and energy.relative_error is not None
    return bool(is_known and row.record.joules_per_step and row.record.gflop_per_forward)


def _energy_verdict(claim: Claim, rows: list[Row], shown: Overview) -> Verdict:
    base = rows[-1]
    joules = {row.name: row.record.joules_per_step or 0.0 for row in rows}
    gflop = {row.name: row.record.gflop_per_forward or 0.0 for row in rows}
    line = fit_line((gflop[name], joules[name]) for name in joules)
    smallest = rows[0]
    here, flops = joules[smallest.name] / joules[base.name], gflop[smallest.name] / gflop[base.name]
    energies = [row.record.energy for row in (smallest, base)]
    # The counter tells each energy to within the moments of its first and last update.
    error = math.prod(1 + (0.0 if energy is None else energy.relative_error or 0.0) for energy in energies)
    factor = off_by(Interval(here / error, here, here * error, 1.0), flops, flops)
    judged = Judged("smallest size, factor off", factor, limits.COST_FACTOR)
    r2 = None if line is None else line.r2
    headings = ("size", "joules per step", f"over {base.name}", "GFLOP ratio", "here over FLOPs")
    cells = [
        (
            name,
            number(joules[name]),
            short_ratio(joules[name] / joules[base.name]),
            short_ratio(gflop[name] / gflop[base.name]),
            times(ratio(joules[name] / joules[base.name], gflop[name] / gflop[base.name])),
        )
        for name in joules
    ]
    sentence = (
        f"a step of the {smallest.name} takes {short_ratio(here)} of the {base.name}'s joules where FLOPs say "
        f"{short_ratio(flops)}: off by {times(factor.value)} ({interval_text(factor)} within the counter's "
        f"error; up to {limits.COST_FACTOR:.2f}x holds); R² of joules over FLOPs is {_r2(r2)} (above "
        f"{limits.ENERGY_R2:g} holds)"
    )
    evidence = Evidence(claim, rows, shown.environments, Grid(headings, tuple(cells), ("size",)), list(joules))
    # Its interval does not come from samples.
    verdict = evidence.decided(judged, sentence, samples=FEWEST)
    # Where the line explains less than its source says, it does not matter what the smallest size does.
    is_predicted = r2 is None or r2 > limits.ENERGY_R2
    return verdict if is_predicted else replace(verdict, finding="does not hold")


def _r2(value: float | None) -> str:
    return MISSING if value is None else f"{value:.3f}"

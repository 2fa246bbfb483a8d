"""Cost beside what FLOPs say: over sizes (time, energy) and over steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..figures.derived import Overview, Row, alike, names_by_size, ratio
from ..figures.lines import fit_line, least_squares
from ..figures.text import short_ratio, times
from ..measure.intervals import FEWEST, Interval, medians_interval, ratio_interval
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
    ranges = [paper_ratio_range(row.name, reference.name) for row in others]

    def worst(base: Any, *medians: Any) -> Any:
        return largest([off_by(m / base, *ends) for m, ends in zip(medians, ranges, strict=True)])

    interval = medians_interval([step_samples(row) for row in (reference, *others)], worst)
    cells, factors = [], {}
    for row in rows:
        here = ratio(row.record.ms_per_step, reference.record.ms_per_step)
        paper = paper_ratio(row.name, reference.name)
        spread = ratio_interval(step_samples(row), step_samples(reference))
        if row is not reference and here is not None:
            factors[row.name] = (float(off_by(here, *paper_ratio_range(row.name, reference.name))), here, paper)
        cells.append(
            (
                row.name,
                number(row.record.ms_per_step),
                short_ratio(here),
                MISSING if row is reference or spread is None else interval_text(spread),
                short_ratio(paper),
                times(ratio(here, paper)),
                times(factors[row.name][0]) if row.name in factors else MISSING,
            )
        )
    headings = (
        *("size", "ms per step", f"over {reference.name}", "interval", "in the paper", "here over paper"),
        "beyond rounding",
    )
    grid = Grid(headings, tuple(cells), ("size",))
    judged = None if interval is None else Judged("worst factor off", interval, limits.COST_FACTOR)
    evidence = Evidence(claim, rows, shown.environments, grid, [row.name for row in rows])
    return evidence.decided(judged, _cost_sentence(judged, factors, reference.name))


def _cost_sentence(judged: Judged | None, factors: dict[str, tuple[float, float, float]], reference: str) -> str:
    if judged is None:
        return ""
    name, (worst, here, paper) = max(factors.items(), key=lambda item: item[1][0])
    mean = sum(factor for factor, _, _ in factors.values()) / len(factors)
    return (
        f"a step of the {name} takes {short_ratio(here)} of the {reference}'s time where the paper's cost says "
        f"{short_ratio(paper)}: off by {times(worst)} beyond rounding, {times(mean)} in the mean (interval of the "
        f"worst {interval_text(judged.interval)}, at most {limits.COST_FACTOR:.2f} holds)"
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


def off_by(value: Any, low: float, high: float) -> Any:
    """The factor by which values lie outside a range, 1 inside; of numbers, or of arrays elementwise."""
    import numpy

    return numpy.maximum(numpy.maximum(value / high, low / value), 1.0)


def largest(values: Sequence[Any]) -> Any:
    """The largest value of several, elementwise."""
    import numpy

    return numpy.maximum.reduce(values)


def step_samples(row: Row) -> list[float]:
    """Wall ms of a model evaluation, sample by sample."""
    wall, evaluations = row.record.wall_ms, row.record.evaluations or 1
    return [] if wall is None else [ms / evaluations for ms in wall.samples]


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
    counts = [[row.record.evaluations or 0 for row in of] for of in series.values()]

    def worst(*medians: Any) -> Any:
        rest, found = list(medians), []
        for xs in counts:
            found.append(line_deviation(xs, rest[: len(xs)]))
            rest = rest[len(xs) :]
        return largest(found)

    samples = [list(row.record.wall_ms.samples) for row in rows if row.record.wall_ms is not None]
    interval = medians_interval(samples, worst)
    cells, deviations, fixed = [], {}, {}
    for (name, of), xs in zip(series.items(), counts, strict=True):
        ys = [row.record.wall_ms.p50 for row in of if row.record.wall_ms is not None]
        line = fit_line(zip(xs, ys, strict=True), relative=True)
        assert line is not None
        if min(ys) > 0:
            pairs = zip(xs, ys, strict=True)
            deviations[name] = max(abs(line.intercept + line.slope * x - y) / y for x, y in pairs)
        fixed[name] = ratio(line.intercept, line.slope)
        cells.append(
            (
                name,
                ", ".join(map(str, xs)),
                number(line.slope),
                number(line.intercept),
                short_ratio(fixed[name]),
                MISSING if line.r2 is None else f"{line.r2:.5f}",
                f"{deviations[name]:.1%}" if name in deviations else MISSING,
            )
        )
    headings = ("size", "steps", "ms per step", "fixed ms", "fixed in steps", "R²", "farthest from the line")
    judged = None if interval is None else Judged("farthest from the line", interval, limits.LINE_DEVIATION)
    sentence = ""
    if judged is not None:
        name = max(deviations, key=lambda name: deviations[name])
        parts = [value for value in fixed.values() if value is not None]
        sentence = (
            f"times lie within {judged.interval.value:.1%} of a line over the steps, farthest with the {name} "
            f"(interval {interval_text(judged.interval, '{:.1%}')}, at most {limits.LINE_DEVIATION:.0%} holds); "
            f"the paper's cost has no fixed part, the line one of {_range(parts)} steps"
        )
    grid = Grid(headings, tuple(cells), ("size", "steps"))
    return Evidence(claim, rows, shown.environments, grid, list(series)).decided(judged, sentence)


def line_deviation(xs: Sequence[float], ys: Sequence[Any]) -> Any:
    """The farthest that times lie from their line (`fit_line`, relative), as a share; of arrays elementwise."""
    slope, intercept = least_squares(xs, ys, [(ys[0] / y) ** 2 for y in ys])
    return largest([abs(intercept + slope * x - y) / y for x, y in zip(xs, ys, strict=True)])


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
    factors = [float(off_by(share, flops, flops)) for share in (here / error, here, here * error)]
    low = 1.0 if here / error <= flops <= here * error else min(factors)
    judged = Judged("smallest size, factor off", Interval(low, factors[1], max(factors), 1.0), limits.COST_FACTOR)
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
        f"{short_ratio(flops)}: off by {times(factors[1])} ({interval_text(judged.interval)} within the counter's "
        f"error, at most {limits.COST_FACTOR:.2f} holds); R² of joules over FLOPs is {_r2(r2)}"
    )
    evidence = Evidence(claim, rows, shown.environments, Grid(headings, tuple(cells), ("size",)), list(joules))
    # Its interval does not come from samples.
    verdict = evidence.decided(judged, sentence, samples=FEWEST)
    # Where the line explains less than its source says, it does not matter what the smallest size does.
    is_predicted = r2 is None or r2 > limits.ENERGY_R2
    return verdict if is_predicted else replace(verdict, finding="does not hold")


def _r2(value: float | None) -> str:
    return MISSING if value is None else f"{value:.3f}"

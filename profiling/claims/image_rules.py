"""What an image costs: by 50 steps of DDIM, and by a generator of another kind."""

from __future__ import annotations

from collections.abc import Sequence

from ..figures.beside import conditions_of_both, ends_with, ms_to_image, parameters_apart
from ..figures.derived import Overview, Row, alike, ratio
from ..figures.text import count, joined, times
from ..measure.intervals import Interval, each_of, extreme_interval, median_interval, medians_interval
from ..paper import paper_sizes
from ..rivals.rival import KINDS
from ..terminal.layout import MISSING, Grid, number
from ..terminal.visible import counted
from . import limits
from .catalogue import Claim
from .trajectory_cost import TrajectoryCost, by_conditions, costs_by_size
from .verdict import Evidence, Judged, Verdict, interval_text


def ddim50_slow(claim: Claim, shown: Overview) -> list[Verdict]:
    """Ms per image of 50 steps, size by size. Slow is judged, by the wait for a batch; high quality is not."""
    steps, found = limits.RELAXED_STEPS, []
    for group in by_conditions(shown.rows, "steps"):
        rows = [row for row in group if row.case.sampler == "ddim" and row.case.task == "t2i"]
        costs = costs_by_size(rows)
        if costs:
            found.append(_slow_verdict(claim, [row for row in rows if row.name in costs], costs, steps, shown))
    return found


def _slow_verdict(
    claim: Claim, rows: list[Row], costs: dict[str, TrajectoryCost], steps: int, shown: Overview
) -> Verdict:
    batch = rows[0].case.batch
    cells, judged = [], {}
    for name, cost in costs.items():
        ms, measured = cost.ms(steps) / batch, _at(cost, steps)
        # A shorter trajectory that is slow alone is enough: more steps do not take less. Others say nothing.
        shorter = [
            row for row in cost.rows if (row.record.evaluations or 0) < steps and _wait(row) > limits.SLOW_MS
        ]
        if measured is not None or shorter:
            judged[name] = measured or max(shorter, key=_wait)
        cells.append(
            (
                name,
                number(ms),
                "measured" if measured is not None else "predicted",
                number(ratio(1e3, ms)),
                number(None if measured is None else ratio(1.0, measured.record.joules_per_image)),
                f"{paper_sizes()[name].fid:.2f}" if name in paper_sizes() else MISSING,
            )
        )
    headings = ("size", f"ms per image, {steps} steps", "by", "images per s", "images per joule", "paper's FID")
    grid = Grid(headings, tuple(cells), ("size", "by")).without_empty()
    unknown = [name for name in costs if name not in judged]
    needed = (
        f"{steps} steps of DDIM, or fewer that take above {limits.SLOW_MS:.0f} ms alone, of "
        f"{joined(unknown)}; those measured predict {number(min(costs[name].ms(steps) for name in unknown))} ms"
        if unknown
        else ""
    )
    if not judged:
        return Evidence(claim, rows, shown.environments, grid, list(costs)).unmeasured(needed)
    # Slow means at every size: the shortest wait decides.
    together = each_of(len(judged))
    least = extreme_interval(min, [median_interval(_waits(row), together) for row in judged.values()])
    shortest = min(judged, key=lambda name: _wait(judged[name]))
    sentence = (
        f"an image{'' if batch == 1 else f' of a batch of {batch}'} is not there before {number(least.value)} ms, "
        f"{counted(judged[shortest].record.evaluations or 0, 'step')} of the {shortest}, the shortest wait "
        f"judged (interval {number(least.low)} to {number(least.high)}; above {limits.SLOW_MS:.0f} ms is slow); "
        "quality is not judged"
    )
    evidence = Evidence(claim, list(judged.values()), shown.environments, grid, list(judged))
    verdict = Judged("least ms until an image", least, limits.SLOW_MS, above=True)
    if unknown and verdict.finding != "does not hold":
        # A size that is not judged may be fast.
        return evidence.unmeasured(f"{needed}; of the others: {sentence}")
    return evidence.decided(verdict, sentence)


def _wait(row: Row) -> float:
    """Median ms until the images of a batch are there."""
    return 0.0 if row.record.wall_ms is None else row.record.wall_ms.p50


def _waits(row: Row) -> tuple[float, ...]:
    return () if row.record.wall_ms is None else tuple(row.record.wall_ms.samples)


def _at(cost: TrajectoryCost, steps: int) -> Row | None:
    return next((row for row in cost.rows if row.record.evaluations == steps), None)


def single_shot_cheaper(claim: Claim, shown: Overview) -> list[Verdict]:
    """Rivals, on the backend that is fastest for each, beside the size with the likest parameter count."""
    found = []
    rivals = [row for row in shown.rivals if row.record.wall_ms is not None]
    for group in by_conditions([row for row in shown.rows if row.case.task == "t2i"], "steps"):
        # Each at its best, as peers are.
        near = [
            min(of, key=_wait)
            for of in alike(rivals, "backend")
            if conditions_of_both(of[0]) == conditions_of_both(group[0])
        ]
        pairs = [
            (rival, row)
            for rival in sorted(near, key=lambda row: (row.name, row.case.backend))
            if (row := _likest(rival, group)) is not None
        ]
        paired = {rival.name for rival, _ in pairs}
        alone = sorted({rival.name for rival in near} - paired)
        if pairs:
            found.append(_rival_verdict(claim, pairs, alone, group, shown))
    return found


def _likest(rival: Row, family: Sequence[Row]) -> Row | None:
    """The size with the likest parameter count, at its most steps up to 50; null where none is alike."""
    alike_rows = [
        row
        for row in family
        if row.name in paper_sizes()
        and row.case.steps <= limits.RELAXED_STEPS
        and parameters_apart(rival, row) <= limits.LIKE_PARAMETERS
    ]
    return min(alike_rows, key=lambda row: (parameters_apart(rival, row), -row.case.steps), default=None)


def _rival_verdict(
    claim: Claim, pairs: list[tuple[Row, Row]], alone: Sequence[str], group: list[Row], shown: Overview
) -> Verdict:
    """Of rivals with the size likest to each; `alone`: the rivals that have none."""
    costs = {rows[0].name: TrajectoryCost.of(rows) for rows in alike(group, "steps")}
    rows = [row for pair in pairs for row in pair]
    is_decoded = all(_ms_to_image(row) is not None for row in rows)
    together = each_of(len(pairs))
    cells, ratios = [], []
    for rival, row in pairs:
        over = _ratio(_parts(rival, is_decoded), _parts(row, is_decoded), together)
        cost, ms = costs[row.name], rival.record.wall_ms.p50 if rival.record.wall_ms is not None else 0.0
        if over is not None:
            ratios.append((over, rival, row))
        cells.append(
            (
                rival.name,
                rival.case.backend,
                count(rival.record.parameters),
                number(rival.record.gflop_per_forward),
                f"{rival.record.evaluations}{_guided(rival)}",
                number(rival.record.ms_per_image),
                number(_ms_to_image(rival)),
                row.name,
                number(row.record.gflop_per_forward),
                f"{row.record.evaluations}{_guided(row)}",
                number(row.record.ms_per_image),
                number(_ms_to_image(row)),
                MISSING if over is None else times(over.value),
                MISSING if over is None else interval_text(over),
                number(None if cost is None else cost.steps_within(ms)),
            )
        )
    headings = (
        *("rival", "backend", "parameters", "GFLOP", "steps", "ms per image", "to an image", "size", "its GFLOP"),
        *("its steps", "its ms per image", "its ms to an image", "rival over size", "interval"),
        "steps that take as long",
    )
    grid = Grid(headings, tuple(cells), ("rival", "backend", "size")).without_empty()
    sizes = list(dict.fromkeys(row.name for _, row in pairs))
    evidence = Evidence(claim, rows, shown.environments, grid, sizes, place=[row for _, row in pairs])
    if len(ratios) < len(pairs):
        return evidence.decided(None, "")
    ordered = sorted(ratios, key=lambda item: item[0].value)
    told = joined(
        f"{times(over.value)} with {of.name} ({of.case.backend}{_guided(of)})" for over, of, _ in ordered
    )
    _, dearest, row = ordered[-1]
    judged = Judged("dearest rival over its size", extreme_interval(max, [item[0] for item in ordered]), 1.0)
    sentence = (
        f"the time of an image over that of the size of about as many parameters is {told}; the dearest, of "
        f"{_gflop(dearest)}, stands against {counted(row.record.evaluations or 0, 'step')} of the {row.name}, of "
        f"{_gflop(row)} each (interval {interval_text(judged.interval)}; up to 1 is cheaper); "
        f"decoders of latents and tokens are {'' if is_decoded else 'not '}counted; quality is not judged"
        f"{_left_out(pairs, alone)}"
    )
    if judged.finding != "holds" and (row.record.evaluations or 0) < limits.RELAXED_STEPS:
        # A rival that is dearer than few steps may be cheaper than 50.
        cost, steps, price = costs[row.name], limits.RELAXED_STEPS, ""
        if cost is not None:
            price = f", {number(cost.ms(steps) / row.case.batch)} ms per image{cost.label(steps)}"
        return evidence.unmeasured(f"{steps} steps of the {row.name}{price}: {sentence}")
    fewest = min(len(samples) for row in rows for samples in _parts(row, is_decoded))
    return evidence.decided(judged, sentence, samples=fewest)


def _gflop(row: Row) -> str:
    return f"{number(row.record.gflop_per_forward)} GFLOP a forward"


def _left_out(pairs: Sequence[tuple[Row, Row]], alone: Sequence[str]) -> str:
    """What the claim speaks of, or what was measured, that is not judged."""
    kinds = [kind for kind in KINDS if not any(rival.name.startswith(kind) for rival, _ in pairs)]
    said = f"; no {' and no '.join(kinds)} among them" if kinds else ""
    return said + (f"; no size of about as many parameters was measured for {joined(alone)}" if alone else "")


def _guided(row: Row) -> str:
    return " guided" if row.case.guided else ""


def _ms_to_image(row: Row) -> float | None:
    return ms_to_image(row.record, ends_with(row))


def _parts(row: Row, is_decoded: bool) -> list[list[float]]:
    """Wall ms per image, sample by sample: of the trajectory, and of the decoder where that is counted."""
    decoder = row.record.decoder_ms if is_decoded and ends_with(row) != "image" else None
    return [[ms / row.case.batch for ms in of.samples] for of in (row.record.wall_ms, decoder) if of is not None]


def _ratio(over: list[list[float]], under: list[list[float]], confidence: float) -> Interval | None:
    """The sum of medians over another sum of medians."""
    count = len(over)
    return medians_interval([*over, *under], lambda *m: sum(m[:count]) / sum(m[count:]), confidence)

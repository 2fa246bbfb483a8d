"""What an image costs: by 50 steps of DDIM, and by a generator of another kind."""

from __future__ import annotations

from collections.abc import Sequence

from ..figures.beside import conditions_beside, ends_with, ms_to_image
from ..figures.derived import Overview, Row, alike, ratio
from ..figures.text import count, times
from ..measure.intervals import medians_interval, ratio_interval
from ..paper import paper_sizes
from ..terminal.layout import MISSING, Grid, number
from ..terminal.visible import counted
from . import limits
from .catalogue import Claim
from .cost_rules import largest
from .trajectory_cost import TrajectoryCost, by_conditions, costs_by_size
from .verdict import Evidence, Judged, Verdict, interval_text


def ddim50_slow(claim: Claim, shown: Overview) -> list[Verdict]:
    """Ms per image of 50 steps, size by size. Slow is judged; high quality is the paper's, and is not."""
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
        shorter = [row for row in cost.rows if (row.record.evaluations or 0) < steps and _ms(row) > limits.SLOW_MS]
        if measured is not None or shorter:
            judged[name] = measured or max(shorter, key=_ms)
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
    if not judged:
        name = next(iter(costs))
        return Evidence(claim, rows, shown.environments, grid, list(costs)).unmeasured(
            f"{steps} steps of DDIM, or fewer that take above {limits.SLOW_MS:.0f} ms per image alone; those "
            f"measured predict {number(costs[name].ms(steps) / batch)} ms for the {name}"
        )
    # Slow means at every size: the fastest decides.
    least = medians_interval([_samples(row) for row in judged.values()], lambda *of: -largest([-ms for ms in of]))
    assert least is not None
    fastest = min(judged, key=lambda name: _ms(judged[name]))
    sentence = (
        f"no size judged takes less than {number(least.value)} ms per image "
        f"({counted(judged[fastest].record.evaluations or 0, 'step')} of the {fastest}; interval "
        f"{interval_text(least, '{:.4g}')}, above {limits.SLOW_MS:.0f} ms is slow); quality is not judged"
    )
    evidence = Evidence(claim, list(judged.values()), shown.environments, grid, list(judged))
    return evidence.decided(Judged("ms per image of the fastest", least, limits.SLOW_MS, above=True), sentence)


def _ms(row: Row) -> float:
    return row.record.ms_per_image or 0.0


def _at(cost: TrajectoryCost, steps: int) -> Row | None:
    return next((row for row in cost.rows if row.record.evaluations == steps), None)


def single_shot_cheaper(claim: Claim, shown: Overview) -> list[Verdict]:
    """Rivals beside the size with the likest parameter count, for each sampler and backend of the family."""
    found = []
    rivals = [row for row in shown.rivals if row.record.wall_ms is not None]
    for group in by_conditions([row for row in shown.rows if row.case.task == "t2i"], "steps"):
        near = [rival for rival in rivals if conditions_beside(rival) == conditions_beside(group[0])]
        pairs = [
            (rival, row)
            for rival in sorted(near, key=lambda row: (row.name, row.case.backend))
            if (row := _likest(rival, group)) is not None
        ]
        if pairs:
            found.append(_rival_verdict(claim, pairs, group, shown))
    return found


def _likest(rival: Row, family: Sequence[Row]) -> Row | None:
    """The size with the likest parameter count, at its most steps up to 50; null where none is alike."""
    own = rival.record.parameters

    def apart(row: Row) -> float:
        other = row.record.parameters
        return max(own / other, other / own) if own and other else float("inf")

    alike_rows = [
        row
        for row in family
        if row.name in paper_sizes()
        and row.case.steps <= limits.RELAXED_STEPS
        and apart(row) <= limits.LIKE_PARAMETERS
    ]
    return min(alike_rows, key=lambda row: (apart(row), -row.case.steps), default=None)


def _rival_verdict(claim: Claim, pairs: list[tuple[Row, Row]], group: list[Row], shown: Overview) -> Verdict:
    costs = {rows[0].name: TrajectoryCost.of(rows) for rows in alike(group, "steps")}
    cells, ratios = [], {}
    for rival, row in pairs:
        over = ratio_interval(_samples(rival), _samples(row))
        cost, ms = costs[row.name], rival.record.wall_ms.p50 if rival.record.wall_ms is not None else 0.0
        if over is not None:
            ratios[rival.name, rival.case.backend] = over
        cells.append(
            (
                rival.name,
                rival.case.backend,
                count(rival.record.parameters),
                str(rival.record.evaluations),
                number(rival.record.ms_per_image),
                row.name,
                str(row.record.evaluations),
                number(row.record.ms_per_image),
                number(ms_to_image(row.record, ends_with(row))),
                MISSING if over is None else times(over.value),
                MISSING if over is None else interval_text(over),
                number(None if cost is None else cost.steps_within(ms)),
            )
        )
    headings = (
        *("rival", "backend", "parameters", "steps", "ms per image", "size", "its steps", "its ms per image"),
        *("with the decoder", "rival over size", "interval", "steps that take as long"),
    )
    grid = Grid(headings, tuple(cells), ("rival", "backend", "size")).without_empty()
    rows = [row for pair in pairs for row in pair]
    sizes = list(dict.fromkeys(row.name for _, row in pairs))
    evidence = Evidence(claim, rows, shown.environments, grid, sizes)
    if not ratios:
        return evidence.decided(None, "")
    medians = [samples for rival, row in pairs for samples in (_samples(rival), _samples(row))]
    interval = medians_interval(medians, lambda *m: largest([a / b for a, b in zip(m[::2], m[1::2], strict=True)]))
    ordered = sorted(ratios.items(), key=lambda item: item[1].value)
    told = ", ".join(f"{times(over.value)} with {name} ({backend})" for (name, backend), over in ordered)
    row = next(row for rival, row in pairs if (rival.name, rival.case.backend) == ordered[-1][0])
    steps = counted(row.record.evaluations or 0, "step")
    sentence = (
        f"the time per image over that of the size with the likest parameter count is {told}; the dearest stands "
        f"against {steps} of the {row.name} (interval {interval_text(ordered[-1][1])}, at most 1 is cheaper); "
        "decoders of latents and tokens, and the parameters that equal quality takes, are left out"
    )
    judged = None if interval is None else Judged("dearest rival over its size", interval, 1.0)
    short = (row.record.evaluations or 0) < limits.RELAXED_STEPS
    if judged is not None and judged.finding != "holds" and short:
        # A rival that is dearer than few steps may be cheaper than 50.
        return evidence.unmeasured(f"{limits.RELAXED_STEPS} steps of the {row.name}: {sentence}")
    return evidence.decided(judged, sentence)


def _samples(row: Row) -> list[float]:
    """Wall ms per image, sample by sample."""
    wall = row.record.wall_ms
    return [] if wall is None else [ms / row.case.batch for ms in wall.samples]

"""The ladder: what each backend gains over the one before at each size, and what sizes cost on each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..figures import text
from ..figures.derived import PEER, Overview, Row, Section, names_by_size, ratio, rung_place, step_ms
from ..measure.conditions import marks
from ..step.groups import OTHER, Other, by_group
from ..step.launches import GROUPS, LaunchGroup
from ..terminal.layout import MISSING, Grid, formatted, number
from ..terminal.visible import visible
from ..trajectory.case import BESIDE, IDEAS
from .details import GIB, flags_cell, largest_error

# Fewer backends are told apart by the table of the run.
MIN_RUNGS = 3
LADDER_TITLE = "What each rung gains, at each size"
GROUPS_TITLE = "Where a step's device time goes: ms (launches)"
STARRED = "throttled, or beside another process on the GPU"
COSTS_TITLE = "Measured cost of a step relative to {}, beside the paper's"


@dataclass(frozen=True)
class Rung:
    """A backend's row; `gain` is the time of the rung it stands on, or beside, divided by its own."""

    row: Row
    gain: float | None


@dataclass(frozen=True)
class Ladder:
    """The rungs of one network under one set of conditions, from the peer's to all of ours."""

    section: Section
    name: str
    rungs: tuple[Rung, ...]


def ladders(shown: Overview) -> tuple[Ladder, ...]:
    """A ladder for each network that was tried on enough backends."""
    found = []
    for section in shown.sections:
        for name in names_by_size(section.rows):
            rows = sorted((row for row in section.rows if row.name == name), key=_place)
            if len(rows) >= MIN_RUNGS:
                found.append(Ladder(section, name, _rungs(rows)))
    return tuple(found)


def _place(row: Row) -> tuple[int, str]:
    """The rungs in their order; backends of others behind them."""
    return rung_place(row.case.backend), row.case.backend


def _rungs(rows: list[Row]) -> tuple[Rung, ...]:
    rungs = []
    before: float | None = None
    of_rungs: dict[str, float] = {}
    for row in rows:
        backend, own = row.record.case.backend, step_ms(row.record)
        compared = of_rungs.get(BESIDE[backend]) if backend in BESIDE else before
        rungs.append(Rung(row, ratio(compared, None if own is None else own.p50)))
        # An idea alone stands on the same rung as the other ideas do, and so does the next rung.
        if own is not None and backend not in IDEAS:
            before = of_rungs[backend] = own.p50
    return tuple(rungs)


def ladder_grid(shown: Overview) -> Grid:
    """A line for each rung of each ladder; a rung without a time says why."""
    columns: dict[str, Callable[[Rung], str]] = {
        "rung": lambda rung: visible(rung.row.case.backend),
        "ms per step": lambda rung: number(rung.row.record.ms_per_step),
        "gain over the rung before": lambda rung: text.times(rung.gain),
        f"gain over {PEER}": lambda rung: text.times(rung.row.times_faster),
        "launches per step": lambda rung: _launches(rung.row),
        "host gap": lambda rung: formatted(rung.row.record.host_gap, ".1%"),
        "peak memory GiB": lambda rung: number(ratio(rung.row.record.peak_memory_bytes, GIB)),
        "J per image": lambda rung: number(rung.row.record.joules_per_image),
        "relative RMS error": lambda rung: largest_error(rung.row.record),
        "flags": lambda rung: flags_cell(rung.row.record),
        "no time because": lambda rung: (
            MISSING if rung.row.record.wall_ms is not None else text.failure(rung.row.record)
        ),
    }
    rows = []
    for ladder in ladders(shown):
        size = visible(text.joined((ladder.name, shown.conditions.heading(ladder.section))))
        rows += [(size, *(cell(rung) for cell in columns.values())) for rung in ladder.rungs]
    return Grid(("size", *columns), tuple(rows), ("size", "rung", "flags", "no time because")).without_empty()


def groups_grid(shown: Overview) -> Grid:
    """Device time of a step by group of kernels, for every rung that was traced."""
    found = []
    for ladder in ladders(shown):
        size = visible(text.joined((ladder.name, shown.conditions.heading(ladder.section))))
        for rung in ladder.rungs:
            record = rung.row.record
            if (trace := record.trace) is not None and trace.step:
                backend = visible(rung.row.case.backend)
                found.append((size, backend, by_group(trace.step), flags_cell(record)))
    groups = [group for group in (*GROUPS, OTHER) if any(group in of for _, _, of, _ in found)]

    def cell(of: Mapping[LaunchGroup | Other, tuple[float, float]], group: LaunchGroup | Other) -> str:
        if group not in of:
            return MISSING
        launches, ms = of[group]
        return f"{number(ms)} ({launches:.0f})"

    rows = tuple((size, rung, *(cell(of, group) for group in groups), marked) for size, rung, of, marked in found)
    return Grid(("size", "rung", *groups, "flags"), rows, ("size", "rung", "flags")).without_empty()


def costs_title(shown: Overview) -> str:
    """Names what costs are relative to, and what a star means where there is one."""
    references = {row.reference for row in shown.rows if row.reference}
    title = COSTS_TITLE.format(references.pop() if len(references) == 1 else "the largest size of each rung")
    return title + (f" (* {STARRED})" if any(marks(row.record) for row in shown.timed) else "")


def costs_grid(shown: Overview) -> Grid:
    """The project's headline: measured cost beside the paper's, a row for each size, a column for each rung."""
    sections = list({id(ladder.section): ladder.section for ladder in ladders(shown)}.values())
    backends = sorted({row.case.backend: row for section in sections for row in section.rows}.values(), key=_place)
    names = [row.case.backend for row in backends]
    rows = []
    for section in sections:
        heading = shown.conditions.heading(section)
        for size in names_by_size(section.rows):
            cells = {row.case.backend: row for row in section.rows if row.name == size}
            on_paper = next((row.paper_cost for row in cells.values() if row.paper_cost is not None), None)
            rows.append(
                (
                    visible(text.joined((size, heading))),
                    text.short_ratio(on_paper),
                    *(_cost(cells.get(name)) for name in names),
                )
            )
    grid = Grid(("size", "the paper's", *map(visible, names)), tuple(rows), ("size",))
    # One size is 1 by definition.
    return grid if len({row[0] for row in rows}) > 1 else Grid(grid.headings, ())


def _cost(row: Row | None) -> str:
    """Starred where its time is flagged."""
    if row is None or row.cost is None:
        return MISSING
    return text.short_ratio(row.cost.p50) + ("*" if marks(row.record) else "")


def _launches(row: Row) -> str:
    trace = row.record.trace
    return MISSING if trace is None or trace.launches_per_step is None else str(trace.launches_per_step)

"""Many cases on the terminal in a screen: the headline, counts, failures, the fastest and the slowest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rich.console import Console

from ..compare.history import CaseHistory, History, HistoryPoint
from ..compare.side_by_side import SideBySide
from ..figures import text
from ..figures.derived import Overview, Row, names_by_size, rung_place
from ..figures.headline import Headline
from ..terminal.layout import MISSING, Grid, number
from ..terminal.visible import counted, say, say_wrapped, visible
from .notes import warnings
from .tables import print_grid

# With more the whole table is printed on request only.
MOST_CASES = 50
# Names of a list that are told.
_FEW = 5
_ENDS = 3


def print_summary(shown: Overview, console: Console) -> None:
    """What is shared, how many cases each size and backend has, failures, the fastest and slowest, warnings."""
    rows = shown.all_rows
    statuses = text.statuses_in_words(row.record.status for row in rows)
    say_wrapped(console, text.joined(shown.conditions.shared), "bold")
    say_wrapped(console, f"{counted(len(rows), 'case')}: {statuses}.")
    if varying := _varying(shown):
        say_wrapped(console, f"They differ in {varying}.")
    print_grid(console, "Cases of each size on each backend, and those without a time", counts_grid(rows))
    _print_failures(shown, console)
    say(console)
    timed = sorted((row for row in rows if row.record.ms_per_image is not None), key=_ms_per_image)
    for title, some in (("fastest", timed[:_ENDS]), ("slowest", timed[: -_ENDS - 1 : -1])):
        for row in some:
            say_wrapped(
                console, f"{title}: {number(_ms_per_image(row))} ms per image, {_named(row, shown)}", indent=2
            )
    say(console)
    for warning in warnings(shown):
        say_wrapped(console, f"Note: {warning}", "yellow")


def print_headline(found: Headline | None, console: Console) -> None:
    """The headline with its conditions and doubts; nothing where there is none."""
    if found is None:
        return
    say_wrapped(console, f"{found.sentence}.", "bold green")
    say_wrapped(console, f"  {found.conditions}.", "dim", indent=2)
    sure = [f"interval {found.certainty}"] if found.certainty else []
    if told := [*sure, *found.doubts]:
        say_wrapped(console, f"  {'; '.join(told)}.", "dim", indent=2)
    say(console)


def print_changes(over: History | None, compared: Sequence[SideBySide], console: Console) -> None:
    """What changed from commit to commit; nothing where all is of one commit."""
    if over is not None:
        steps = [point for series in over.series for point in series.points[1:]]
        verdicts = Counter(point.verdict for point in steps)
        told = text.joined(f"{count} {verdict}" for verdict, count in sorted(verdicts.items()))
        say(console)
        cases = counted(len(over.series), "case")
        say_wrapped(console, f"Over commits, {cases}, each step against the one before: {told}.", "bold")
        for series, point in over.changed[:_FEW]:
            say_wrapped(console, f"  {_change(series, point)}", indent=4)
        if len(over.changed) > _FEW:
            say(console, f"  and {len(over.changed) - _FEW} more")
    for one in compared:
        say_wrapped(console, f"{one.title}: {one.counts}.")


def counts_grid(rows: Sequence[Row]) -> Grid:
    """A row for each size, a column for each backend: "45", "45 (2 oom)"."""
    names = [*names_by_size(row for row in rows if row.case.task != "rival")]
    names += [name for name in dict.fromkeys(row.name for row in rows) if name not in names]
    backends = sorted({row.case.backend for row in rows}, key=lambda name: (rung_place(name), name))
    cells: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        cells.setdefault((row.name, row.case.backend), []).append(row)
    found = tuple(
        (visible(name), *(_count(cells.get((name, backend), [])) for backend in backends)) for name in names
    )
    return Grid(("size", *map(visible, backends)), found, ("size",))


def _count(rows: Sequence[Row]) -> str:
    if not rows:
        return MISSING
    without = Counter(row.record.status for row in rows if row.record.wall_ms is None)
    told = text.joined(f"{count} {status}" for status, count in sorted(without.items()))
    return f"{len(rows)} ({told})" if told else str(len(rows))


def _print_failures(shown: Overview, console: Console) -> None:
    failed = [row for row in shown.all_rows if row.record.wall_ms is None]
    if not failed:
        return
    say(console)
    for row in failed[:_FEW]:
        say_wrapped(console, f"{_named(row, shown)}: {text.failure(row.record)}", "red", indent=2)
    if len(failed) > _FEW:
        say(console, f"and {len(failed) - _FEW} more without a time", "red")


def _varying(shown: Overview) -> str:
    """The names of the conditions that vary, and how many values each has."""
    values: dict[str, set[object]] = {}
    for row in shown.all_rows:
        for name, value in row.case:
            values.setdefault(name, set()).add(value)
    values = {name: of for name, of in values.items() if len(of) > 1 and name not in ("unet", "weights_sha256")}
    named = [f"{name.replace('_', ' ')} ({len(of)})" for name, of in values.items()]
    environments = len(shown.environments)
    return text.joined([*named, *([f"environment ({environments})"] if environments > 1 else [])])


def _ms_per_image(row: Row) -> float:
    return row.record.ms_per_image or 0.0


def _named(row: Row, shown: Overview) -> str:
    return visible(text.joined((f"{row.name} {row.case.backend}", shown.conditions.heading(row))))


def _change(series: CaseHistory, point: HistoryPoint) -> str:
    ratio = "" if point.ratio is None else f" {text.times(point.ratio.value)} the time"
    return text.joined((f"{point.verdict}{ratio} at {point.commit}: {series.name}", series.machine))

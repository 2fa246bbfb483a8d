"""The columns of the table of a run, one definition for the terminal, markdown and the page."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..figures import text
from ..figures.derived import PEER, Overview, Row, decoder_share, step_ms
from ..measure.conditions import marks
from ..terminal.layout import MISSING, formatted, number
from ..terminal.visible import visible
from ..trajectory.records import Record
from .notes import notes, warnings


@dataclass(frozen=True)
class Column:
    """`heading` in two lines for narrow terminals; `cell` gives a row's text."""

    heading: tuple[str, str]
    cell: Callable[[Row], str]
    is_number: bool = True
    # Known without a time: a failed case shows these columns, and its status and message in place of the others.
    is_fact: bool = False

    @property
    def label(self) -> str:
        """The heading on one line."""
        first, second = self.heading
        return first.removesuffix("-") + second if first.endswith("-") else f"{first} {second}".strip()


@dataclass(frozen=True)
class Table:
    """Headings, and the rows of each section under the phrases that set the section apart."""

    columns: tuple[Column, ...]
    shared: tuple[str, ...]
    sections: tuple[tuple[str, tuple[Row, ...]], ...]
    notes: tuple[str, ...]
    warnings: tuple[str, ...]


def table_of(shown: Overview) -> Table:
    """The table of a record set, its conditions and the notes that it cannot be read without."""
    sections = tuple((shown.conditions.heading(section), section.rows) for section in shown.sections)
    return Table(_columns(shown), shown.conditions.shared, sections, notes(shown), warnings(shown))


def _columns(shown: Overview) -> tuple[Column, ...]:
    columns = [
        Column(("", "size"), lambda row: visible(row.name), is_number=False, is_fact=True),
        Column(("", "backend"), lambda row: visible(row.case.backend), is_number=False, is_fact=True),
        Column(("para-", "meters"), lambda row: text.count(row.record.parameters), is_fact=True),
        Column(("", "GFLOP"), lambda row: formatted(row.record.gflop_per_forward, ".1f"), is_fact=True),
        Column(("ms per", "step"), lambda row: number(row.record.ms_per_step)),
        Column(("ms per step", "p20..p80"), lambda row: _spread(row.record)),
        *_floor_columns(shown),
        Column(("ms per", "image"), lambda row: number(row.record.ms_per_image)),
        Column(("cost", "here"), lambda row: text.short_ratio(None if row.cost is None else row.cost.p50)),
        Column(("cost", "paper"), lambda row: text.short_ratio(row.paper_cost)),
    ]
    if any(row.gflop_ratio is not None for row in shown.rows):
        columns.append(Column(("GFLOP", "ratio"), lambda row: text.short_ratio(row.gflop_ratio)))
    if any(row.record.decoder_ms is not None for row in shown.rows):
        columns.append(Column(("decoder", "share"), lambda row: formatted(decoder_share(row.record), ".1%")))
    if any(row.case.backend == PEER for row in shown.rows):
        columns.append(Column(("times", "faster"), lambda row: text.times(row.times_faster)))
    if any(row.record.joules_per_image is not None for row in shown.rows):
        columns.append(Column(("J per", "image"), lambda row: number(row.record.joules_per_image)))
    if any(marks(row.record) for row in shown.timed):
        columns.append(Column(("", "flags"), lambda row: marks(row.record) or MISSING, is_number=False))
    return tuple(columns)


def _floor_columns(shown: Overview) -> tuple[Column, ...]:
    """The floor of a step, and how much of the time it is; none where no record has a floor."""
    if all(row.record.floor is None for row in shown.rows):
        return ()
    return (
        Column(
            ("floor ms", "per step"), lambda row: number(None if (f := row.record.floor) is None else f.step_ms)
        ),
        Column(("% of", "floor"), lambda row: formatted(row.record.percent_of_floor, ".0f")),
    )


def _spread(record: Record) -> str:
    spread = step_ms(record)
    return MISSING if spread is None else f"{number(spread.p20)}..{number(spread.p80)}"

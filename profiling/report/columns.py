"""The columns of the table of a run, one definition for the terminal, markdown and the page."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..measure.conditions import busy_notes, commit
from ..report import figures, text
from ..terminal.layout import number
from ..terminal.visible import counted, visible
from ..trajectory.records import Record
from .figures import Overview, Row

# Of the median, between p20 and p80: beyond this a comparison to two digits is not one.
WIDE_SPREAD = 0.1
# Samples: of fewer, quantiles tell no spread.
FEWEST = 3


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
    conditions = text.conditions(shown)
    sections = tuple((conditions.heading(s.environment, s.case), s.rows) for s in shown.sections)
    return Table(_columns(shown), conditions.shared, sections, _notes(shown), warnings(shown))


def warnings(shown: Overview) -> tuple[str, ...]:
    """What to know before the numbers: mixed environments, changed code, unsteady times, busy hosts."""
    found = []
    for index, environment in enumerate(shown.environments[1:], 1):
        differing = "; ".join(text.differences(shown.environments[0], environment))
        found.append(
            f"Environment {text.environment_name(index)} is not environment A ({differing}). "
            "Nothing is compared across environments."
        )
    dirty = sorted({commit(e) for e in shown.environments if e.git_dirty})
    if dirty:
        found.append(f"Measured on commit {', '.join(dirty)}: the commit alone does not say what ran.")
    cases = counted(len(shown.rows), "case")
    wide = [row for row in shown.rows if _is_wide(row.record)]
    if wide:
        heading = text.conditions(shown).heading
        names = text.joined(
            dict.fromkeys(
                " ".join(
                    filter(None, (row.name, row.record.case.backend, heading(row.environment, row.record.case)))
                )
                for row in wide
            )
        )
        found.append(
            f"Unsteady: p20 to p80 spans more than {WIDE_SPREAD:.0%} of the median in {len(wide)} of "
            f"{cases} ({visible(names)}); ratios of these are no better than that."
        )
    found += busy_notes([row.record for row in shown.rows], "case")
    timed = [row for row in shown.rows if row.record.wall_ms is not None]
    cut = [row for row in timed if row.record.harness.stopped_by is not None]
    few = [row for row in timed if row.record.wall_ms and row.record.wall_ms.n < FEWEST]
    if few:
        found.append(
            f"Fewer than {FEWEST} samples in {len(few)} of {cases}: their p20 to p80 says nothing of the spread; "
            "--min-count asks for more."
        )
    if cut:
        found.append(
            f"Cut short by --seconds: {len(cut)} of {cases} with fewer trajectories than "
            "were asked for (n in the details); --resume measures them again."
        )
    if shown.superseded:
        found.append(
            "Cases measured more than once: "
            f"{counted(shown.superseded, 'other record is', 'other records are')} not shown (those cut short, "
            "beside fewer backends, without a trace, or earlier)."
        )
    return tuple(found)


def _is_wide(record: Record) -> bool:
    wall = record.wall_ms
    return wall is not None and wall.p80 - wall.p20 > WIDE_SPREAD * wall.p50


def _columns(shown: Overview) -> tuple[Column, ...]:
    columns = [
        Column(("", "size"), lambda row: visible(row.name), is_number=False, is_fact=True),
        Column(("", "backend"), lambda row: visible(row.record.case.backend), is_number=False, is_fact=True),
        Column(("para-", "meters"), lambda row: text.count(row.record.parameters), is_fact=True),
        Column(("", "GFLOP"), lambda row: text.gflop(row.record.gflop_per_forward), is_fact=True),
        Column(("ms per", "step"), lambda row: number(row.record.ms_per_step)),
        Column(("ms per step", "p20..p80"), lambda row: _spread(row.record)),
        Column(("ms per", "image"), lambda row: number(row.record.ms_per_image)),
        Column(("images", "per s"), lambda row: number(figures.ratio(1e3, row.record.ms_per_image))),
        Column(("cost", "here"), lambda row: text.short_ratio(None if row.cost is None else row.cost.p50)),
        Column(("cost", "paper"), lambda row: text.short_ratio(row.paper_cost)),
    ]
    if any(row.gflop_ratio is not None for row in shown.rows):
        columns.append(Column(("GFLOP", "ratio"), lambda row: text.short_ratio(row.gflop_ratio)))
    if any(row.record.case.backend == figures.PEER for row in shown.rows):
        columns.append(Column(("times", "faster"), _times_faster))
    return tuple(columns)


def _spread(record: Record) -> str:
    spread = figures.step_ms(record)
    return text.MISSING if spread is None else f"{number(spread.p20)}..{number(spread.p80)}"


def _times_faster(row: Row) -> str:
    return text.MISSING if row.times_faster is None else f"{text.short_ratio(row.times_faster)}x"


def _notes(shown: Overview) -> tuple[str, ...]:
    rows = shown.rows
    if not rows:
        return ()
    references = list(dict.fromkeys(row.reference for row in rows if row.reference))
    notes = ["step: a model evaluation of the whole batch with its share of the sampler, wall clock, median"]
    if any(row.record.case.guided for row in rows):
        notes[0] += "; guidance doubles the batch inside it"
    notes.append("GFLOP: of one forward of one sample")
    if references:
        base = f"{references[0]}, the" if len(references) == 1 else "the row with 1.00, each backend's"
        notes.append(
            f"cost here: ms per step relative to {base} largest size measured; "
            "cost paper: the paper's normalized cost (FLOPs) relative to the same size"
        )
    if any(row.gflop_ratio is not None for row in rows):
        notes.append("GFLOP ratio: GFLOP relative to that size, for networks that the paper does not have")
    if any(row.record.case.backend == figures.PEER for row in rows):
        notes.append(
            f"times faster: the time of {figures.PEER} over that of the row's backend, same case and environment"
        )
    without = [row.record.status for row in rows if row.record.status != "ok"]
    if without:
        cases = counted(len(rows), "case")
        notes.append(f"{len(without)} of {cases} without a time: {text.statuses_in_words(without)}")
    return tuple(notes)

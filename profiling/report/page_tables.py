"""The tables of the page: each case in one row, what rungs gain, lines over steps, what claims stand on."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..claims.verdict import ClaimVerdicts
from ..figures import text
from ..figures.derived import Overview, Row, names_by_size
from ..terminal.layout import MISSING, Grid
from ..terminal.visible import visible
from .columns import table_of
from .details import cases_grid, lines_grid
from .fact_tables import Placing, coded
from .ladder import GROUPS_TITLE, LADDER_TITLE, costs_grid, costs_title, groups_grid, ladder_grid, ladders
from .pipelines_table import pipelines_grid, pipelines_title
from .rivals_table import RIVALS_TITLE, rivals_grid

# Rows that a page shows of a table unless asked for more.
FIRST_ROWS = 40
# What a condition is called, where that is not its name.
LABELS: Mapping[str, str] = {
    "device": "machine",
    "guidance_scale": "guidance",
    "context_tokens": "text tokens",
    "reference": "relative to",
}
_LINES = (
    "Lines through the medians with the least squares of relative deviations: time of a trajectory = slope x "
    "evaluations + fixed part."
)


def label_of(condition: str) -> str:
    """What a filter, a choice or a column calls a condition."""
    return LABELS.get(condition, condition.replace("_", " "))


@dataclass(frozen=True)
class PageTable:
    """A table that the page sorts, and shows the first rows of.

    cases   for each row the places of its cases in `Overview.rows`: it is shown where a filter leaves one of
            them; empty where rows are of no cases
    extra   the headings of columns that a screen shows when asked for
    """

    name: str
    caption: str
    grid: Grid
    cases: tuple[tuple[int, ...], ...] = ()
    extra: Collection[str] = ()

    @property
    def first(self) -> tuple[tuple[str, ...], ...]:
        """The rows that are in the page from the start."""
        return self.grid.rows[:FIRST_ROWS]

    @property
    def rest(self) -> dict[str, Any]:
        """For the page: the columns of the other rows, coded, and the cases of all rows."""
        columns = [coded(column) for column in zip(*self.grid.rows[FIRST_ROWS:], strict=True)]
        for column in columns:
            column["texts"] = [visible(text) for text in column["texts"]]
        return {"columns": columns, "cases": self.cases}


def tables_of(shown: Overview) -> tuple[PageTable, ...]:
    """Those of the cases, without the ones that have no rows."""
    place = {id(row.record): place for place, row in enumerate(shown.rows)}

    def places(rows: Iterable[Row]) -> tuple[int, ...]:
        return tuple(place[id(row.record)] for row in rows)

    found = ladders(shown)
    rungs = [rung.row for ladder in found for rung in ladder.rungs]
    traced = [row for row in rungs if row.record.trace is not None and row.record.trace.step]
    sections = {id(ladder.section): ladder.section for ladder in found}.values()
    sizes = [
        [row for row in section.rows if row.name == name]
        for section in sections
        for name in names_by_size(section.rows)
    ]
    tables = (
        _cases_table(shown),
        PageTable("costs", costs_title(shown), costs_grid(shown), tuple(map(places, sizes))),
        PageTable("rungs", LADDER_TITLE, ladder_grid(shown), tuple(places([row]) for row in rungs)),
        PageTable("groups", GROUPS_TITLE, groups_grid(shown), tuple(places([row]) for row in traced)),
        PageTable("lines", _LINES, lines_grid(shown), tuple(places(series.rows) for series in shown.series)),
    )
    return tuple(table for table in tables if table.grid.rows)


def _cases_table(shown: Overview) -> PageTable:
    """A row for each case of the family, failed ones too: conditions, cost and time, then all that was seen."""
    placing, details = Placing.of(shown), cases_grid(shown, shown.rows)
    # The details tell flags in full.
    columns = [column for column in table_of(shown).columns if column.label != "flags"]
    known = {"case", "conditions", "status", "J per image", *(column.label for column in columns)}
    places = [place for place, heading in enumerate(details.headings) if heading not in known]
    size, *others = columns
    rows = []
    for row, detail in zip(shown.rows, details.rows, strict=True):
        words, has_time = placing.words(row), row.record.wall_ms is not None
        rows.append(
            (
                size.cell(row),
                *(words[name] for name in placing.names),
                *(column.cell(row) if column.is_fact or has_time else MISSING for column in others),
                MISSING if has_time else text.failure(row.record),
                *(detail[place] for place in places),
            )
        )
    conditions = [label_of(name) for name in placing.names]
    of_details = [details.headings[place] for place in places]
    headings = (size.label, *conditions, *(column.label for column in others), "no time because", *of_details)
    words_in = (*(column.label for column in columns if not column.is_number), *conditions, "no time because")
    grid = Grid(headings, tuple(rows), (*words_in, *details.words)).without_empty()
    extra = {"environment", "parameters", "GFLOP", "ms per step p20..p80", *of_details} - {"images per s", "flags"}
    return PageTable("cases", "Every case", grid, tuple((place,) for place in range(len(rows))), extra)


def rivals_tables(shown: Overview) -> tuple[PageTable, ...]:
    """The rivals beside the family, and each of their cases with all that was seen."""
    return (
        PageTable("rivals", f"{RIVALS_TITLE}.", rivals_grid(shown)),
        PageTable("rivals-cases", "Every case of a rival, with its check.", cases_grid(shown, shown.rivals)),
    )


def pipelines_tables(shown: Overview) -> tuple[PageTable, ...]:
    """Pipelines by part, and each of their cases with all that was seen."""
    return (
        PageTable("pipelines", f"{pipelines_title(shown)}.", pipelines_grid(shown)),
        PageTable("pipelines-cases", "Every pipeline, with its check.", cases_grid(shown, shown.pipelines)),
    )


def claim_tables(of: ClaimVerdicts) -> tuple[PageTable, ...]:
    """The verdict under each set of conditions, and the figures behind them."""
    common = of.common
    verdicts = tuple(
        (_conditions(verdict.conditions, common), verdict.finding, verdict.sentence) for verdict in of.verdicts
    )
    grid = Grid(("conditions", "finding", "why"), verdicts, ("conditions", "finding", "why"))
    tables = [PageTable(f"claim-{of.claim.id}-verdicts", "The verdict under each set of conditions.", grid)]
    figures: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
    words: set[str] = {"conditions"}
    for verdict in of.verdicts:
        if verdict.figures is not None:
            place = _conditions(verdict.conditions, common)
            of_kind = figures.setdefault(verdict.figures.headings, [])
            of_kind += [(place, *row) for row in verdict.figures.rows]
            words |= {*verdict.figures.words}
    for number, (headings, rows) in enumerate(figures.items()):
        name = f"claim-{of.claim.id}-figures-{number}"
        grid = Grid(("conditions", *headings), tuple(rows), tuple(words))
        tables.append(PageTable(name, "The figures behind the verdicts.", grid))
    return tuple(tables)


def _conditions(conditions: Mapping[str, str], common: Mapping[str, str]) -> str:
    """Those that the reader does not know already."""
    return text.joined(phrase for name, phrase in conditions.items() if common.get(name) != phrase) or MISSING

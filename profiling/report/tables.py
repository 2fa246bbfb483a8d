"""The table of a run in the terminal and as markdown."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from rich.console import Console

from ..figures import text
from ..figures.derived import Overview, Row
from ..terminal.layout import MISSING, Grid, say_grid
from ..terminal.visible import for_markdown, say, say_wrapped
from .columns import Column, Table, table_of
from .ladder import GROUPS_TITLE, LADDER_TITLE, costs_grid, costs_title, groups_grid, ladder_grid
from .pipelines_table import PIPELINES_NOTE, pipelines_grid, pipelines_title
from .rivals_table import RIVALS_NOTE, RIVALS_TITLE, rivals_grid

NOTHING = "No cases were measured."


def print_table(shown: Overview, console: Console) -> None:
    """Prints the final table. No number is ever cut: lines are as long as the numbers need, plain where piped."""
    if not shown.all_rows:
        _print(console, NOTHING)
        return
    table = table_of(shown)
    if table.sections:
        _print_sections(console, table)
    for note in table.notes:
        say_wrapped(console, note, "dim")
    for warning in table.warnings:
        say_wrapped(console, f"Note: {warning}", "yellow")
    for title, grid, note in _grids(shown):
        print_grid(console, title, grid)
        if note:
            say_wrapped(console, note, "dim")


def _print_sections(console: Console, table: Table) -> None:
    say_wrapped(console, text.joined(table.shared), "bold")
    rows = [row for _, rows in table.sections for row in rows]
    widths = [
        max(*map(len, column.heading), *(len(column.cell(row)) for row in rows if _shows(column, row)))
        for column in table.columns
    ]
    # A narrow terminal gets narrower gaps; a pipe has no width to keep to.
    fits = not console.is_terminal or sum(widths) + 2 * (len(widths) - 1) <= console.width
    gap = "  " if fits else " "
    _print(console)
    for line in (0, 1):
        headings = [column.heading[line] for column in table.columns]
        _print(console, _line(headings, table.columns, widths, gap), "dim")
    for heading, rows_of_section in table.sections:
        if heading:
            _print(console)
            say_wrapped(console, heading, "bold cyan")
        for row in rows_of_section:
            _print_row(console, row, table, widths, gap)
    _print(console)


def markdown_table(shown: Overview) -> str:
    """The same figures as a GitHub markdown table, with the conditions above and the notes below."""
    if not shown.all_rows:
        return NOTHING + "\n"
    table = table_of(shown)
    words = ("conditions", *(column.label for column in table.columns if not column.is_number))
    headings = ("conditions", *(column.label for column in table.columns))
    rows = [(heading, *_cells(row, table.columns)) for heading, rows in table.sections for row in rows]
    if not any(heading for heading, _ in table.sections):
        headings, rows = headings[1:], [row[1:] for row in rows]
    lines = [for_markdown(text.joined(table.shared)) + "\n"] if table.shared else []
    lines += [*Grid(headings, tuple(rows), words).markdown(), ""] if rows else []
    lines += [f"- {for_markdown(note)}" for note in (*table.notes, *table.warnings)]
    for title, grid, note in _grids(shown):
        lines += ["", f"{for_markdown(title)}:", "", *grid.markdown()]
        lines += ["", for_markdown(note)] if note else []
    return "\n".join(lines) + "\n"


def _grids(shown: Overview) -> list[tuple[str, Grid, str]]:
    """Title, grid and note of pipelines, rivals and the ladder, where there is enough for one."""
    found = [
        (pipelines_title(shown), pipelines_grid(shown), PIPELINES_NOTE),
        (RIVALS_TITLE, rivals_grid(shown), RIVALS_NOTE),
        (LADDER_TITLE, ladder_grid(shown), ""),
        (GROUPS_TITLE, groups_grid(shown), ""),
        (costs_title(shown), costs_grid(shown), ""),
    ]
    return [(title, grid, note) for title, grid, note in found if grid.rows]


def print_grid(console: Console, title: str, grid: Grid) -> None:
    """A table under its title."""
    _print(console)
    say_wrapped(console, title, "bold")
    say_grid(console, grid, leading=2)


def _shows(column: Column, row: Row) -> bool:
    return column.is_fact or row.record.wall_ms is not None


def _cells(row: Row, columns: Sequence[Column]) -> list[str]:
    """A text per column; a failed case has its status and message in the first column that needs a time."""
    cells = [column.cell(row) if _shows(column, row) else MISSING for column in columns]
    if row.record.wall_ms is None:
        cells[[column.is_fact for column in columns].index(False)] = text.failure(row.record)
    return cells


def _print_row(console: Console, row: Row, table: Table, widths: Sequence[int], gap: str) -> None:
    if row.record.wall_ms is not None:
        _print(console, _line([column.cell(row) for column in table.columns], table.columns, widths, gap))
        return
    facts = [column for column in table.columns if column.is_fact]
    start = _line([column.cell(row) for column in facts], facts, widths, gap) + gap
    message = text.failure(row.record)
    indent = len(start)
    # Beside the facts while that leaves room to read it, else on the lines below them.
    if console.is_terminal and console.width - indent < min(30, len(message)):
        _print(console, start.rstrip())
        start, indent = "    ", 4
    width = console.width - indent if console.is_terminal else len(message)
    lines = textwrap.wrap(message, max(width, 20), break_on_hyphens=False) or [message]
    _print(console, start + lines[0], "red")
    for line in lines[1:]:
        _print(console, " " * indent + line, "red")


def _line(cells: Sequence[str], columns: Sequence[Column], widths: Sequence[int], gap: str) -> str:
    padded = (
        cell.rjust(width) if column.is_number else cell.ljust(width)
        for cell, column, width in zip(cells, columns, widths, strict=False)
    )
    return gap.join(padded)


def _print(console: Console, line: str = "", style: str = "") -> None:
    say(console, line.rstrip(), style)

"""Values as texts, and tables of texts as lines: columns where they fit the width, else a block for each row."""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from rich.console import Console

from .visible import for_markdown, say, visible, width_of

# In place of a value that is not there.
MISSING = "-"
_GAP = "  "
_BLOCK = " " * 4
# Columns that a message needs to stand beside its row; with fewer it stands below.
_ROOM = 30


@dataclass(frozen=True)
class Grid:
    """A table of texts; the first column heads its row, and the columns in `words` hold no numbers."""

    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: Collection[str] = ()

    def without_empty(self) -> Grid:
        """Without the columns that have no value in any row."""
        kept = [i for i in range(len(self.headings)) if any(row[i] != MISSING for row in self.rows)]
        rows = tuple(tuple(row[i] for i in kept) for row in self.rows)
        return Grid(tuple(self.headings[i] for i in kept), rows, self.words)

    def without_last(self) -> Grid:
        """Without the last column."""
        return Grid(self.headings[:-1], tuple(row[:-1] for row in self.rows), self.words)

    def markdown(self) -> list[str]:
        """The lines of a GitHub table."""
        rules = [":---" if heading in self.words else "---:" for heading in self.headings]
        head, *rows = ([for_markdown(cell) for cell in cells] for cells in (self.headings, *self.rows))
        return [f"| {' | '.join(cells)} |" for cells in (head, rules, *rows)]


@dataclass(frozen=True)
class LaidOut:
    """The line of headings, None where rows are blocks, and the lines of each row. No cell is ever cut."""

    head: str | None
    rows: tuple[tuple[str, ...], ...]

    @property
    def lines(self) -> list[str]:
        return [*([] if self.head is None else [self.head]), *(line for row in self.rows for line in row)]


def laid_out(
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    words: Collection[str] = (),
    width: int | None = None,
    leading: int = 1,
) -> LaidOut:
    """The rows, indented by two, in at most `width` columns; None is without limit.

    A row with fewer cells than there are headings has a message after its first `leading` cells. `words` are the
    headings of columns that hold no numbers. A column without a value in any row is left out. A block has the
    leading cells on its first line, then each other value as "heading value".
    """
    shown = [[visible(cell) for cell in row] for row in rows]
    whole = [row for row in shown if len(row) == len(headings)]
    kept = [i for i in range(len(headings)) if i < leading or any(row[i] != MISSING for row in whole)]
    names = [headings[i] for i in kept]
    sizes = [max(map(len, (headings[i], *(row[i] for row in (shown if i < leading else whole))))) for i in kept]

    def line(cells: Sequence[str]) -> str:
        padded = (
            cell.ljust(size) if name in words else cell.rjust(size)
            for cell, name, size in zip(cells, names, sizes, strict=False)
        )
        return _GAP + _GAP.join(padded)

    in_columns = width is None or len(line(names)) <= width
    laid = []
    for row in shown:
        first, told = row[:leading], len(row) < len(headings)
        if told and in_columns:
            laid.append(_wrapped(line(first) + _GAP, " ".join(row[leading:]), width))
        elif in_columns:
            laid.append([line([row[i] for i in kept]).rstrip()])
        else:
            pairs = [_pair(headings[i], row[i], words) for i in range(leading)]
            below = _wrapped(_BLOCK, " ".join(row[leading:]), width) if told else []
            if not told:
                below = _packed([f"{headings[i]} {row[i]}" for i in kept[leading:] if row[i] != MISSING], width)
            laid.append([_GAP + _GAP.join(pairs), *below])
    return LaidOut(line(names).rstrip() if in_columns else None, tuple(map(tuple, laid)))


def say_grid(console: Console, grid: Grid, leading: int = 1) -> None:
    """Prints the table within the console's width; `leading` as of `laid_out`."""
    for line in laid_out(
        grid.headings, grid.rows, words=grid.words, width=width_of(console), leading=leading
    ).lines:
        say(console, line)


def _pair(heading: str, cell: str, words: Collection[str]) -> str:
    return cell if heading in words else f"{heading} {cell}"


def _packed(texts: Sequence[str], width: int | None) -> list[str]:
    """As many texts to a line as fit; none is broken."""
    lines: list[str] = []
    for text in texts:
        if lines and width is not None and len(lines[-1]) + len(_GAP) + len(text) <= width:
            lines[-1] += _GAP + text
        else:
            lines.append(_BLOCK + text)
    return lines


def _wrapped(start: str, text: str, width: int | None) -> list[str]:
    """`text` after `start`, its other lines below its first; all of it below `start` where little room is left."""
    if width is None or len(start) + len(text) <= width:
        return [start + text]
    if width - len(start) < _ROOM and start.strip():
        return [start.rstrip(), *_wrapped(_BLOCK, text, width)]
    return textwrap.wrap(
        text,
        max(width, len(start) + _ROOM),
        initial_indent=start,
        subsequent_indent=" " * len(start),
        break_long_words=False,
        break_on_hyphens=False,
    )


def formatted(value: float | None, form: str) -> str:
    """The value in that format, or MISSING."""
    return MISSING if value is None else format(value, form)


def number(value: float | None) -> str:
    """Four significant digits; whole from a thousand on, with an exponent only where it is very small or large."""
    if value is None:
        return MISSING
    if not value:
        return "0"
    if abs(value) >= 1e3:
        return f"{value:.0f}" if abs(value) < 1e9 else f"{value:.3e}"
    return f"{value:#.4g}".rstrip(".")

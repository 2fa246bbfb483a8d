"""Text for people: the unseen is spelled out, what a stream cannot encode is escaped, nothing is markup."""

from __future__ import annotations

import html
import os
import re
import sys
import textwrap
import unicodedata

from rich.console import Console
from rich.text import Text

# Control, format (bidi marks among them), lone surrogates (a path's bytes that are no UTF-8), line and paragraph
# separators. A terminal acts on them or draws nothing.
_UNSEEN = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})


def visible(text: str) -> str:
    r"""`text` on one line with its unseen characters as Python escapes: `\n`, `\x1b`, `\u202e`, `\udcff`.

    All else, backslashes included, stays as it is; of a visible text nothing changes.
    """
    return "".join(_escaped(c) if unicodedata.category(c) in _UNSEEN else c for c in text)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")


def for_markdown(text: str) -> str:
    """What GitHub markdown shows as `visible(text)`, in a table's cell too."""
    return re.sub(r"([\\`*_\[\]|~])", r"\\\1", html.escape(visible(text), quote=False))


def counted(count: int, noun: str, plural: str | None = None) -> str:
    """ "1 case", "2 cases"; with `plural` where an s is not enough."""
    return f"{count} {noun if count == 1 else plural or noun + 's'}"


def console(*, stderr: bool = False) -> Console:
    """A console of rich on stdout or stderr that takes text as text: no markup, no emoji codes, no highlights."""
    return Console(stderr=stderr, markup=False, emoji=False, highlight=False)


def width_of(console: Console) -> int | None:
    """The columns to keep to: a terminal's, or those that COLUMNS tells; None for a pipe, which has no width."""
    return console.width if console.is_terminal or os.environ.get("COLUMNS", "").isdecimal() else None


def say(console: Console, line: str = "", style: str = "") -> None:
    """Prints `visible(line)` whole: it is never cut, and its end is the only line break."""
    console.print(Text(visible(line), style=style), soft_wrap=True)


def emit(document: str) -> None:
    """Writes a document for another program to stdout, as it is, in UTF-8 whatever a terminal's encoding."""
    sys.stdout.flush()
    sys.stdout.buffer.write(document.encode())
    sys.stdout.flush()


def say_wrapped(console: Console, line: str, style: str = "", indent: int = 0) -> None:
    """Prints prose, broken between words where the console has a width; lines but the first are indented."""
    width, shown = width_of(console), visible(line)
    parts = [shown]
    if width is not None:
        parts = textwrap.wrap(
            shown,
            max(width, indent + 20),
            subsequent_indent=" " * indent,
            break_long_words=False,
            break_on_hyphens=False,
            drop_whitespace=True,
        )
    for part in parts or [""]:
        say(console, part, style)


def prepare_streams() -> None:
    """From here on stdout and stderr write what their encoding lacks as an escape; the encoding stays.

    Where one was closed before the start (`>&-`), what is written to it goes nowhere.
    """
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        # A stand-in for a stream may have no encoding to fail on.
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")

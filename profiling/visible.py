"""Text for people: the unseen is spelled out, what a stream cannot encode is escaped, nothing is markup."""

from __future__ import annotations

import sys
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
    return "".join(
        _escaped(character) if unicodedata.category(character) in _UNSEEN else character for character in text
    )


def _escaped(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")


def console(*, stderr: bool = False) -> Console:
    """A console of rich on stdout or stderr that takes text as text: no markup, no emoji codes, no highlights."""
    return Console(stderr=stderr, markup=False, emoji=False, highlight=False)


def say(console: Console, line: str = "", style: str = "") -> None:
    """Prints `visible(line)` whole: it is never cut, and its end is the only line break."""
    console.print(Text(visible(line), style=style), soft_wrap=True)


def never_fail_on_encoding() -> None:
    """From here on stdout and stderr write what their encoding lacks as an escape; the encoding stays."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        # A stand-in for a stream may have no encoding to fail on.
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")

"""What the commands share: kinds of options, and how a command tells and stops."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import typer

from ..options import real, whole
from ..terminal.visible import console, say

DEFAULT_OUT = Path("runs")


def list_option(text: str) -> Any:
    """An option that takes a list of values; `text` is its help."""
    return typer.Option(help=f"{text} Repeat it or separate values by commas.", metavar="LIST")


def whole_option(text: str, least: int = 0, most: int | None = None) -> Any:
    """An option that takes a whole number from `least` to `most`; `text` is its help."""

    def parse(given: str) -> int:
        value = whole(given)
        if value is None or value < least or (most is not None and value > most):
            limits = f"of at least {least}" if most is None else f"from {least} to {most}"
            raise typer.BadParameter(f"{given!r} is not a whole number {limits}")
        return value

    return typer.Option(help=text, parser=parse, metavar="NUMBER")


def seconds_option(text: str) -> Any:
    """An option that takes seconds, of at least 0; `text` is its help."""

    def parse(given: object) -> float:
        # A default comes as the number that it is.
        value = real(str(given))
        if not value >= 0:
            raise typer.BadParameter(f"{given!r} is not a number of seconds of at least 0")
        return value

    return typer.Option(help=text, parser=parse, metavar="SECONDS")


def tell(line: str, style: str = "") -> None:
    """A line on stderr."""
    say(console(stderr=True), line, style)


def stop(message: str, code: int) -> NoReturn:
    """Ends the process with that exit code, the message its last line on stderr."""
    tell(f"ldmperf: {message.strip()}")
    sys.exit(code)


@contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM ends a profile as Ctrl-C does: it says where its records are."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:
        # Not the main thread: signals are somebody else's.
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)

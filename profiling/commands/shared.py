"""What the commands share: kinds of options, and how a command tells and stops."""

from __future__ import annotations

import functools
import inspect
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from ..options import real, whole_within
from ..terminal.visible import console, say

DEFAULT_OUT = Path("runs")


def with_lists(options: Mapping[str, str]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command, for each name with its help, an option that takes a list of values.

    The command's first argument is then what was typed, by the options' names; empty where one is left out.
    """

    def decorated(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def called(**given: Any) -> None:
            command({name: given.pop(name.replace("-", "_")) or [] for name in options}, **given)

        _, *others = inspect.signature(command, eval_str=True).parameters.values()
        lists = [
            inspect.Parameter(
                name.replace("-", "_"),
                inspect.Parameter.POSITIONAL_OR_KEYWORD,
                default=None,
                annotation=Annotated[list[str] | None, _list_option(text)],
            )
            for name, text in options.items()
        ]
        # What typer reads.
        called.__signature__ = inspect.Signature([*lists, *others])  # type: ignore[attr-defined]
        return called

    return decorated


def _list_option(text: str) -> Any:
    return typer.Option(help=f"{text} Repeat it or separate values by commas.", metavar="LIST")


def whole_option(text: str, least: int = 0, most: int | None = None) -> Any:
    """An option that takes a whole number from `least` to `most`; `text` is its help."""

    def parse(given: str) -> int:
        try:
            return whole_within(given, least, most)
        except ValueError as wrong:
            raise typer.BadParameter(str(wrong)) from None

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

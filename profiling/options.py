"""Number options of the commands: their texts are read here, so that all take ASCII digits alone."""

from __future__ import annotations

from typing import Any

import typer

from .cases import real, whole


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

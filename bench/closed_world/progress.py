"""How far a task is, told while it runs: shares of the whole, from 0 to 1."""

from __future__ import annotations

from collections.abc import Callable

# Takes the share that is done.
Tell = Callable[[float], None]


def to_nobody(share: float) -> None:
    """Tells nobody."""


def part(tell: Tell, first: float, last: float) -> Tell:
    """Tells shares of a part of a task, which goes from `first` to `last` of the whole."""
    return lambda share: tell(first + (last - first) * share)

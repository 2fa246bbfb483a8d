"""Numbers and statuses as people read them. A missing value is never printed as a number, or as "None"."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from ..measure.recorded import FAILED, Status
from ..terminal.layout import MISSING
from ..terminal.visible import visible
from ..trajectory.records import Record


def short_ratio(value: float | None) -> str:
    """Two decimals, or two significant digits where those are more."""
    if value is None:
        return MISSING
    if abs(value) >= 0.1 or not value:
        return f"{value:.2f}" if abs(value) < 1e6 else f"{value:.2e}"
    return f"{value:#.2g}"


def times(value: float | None) -> str:
    """ "1.25x"."""
    return MISSING if value is None else f"{short_ratio(value)}x"


def count(value: int | None) -> str:
    """A parameter count: 38.8M, 4.90B."""
    if value is None:
        return MISSING
    for limit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            scaled = value / limit
            return f"{scaled:.2f}{letter}" if scaled < 10 else f"{scaled:.1f}{letter}"
    return str(value)


def joined(parts: Iterable[str]) -> str:
    return ", ".join(part for part in parts if part)


def first_of(names: Sequence[str], most: int = 8) -> str:
    """The names, of many the first and how many more there are: "39M torch, 83M torch and 7 more"."""
    more = len(names) - most
    return joined(names) if more <= 0 else f"{joined(names[:most])} and {more} more"


def statuses_in_words(statuses: Iterable[Status]) -> str:
    """ "2 failed (1 error, 1 incorrect), 1 unsupported": unsupported and oom are findings, and no failures."""
    counts = Counter(statuses)
    failed = {name: counts.pop(name) for name in FAILED if name in counts}
    of_failed = ", ".join(f"{count} {name}" for name, count in failed.items())
    said = [f"{sum(failed.values())} failed ({of_failed})"] if failed else []
    words = {"oom": "out of memory"}
    return joined((*said, *(f"{count} {words.get(name, name)}" for name, count in sorted(counts.items()))))


def failure(record: Record) -> str:
    """Status and message of a failed case, on one line."""
    return visible(f"{record.status}: {record.message or 'no message'}")


def value_of(value: object) -> str:
    if value is None:
        return "unknown"
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)

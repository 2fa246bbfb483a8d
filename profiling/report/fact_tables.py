"""The columns that charts and filters go by, and the words that place a row: conditions, machine, commit."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from ..figures.derived import Overview, Row, StepsSeries
from ..figures.phrases import environment_name, phrases_of
from ..figures.text import joined
from ..measure.conditions import commit
from ..terminal.visible import visible

Words: TypeAlias = tuple[str, ...]
Fact: TypeAlias = dict[str, Any]
FactOf: TypeAlias = tuple[Mapping[str, str], Mapping[str, float | None]]

# What places a row on a machine: a history leaves them out, as it follows a case over environments.
PLACES = ("environment", "device", "commit")
_CONDITIONS = (
    *("task", "dtype", "batch", "sampler", "steps", "guidance_scale", "latent", "context_tokens", "seed"),
)


@dataclass(frozen=True)
class FactTable:
    """Rows as columns of one length: `words` in text, `numbers` null where there is none.

    conditions  the columns of words that set rows apart besides the network and the backend
    """

    words: Mapping[str, Words] = field(default_factory=dict)
    numbers: Mapping[str, tuple[float | None, ...]] = field(default_factory=dict)
    conditions: Words = ()

    @classmethod
    def of(cls, facts: Sequence[FactOf], names: Words) -> FactTable:
        """Of the words and numbers of each row, which all have the same names; `names`: conditions that vary."""
        if not facts:
            return cls()
        first_words, first_numbers = facts[0]
        words = {name: tuple(of[name] for of, _ in facts) for name in first_words}
        numbers = {name: tuple(of[name] for _, of in facts) for name in first_numbers}
        return cls(words, numbers, _apart(words, names))

    def rows(self) -> list[Fact]:
        """Each row with all its columns by name."""
        columns: dict[str, Sequence[Any]] = {**self.words, **self.numbers}
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]

    def as_json(self) -> dict[str, Any]:
        """For the page: words `coded`, numbers with six digits; a column without a value is left out."""
        return {
            "conditions": self.conditions,
            "words": {name: coded(values) for name, values in self.words.items()},
            "numbers": {
                name: [None if value is None else float(f"{value:.6g}") for value in values]
                for name, values in self.numbers.items()
                if any(value is not None for value in values)
            },
        }


def coded(values: Iterable[str]) -> dict[str, list[Any]]:
    """The different texts, and for each value its place among them."""
    places: dict[str, int] = {}
    at = [places.setdefault(value, len(places)) for value in values]
    return {"texts": list(places), "at": at}


def natural(text: str) -> tuple[tuple[float, str], ...]:
    """Sorts numbers within texts by value: "2 steps" before "10 steps"."""
    parts = re.split(r"(\d+(?:\.\d+)?)", text)
    return tuple((float(part), "") if place % 2 else (0.0, part) for place, part in enumerate(parts))


@dataclass(frozen=True)
class Placing:
    """The words that place a row.

    names    the conditions that vary, the environment first, and the commit
    """

    shown: Overview
    names: Words

    @classmethod
    def of(cls, shown: Overview) -> Placing:
        varying = shown.conditions.varying
        if len({commit(environment) for environment in shown.environments}) > 1:
            varying |= {"commit"}
        known = [name for name in (*PLACES, *_CONDITIONS) if name in varying]
        return cls(shown, (*known, *sorted(varying - {*known})))

    def words(self, row: Row | StepsSeries, *without: str) -> dict[str, str]:
        """Network, backend and each condition that varies, but for some."""
        environment = self.shown.environments[row.environment]
        phrases = phrases_of(row, self.shown.environments) | {"commit": commit(environment)}
        told = joined(phrases[name] for name in ("device", "commit") if name in self.names)
        phrases["environment"] = joined((environment_name(row.environment), told))
        placed = {name: visible(phrases[name]) for name in self.names if name not in without}
        return {"size": visible(row.name), "backend": visible(row.case.backend), **placed}


def told_by(words: Mapping[str, Words], name: str, *by: str) -> bool:
    """Whether some columns, as far as they are there, tell what stands in another one."""
    known = list(zip(*(words[column] for column in by if column in words), strict=True))
    return name in words and bool(known) and len(set(known)) == len(set(zip(known, words[name], strict=True)))


def _apart(words: Mapping[str, Words], names: Words) -> Words:
    """The conditions that set rows apart; an environment stands for what it tells, its commit first of all."""
    known = tuple(name for name in names if name in words)
    return tuple(name for name in known if name == "environment" or not told_by(words, name, "environment"))

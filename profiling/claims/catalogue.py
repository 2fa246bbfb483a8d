"""The claims to judge and readings published elsewhere (claims.json, whose source says where they are from)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any


@dataclass(frozen=True)
class Claim:
    """A claim about the cost of sampling.

    timing    what wall-clock time can say of it; null where it can say nothing
    needs     what else a verdict needs; null where timing is enough
    """

    id: str
    text: str
    timing: str | None
    needs: str | None


@dataclass(frozen=True)
class PublishedReading:
    """A figure of somebody else's with its conditions, to read beside ours; `claims`: those that it bears on."""

    claims: tuple[str, ...]
    subject: str
    conditions: str
    result: str
    source: str

    def __str__(self) -> str:
        return f"{self.subject} ({self.conditions}): {self.result}; {self.source}"


@cache
def _content() -> dict[str, Any]:
    text = resources.files(__package__).joinpath("claims.json").read_text(encoding="utf-8")
    content: dict[str, Any] = json.loads(text)
    return content


def claims_source() -> str:
    """Who made the claims."""
    return str(_content()["source"])


def all_claims() -> tuple[Claim, ...]:
    """The claims, in the order in which they are told."""
    return tuple(Claim(row["id"], row["claim"], row["timing"], row["needs"]) for row in _content()["claims"])


def published_readings(claim_id: str | None) -> tuple[PublishedReading, ...]:
    """The readings that bear on a claim; with None those that bear on no claim."""
    readings = [
        PublishedReading(tuple(r["claims"]), r["subject"], r["conditions"], r["result"], r["source"])
        for r in _content()["published"]
    ]
    return tuple(r for r in readings if (claim_id in r.claims if claim_id is not None else not r.claims))

"""The paper's sizes (paper.json, whose source and notes say what each number is)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources


@dataclass(frozen=True)
class PaperSize:
    """A size: GFLOP of a forward as a count gives it, and the paper's normalized cost, where 866M is 1."""

    gflop: float
    normalized_cost: float


@cache
def paper_sizes() -> Mapping[str, PaperSize]:
    """The sizes by name, the smallest first."""
    text = resources.files(__package__).joinpath("paper.json").read_text(encoding="utf-8")
    return {
        row["name"]: PaperSize(row["gflop"], row["paper_normalized_cost"]) for row in json.loads(text)["sizes"]
    }

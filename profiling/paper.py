"""The paper's sizes (paper.json, whose source and notes say what each number is)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources


@dataclass(frozen=True)
class PaperSize:
    """A row of paper.json: what the paper prints of a size, and the parameters and GFLOP that a count gives."""

    name: str
    base_channels: int
    params_exact: int
    gflop: float
    paper_gflops: float
    paper_normalized_cost: float
    paper_fid: float
    paper_clip: float


@cache
def paper_sizes() -> Mapping[str, PaperSize]:
    """The sizes by name, the smallest first; the normalized cost of 866M is 1."""
    text = resources.files(__package__).joinpath("paper.json").read_text(encoding="utf-8")
    return {size["name"]: PaperSize(**size) for size in json.loads(text)["sizes"]}

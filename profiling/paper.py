"""The paper's sizes (paper.json, whose source and notes say what each number is)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any


@dataclass(frozen=True)
class PaperSize:
    """A size of the paper's Table 1.

    parameters        of the UNet, as a count gives them
    gflop             of a forward, as a count gives it; printed_gflops as the paper prints it
    normalized_cost   the paper's, printed with two decimals, where 866M is 1
    fid, clip         the paper's quality after 50 steps of DDIM at guidance 7.5: 30k samples of COCO-2014
    """

    parameters: int
    gflop: float
    printed_gflops: float
    normalized_cost: float
    fid: float
    clip: float


@cache
def _content() -> dict[str, Any]:
    text = resources.files(__package__).joinpath("paper.json").read_text(encoding="utf-8")
    content: dict[str, Any] = json.loads(text)
    return content


@cache
def paper_sizes() -> Mapping[str, PaperSize]:
    """The sizes by name, the smallest first."""
    fields = ("params_exact", "gflop", "paper_gflops", "paper_normalized_cost", "paper_fid", "paper_clip")
    return {row["name"]: PaperSize(*(row[name] for name in fields)) for row in _content()["sizes"]}


def paper_source() -> str:
    """Where the table is from."""
    return str(_content()["source"])


def paper_notes() -> tuple[str, ...]:
    """What to know of its numbers, the misprint first."""
    return tuple(_content()["notes"])

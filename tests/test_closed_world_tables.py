"""The tables and the sentence of docs/closed-world.md, on a family of known quality and cost."""

from __future__ import annotations

import math
import re
from datetime import UTC, datetime
from pathlib import Path

import pytest
from closed_world.tables import _factors, sentence, tables
from quality_worlds import NETWORKS, Make, MakeRecord, as_the_paper_says, estimate, times, world
from scipy import stats

from ldmperf.profiling.claims.closed_worlds import closed_worlds
from ldmperf.profiling.quality import Estimate, QualityStore


@pytest.fixture
def folder(tmp_path: Path, make_quality: Make, make_record: MakeRecord) -> Path:
    """Three seeds; a step's time grows as the root of its FLOPs, with 64 images as the FLOPs."""
    right = Estimate(value=0.75, replicates=(0.75,) * 200)
    records = world(make_quality, seeds=(0, 1, 2), alignment=right)
    records.append(make_quality("real", 1, kind="real", sampler="none", frechet=estimate(0.25), alignment=right))
    QualityStore(tmp_path / "quality.jsonl").append(*records)
    alone = times(make_record, lambda name: math.sqrt(NETWORKS[name]))
    many = times(make_record, batch=64)
    (tmp_path / "records.jsonl").write_text("".join(r.model_dump_json() + "\n" for r in (*alone, *many)))
    return tmp_path


def rows(text: str, heading: str) -> dict[str, list[str]]:
    """The table whose first line begins so, by the first cell of each row."""
    lines = text[text.index(f"| {heading}") :].partition("\n\n")[0].splitlines()
    return {cells[0]: cells[1:] for cells in ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines)}


def test_the_tables_have_costs_quality_and_who_is_best(folder: Path) -> None:
    told = tables(folder)
    assert "a Frechet distance of 0.25; the judge reads 75.0% of their factors right" in " ".join(told.split())
    costs = rows(told, "network | parameters")
    assert costs["network"][-3:] == [
        "FLOPs over the widest's",
        "time, an image alone",
        "time, an image in a batch of 64",
    ]
    for name, cost in NETWORKS.items():
        shares = (cost / 16, math.sqrt(cost / 16), cost / 16)
        assert costs[name][-3:] == [f"{share:.2f}" for share in shares]
    frontier = rows(told, "network | 1")
    assert frontier["w16"][3].startswith(f"**{as_the_paper_says('w16', 4):.2f}** (")
    assert frontier["w16"][3].endswith("<br>75%, at 2")
    factors = rows(told, "network | colour | shape")
    assert list(factors)[2:] == [*NETWORKS, "real scenes"]
    # Seeds that are alike vary as one does.
    for name in NETWORKS:
        for cell, share in zip(factors[name], (0.9, 0.7), strict=True):
            value, low, high = (float(word) for word in re.findall(r"[0-9.]+", cell))
            proportion = stats.binomtest(round(share * 2048), 2048).proportion_ci(method="wilson")
            assert value == 100 * share
            assert (low, high) == pytest.approx((100 * proportion.low, 100 * proportion.high), abs=0.2)
    # What 3 steps of the w32 buy: of the w8 by FLOPs 48, by the clock 12.
    three = rows(told, "steps of w32")["3"]
    assert three[0].startswith("**w8 at 25, 1.10**<br>3.33 (")
    assert three[1].startswith("**w8 at 12, 1.53**<br>")
    assert three[2].startswith("**w8 at 25, 1.10**<br>")


def test_what_it_took_is_that_of_the_family(folder: Path, make_quality: Make) -> None:
    """Students and other commits came a day later: the commits are told, their time is none of the family's."""
    (plain,) = {record.environment for record in world(make_quality)}
    later = {
        "environment": plain.model_copy(update={"git_commit": "fedcba98" * 5}),
        "started_at": datetime(2026, 11, 29, 1, tzinfo=UTC),
    }
    QualityStore(folder / "quality.jsonl").append(
        make_quality("w8", 4, kind="distilled", guidance_scale=1.0, frechet=estimate(1.1), **later)
    )
    told = " ".join(tables(folder).split())
    assert f"commits {plain.git_commit[:7]}, fedcba9; ddim" in told
    assert "cells were judged within 0 minutes" in told


def test_real_scenes_that_went_through_tokens_are_no_real_scenes(make_quality: Make) -> None:
    right = Estimate(value=0.75, replicates=(0.75,) * 200)
    tokens = make_quality("real-tokens", 1, kind="real", sampler="none", frechet=estimate(0.5), alignment=right)
    (found,) = closed_worlds([*world(make_quality, alignment=right), tokens])
    factors = rows(_factors(found), "network | colour | shape")
    assert list(factors)[2:] == [*NETWORKS]


def test_the_sentence_counts_budgets_by_flops_and_by_each_clock(folder: Path) -> None:
    told = " ".join(sentence(folder).split())
    counts = (
        "9 of 10 budgets by FLOPs",
        "by the time of an image alone",
        "by the time of an image in a batch of 64",
    )
    assert all(count in told for count in counts)
    assert "the cost of 1 to 50 steps of the widest of 5 networks, trained here with 3 seeds each" in told
    ratio = as_the_paper_says("w32", 3) / as_the_paper_says("w8", 25)
    affords = f"by FLOPs w8 affords 25 steps, and the Frechet distance of w32 is {ratio:.2f} times that of w8 ("
    assert f"3 steps of the widest: {affords}" in told
    assert "by the time of an image alone w8 affords 12 steps, and the" in told

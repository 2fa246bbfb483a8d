"""The tables of further systems, on families of known quality and cost."""

from __future__ import annotations

from pathlib import Path

import pytest
from closed_world.further_tables import tables
from quality_worlds import NETWORKS, STEPS, Make, MakeRecord, as_the_paper_says, estimate, times, world

from ldmperf.profiling.quality import Estimate, QualityRecord, QualityStore

SEEDS = (0, 1, 2)


def rows(text: str, heading: str) -> dict[str, list[str]]:
    """The table whose first line begins so, by the first cells of each row."""
    lines = text[text.index(f"| {heading}") :].partition("\n\n")[0].splitlines()
    found = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    return {" ".join(cells[:2]): cells[2:] for cells in found[2:]}


@pytest.fixture
def family(tmp_path: Path, make_quality: Make, make_record: MakeRecord) -> list[QualityRecord]:
    """With records of times: a step of an image alone takes as many ms as it has GFLOP, without guidance half."""
    right = Estimate(value=0.75, replicates=(0.75,) * 200)
    alone = [*times(make_record), *times(make_record, lambda name: NETWORKS[name] / 2, guidance_scale=1.0)]
    (tmp_path / "records.jsonl").write_text("".join(record.model_dump_json() + "\n" for record in alone))
    held_out = world(make_quality, split="held-out", samples=500, tuned=False)
    return [*world(make_quality, seeds=SEEDS, alignment=right), *held_out]


def test_a_student_stands_beside_the_cheapest_network_that_is_as_good(
    tmp_path: Path, make_quality: Make, family: list[QualityRecord]
) -> None:
    """The w8 has 0.7 + 10 / steps: with 25 it is as good as a student of 1.1, and the cheapest that is."""
    student = {"kind": "distilled", "guidance_scale": 1.0, "gflop_per_image": 64.0, "parameters": 160_000}
    right = Estimate(value=0.5, replicates=(0.5,) * 200)
    students = [
        make_quality("w32", 4, training_seed=seed, frechet=estimate(1.1), alignment=right, **student)
        for seed in SEEDS
    ]
    QualityStore(tmp_path / "quality.jsonl").append(*family, *students)
    told = rows(tables(tmp_path), "kind | network")
    assert list(told) == ["distilled w32"]
    parameters, evaluations, quality, flops, clock = told["distilled w32"]
    assert (parameters, evaluations) == ("160,000", "4")
    assert quality.startswith("**1.10** (")
    assert quality.endswith("<br>50%, at 1")
    assert as_the_paper_says("w8", 25) == pytest.approx(1.1)
    # 50 GFLOP of guided steps over its own 64; 25 ms over 4 steps of 8 ms.
    assert flops == "64 GFLOP<br>w8 at 25: 0.78 times"
    assert clock == "32 ms<br>w8 at 25: 0.78 times"


def test_none_may_be_as_good(tmp_path: Path, make_quality: Make, family: list[QualityRecord]) -> None:
    """A masked transformer is told at the steps that are best on held-out prompts, without a time."""
    of = {"kind": "masked-transformer", "sampler": "masked", "gflop_per_image": 8.0}
    for steps, held_out, on_test in ((4, 0.1, 0.05), (8, 0.2, 0.01)):
        family.append(make_quality("m12", steps, frechet=estimate(on_test), **of))
        family.append(
            make_quality(
                "m12", steps, frechet=estimate(held_out), split="held-out", samples=500, tuned=False, **of
            )
        )
    QualityStore(tmp_path / "quality.jsonl").append(*family)
    _, evaluations, quality, flops, clock = rows(tables(tmp_path), "kind | network")["masked transformer m12"]
    assert (evaluations, flops, clock) == ("4", "8 GFLOP<br>none is as good", "-")
    assert quality.startswith("**0.05** (")


def test_stitched_trajectories_stand_beside_the_best_single_network(
    tmp_path: Path, make_quality: Make, family: list[QualityRecord]
) -> None:
    """Four steps of the w8 and one of the w32, as dear as a step and a quarter of the w32."""
    of = {"kind": "stitched", "takes": (("w8", 4), ("w32", 1)), "steps": 5, "gflop_per_image": 40.0}
    tests = [make_quality(training_seed=seed, frechet=estimate(0.9), **of) for seed in SEEDS]
    held_out = make_quality(frechet=estimate(0.9), split="held-out", samples=500, tuned=False, **of)
    QualityStore(tmp_path / "quality.jsonl").append(*family, *tests, held_out)
    told = tables(tmp_path)
    single = [
        min(as_the_paper_says(n, s) for n, cost in NETWORKS.items() for s in STEPS if cost * s <= 16 * budget)
        for budget in STEPS[1:]
    ]
    ahead = sum(best > 0.9 for best in single)
    assert 0 < ahead < len(single)
    count = f"at {ahead} of 9 budgets, {ahead} beyond noise"
    assert f"by FLOPs {count}; by the time of an image alone {count}." in " ".join(told.split())
    three = rows(told, "steps of w32")
    lines = {key.split()[0]: (key, *cells) for key, cells in three.items()}
    assert set(lines) == {"2", "3", "4", "6", "8", "12", "16", "25", "50"}
    assert "**w8x4+w32x1, 0.90**<br>w8 at 25, 1.10<br>1.22 (" in lines["3"][0]
    # Beyond noise the other way.
    assert "w8x4+w32x1, 0.90<br>**w32 at 50, 0.53**<br>" in lines["50"][0]


def test_a_stitched_trajectory_may_be_better_within_noise(
    tmp_path: Path, make_quality: Make, family: list[QualityRecord]
) -> None:
    """Its trainings are far apart, and as good in the mean as in the test above."""
    of = {"kind": "stitched", "takes": (("w8", 4), ("w32", 1)), "steps": 5, "gflop_per_image": 40.0}
    apart = zip(SEEDS, (0.1, 0.9, 8.1), strict=True)
    tests = [make_quality(training_seed=seed, frechet=estimate(value), **of) for seed, value in apart]
    held_out = make_quality(frechet=estimate(0.9), split="held-out", samples=500, tuned=False, **of)
    QualityStore(tmp_path / "quality.jsonl").append(*family, *tests, held_out)
    told = " ".join(tables(tmp_path).split())
    assert "of 9 budgets, 0 beyond noise; by the time" in told
    assert "by FLOPs at 0 of" not in told
    assert "<br>w8 at 25, 1.10<br>1.22 (" in told
    assert "**" not in told[told.index("| steps of w32") :]


def test_stitched_by_each_cost_counts_the_budgets_that_it_has(
    tmp_path: Path, make_quality: Make, make_record: MakeRecord, family: list[QualityRecord]
) -> None:
    """A step of the w8 takes seven times what its FLOPs say: the trajectory takes 44 ms, two steps of w32 32."""
    slow = times(make_record, lambda name: 7.0 if name == "w8" else NETWORKS[name])
    (tmp_path / "records.jsonl").write_text("".join(record.model_dump_json() + "\n" for record in slow))
    of = {"kind": "stitched", "takes": (("w8", 4), ("w32", 1)), "steps": 5, "gflop_per_image": 40.0}
    tests = [make_quality(training_seed=seed, frechet=estimate(0.01), **of) for seed in SEEDS]
    held_out = make_quality(frechet=estimate(0.01), split="held-out", samples=500, tuned=False, **of)
    QualityStore(tmp_path / "quality.jsonl").append(*family, *tests, held_out)
    told = tables(tmp_path)
    counts = (
        "by FLOPs at 9 of 9 budgets, 9 beyond noise; by the time of an image alone at 8 of 8 budgets, 8 beyond"
    )
    assert counts in " ".join(told.split())
    lines = {key.split()[0]: cells for key, cells in rows(told, "steps of w32").items()}
    assert lines["2"] == ["-"]


def test_super_resolution_has_both_beginnings_by_length(tmp_path: Path, make_quality: Make) -> None:
    records = [
        make_quality(
            "w8-sr",
            16,
            task="sr",
            kind=kind,
            training_steps=length,
            guidance_scale=1.0,
            training_seed=seed,
            frechet=estimate(value),
            tuned=True,
        )
        for kind, values in (("diffusion", (3.0, 2.0)), ("scratch", (9.0, 4.0)))
        for length, value in zip((100, 1000), values, strict=True)
        for seed in SEEDS
        if (kind, length) != ("scratch", 100)
    ]
    QualityStore(tmp_path / "quality.jsonl").append(*records)
    told = rows(tables(tmp_path), "network | began")
    assert [cell[:8] for cell in told["w8-sr text-to-image"]] == ["**3.00**", "**2.00**"]
    assert [cell[:8] for cell in told["w8-sr drawn"]] == ["-", "**4.00**"]


@pytest.mark.parametrize(
    ("seeds", "told"),
    [
        ({"w8-sr": (0, 1, 2), "w32-sr": (0, 1, 2)}, "samples and seeds"),
        ({"w8-sr": (0,), "w32-sr": (0,)}, "samples alone (one training seed)"),
        ({"w8-sr": (0,), "w32-sr": (0, 1)}, "samples, and over seeds where there are several"),
    ],
)
def test_a_title_says_what_its_intervals_are_over(
    tmp_path: Path, make_quality: Make, seeds: dict[str, tuple[int, ...]], told: str
) -> None:
    """One training tells nothing of how trainings differ."""
    QualityStore(tmp_path / "quality.jsonl").append(
        *(
            make_quality(name, 16, task="sr", guidance_scale=1.0, training_seed=seed, frechet=estimate(2.0))
            for name, of in seeds.items()
            for seed in of
        )
    )
    text = " ".join(tables(tmp_path).split())
    assert f"at 16 steps, with its 95% interval over {told}, by the length" in text
    assert f"the Frechet distance with its 95% interval over {told}; the share" in text
    assert f"with a bound over all of them and over {told}; in italics" in text

"""Verdicts on samplers, guidance and training compute in a closed world; any order of records; the command."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from quality_worlds import (
    NETWORKS,
    Make,
    MakeRecord,
    as_the_paper_says,
    both,
    by_metric,
    estimate,
    fine_tuned,
    judged,
    rival,
    rows,
    students,
    sweep,
    times,
    world,
)

from ldmperf.profiling.claims import judge
from ldmperf.profiling.claims.judge import QUALITY_RULES
from ldmperf.profiling.claims.summary import shared_by_all, summary
from ldmperf.profiling.quality import Estimate, QualityRecord, QualityStore

# Samplers


def test_an_order_that_all_samplers_share_holds(make_quality: Make) -> None:
    records = both(make_quality, lambda name, steps: 3 * as_the_paper_says(name, steps), noise=1e-4)
    for verdict in judged(records, "sampler-independent"):
        assert verdict.finding == "holds"
        assert "100% of 100 pairs" in verdict.sentence
        assert verdict.conditions["samplers"] == "ddim and ddpm"
        (three,) = (row for row in rows(verdict) if row["steps"] == "3")
        assert three["best first, ddim"] == "w32, w24, w16, w12, w8"
        assert three["wins at that budget, ddpm"] == "w8 with 25"


def test_networks_of_which_the_smaller_is_better_have_an_order_too(make_quality: Make) -> None:
    records = both(
        make_quality, lambda name, steps: NETWORKS[name], lambda name, steps: NETWORKS[name], steps=(4,)
    )
    for verdict in judged(records, "sampler-independent"):
        assert verdict.finding == "holds"
        assert "100% of 10 pairs" in verdict.sentence


def test_an_order_that_turns_round_does_not_hold_and_noise_leaves_it_open(make_quality: Make) -> None:
    turned = both(make_quality, lambda name, steps: NETWORKS[name] + 10 / steps)
    assert {verdict.finding for verdict in judged(turned, "sampler-independent")} == {"does not hold"}
    # One pair of ten turns round, within noise.
    near = {"w8": 1.0, "w12": 0.9, "w16": 0.8, "w24": 0.6, "w32": 0.5}
    swap = near | {"w24": 0.597, "w32": 0.603}
    open_ = both(make_quality, lambda name, steps: swap[name], lambda name, steps: near[name], steps=(50,))
    assert {verdict.finding for verdict in judged(open_, "sampler-independent")} == {"undecided"}
    flat = both(make_quality, lambda name, steps: 1.0, lambda name, steps: 1.0, steps=(50,))
    for verdict in judged(flat, "sampler-independent"):
        assert verdict.finding == "not measured"
        assert verdict.sentence.startswith("needs two networks that differ beyond noise; none of 10 pairs does")


def test_samplers_are_compared_at_the_trainings_that_all_have(make_quality: Make) -> None:
    """Two trainings that one sampler alone was tried with turn its order round: no doing of the sampler."""
    once = both(make_quality, as_the_paper_says, noise=1e-4, steps=(4, 50))
    turned = world(make_quality, lambda name, steps: 9 * NETWORKS[name], seeds=(1, 2), noise=1e-4, steps=(4, 50))
    for verdict, alone in zip(
        judged([*once, *turned], "sampler-independent"), judged(once, "sampler-independent"), strict=True
    ):
        assert (verdict.finding, verdict.judged) == ("holds", alone.judged)
        assert "one training seed" in verdict.sentence
    # Budgets of a sampler are told of all its trainings.
    (four,) = (row for row in rows(verdict) if row["steps"] == "4")
    assert (four["wins at that budget, ddim"], four["wins at that budget, ddpm"]) == ("w8 with 50", "w8 with 50")
    # Without a training in common there is no order to compare.
    apart = [r for r in [*once, *turned] if (r.case.sampler, r.case.training_seed) != ("ddim", 0)]
    assert judged(apart, "sampler-independent") == ()


def test_one_sampler_needs_a_second_and_no_times(make_quality: Make, make_record: MakeRecord) -> None:
    for records in ([], times(make_record)):
        (verdict,) = judged(world(make_quality), "sampler-independent", records)
        assert verdict.finding == "not measured"
        assert (
            verdict.sentence == "needs quality under a second sampler, at the same steps; there is none but ddim's"
        )
        assert rows(verdict)[0] == {"network": "w8", "steps": "1, 2, 3, 4, 6, 8, 12, 16, 25, 50"}
    (told,) = (of for of in judge([], world(make_quality)) if of.claim.id == "sampler-independent")
    assert len(told.verdicts) == 1
    assert judged(world(make_quality, task="sr"), "sampler-independent") == ()


# Guidance


def test_quality_that_moves_more_than_alignment_holds(make_quality: Make) -> None:
    records = sweep(make_quality, lambda rate: rate, lambda rate: 0.80 + 0.005 * rate)
    for verdict in judged(records, "cfg-quality-not-alignment"):
        assert verdict.finding == "holds"
        assert "between guidance 1.5 and 8 at 50 steps" in verdict.sentence
        assert " of the w8 changes 5.33x, the share of factors that is right 1.04x and " in verdict.sentence
        assert (
            "the share that is wrong 1.20x; the first over the larger of the others is least there (4.43x, "
            in (verdict.sentence)
        )
        assert "a bound over 2 networks; above 1 holds)" in verdict.sentence
        assert [row["guidance"] for row in rows(verdict)][:6] == ["1", "1.5", "2", "4", "8", "range"]
        # 8 / 1.5 over errors of 0.1925 and 0.16.
        assert verdict.judged is not None
        assert verdict.judged.interval.value == pytest.approx(math.log(8 / 1.5) - math.log(0.1925 / 0.16))


def test_quality_that_moves_less_does_not_hold_and_scales_that_disagree_are_told(make_quality: Make) -> None:
    less = sweep(make_quality, lambda rate: 1 + 0.001 * rate, lambda rate: 0.3 + 0.05 * rate)
    for verdict in judged(less, "cfg-quality-not-alignment"):
        assert verdict.finding == "does not hold"
        assert "disagree" not in verdict.sentence
        assert "not more than" not in verdict.sentence
    # Errors go from 0.0425 to 0.01, 4.25x; the alignment itself by 1.03x; the metric by 1.5x.
    split = sweep(make_quality, lambda rate: 1 + rate / 10, lambda rate: 0.95 + 0.005 * rate)
    for verdict in judged(split, "cfg-quality-not-alignment"):
        assert verdict.finding == "does not hold"
        said = (
            "right 1.03x and the share that is wrong 4.25x: more than the share that is right, not more than the "
        )
        assert f"{said}share that is wrong; " in verdict.sentence
    # Without replicates there is no interval, and none is printed.
    none = [
        record.model_copy(
            update={
                name: figure.model_copy(update={"replicates": ()})
                for name, figure in record.estimates.items()
                if figure is not None
            }
        )
        for record in split
    ]
    for verdict in judged(none, "cfg-quality-not-alignment"):
        assert verdict.finding == "undecided"
        assert "least there (0.37x, no interval; above 1 holds)" in verdict.sentence
        assert "x to " not in verdict.sentence


def test_guidance_needs_rates_and_logarithms(make_quality: Make) -> None:
    def moving(rate: float) -> float:
        return rate

    few = sweep(make_quality, moving, lambda rate: 0.8, rates=(1.0, 1.5, 2.0, 9.0))
    assert judged(few, "cfg-quality-not-alignment") == ()
    below = sweep(make_quality, moving, lambda rate: 0.8, kid=estimate(-0.01))
    found = by_metric(judged(below, "cfg-quality-not-alignment"))
    assert found["KID"].finding == "not measured"
    assert found["KID"].sentence.startswith("needs a KID above 0 and an alignment below 1 of the w8 at every rate")
    assert found["Frechet distance"].finding == "holds"
    perfect = sweep(make_quality, moving, lambda rate: 1.0)
    assert {v.finding for v in judged(perfect, "cfg-quality-not-alignment")} == {"not measured"}
    held_out = sweep(make_quality, moving, lambda rate: 0.8 + 0.001 * rate, split="held-out")
    tuned = world(make_quality, steps=(50,))
    assert "on held-out prompts" in judged([*held_out, *tuned], "cfg-quality-not-alignment")[0].sentence


def test_the_network_whose_guidance_moves_quality_least_decides(make_quality: Make) -> None:
    def right(rate: float) -> float:
        return 0.80 + 0.005 * rate

    records = sweep(make_quality, lambda rate: rate, right, networks=("w8",))
    records += sweep(make_quality, lambda rate: 1 + rate / 1000, right, networks=("w32",))
    for verdict in judged(records, "cfg-quality-not-alignment"):
        assert verdict.finding == "does not hold"
        assert " of the w32 changes 1.01x, " in verdict.sentence


def test_rates_are_compared_at_the_same_seeds(make_quality: Make) -> None:
    """Every network was trained twice, and one of the two sampled at rates that are not the tuned one."""
    records = sweep(make_quality, lambda rate: rate, lambda rate: 0.8 + 0.005 * rate, rates=(1.5, 4.0, 8.0))
    records += world(make_quality, networks=("w8", "w32"), steps=(50,), seeds=(0, 1))
    for verdict in judged(records, "cfg-quality-not-alignment"):
        assert "one training seed" in verdict.sentence
        assert [row["guidance"] for row in rows(verdict)][:5] == ["1.5", "2", "4", "8", "range"]


# Compute


@pytest.mark.parametrize(("power", "finding"), [(-0.5, "holds"), (0.5, "does not hold"), (0.0, "undecided")])
def test_the_slope_over_training_compute_decides(make_quality: Make, power: float, finding: str) -> None:
    """A power law gives its own exponent."""
    records = world(make_quality, lambda name, steps: NETWORKS[name] ** power + (100 if steps < 50 else 0))
    found = by_metric(judged(records, "quality-scales-with-compute"))
    frechet = found["Frechet distance"]
    assert {verdict.finding for verdict in found.values()} == {finding}
    assert frechet.judged is not None
    assert frechet.judged.interval.value == pytest.approx(power)
    assert "at 50 steps" in frechet.sentence
    if power:
        assert f"rank correlation {math.copysign(1, power):.2f}" in frechet.sentence


def test_scaling_needs_three_networks_and_tells_a_networks_own_training(make_quality: Make) -> None:
    two = judged(world(make_quality, networks=("w8", "w32")), "quality-scales-with-compute")
    assert {verdict.finding for verdict in two} == {"not measured"}
    assert two[0].sentence.startswith("needs 3 networks of different training compute")
    records = world(make_quality, steps=(50,))
    # After all of it 0.2 + 0.5 + 10 / 50.
    for share in (0.25, 0.5):
        records += [
            make_quality("w8", 50, training_steps=int(20_000 * share), training_gflop=1e5 * share, tuned=False,
                         frechet=estimate(0.9 / share))
        ]  # fmt: skip
    frechet = by_metric(judged(records, "quality-scales-with-compute"))["Frechet distance"]
    own = {row["network"]: row["slope over its own training"] for row in rows(frechet)}
    assert own["w8"].startswith("-1 (")
    assert own["w32"] == "-"
    # Other guidance than the tuned one is another sampler.
    other = [
        record.model_copy(update={"case": record.case.model_copy(update={"guidance_scale": 7.0})})
        for record in records[-2:]
    ]
    other = [record.model_copy(update={"case_key": record.case.key}) for record in other]
    frechet = by_metric(judged([*records[:-2], *other], "quality-scales-with-compute"))["Frechet distance"]
    assert "slope over its own training" not in rows(frechet)[0]


# All of them


def everything(make_quality: Make) -> list[QualityRecord]:
    records = both(
        make_quality,
        lambda name, steps: 2 * as_the_paper_says(name, steps),
        seeds=(0, 1),
        between=0.05,
        steps=(1, 3, 25, 50),
    )
    records += sweep(make_quality, lambda rate: rate, lambda rate: 0.8 + 0.005 * rate, rates=(1.0, 1.5, 3.0, 8.0))
    records += [make_quality("real", 1, kind="real", sampler="none")]
    records += [make_quality(kind="stitched", steps=13, takes=(("w8", 12), ("w32", 1)))]
    records += students(make_quality, lambda name: as_the_paper_says(name, 16))
    records += [rival(make_quality, 3.0), rival(make_quality, 2.0, "m12", 4, "masked-transformer")]
    records += fine_tuned(
        make_quality,
        lambda kind, name, trained: as_the_paper_says(name, 16) + (kind == "scratch") + 1 / trained,
        networks=("w8", "w32"),
        steps=(3, 25),
    )
    records += [make_quality("w8", 3, status="error", training_seed=5)]
    return records


@settings(max_examples=3, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.randoms(use_true_random=False))
def test_the_order_of_records_changes_nothing(make_quality: Make, make_record: MakeRecord, random: Any) -> None:
    qualities, records = everything(make_quality), times(make_record)
    found = judge(records, qualities)
    assert judge(random.sample(records, len(records)), random.sample(qualities, len(qualities))) == found
    assert {of.claim.id for of in found if any(v.is_of_quality for v in of.verdicts)} == set(QUALITY_RULES)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_qualities_are_judged_without_a_number_that_is_none(make_quality: Make, data: st.DataObject) -> None:
    values = st.one_of(st.just(0.0), st.floats(-1.0, 1.0), st.floats(1e-12, 1e9))
    records = []
    for _ in range(data.draw(st.integers(1, 14))):
        value = data.draw(values)
        count = data.draw(st.sampled_from([0, 20, 31]))
        figure = Estimate(value=value, replicates=tuple(value + 0.1 * k for k in range(count)))
        share = Estimate(value=data.draw(st.sampled_from([0.0, 0.5, 1.0])), replicates=(0.5,) * count)
        records.append(
            make_quality(
                data.draw(st.sampled_from(["w8", "w16", "w32"])),
                data.draw(st.sampled_from([1, 3, 4, 8, 50])),
                kind=data.draw(st.sampled_from(["diffusion", "diffusion", "scratch", "distilled", "gan"])),
                task=data.draw(st.sampled_from(["t2i", "sr"])),
                training_steps=data.draw(st.sampled_from([100, 1000])),
                sampler=data.draw(st.sampled_from(["ddim", "ddpm"])),
                guidance_scale=data.draw(st.sampled_from([1.0, 2.0, 3.0, 8.0])),
                training_seed=data.draw(st.integers(0, 2)),
                training_gflop=data.draw(st.sampled_from([None, 0.0, 1.0, 5.0, 9.0])),
                gflop_per_image=data.draw(st.sampled_from([None, 0.0, 1.0, 2.0])),
                samples=data.draw(st.sampled_from([10, 20])),
                tuned=data.draw(st.booleans()),
                frechet=figure, kid=figure, sliced_wasserstein=None, alignment=share,
            )
        )  # fmt: skip
    found = judge([], records)
    for of in found:
        texts = [summary(of, shared_by_all(found)).sentence]
        texts += [cell for v in of.verdicts if v.figures is not None for row in v.figures.rows for cell in row]
        assert not [text for text in texts if re.search(r"\b(nan|inf|None)\b", text)]
        for verdict in of.verdicts:
            assert verdict.sentence.startswith("needs " if verdict.finding == "not measured" else "in this closed")


# The command


def test_the_command_reads_qualities_alone_and_beside_times(
    run: Any, tmp_path: Path, make_quality: Make, make_record: MakeRecord
) -> None:
    QualityStore(tmp_path / "quality.jsonl").append(*world(make_quality, steps=(1, 3, 25, 50)))
    alone = run("claims", tmp_path)
    assert alone.code == 0, alone.err
    assert "in this closed world" in alone.out
    (tmp_path / "records.jsonl").write_text("".join(r.model_dump_json() + "\n" for r in times(make_record)))
    told = json.loads(run("claims", tmp_path, "--json").out)
    claim = next(claim for claim in told["claims"] if claim["id"] == "small-wins-at-budget")
    of_quality = [verdict for verdict in claim["verdicts"] if "world" in verdict["conditions"]]
    assert len(of_quality) == 6
    assert of_quality[0]["judged"]["limit"] == 0.0
    assert of_quality[0]["judged"]["holds"] == "above"
    report = run("report", tmp_path, "-o", tmp_path / "page.html")
    assert report.code == 0, report.err
    assert "small-wins-at-budget: holds in" in " ".join(report.out.split())
    assert "in this closed world" in (tmp_path / "page.html").read_text().lower()

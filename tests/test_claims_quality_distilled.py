"""Verdicts on distilled networks in a closed world: the order of sizes, and the undistilled that is as good."""

from __future__ import annotations

import math

import pytest
from quality_worlds import (
    METRICS,
    NETWORKS,
    Make,
    MakeRecord,
    as_the_paper_says,
    judged,
    rows,
    students,
    times,
    world,
)

from ldmperf.profiling.claims.verdict import Verdict
from ldmperf.profiling.quality import QualityRecord

CLAIM = "distillation-keeps-trend"


def by_question(verdicts: tuple[Verdict, ...]) -> dict[tuple[str, str], Verdict]:
    """By "order" or "match", and metric."""
    found = {
        ("order" if v.conditions["question"] == "order of sizes" else "match", v.conditions["metric"]): v
        for v in verdicts
    }
    assert len(found) == len(verdicts)
    return found


def distilled(
    make_quality: Make, largest: float = 1.0, noise: float = 1e-3, **changes: object
) -> list[QualityRecord]:
    """Students as far as 16 undistilled steps, by hand the largest as far as told."""
    made = students(
        make_quality,
        lambda name: largest if name == "w32" else as_the_paper_says(name, 16),
        noise=noise,
        **changes,
    )
    return [*world(make_quality, noise=noise), *made]


def test_students_in_the_order_of_their_teachers_hold(make_quality: Make) -> None:
    found = by_question(judged(distilled(make_quality, 0.9), CLAIM))
    assert [*found] == [(question, metric) for question in ("order", "match") for metric in METRICS]
    for metric in METRICS:
        verdict = found["order", metric]
        assert (verdict.finding, verdict.sizes) == ("holds", 5)
        assert (
            "100% of 10 pairs of networks that differ beyond noise, distilled or not, have the same order both "
            in (verdict.sentence)
        )
        assert "distilled w32, w24, w16, w12, w8, undistilled w32, w24, w16, w12, w8" in verdict.sentence
        assert "budget" not in verdict.conditions


def test_an_order_that_turns_round_does_not_hold_and_none_is_needed(make_quality: Make) -> None:
    family = world(make_quality, noise=1e-3)
    turned = students(make_quality, lambda name: NETWORKS[name], noise=1e-3)
    found = by_question(judged([*family, *turned], CLAIM))
    assert found["order", "KID"].finding == "does not hold"
    assert "0% of 10 pairs" in found["order", "KID"].sentence
    # The two largest change places within noise.
    swapped = {"w8": 5.0, "w12": 3.0, "w16": 2.0, "w24": 1.0, "w32": 1.02}
    near = students(make_quality, swapped.__getitem__, noise=0.05)
    wide = world(make_quality, lambda name, steps: 10 / NETWORKS[name], noise=1e-3)
    close = [*wide, *near]
    assert by_question(judged(close, CLAIM))["order", "Frechet distance"].finding == "undecided"
    flat = [*world(make_quality, lambda n, s: 1.0), *students(make_quality, lambda n: 1.0)]
    verdict = by_question(judged(flat, CLAIM))["order", "KID"]
    assert verdict.finding == "not measured"
    assert verdict.sentence.startswith(
        "needs two networks, distilled and not, with 4 steps, that differ beyond noise"
    )
    assert "none of 10 pairs does" in verdict.sentence


def test_an_undistilled_smaller_network_at_cost_8_is_as_good(make_quality: Make) -> None:
    """By hand: 8 steps of the w32 cost 256 GFLOP, which buy 50 of the w12: 0.2 + 0.5 / 1.5 + 10 / 50."""
    verdict = by_question(judged(distilled(make_quality), CLAIM))["match", "Frechet distance"]
    assert verdict.finding == "holds"
    assert verdict.judged is not None
    assert verdict.judged.interval.value == pytest.approx(math.log(1.0 / (0.4 + 1 / 3)))
    said = (
        "in this closed world, at the cost of 8 steps of the undistilled w32, 4.00x the cost of the student, the "
        "best undistilled smaller network, the w12 with 50 steps, has a Frechet distance of 0.7333, the w32 "
        "distilled to 4 of 1 (1.36x, interval "
    )
    assert verdict.sentence.startswith(said)
    assert "a bound over 4 smaller networks; above 1 the undistilled one is as good" in verdict.sentence
    # At 4 steps the w8 affords 50, which have 0.9; 16 steps of the w32 cost 512 GFLOP, the student 64.
    assert "a smaller one is as good at the cost of 4 steps first" in verdict.sentence
    assert (
        "the student's 4 steps are as good as 16 of its undistilled network, 8.00x their speed" in verdict.sentence
    )
    (last,) = (row for row in rows(verdict) if row["network"] == "w32")
    assert (last["Frechet distance, distilled to 4"], last["undistilled with 4"]) == ("1", "2.825")
    assert (last["undistilled steps as good"], last["speed-up"]) == ("16", "8.00x")
    assert last["gain"].startswith("2.83x, interval ")


def test_a_student_that_none_reaches_does_not_hold_and_noise_leaves_it_open(make_quality: Make) -> None:
    verdict = by_question(judged(distilled(make_quality, 0.3), CLAIM))["match", "sliced Wasserstein"]
    assert verdict.finding == "does not hold"
    assert "a smaller one is as good at none of the budgets" in verdict.sentence
    assert "the student's 4 steps are better than its undistilled network's up to 50" in verdict.sentence
    even = by_question(judged(distilled(make_quality, 0.4 + 1 / 3, noise=0.05), CLAIM))
    assert even["match", "Frechet distance"].finding == "undecided"


def test_what_is_missing_is_needed(make_quality: Make) -> None:
    records = distilled(make_quality)
    without = [r for r in records if (r.case.kind, r.case.network) != ("distilled", "w32")]
    found = by_question(judged(without, CLAIM))
    assert found["match", "KID"].sentence.startswith("needs the w32 distilled to 4 steps")
    assert "of 6 pairs" in found["order", "KID"].sentence
    no_budget = [r for r in records if (r.case.network, r.case.steps) != ("w32", 8)]
    verdict = by_question(judged(no_budget, CLAIM))["match", "KID"]
    assert verdict.finding == "not measured"
    assert verdict.sentence.startswith(
        "needs 8 steps of the undistilled w32 and a smaller network of the same seeds"
    )
    in_two = [*world(make_quality), *students(make_quality, lambda name: 1.0, steps=2)]
    (verdict,) = judged(in_two, CLAIM)
    assert verdict.sentence.startswith("needs students of 4 steps, of the networks that are there undistilled")
    assert rows(verdict)[0] == {"network": "w8", "steps": "2"}
    assert judged(world(make_quality), CLAIM) == ()
    assert judged([r for r in records if r.case.kind == "distilled"], CLAIM)[0].finding == "not measured"


def test_students_stand_beside_undistilled_networks_of_their_seeds(make_quality: Make) -> None:
    """A second training of the family was a bad one, which nobody distilled."""
    bad = world(make_quality, lambda name, steps: 9.0, seeds=(1,))
    both, one = (by_question(judged([*distilled(make_quality), *more], CLAIM)) for more in (bad, []))
    for question, metric in one:
        first, second = both[question, metric], one[question, metric]
        assert first.judged == second.judged
        assert "one training seed" in first.sentence


def test_a_student_costs_its_teachers_steps_without_guidance(make_quality: Make, make_record: MakeRecord) -> None:
    """A step of either takes as long where launches bind: 8 steps of the w32 buy 8 of any, and 4 are 4."""
    timed = times(make_record, lambda name: 10.0, steps=(4, 8, 16))
    timed += times(make_record, lambda name: 10.0, steps=(4, 8), guidance_scale=1.0)
    found = judged(distilled(make_quality), CLAIM, timed)
    of_time = [v for v in found if v.conditions.get("budget", "").startswith("ms")]
    assert [v.conditions["metric"] for v in of_time] == [*METRICS]
    for verdict in of_time:
        assert verdict.finding == "does not hold"
        assert "2.00x the cost of the student" in verdict.sentence
        assert (
            "the student's 4 steps are as good as 16 of its undistilled network, 4.00x their speed"
            in verdict.sentence
        )
        assert "distilled networks take the times of their teachers' steps" in verdict.sentence
    # Without times of unguided steps the student's cost is not known, and not guessed.
    guided = times(make_record, lambda name: 10.0, steps=(4, 8, 16))
    verdict = next(
        v for v in judged(distilled(make_quality), CLAIM, guided) if "ms" in v.conditions.get("budget", "")
    )
    assert "the cost of the student" not in verdict.sentence
    assert "their speed" not in verdict.sentence


def test_a_failed_training_of_a_network_that_several_budgets_afford_is_one(make_quality: Make) -> None:
    """The w12 with 50 steps is the best that 8, 12 and 16 steps of the w32 buy: it alone is worth anything."""

    def value(name: str, steps: int) -> float:
        return 0.5 if (name, steps) == ("w12", 50) else as_the_paper_says(name, steps)

    family = world(make_quality, value, seeds=(0, 1), noise=1e-3)
    failed = [r for r in family if (r.case.network, r.case.steps, r.case.training_seed) == ("w12", 50, 1)]
    error = make_quality("w12", 50, training_seed=1, status="error")
    made = students(make_quality, lambda name: 1.0, seeds=(0, 1), noise=1e-3)
    records = [*(r for r in family if r not in failed), error, *made]
    verdict = by_question(judged(records, CLAIM))["match", "Frechet distance"]
    assert "the w12 with 50 steps, has" in verdict.sentence
    assert "; 1 training seed of its cells failed and is left out" in verdict.sentence


def test_the_advantage_of_the_best_of_several_is_a_bound_over_them(make_quality: Make) -> None:
    """Of four smaller networks each interval holds at 98.75 %: wider than the one of the best alone."""
    everyone = distilled(make_quality, noise=0.05)
    alone = [r for r in everyone if r.case.network in ("w12", "w32")]
    found = [by_question(judged(records, CLAIM))["match", "Frechet distance"] for records in (everyone, alone)]
    of_all, of_one = (verdict.judged.interval for verdict in found if verdict.judged is not None)
    assert of_all.value == of_one.value
    assert of_all.low < of_one.low - 0.01
    assert "a bound over 4 smaller networks" in found[0].sentence
    assert "a bound over 1 smaller network;" in found[1].sentence


def test_a_network_that_is_just_as_good_is_as_good(make_quality: Make) -> None:
    verdict = by_question(judged(distilled(make_quality, as_the_paper_says("w32", 16)), CLAIM))["match", "KID"]
    assert "the student's 4 steps are as good as 16 of its undistilled network" in verdict.sentence

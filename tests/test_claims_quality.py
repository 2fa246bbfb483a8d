"""Verdicts on budgets in a closed world, on records built to hold, to fail, to be undecided and to be too few."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta

import pytest
from quality_worlds import (
    METRICS,
    NETWORKS,
    Make,
    MakeRecord,
    as_the_paper_says,
    by_metric,
    estimate,
    judged,
    rows,
    times,
    world,
)

from ldmperf.profiling import Case, Record
from ldmperf.profiling.claims import judge
from ldmperf.profiling.claims.summary import left_open, only_timed, shared_by_all, summaries, summary
from ldmperf.profiling.claims.verdict import ClaimVerdicts, Finding, Judged, Verdict
from ldmperf.profiling.measure.intervals import Interval
from ldmperf.profiling.quality import QualityRecord

# Budgets


def test_a_family_as_the_papers_holds_under_every_metric(make_quality: Make) -> None:
    """By hand: 3 steps of the w32 cost 96 GFLOP, which buy the w8 25 of its 48 and the w12 16 of its 21."""
    found = by_metric(judged(world(make_quality), "small-wins-at-budget"))
    assert tuple(found) == METRICS
    for verdict in found.values():
        assert (verdict.finding, verdict.sizes, verdict.samples) == ("holds", 5, 2048)
        assert verdict.sentence.startswith(
            "in this closed world, at the cost of 3 steps of the w32, the best smaller "
        )
        assert "the w8 with 25 steps" in verdict.sentence
        assert "one training seed" in verdict.sentence
        assert verdict.conditions["budget"] == "FLOPs"
    frechet = found["Frechet distance"]
    assert frechet.judged is not None
    # 0.2 + 0.5 + 10 / 25 against 0.2 + 0.5 / 4 + 10 / 3.
    assert frechet.judged.interval.value == pytest.approx(math.log((0.325 + 10 / 3) / 1.1))
    three = next(row for row in rows(frechet) if row["steps of w32"] == "3")
    assert (three["best smaller"], three["its steps"], three["better"]) == ("w8", "25", "w8")
    assert (three["GFLOP per image"], three["its Frechet distance"]) == ("96.00", "1.1")
    assert three["advantage"].startswith("3.33x, interval 3.")
    large = by_metric(judged(world(make_quality), "large-wins-relaxed"))
    assert {verdict.finding for verdict in large.values()} == {"holds"}
    sentence = large["Frechet distance"].sentence
    assert "at the cost of 50 steps of the w32, the largest budget, the best smaller network, the w24" in sentence
    assert "more steps than were measured of w8, w12, w16, w24" in sentence


def test_small_that_never_wins_does_not_hold_and_large_that_loses_neither(make_quality: Make) -> None:
    flat = world(make_quality, lambda name, steps: 10.0 / NETWORKS[name] ** 0.5)
    small = by_metric(judged(flat, "small-wins-at-budget"))
    assert {verdict.finding for verdict in small.values()} == {"does not hold"}
    assert "beyond noise at 0 of 10 budgets, the w32 at 10" in small["KID"].sentence
    turned = world(make_quality, lambda name, steps: NETWORKS[name] ** 0.5 + 10.0 / steps)
    large = by_metric(judged(turned, "large-wins-relaxed"))
    assert {verdict.finding for verdict in large.values()} == {"does not hold"}


def test_the_largest_has_to_beat_each_smaller_network(make_quality: Make) -> None:
    """One of four is better than it: the others, which are worse, do not help."""
    odd = world(
        make_quality, lambda name, steps: {"w8": 9.0, "w12": 8.0, "w16": 7.0, "w24": 1.0, "w32": 2.0}[name]
    )
    for verdict in judged(odd, "large-wins-relaxed"):
        assert verdict.finding == "does not hold"
        assert "the w24 with " in verdict.sentence


def test_noise_as_large_as_the_difference_is_undecided(make_quality: Make) -> None:
    same = world(make_quality, lambda name, steps: 1.0, noise=0.1)
    for claim in ("small-wins-at-budget", "large-wins-relaxed"):
        for verdict in judged(same, claim):
            assert verdict.finding == "undecided"
            assert verdict.judged is not None
            assert verdict.judged.interval.low < 0 < verdict.judged.interval.high


def test_metrics_that_disagree_are_told_and_not_averaged(make_quality: Make) -> None:
    records = world(make_quality, frechet=lambda name, steps: 10.0 / NETWORKS[name] ** 0.5)
    assert {
        name: verdict.finding for name, verdict in by_metric(judged(records, "small-wins-at-budget")).items()
    } == {
        "Frechet distance": "does not hold",
        "KID": "holds",
        "sliced Wasserstein": "holds",
    }
    told = {one.claim.id: one for one in summaries(judge([], records))}["small-wins-at-budget"]
    assert told.finding is None
    assert told.sentence.startswith(
        "holds in 2 of 3 sets of conditions (KID / sliced Wasserstein; FLOPs); "
        "does not hold in 1 of 3 sets of conditions (Frechet distance; FLOPs); most clearly "
    )


def test_a_study_that_has_only_begun_is_told_what_it_lacks(make_quality: Make) -> None:
    """Not times of the paper's sizes alone, which its owner does not look for."""
    begun = world(make_quality, split="held-out", tuned=False)
    of = {one.claim.id: one.verdicts for one in judge([], begun)}
    for claim in ("small-wins-at-budget", "distillation-keeps-trend", "single-shot-cheaper"):
        (verdict,) = of[claim]
        assert verdict.sentence.endswith("judged on test prompts, at the guidance tuned for them")
    assert not [one for one in judge([], []) if "closed world" in one.verdicts[0].sentence]


@pytest.mark.parametrize("finding", ["not measured", "undecided"])
def test_what_is_decided_is_told_however_many_times_decide_nothing(finding: Finding, make_quality: Make) -> None:
    decided = judged(world(make_quality), "small-wins-at-budget")[0]
    timed = Verdict(decided.claim, finding, "needs quality; timing says: nothing", {"batch": "batch 1"})
    others = [replace(timed, conditions={"batch": f"batch {n}"}) for n in range(2, 7)]
    told = summary(ClaimVerdicts(decided.claim, (timed, decided, *others)), {})
    assert told.sentence.startswith("holds in 1 of 7 sets of conditions")
    assert told.told == decided.sentence
    assert summary(ClaimVerdicts(decided.claim, (timed, *others)), {}).told == timed.sentence


def test_kid_below_zero_is_judged_by_differences(make_quality: Make) -> None:
    """The best of them lies below zero, as an unbiased estimate may."""
    found = by_metric(judged(world(make_quality, kid_offset=-0.015), "small-wins-at-budget"))
    kid = found["KID"]
    assert kid.finding == "holds"
    assert kid.judged is not None
    assert kid.judged.interval.value == pytest.approx(0.01 * (0.325 + 10 / 3 - 1.1))
    assert "has a KID of -0.004, " in kid.sentence
    assert found["Frechet distance"].finding == "holds"
    below = rows(by_metric(judged(world(make_quality, kid_offset=-0.5), "large-wins-relaxed"))["KID"])
    assert all(float(row["KID of w32"]) < 0 for row in below)


def test_the_papers_budget_is_needed(make_quality: Make) -> None:
    records = world(make_quality, steps=(4, 50))
    for verdict in judged(records, "small-wins-at-budget"):
        assert verdict.finding == "not measured"
        assert verdict.sentence.startswith(
            "needs 3 steps of the w32, the paper's budget; a smaller network is better "
        )
        assert [row["steps of w32"] for row in rows(verdict)] == ["4", "50"]
    told = judge([], records)
    assert "small-wins-at-budget" in left_open(told)
    assert "small-wins-at-budget" not in only_timed(told)
    # The largest budget is the most there is.
    assert "50 steps of the w32, the largest" in judged(records, "large-wins-relaxed")[0].sentence


def test_the_best_steps_are_chosen_on_held_out_prompts(make_quality: Make) -> None:
    """More steps are worse on held-out prompts: the few are taken. Without these the most steps are, whatever the
    prompts that judge say."""

    def odd(network: str, steps: int) -> float:
        return 0.5 if (network, steps) == ("w8", 4) else as_the_paper_says(network, steps)

    test = world(make_quality, odd)
    assert "the w8 with 25 steps" in judged(test, "small-wins-at-budget")[0].sentence
    held_out = world(make_quality, odd, split="held-out")
    assert "the w8 with 4 steps" in judged([*test, *held_out], "small-wins-at-budget")[0].sentence
    # Of these prompts nothing else is taken.
    lucky = world(
        make_quality, lambda name, steps: as_the_paper_says(name, steps) / NETWORKS[name], split="held-out"
    )
    found, alone = (judged(of, "large-wins-relaxed") for of in ([*test, *lucky], test))
    assert found == alone


def test_only_tuned_records_of_the_whole_training_are_used(make_quality: Make) -> None:
    good = world(make_quality)
    untuned = world(make_quality, lambda name, steps: 0.01, guidance_scale=1.5, tuned=False)
    early = world(make_quality, lambda name, steps: 0.01, training_steps=5)
    failed = [make_quality("w8", 40, status="error", training_seed=3)]
    assert judge([], [*good, *untuned, *early, *failed])[2] == judge([], good)[2]


def test_the_bound_is_over_all_smaller_networks(make_quality: Make) -> None:
    """The best of several is chosen by the samples that judge it: its interval is wider than that of one alone."""
    alone = judged(world(make_quality, networks=("w8", "w32")), "small-wins-at-budget")[0]
    several = judged(world(make_quality), "small-wins-at-budget")[0]
    assert alone.judged is not None
    assert several.judged is not None
    assert alone.judged.interval.value == several.judged.interval.value
    assert several.judged.interval.low < alone.judged.interval.low
    assert "a bound over 4 smaller networks" in several.sentence
    assert "judged on 2 networks only (w8, w32)" in alone.sentence


def test_what_is_compared_with_zero_has_its_distance_in_widths() -> None:
    """The verdict that is told first is the farthest from its limit."""
    assert Judged("a difference", Interval(1.0, 3.0, 5.0), 0.0, above=True).distance == 0.75
    assert Judged("a difference", Interval(3.0, 3.0, 3.0), 0.0).distance == 0.0


def test_few_replicates_and_none_say_so(make_quality: Make) -> None:
    few = judged(world(make_quality, count=20), "small-wins-at-budget")[0]
    assert few.finding == "holds"
    assert "with 20 replicates the interval has 90% confidence" in few.sentence
    none = judged(world(make_quality, count=0), "small-wins-at-budget")[0]
    assert none.finding == "undecided"
    assert "records without replicates decide nothing" in none.sentence


# Seeds


def test_seeds_that_differ_more_than_samples_widen_the_interval(make_quality: Make) -> None:
    one = judged(world(make_quality, between=0.3), "small-wins-at-budget")[0]
    three = judged(world(make_quality, between=0.3, seeds=(0, 1, 2)), "small-wins-at-budget")[0]
    assert "; one training seed" in one.sentence
    assert "; 3 training seeds" in three.sentence
    assert one.judged is not None
    assert three.judged is not None
    width = [v.judged.interval.high - v.judged.interval.low for v in (one, three) if v.judged]
    assert width[1] > 2 * width[0]
    mixed = world(make_quality, networks=("w8",), seeds=(0, 1)) + world(make_quality, networks=("w32",))
    assert "; 1 to 2 training seeds" in judged(mixed, "small-wins-at-budget")[0].sentence


def test_seeds_are_pooled_by_the_mean_of_logarithms(make_quality: Make) -> None:
    records = world(make_quality, lambda name, steps: 1.0 if name == "w8" else 5.0, networks=("w8", "w32"))
    records += world(make_quality, lambda name, steps: 4.0, seeds=(1,), networks=("w8",))
    found = by_metric(judged(records, "small-wins-at-budget"))
    assert found["Frechet distance"].judged is not None
    assert found["Frechet distance"].judged.interval.value == pytest.approx(math.log(5.0 / 2.0))
    assert found["KID"].judged is not None
    assert found["KID"].judged.interval.value == pytest.approx(0.01 * (5.0 - 2.5))


# Time


def test_without_times_flops_alone_are_judged_and_times_add_budgets(
    make_quality: Make, make_record: MakeRecord
) -> None:
    qualities = world(make_quality)
    records = times(make_record) + times(make_record, batch=64)
    found = judged(qualities, "small-wins-at-budget", records)
    assert {
        verdict.conditions["budget"].partition(",")[0] for verdict in judged(qualities, "small-wins-at-budget")
    } == {"FLOPs"}
    budgets = [verdict.conditions["budget"] for verdict in found]
    assert len(found) == 9
    assert sum(budget.startswith("ms, batch 1, ") for budget in budgets) == 3
    assert sum(budget.startswith("ms per image, batch 64, ") for budget in budgets) == 3
    timed = next(verdict for verdict in found if verdict.conditions["budget"].startswith("ms, batch 1"))
    assert "some times are predicted from other step counts" in timed.sentence
    many = next(verdict for verdict in found if verdict.conditions["budget"].startswith("ms per image, batch 64"))
    assert [row["ms per image"] for row in rows(many)] == [row["ms per image"] for row in rows(timed)]
    three = next(row for row in rows(timed) if row["steps of w32"] == "3")
    assert float(three["ms per image"]) == pytest.approx(48.0, rel=1e-3)
    assert three["its steps"] == "25"


def test_where_a_step_costs_the_same_small_does_not_win(make_quality: Make, make_record: MakeRecord) -> None:
    """Launch-bound: every network's step takes 10 ms, so that 3 steps buy 3 of any. By FLOPs small wins."""
    records = times(make_record, lambda name: 10.0)
    found = judged(world(make_quality, noise=1e-4), "small-wins-at-budget", records)
    told = {(v.conditions["budget"].partition(",")[0], v.conditions["metric"]): v.finding for v in found}
    assert told["FLOPs", "Frechet distance"] == "holds"
    assert told["ms", "Frechet distance"] == "does not hold"


def test_times_of_another_sampler_stand_in_and_the_sentence_says_so(
    make_quality: Make, make_record: MakeRecord
) -> None:
    qualities = world(make_quality, sampler="dpmpp_2m")
    own = times(make_record, sampler="dpmpp_2m")

    def of_time(records: Sequence[Record]) -> Verdict:
        found = judged(qualities, "small-wins-at-budget", records)
        return next(verdict for verdict in found if verdict.conditions["budget"].startswith("ms"))

    assert "ddim's times stand in for those of dpmpp_2m" in of_time(times(make_record)).sentence
    assert "stand in" not in of_time(times(make_record) + own).sentence
    # Times without guidance say nothing of a guided sampler.
    without = times(make_record, guidance_scale=1.0)
    assert len(judged(qualities, "small-wins-at-budget", without)) == 3
    # An unlike network's times neither.
    assert len(judged(qualities, "small-wins-at-budget", times(make_record, networks=("w8",)))) == 3


def test_a_stitched_trajectory_costs_its_steps_and_begins_once(
    make_quality: Make, make_record: MakeRecord
) -> None:
    """12 steps of the w8 and one of the w32: 5 + 12 + 16 ms, which 2 steps of the w32 afford, 1 does not."""
    stitched = make_quality(kind="stitched", steps=13, takes=(("w8", 12), ("w32", 1)), gflop_per_image=56.0,
                            frechet=estimate(0.7))  # fmt: skip
    qualities = [*world(make_quality), stitched]
    found = judged(qualities, "small-wins-at-budget", times(make_record, fixed=5.0))
    timed = next(verdict for verdict in found if verdict.conditions["budget"].startswith("ms"))
    best = {row["steps of w32"]: row["best of another kind"] for row in rows(timed)}
    assert (best["1"], best["2"], best["3"]) == ("-", "w8x12+w32x1 (stitched)", "w8x12+w32x1 (stitched)")
    dear = judged(qualities, "small-wins-at-budget", times(make_record, fixed=5.0, ms=lambda n: 30 * NETWORKS[n]))
    timed = next(verdict for verdict in dear if verdict.conditions["budget"].startswith("ms"))
    assert {row["steps of w32"]: row["best of another kind"] for row in rows(timed)}["1"] == "-"
    # It wins nothing: it is told.
    assert {v.finding for v in found} == {v.finding for v in judged(world(make_quality), "small-wins-at-budget")}


def test_another_kind_is_told_beside_the_same_trainings(make_quality: Make) -> None:
    """One training of three was lucky: what was stitched of it is behind the w8 of that training."""
    luck = {0: 0.5, 1: 2.0, 2: 2.0}

    def trained(seed: int) -> list[QualityRecord]:
        return world(make_quality, lambda name, steps: luck[seed] * as_the_paper_says(name, steps), seeds=(seed,))

    family = [record for seed in luck for record in trained(seed)]
    stitched = make_quality(kind="stitched", steps=13, takes=(("w8", 12), ("w32", 1)), gflop_per_image=56.0,
                            frechet=estimate(1.0), training_seed=0)  # fmt: skip
    verdict = by_metric(judged([*family, stitched], "small-wins-at-budget"))["Frechet distance"]
    three = next(row for row in rows(verdict) if row["steps of w32"] == "3")
    # The w8 with 25 steps has 1.1 by the law, times the geometric mean of the three.
    assert float(three["its Frechet distance"]) == pytest.approx(1.1 * 2 ** (1 / 3), rel=1e-3)
    assert three["that one's Frechet distance"] == "1"
    assert float(three["the better single one's at its seeds"]) == pytest.approx(0.55)


def test_cells_of_unlike_numbers_of_samples_are_told(make_quality: Make) -> None:
    few, many = (world(make_quality, networks=(n,), samples=s) for n, s in (("w8", 500), ("w32", 2000)))
    sentence = judged([*few, *many], "small-wins-at-budget")[0].sentence
    assert "compared are 500 to 2000 samples: Frechet and Wasserstein distances of fewer are larger" in sentence
    assert "compared are" not in judged(world(make_quality), "small-wins-at-budget")[0].sentence


def test_real_samples_are_told(make_quality: Make) -> None:
    real = make_quality("real", 1, kind="real", sampler="none", frechet=estimate(0.011), alignment=estimate(0.97))
    verdict = judged([*world(make_quality), real], "small-wins-at-budget")[0]
    assert rows(verdict)[-1]["steps of w32"] == "real samples"
    assert rows(verdict)[-1]["Frechet distance of w32"] == "0.011"


def test_real_samples_that_went_through_tokens_are_no_floor(make_quality: Make) -> None:
    tokens = make_quality("real-tokens", 1, kind="real", sampler="none", frechet=estimate(0.7))
    (verdict, *_) = judged([*world(make_quality), tokens], "small-wins-at-budget")
    assert "real samples" not in {row["steps of w32"] for row in rows(verdict)}


def test_the_papers_verdicts_by_time_stay(make_quality: Make, make_record: MakeRecord) -> None:
    """Miniature networks among the records change no verdict of the paper's sizes."""
    paper = [make_record(Case(unet=name, steps=n)) for name in ("39M", "83M", "866M") for n in (4, 20, 50)]
    alone = judge(paper)
    beside = judge([*paper, *times(make_record)], world(make_quality))
    for before, after in zip(alone, beside, strict=True):
        of_paper = [
            v for v in after.verdicts if not v.is_of_quality and v.conditions.get("latent") != "latent 8x8"
        ]
        if before.has_figures:
            assert of_paper[: len(before.verdicts)] == list(before.verdicts)


# Which records


def test_worlds_and_tasks_are_judged_apart(make_quality: Make) -> None:
    one, other = world(make_quality), world(make_quality, lambda n, s: 10.0 / NETWORKS[n], world="scenes-16x16-v1")
    found = judged([*one, *other], "small-wins-at-budget")
    assert [verdict.finding for verdict in found] == 3 * ["does not hold"] + 3 * ["holds"]
    assert found[3:] == judged(one, "small-wins-at-budget")
    told = {one.claim.id: one for one in summaries(judge([], [*one, *other]))}["small-wins-at-budget"]
    assert "holds in 3 of 6 sets of conditions (closed world scenes-8x8-v1; " in told.sentence
    assert judged(world(make_quality, task="sr"), "small-wins-at-budget") == ()


def test_of_a_case_the_record_with_most_samples_counts_then_the_latest(make_quality: Make) -> None:
    good = world(make_quality)
    fewer = world(make_quality, lambda name, steps: 0.01, samples=100)
    assert judged([*good, *fewer], "small-wins-at-budget") == judged(good, "small-wins-at-budget")
    older = world(make_quality, lambda name, steps: 0.01, started_at=good[0].started_at - timedelta(days=1))
    assert judged([*good, *older], "small-wins-at-budget") == judged(good, "small-wins-at-budget")


def test_a_seed_that_is_tuned_to_two_rates_counts_once(make_quality: Make) -> None:
    good = world(make_quality)
    higher = world(make_quality, lambda name, steps: 0.01, guidance_scale=5.0)
    assert judged([*good, *higher], "small-wins-at-budget") == judged(good, "small-wins-at-budget")


def test_what_all_verdicts_share_is_told_once(make_quality: Make, make_record: MakeRecord) -> None:
    shared = shared_by_all(judge(times(make_record), world(make_quality)))
    assert shared["world"] == "closed world scenes-8x8-v1"
    assert shared["latent"] == "latent 8x8"
    assert "metric" not in shared
    assert "sampler" in shared
    other = judge(times(make_record, sampler="ddpm", steps=(4, 8, 20)), world(make_quality))
    assert "sampler" not in shared_by_all(other)

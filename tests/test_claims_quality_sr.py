"""Verdicts on super-resolution in a closed world: pre-training beside fine-tuning; small and large budgets."""

from __future__ import annotations

import math

import pytest
from quality_worlds import (
    METRICS,
    NETWORKS,
    Make,
    MakeRecord,
    by_metric,
    fine_tuned,
    judged,
    rows,
    times,
    world,
)

from ldmperf.profiling.claims import judge
from ldmperf.profiling.quality import QualityRecord

PRETRAINING = "pretraining-over-finetuning"
BUDGETS = "sr-small-wins-below-20"


def beginnings(pretrained: dict[int, float], scratch: dict[int, float]) -> object:
    """Alike for every network, but for its size."""
    of = {"diffusion": pretrained, "scratch": scratch}
    return lambda kind, name, trained: of[kind][trained] / NETWORKS[name] ** 0.1


# Pre-training


def test_pretraining_that_is_worth_more_than_longer_fine_tuning_holds(make_quality: Make) -> None:
    """By hand: from scratch 4x as far after 1000 steps, pre-trained 2x as far after 100: 2x beyond it."""
    value = beginnings({100: 2.0, 300: 1.4, 1000: 1.0}, {100: 40.0, 300: 9.0, 1000: 4.0})
    found = by_metric(judged(fine_tuned(make_quality, value), PRETRAINING))
    assert tuple(found) == METRICS
    for verdict in found.values():
        assert (verdict.finding, verdict.sizes) == ("holds", 5)
        assert verdict.conditions["task"] == "super-resolution"
        assert "in this closed world, at 16 steps of sampling the " in verdict.sentence
        assert "a bound over 5 networks; above " in verdict.sentence
        assert "one training seed" in verdict.sentence
    frechet = found["Frechet distance"]
    assert frechet.judged is not None
    assert frechet.judged.interval.value == pytest.approx(math.log(4.0 / 2.0))
    assert "from drawn weights after as many (4.00x)" in frechet.sentence
    assert "when fine-tuned for 100 only (2.00x)" in frechet.sentence
    assert found["KID"].judged is not None
    # 4 - 1 less 2 - 1, of the largest network, whose distances are the smallest.
    assert found["KID"].judged.interval.value == pytest.approx(0.01 * (4.0 - 2.0) / 16**0.1)
    told = rows(frechet)
    assert [(row["network"], row["began with"]) for row in told[:2]] == [
        ("w8", "text-to-image"),
        ("w8", "drawn weights"),
    ]
    assert [told[0][f"Frechet distance after {n}"] for n in (100, 300, 1000)] == ["2", "1.4", "1"]
    assert [told[1][f"Frechet distance after {n}"] for n in (100, 300, 1000)] == ["40", "9", "4"]
    assert (told[0]["pre-training"], told[0]["fine-tuning longer"]) == ("4.00x", "2.00x")
    assert told[0]["the former beyond it"].startswith("2.00x, interval ")


def test_fine_tuning_that_is_worth_more_does_not_hold_and_noise_leaves_it_open(make_quality: Make) -> None:
    less = beginnings({100: 4.0, 1000: 1.0}, {100: 9.0, 1000: 2.0})
    for verdict in judged(fine_tuned(make_quality, less, trained=(100, 1000)), PRETRAINING):
        assert verdict.finding == "does not hold"
    even = beginnings({100: 2.0, 1000: 1.0}, {100: 9.0, 1000: 2.0})
    records = fine_tuned(make_quality, even, trained=(100, 1000), noise=0.1)
    assert {verdict.finding for verdict in judged(records, PRETRAINING)} == {"undecided"}


def test_fine_tuning_that_makes_worse_is_no_merit_of_pretraining(make_quality: Make) -> None:
    """From scratch is as good after the longest; the pre-trained network was better after the shortest."""
    value = beginnings({100: 1.0, 1000: 2.0}, {100: 9.0, 1000: 2.0})
    for verdict in judged(fine_tuned(make_quality, value, trained=(100, 1000)), PRETRAINING):
        assert verdict.finding == "does not hold"
        assert verdict.judged is not None
        assert verdict.judged.interval.value < 0


def test_the_network_that_pretraining_helps_least_decides(make_quality: Make) -> None:
    def value(kind: str, name: str, trained: int) -> float:
        scratch = 1.5 if name == "w16" else 8.0
        return scratch if kind == "scratch" else {100: 2.0, 1000: 1.0}[trained]

    for verdict in judged(fine_tuned(make_quality, value, trained=(100, 1000)), PRETRAINING):
        assert verdict.finding == "does not hold"
        assert "at 16 steps of sampling the w16 has" in verdict.sentence


def test_beginnings_are_compared_at_the_trainings_that_both_have(make_quality: Make) -> None:
    """A second training of the pre-trained networks alone was a bad one."""
    value = beginnings({100: 2.0, 1000: 1.0}, {100: 9.0, 1000: 4.0})
    once = fine_tuned(make_quality, value, trained=(100, 1000))
    bad = fine_tuned(make_quality, lambda *_: 50.0, trained=(100, 1000), kinds=("diffusion",), seeds=(1,))
    one, both = (by_metric(judged(records, PRETRAINING)) for records in (once, [*once, *bad]))
    for metric in METRICS:
        assert both[metric].finding == "holds"
        assert both[metric].judged == one[metric].judged
        assert "one training seed" in both[metric].sentence
    # Without a training in common nothing is compared.
    moved = [r for r in bad if r.case.kind == "diffusion"] + [r for r in once if r.case.kind == "scratch"]
    assert {verdict.finding for verdict in judged(moved, PRETRAINING)} == {"not measured"}


def test_pretraining_needs_both_beginnings_and_two_times(make_quality: Make) -> None:
    value = beginnings({100: 2.0, 1000: 1.0}, {100: 9.0, 1000: 8.0})
    whole = fine_tuned(make_quality, value, trained=(100, 1000))
    alone = fine_tuned(make_quality, value, trained=(100, 1000), kinds=("diffusion",))
    once = fine_tuned(make_quality, value, trained=(1000,))
    for records in (alone, once):
        found = judged(records, PRETRAINING)
        assert [verdict.finding for verdict in found] == 3 * ["not measured"]
        assert found[0].sentence.startswith(
            "needs networks of super-resolution that were fine-tuned from text-to-"
        )
        assert "from drawn weights (scratch), for two numbers of training steps" in found[0].sentence
        assert rows(found[0])[0]["network"] == "w8"
    assert judged(fine_tuned(make_quality, value, trained=(100, 1000), task="t2i"), PRETRAINING) == ()
    # Of a network that lacks something the others are judged.
    short = [r for r in whole if (r.case.network, r.case.kind, r.case.training_steps) != ("w32", "scratch", 1000)]
    for verdict in judged(short, PRETRAINING):
        assert verdict.finding == "holds"
        assert "; not all of this is there of w32" in verdict.sentence
        assert "a bound over 4 networks" in verdict.sentence
    # Steps of sampling that only some have are not those that are judged.
    more = world(make_quality, task="sr", guidance_scale=1.0, training_steps=1000, steps=(1, 50))
    assert by_metric(judged([*whole, *more], PRETRAINING)) == by_metric(judged(whole, PRETRAINING))


def test_a_kid_below_zero_has_effects_too(make_quality: Make) -> None:
    value = beginnings({100: 2.0, 1000: 1.0}, {100: 9.0, 1000: 4.0})
    records = fine_tuned(make_quality, value, trained=(100, 1000), kid_offset=-0.02, networks=("w8",))
    kid = by_metric(judged(records, PRETRAINING))["KID"]
    assert kid.finding == "holds"
    assert kid.judged is not None
    assert kid.judged.interval.value == pytest.approx(0.01 * (4.0 - 2.0))


# Budgets


def crossing(network: str, steps: int) -> float:
    """The largest has a lower floor: 16 steps of it are worse than 50 of any other, 25 are better."""
    return (0.2 if network == "w32" else 0.5) + 10.0 / steps


def resolved(make_quality: Make, value: object = crossing, **changes: object) -> list[QualityRecord]:
    of_case = {"task": "sr", "guidance_scale": 1.0, "noise": 1e-3} | changes
    return world(make_quality, value, **of_case)


def test_small_up_to_20_steps_and_large_beyond_holds(make_quality: Make) -> None:
    found = by_metric(judged(resolved(make_quality), BUDGETS))
    assert tuple(found) == METRICS
    for verdict in found.values():
        assert (verdict.finding, verdict.sizes) == ("holds", 5)
        assert verdict.sentence.startswith(
            "in this closed world, up to 20 steps of the w32 a smaller network is better beyond noise at 8 of 8 "
            "budgets, worse at 0; beyond 20 steps of the w32 the w32 is better beyond noise at 2 of 2 budgets, "
        )
        assert "a bound over 4 smaller networks and 10 budgets" in verdict.sentence
    frechet = found["Frechet distance"]
    assert frechet.judged is not None
    # At 25 steps 0.5 + 10 / 50 against 0.2 + 10 / 25; the other budgets are farther apart.
    assert frechet.judged.interval.value == pytest.approx(math.log(0.7 / 0.6))
    assert (
        "the budgets beyond 20 steps decide, at the cost of 25 steps: the best smaller network, the w8 with 50 "
        in (frechet.sentence)
    )
    assert [row["better"] for row in rows(frechet)][-3:] == ["w8", "w32", "w32"]


def test_the_half_that_fails_decides(make_quality: Make) -> None:
    never = resolved(make_quality, lambda name, steps: 10.0 / NETWORKS[name] ** 0.5)
    always = resolved(make_quality, lambda name, steps: NETWORKS[name] ** 0.5 + 10.0 / steps)
    for records, half, lost in ((never, "up to", "worse at 8"), (always, "beyond", "worse at 2")):
        for verdict in judged(records, BUDGETS):
            assert verdict.finding == "does not hold"
            assert f"the budgets {half} 20 steps decide" in verdict.sentence
            assert lost in verdict.sentence


def test_one_lost_budget_is_enough_and_noise_leaves_it_open(make_quality: Make) -> None:
    def lucky(network: str, steps: int) -> float:
        return 0.3 if (network, steps) == ("w32", 12) else crossing(network, steps)

    held_out = resolved(make_quality, crossing, split="held-out")
    for verdict in judged([*resolved(make_quality, lucky), *held_out], BUDGETS):
        assert verdict.finding == "does not hold"
        assert "the budgets up to 20 steps decide, at the cost of 12 steps" in verdict.sentence
        assert "at 7 of 8 budgets, worse at 1" in verdict.sentence
    # The crossing lies within noise.
    open_ = judged(resolved(make_quality, noise=0.1), BUDGETS)
    assert {verdict.finding for verdict in open_} == {"undecided"}
    none = judged(resolved(make_quality, count=0), BUDGETS)
    assert {verdict.finding for verdict in none} == {"undecided"}
    assert "better beyond noise at 0 of 8 budgets, worse at 0" in none[0].sentence


def test_a_half_without_a_budget_is_needed_unless_the_other_fails(make_quality: Make) -> None:
    for steps, half in (((1, 4, 16, 49), "beyond"), ((25, 50), "up to")):
        for verdict in judged(resolved(make_quality, steps=steps), BUDGETS):
            assert verdict.finding == "not measured"
            assert verdict.sentence.startswith(f"needs a budget {half} 20 steps of the w32; ")
    lost = judged(resolved(make_quality, lambda n, s: 10.0 / NETWORKS[n] ** 0.5, steps=(1, 4)), BUDGETS)
    for verdict in lost:
        assert verdict.finding == "does not hold"
        assert "there is no budget beyond 20 steps, which would change nothing" in verdict.sentence
    # Without replicates nothing fails.
    unsure = resolved(make_quality, lambda n, s: 10.0 / NETWORKS[n] ** 0.5, steps=(1, 4), count=0)
    assert {verdict.finding for verdict in judged(unsure, BUDGETS)} == {"not measured"}


def test_scratch_and_shorter_training_are_no_part_of_the_family(make_quality: Make) -> None:
    alone = resolved(make_quality)
    scratch = resolved(make_quality, lambda name, steps: 0.01, kind="scratch")
    early = resolved(make_quality, lambda name, steps: 0.01, training_steps=100)
    assert judged([*alone, *scratch, *early], BUDGETS) == judged(alone, BUDGETS)
    # A world of text-to-image has this claim's verdicts no more than the other way round.
    t2i = world(make_quality)
    assert judged(t2i, BUDGETS) == ()
    assert judged([*alone, *t2i], "small-wins-at-budget") == judged(t2i, "small-wins-at-budget")
    larger = make_quality("w64", 16, kind="scratch", task="sr", guidance_scale=1.0, parameters=10**9)
    assert judged([*alone, larger], BUDGETS) == judged(alone, BUDGETS)
    assert judge([], scratch)[-1].findings == ("not measured",)


def test_times_of_super_resolution_are_another_budget(make_quality: Make, make_record: MakeRecord) -> None:
    """Launch-bound: a step of any takes as long, so that 3 steps of the largest buy 3 of any."""
    fields = {"task": "sr", "guidance_scale": 1.0}
    records = times(make_record, lambda name: 10.0, **fields)
    found = judged(resolved(make_quality), BUDGETS, records)
    told = {(v.conditions["budget"].partition(",")[0], v.conditions["metric"]): v for v in found}
    assert len(told) == 6
    assert told["FLOPs", "KID"].finding == "holds"
    assert told["ms", "KID"].finding == "does not hold"
    assert "the budgets up to 20 steps decide" in told["ms", "KID"].sentence
    assert "some times are predicted from other step counts" in told["ms", "KID"].sentence
    # Those of text-to-image are of other networks.
    assert len(judged(resolved(make_quality), BUDGETS, times(make_record, guidance_scale=1.0))) == 3

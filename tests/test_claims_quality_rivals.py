"""Verdicts on generators of other kinds in a closed world, beside a network of about as many parameters."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
from quality_worlds import (
    METRICS,
    Make,
    MakeRecord,
    by_metric,
    judged,
    rival,
    rows,
    times,
    world,
)

from ldmperf.profiling import Record
from ldmperf.profiling.claims.verdict import Verdict

CLAIM = "single-shot-cheaper"


def test_a_rival_between_few_steps_and_the_best_holds(make_quality: Make) -> None:
    """By hand: the w8, of 10,000 parameters, has 10.7 with a step and 0.9 with 50; from 6 on it is below 3."""
    found = by_metric(judged([*world(make_quality), rival(make_quality, 3.0)], CLAIM))
    assert tuple(found) == METRICS
    for verdict in found.values():
        assert (verdict.finding, verdict.sizes) == ("holds", 2)
        assert verdict.conditions["rival"] == "GAN"
    frechet = found["Frechet distance"]
    assert frechet.judged is not None
    assert frechet.judged.interval.value == pytest.approx(math.log(3.0 / 0.9))
    assert frechet.sentence.startswith(
        "in this closed world, the w8-gan with 1 step has a Frechet distance of 3, the w8, of about as many "
        "parameters, of 10.7 with 1 and of 0.9 with 50, its best; the first comparison speaks for fewer steps by "
        "3.57x, the second for more parameters by 3.33x; the one for more parameters decides (3.33x, interval "
    )
    assert "a bound over both and 1 rival; above 1 for both holds" in frechet.sentence
    assert "the w8 is as good with 6 steps; the smallest network that is as good is the w8" in frechet.sentence
    (row,) = rows(frechet)
    assert (row["rival"], row["network"], row["as good with steps"], row["smallest as good"]) == (
        *("w8-gan", "w8", "6", "w8"),
    )


def test_a_rival_that_is_better_or_worse_than_both_does_not_hold(make_quality: Make) -> None:
    family = world(make_quality)
    for verdict in judged([*family, rival(make_quality, 0.6)], CLAIM):
        assert verdict.finding == "does not hold"
        assert "the one for more parameters decides" in verdict.sentence
        # The w24 and the w32 have less with 50 steps.
        assert (
            "the w8 is as good with no number of steps; the smallest network that is as good is the w24"
            in verdict.sentence
        )
    for verdict in judged([*family, rival(make_quality, 20.0)], CLAIM):
        assert verdict.finding == "does not hold"
        assert "the one for fewer steps decides" in verdict.sentence
        assert "the w8 is as good with 1 step;" in verdict.sentence
    best = judged([*family, rival(make_quality, 0.01)], CLAIM)[0]
    assert "the w8 is as good with no number of steps; no network is" in best.sentence
    for even in (0.9, 10.7):
        open_ = judged([*world(make_quality, noise=0.1), rival(make_quality, even)], CLAIM)
        assert {verdict.finding for verdict in open_} == {"undecided"}


def test_a_masked_transformer_takes_the_steps_that_held_out_prompts_chose(make_quality: Make) -> None:
    family = world(make_quality)
    values = {2: 6.0, 4: 2.6, 8: 0.95}

    def masked(steps: int, value: float, **changes: object) -> object:
        return rival(make_quality, value, "m12", steps, "masked-transformer", guidance_scale=2.0, **changes)

    tested = [masked(steps, value) for steps, value in values.items()]
    # Fewer steps are better on held-out prompts: these are taken, whatever test prompts say.
    held_out = [masked(steps, {2: 6.0, 4: 1.0, 8: 5.0}[steps], split="held-out") for steps in values]
    most, chosen = judged([*family, *tested], CLAIM), judged([*family, *tested, *held_out], CLAIM)
    assert {verdict.conditions["rival"] for verdict in (*most, *chosen)} == {"masked transformer"}
    assert "the m12 with 8 steps has a Frechet distance of 0.95" in most[0].sentence
    assert "of 1.95 with 8 and of 0.9 with 50" in most[0].sentence
    assert "the m12 with 4 steps has a Frechet distance of 2.6" in chosen[0].sentence
    assert "of 3.2 with 4 and" in chosen[0].sentence
    assert chosen[0].finding == "holds"


def test_the_likest_network_and_each_kind_have_their_verdicts(make_quality: Make) -> None:
    family = world(make_quality)
    gan = rival(make_quality, 3.0, "gan-a", parameters=29_000)
    vae = rival(make_quality, 3.0, "vae-a", kind="vae", parameters=200_000)
    found = judged([*family, gan, vae], CLAIM)
    told = {verdict.conditions["rival"]: verdict for verdict in found if verdict.conditions["metric"] == "KID"}
    assert "the w12, of about" not in told["VAE"].sentence
    assert rows(told["GAN"])[0]["network"] == "w12"
    assert rows(told["VAE"])[0]["network"] == "w32"
    far = rival(make_quality, 3.0, "gan-b", parameters=10**9)
    alone = judged([*family, far], CLAIM)
    assert [verdict.finding for verdict in alone] == 3 * ["not measured"]
    assert alone[0].sentence.startswith(
        "needs the quality of a network of the family within 1.5x of the parameters of gan-b"
    )
    beside = judged([*family, gan, far], CLAIM)[0]
    assert "no network of about as many parameters is there for gan-b" in beside.sentence
    unknown = rival(make_quality, 3.0, "gan-c", parameters=None)
    assert judged([*family, unknown], CLAIM)[0].finding == "not measured"


def test_the_rival_that_speaks_least_for_the_claim_decides(make_quality: Make) -> None:
    family = world(make_quality)
    good, bad = rival(make_quality, 3.0), rival(make_quality, 0.3, "w32-gan", parameters=160_000)
    for verdict in judged([*family, good, bad], CLAIM):
        assert verdict.finding == "does not hold"
        assert "in this closed world, the w32-gan with 1 step" in verdict.sentence
        assert "a bound over both and 2 rivals" in verdict.sentence
        assert len(rows(verdict)) == 2


def test_a_step_of_the_network_is_needed_beside_a_pass(make_quality: Make) -> None:
    found = judged([*world(make_quality, steps=(4, 50)), rival(make_quality, 3.0)], CLAIM)
    assert [verdict.finding for verdict in found] == 3 * ["not measured"]
    assert found[0].sentence.startswith("needs the w8 with 1 step or fewer, as many as the w8-gan takes")
    assert judged(world(make_quality), CLAIM) == ()
    assert judged([*world(make_quality, task="sr"), rival(make_quality, 3.0, task="sr")], CLAIM) == ()


def test_a_rival_stands_beside_networks_of_its_seeds(make_quality: Make) -> None:
    """A second training of the family was a bad one."""
    family, bad = world(make_quality), world(make_quality, lambda name, steps: 99.0, seeds=(1,))
    gan = rival(make_quality, 3.0)
    both, one = (judged([*of, gan], CLAIM) for of in ([*family, *bad], family))
    assert [verdict.judged for verdict in both] == [verdict.judged for verdict in one]
    assert both[0].finding == "holds"
    # A training that the family has not is compared with all of the family's.
    other = judged([*family, rival(make_quality, 3.0, training_seed=7)], CLAIM)
    assert {verdict.finding for verdict in other} == {"holds"}


def test_a_pass_costs_what_the_same_network_takes_for_a_step_and_says_so(
    make_quality: Make, make_record: MakeRecord
) -> None:
    gan = rival(make_quality, 0.5, gflop_per_image=1.0)
    qualities = [*world(make_quality), gan]
    timed = times(make_record)
    own = times(make_record, lambda name: 5.0, steps=(1,), networks=("w8",), guidance_scale=1.0)
    own = [
        record.model_copy(
            update={"case": record.case.model_copy(update={"unet": "w8-gan", "weights_sha256": "9" * 64})}
        )
        for record in own
    ]
    own = [record.model_copy(update={"case_key": record.case.key}) for record in own]

    def of_time(records: Sequence[Record]) -> Verdict:
        found = judged(qualities, "small-wins-at-budget", records)
        return next(verdict for verdict in found if verdict.conditions["budget"].startswith("ms"))

    verdict = of_time([*timed, *own])
    best = {row["steps of w32"]: row["best of another kind"] for row in rows(verdict)}
    assert best["1"] == "w8-gan (gan)"
    assert "a step of ddim stands in for the pass of w8-gan" in verdict.sentence
    # The w8's times are no times of the GAN.
    without = of_time([*timed, *times(make_record, guidance_scale=1.0)])
    assert "best of another kind" not in rows(without)[0]
    assert "stands in" not in without.sentence

"""Verdicts on quality in a closed world, on records built to hold, to fail, to be undecided and to be too few."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ldmperf.profiling import Case, Record
from ldmperf.profiling.claims import judge
from ldmperf.profiling.claims.judge import QUALITY_RULES
from ldmperf.profiling.claims.summary import left_open, only_timed, shared_by_all, summaries, summary
from ldmperf.profiling.claims.verdict import Verdict
from ldmperf.profiling.measure.recorded import Samples
from ldmperf.profiling.quality import Estimate, QualityRecord, QualityStore

Make = Callable[..., QualityRecord]
MakeRecord = Callable[..., Record]
Quality = Callable[[str, int], float]
# GFLOP of a step; a step of the w32 costs 16 of the w8.
NETWORKS = {"w8": 1.0, "w12": 2.25, "w16": 4.0, "w24": 9.0, "w32": 16.0}
STEPS = (1, 2, 3, 4, 6, 8, 12, 16, 25, 50)
METRICS = ("Frechet distance", "KID", "sliced Wasserstein")


def as_the_paper_says(network: str, steps: int) -> float:
    """A floor that is lower for larger networks, and an error that more steps take away."""
    return 0.2 + 0.5 / NETWORKS[network] ** 0.5 + 10.0 / steps


def estimate(value: float, rng: Any = None, noise: float = 0.02, count: int = 200) -> Estimate:
    """With replicates that are too large, as those of a distance are: a resample has samples twice."""
    spread = (rng or numpy.random.default_rng(0)).normal(0.0, noise, count)
    return Estimate(value=value, replicates=tuple(float(1.1 * value + abs(value) * z) for z in spread))


def world(make_quality: Make, value: Quality = as_the_paper_says, *, seeds: Sequence[int] = (0,),
          noise: float = 0.01, networks: Sequence[str] = tuple(NETWORKS), steps: Sequence[int] = STEPS,
          count: int = 200, frechet: Quality | None = None, kid_offset: float = 0.0,
          between: float = 0.0, **changes: Any) -> list[QualityRecord]:  # fmt: skip
    """A family, every network at every step count; `frechet` replaces that metric alone.

    between: by what factor seeds differ. noise: of the replicates.
    """
    rng = numpy.random.default_rng(7)
    found = []
    for name in networks:
        for seed in seeds:
            luck = math.exp(between * rng.normal())
            for n in steps:
                of = luck * value(name, n)
                figures = {
                    "frechet": estimate(luck * (frechet or value)(name, n), rng, noise, count),
                    "kid": estimate(0.01 * of + kid_offset, rng, noise, count),
                    "sliced_wasserstein": estimate(0.1 * of, rng, noise, count),
                }
                costs = {
                    "gflop_per_image": 2 * NETWORKS[name] * n,
                    "training_gflop": 1e5 * NETWORKS[name],
                    "parameters": int(1e4 * NETWORKS[name]),
                }
                found.append(make_quality(name, n, training_seed=seed, **(figures | costs | changes)))
    return found


def times(make_record: MakeRecord, ms: Callable[[str], float] = lambda name: NETWORKS[name], fixed: float = 0.0,
          steps: Sequence[int] = (4, 20), networks: Sequence[str] = tuple(NETWORKS),
          **fields: Any) -> list[Record]:  # fmt: skip
    """Trajectories of the networks: `fixed` ms and `ms` of each step and image."""
    found = []
    for name in networks:
        for n in steps:
            case = Case(unet=name, weights_sha256=f"{list(NETWORKS).index(name):064x}", steps=n,
                        **({"latent_height": 8, "latent_width": 8, "guidance_scale": 2.0} | fields))  # fmt: skip
            wall = fixed + ms(name) * n * case.batch
            found.append(make_record(case, wall_ms=Samples.of([wall * (1 + k / 1000) for k in range(-4, 5)])))
    return found


def judged(qualities: Sequence[QualityRecord], claim: str, records: Sequence[Record] = ()) -> tuple[Verdict, ...]:
    """The verdicts by quality."""
    of = next(of for of in judge(records, qualities) if of.claim.id == claim)
    return tuple(verdict for verdict in of.verdicts if verdict.is_of_quality)


def by_metric(verdicts: Sequence[Verdict]) -> dict[str, Verdict]:
    found = {verdict.conditions["metric"]: verdict for verdict in verdicts}
    assert len(found) == len(verdicts)
    return found


def rows(verdict: Verdict) -> list[dict[str, str]]:
    assert verdict.figures is not None
    return [dict(zip(verdict.figures.headings, row, strict=True)) for row in verdict.figures.rows]


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
    untuned = world(make_quality, lambda name, steps: 0.01, guidance_scale=9.0, tuned=False)
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


def test_real_samples_are_told(make_quality: Make) -> None:
    real = make_quality("real", 1, kind="real", sampler="none", frechet=estimate(0.011), alignment=estimate(0.97))
    verdict = judged([*world(make_quality), real], "small-wins-at-budget")[0]
    assert rows(verdict)[-1]["steps of w32"] == "real samples"
    assert rows(verdict)[-1]["Frechet distance of w32"] == "0.011"


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


# Samplers


def both(
    make_quality: Make, ddpm: Quality, ddim: Quality = as_the_paper_says, **changes: Any
) -> list[QualityRecord]:
    """The family under two samplers."""
    return world(make_quality, ddim, **changes) + world(make_quality, ddpm, sampler="ddpm", **changes)


def test_an_order_that_all_samplers_share_holds(make_quality: Make) -> None:
    records = both(make_quality, lambda name, steps: 3 * as_the_paper_says(name, steps), noise=1e-4)
    for verdict in judged(records, "sampler-independent"):
        assert verdict.finding == "holds"
        assert "100% of 100 pairs" in verdict.sentence
        assert verdict.conditions["samplers"] == "ddim and ddpm"
        (three,) = (row for row in rows(verdict) if row["steps"] == "3")
        assert three["best first, ddim"] == "w32, w24, w16, w12, w8"
        assert three["wins at that budget, ddpm"] == "w8 with 25"


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
    assert judged(world(make_quality), "sampler-independent") == ()


# Guidance


def sweep(make_quality: Make, quality: Callable[[float], float], alignment: Callable[[float], float],
          rates: Sequence[float] = (1.0, 1.5, 2.0, 4.0, 8.0), networks: Sequence[str] = ("w8", "w32"),
          **changes: Any) -> list[QualityRecord]:  # fmt: skip
    found = []
    for rate in rates:
        right, off = alignment(rate), quality(rate)
        figures = {
            "frechet": estimate(off),
            "kid": estimate(0.01 * off),
            "sliced_wasserstein": estimate(0.1 * off),
            "alignment": Estimate(value=right, replicates=tuple(right + 0.002 * math.sin(k) for k in range(200))),
        }
        for name in networks:
            of_network = {"parameters": int(1e4 * NETWORKS[name]), "tuned": rate == 2.0}
            found.append(make_quality(name, 50, guidance_scale=rate, **(figures | of_network | changes)))
    return found


def test_quality_that_moves_more_than_alignment_holds(make_quality: Make) -> None:
    records = sweep(make_quality, lambda rate: rate, lambda rate: 0.80 + 0.005 * rate)
    for verdict in judged(records, "cfg-quality-not-alignment"):
        assert verdict.finding == "holds"
        assert "between guidance 1.5 and 8 at 50 steps" in verdict.sentence
        assert "moves by a factor of 5.33x" in verdict.sentence
        assert "more than both" in verdict.sentence
        assert [row["guidance"] for row in rows(verdict)][:6] == ["1", "1.5", "2", "4", "8", "range"]
        # 8 / 1.5 over errors of 0.1925 and 0.16.
        assert verdict.judged is not None
        assert verdict.judged.interval.value == pytest.approx(math.log(8 / 1.5) - math.log(0.1925 / 0.16))


def test_quality_that_moves_less_does_not_hold_and_scales_that_disagree_are_told(make_quality: Make) -> None:
    less = sweep(make_quality, lambda rate: 1 + 0.001 * rate, lambda rate: 0.3 + 0.05 * rate)
    for verdict in judged(less, "cfg-quality-not-alignment"):
        assert verdict.finding == "does not hold"
        assert "less than both" in verdict.sentence
    # Errors go from 0.0425 to 0.01, 4.25x; the alignment itself by 1.03x; the metric by 1.5x.
    split = sweep(make_quality, lambda rate: 1 + rate / 10, lambda rate: 0.95 + 0.005 * rate)
    for verdict in judged(split, "cfg-quality-not-alignment"):
        assert verdict.finding == "does not hold"
        assert "the two scales disagree: more than that of the alignment itself (1.03x" in verdict.sentence
        assert "not more than that of its errors (4.25x" in verdict.sentence


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
                data.draw(st.sampled_from([1, 3, 50])),
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

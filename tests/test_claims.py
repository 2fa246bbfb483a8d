"""Verdicts on synthetic records that were built to hold, to fail, to be undecided and to be too few."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import numpy
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ldmperf.profiling import Case, Record
from ldmperf.profiling.claims import judge
from ldmperf.profiling.claims.catalogue import all_claims, published_readings
from ldmperf.profiling.claims.cost_rules import paper_ratio_range
from ldmperf.profiling.claims.judge import RULES
from ldmperf.profiling.claims.limits import COST_FACTOR
from ldmperf.profiling.claims.summary import left_open, only_timed, shared_by_all, summaries, summary
from ldmperf.profiling.claims.verdict import ClaimVerdicts, Verdict
from ldmperf.profiling.measure.environment import DeviceState
from ldmperf.profiling.measure.intervals import medians_interval
from ldmperf.profiling.measure.recorded import KernelTime, Samples
from ldmperf.profiling.paper import paper_notes, paper_sizes
from ldmperf.profiling.trajectory.records import Energy, Trace

MakeRecord = Callable[..., Record]
SIZES = tuple(paper_sizes())
# Judged by timing or energy; the others need quality or training.
DECIDED = {"cost-proportional", "steps-linear", "ddim50-slow", "single-shot-cheaper", "energy-proportional"}


def noisy(ms: float, count: int = 9, spread: float = 0.004) -> Samples:
    """Samples whose median is `ms`, the others at even distances up to `spread` around it."""
    return Samples.of([ms * (1 + spread * share) for share in numpy.linspace(-1, 1, count)])


def timed(make_record: MakeRecord, ms: float, unet: str = "866M", *, count: int = 9, spread: float = 0.004,
          changes: dict[str, Any] | None = None, **fields: Any) -> Record:  # fmt: skip
    size = paper_sizes().get(unet)
    known = {} if size is None else {"gflop_per_forward": size.gflop, "parameters": size.parameters}
    case = Case(unet=unet, **({"steps": 20} | fields))
    return make_record(case, **({"wall_ms": noisy(ms, count, spread)} | known | (changes or {})))


def family(make_record: MakeRecord, step_ms: Callable[[str], float], sizes: Sequence[str] = SIZES,
           **fields: Any) -> list[Record]:  # fmt: skip
    steps = fields.get("steps", 20)
    return [timed(make_record, steps * step_ms(size), size, **fields) for size in sizes]


def as_the_paper_says(size: str) -> float:
    return 50.0 * paper_sizes()[size].normalized_cost


def verdicts(records: Sequence[Record], claim_id: str) -> tuple[Verdict, ...]:
    return next(of.verdicts for of in judge(records) if of.claim.id == claim_id)


def only(records: Sequence[Record], claim_id: str) -> Verdict:
    (verdict,) = verdicts(records, claim_id)
    return verdict


def column(verdict: Verdict, heading: str) -> dict[str, str]:
    """A column of the figures, by the first cell of each row."""
    assert verdict.figures is not None
    place = verdict.figures.headings.index(heading)
    return {row[0]: row[place] for row in verdict.figures.rows}


# cost-proportional


def test_times_as_the_paper_has_them_hold(make_record: MakeRecord) -> None:
    verdict = only(family(make_record, as_the_paper_says), "cost-proportional")
    assert (verdict.finding, verdict.sizes, verdict.samples) == ("holds", 11, 9)
    assert "judged on" not in verdict.sentence
    assert column(verdict, "over 866M")["5B"] == column(verdict, "in the paper")["5B"] == "5.17"


def test_a_floor_of_launches_does_not_hold(make_record: MakeRecord) -> None:
    # Every step waits 20 ms for the host: (3.5 + 20) / (50 + 20) of the 866M at 39M, not 0.07.
    verdict = only(family(make_record, lambda size: as_the_paper_says(size) + 20), "cost-proportional")
    assert verdict.finding == "does not hold"
    assert column(verdict, "over 866M")["39M"] == "0.34"
    assert column(verdict, "here over paper")["39M"] == f"{23.5 / 70 / 0.07:.2f}x"
    # The printed 0.07 may be 0.075.
    assert column(verdict, "beyond its rounding")["39M"] == f"{23.5 / 70 / 0.075:.2f}x"
    assert verdict.judged is not None
    assert verdict.judged.interval.value == pytest.approx(23.5 / 70 / 0.075)


@pytest.mark.parametrize(
    ("cost", "factor"), [(0.0751, 1.0), (0.066, 1.0), (0.0749, 1.0), (0.0975, 1.3), (0.05, 1.3)]
)
def test_the_papers_rounding_is_taken_into_account(make_record: MakeRecord, cost: float, factor: float) -> None:
    records = family(make_record, lambda size: 50.0 * (cost if size == "39M" else 1.0), ("39M", "866M"))
    verdict = only(records, "cost-proportional")
    assert verdict.judged is not None
    assert verdict.judged.interval.value == pytest.approx(factor, rel=0.01)
    assert verdict.finding == ("holds" if factor <= COST_FACTOR else "does not hold")


def test_a_verdict_that_flips_within_its_interval_is_undecided(make_record: MakeRecord) -> None:
    def step_ms(size: str) -> float:
        return 50.0 * {"2B": 2.39 * 1.11}.get(size, paper_sizes()[size].normalized_cost)

    tight = only(family(make_record, step_ms, spread=0.001), "cost-proportional")
    assert tight.finding == "does not hold"
    wide = only(family(make_record, step_ms, spread=0.1), "cost-proportional")
    assert wide.finding == "undecided"
    assert wide.judged is not None
    assert wide.judged.interval.low < COST_FACTOR < wide.judged.interval.high


def test_few_sizes_and_few_samples_say_so(make_record: MakeRecord) -> None:
    three = only(family(make_record, as_the_paper_says, ("39M", "83M", "866M"), count=3), "cost-proportional")
    assert "judged on 3 sizes only (39M, 83M, 866M)" in three.sentence
    assert "with 3 samples of a time the interval has 75% confidence" in three.sentence
    four = only(family(make_record, as_the_paper_says, ("39M", "83M", "145M", "866M")), "cost-proportional")
    assert "judged on" not in four.sentence
    assert "confidence" not in four.sentence
    two = only(family(make_record, as_the_paper_says, count=2), "cost-proportional")
    assert two.finding == "undecided"
    assert "2 samples of a time decide nothing, 3 do" in two.sentence


@pytest.mark.parametrize(("factor", "most"), [(1.0, 0.0), (1.10, 0.05)])
def test_noise_alone_refutes_no_claim_beyond_its_rate(make_record: MakeRecord, factor: float, most: float) -> None:
    """Nine sizes at once: noise alone takes the worst of them beyond the limit, where none is in truth."""
    rng, found = numpy.random.default_rng(0), []
    sizes = [name for name in SIZES if name not in ("39M", "83M")]
    for _ in range(40):
        records = []
        for size in sizes:
            # As far off as still holds, beyond the paper's rounding.
            scale = 1.0 if size == "866M" else factor * paper_ratio_range(size, "866M")[1]
            samples = 20 * 50.0 * scale * numpy.exp(rng.normal(0.0, 0.04, 7))
            records.append(timed(make_record, 1.0, size, changes={"wall_ms": Samples.of(samples.tolist())}))
        found.append(only(records, "cost-proportional"))
    refuted = sum(verdict.finding == "does not hold" for verdict in found) / len(found)
    assert refuted <= most + 3 * math.sqrt(most * (1 - most) / len(found))
    covered = sum(
        v.judged is not None and v.judged.interval.low <= factor <= v.judged.interval.high for v in found
    )
    assert covered / len(found) >= 0.95 - 3 * math.sqrt(0.95 * 0.05 / len(found))


def test_noise_alone_bends_no_line(make_record: MakeRecord) -> None:
    """Times on a line: the interval of the distance from it begins at zero at its rate."""
    rng, begins = numpy.random.default_rng(1), 0
    for _ in range(40):
        walls = {
            n: Samples.of((100.0 * n * numpy.exp(rng.normal(0.0, 0.05, 7))).tolist()) for n in (4, 10, 20, 50)
        }
        verdict = only([timed(make_record, 1.0, steps=n, changes={"wall_ms": w}) for n, w in walls.items()],
                       "steps-linear")  # fmt: skip
        assert verdict.judged is not None
        begins += verdict.judged.interval.low == 0.0
    assert begins / 40 >= 0.95 - 3 * math.sqrt(0.95 * 0.05 / 40)


def test_one_size_or_none_is_not_measured(make_record: MakeRecord) -> None:
    for records in ([], [timed(make_record, 100.0)], [make_record(status="oom")]):
        verdict = only(records, "cost-proportional")
        assert verdict.finding == "not measured"
        assert verdict.sentence.startswith("needs times of two of the paper's sizes")
        assert verdict.figures is None


def test_nothing_is_compared_across_conditions_or_environments(make_record: MakeRecord) -> None:
    small, large = family(make_record, as_the_paper_says, ("39M", "866M"))
    other = large.environment.model_copy(update={"torch": "2.14.0"})
    elsewhere = large.model_copy(update={"environment": other})
    assert only([small, elsewhere], "cost-proportional").finding == "not measured"
    for field, value in {"dtype": "bfloat16", "batch": 4, "sampler": "ddpm", "steps": 4, "backend": "graph",
                         "latent_height": 32, "guidance_scale": 1.0, "context_tokens": 154}.items():  # fmt: skip
        differs = timed(make_record, 900.0, **{field: value})
        assert only([small, differs], "cost-proportional").finding == "not measured"
    again = [r.model_copy(update={"environment": other}) for r in (small, large)]
    both = verdicts([small, large, *again], "cost-proportional")
    assert [v.conditions["environment"] for v in both] == ["environment A", "environment B"]


def test_the_largest_size_stands_in_for_the_866m(make_record: MakeRecord) -> None:
    sizes = ("39M", "83M", "145M", "223M")
    verdict = only(family(make_record, as_the_paper_says, sizes), "cost-proportional")
    # 0.07 / 0.30 of the printed costs.
    assert column(verdict, "in the paper")["39M"] == "0.23"
    assert verdict.finding == "holds"


# steps-linear


def test_a_line_with_a_fixed_part_holds_and_tells_it(make_record: MakeRecord) -> None:
    records = [timed(make_record, 280.0 + 102.0 * n, "866M", steps=n) for n in (1, 4, 20, 50)]
    verdict = only(records, "steps-linear")
    assert verdict.finding == "holds"
    assert column(verdict, "fixed in steps")["866M"] == "2.75"
    assert column(verdict, "ms per step")["866M"] == "102.0"
    assert "times of 1 to 50 steps lie within 0.0% of a line" in verdict.sentence
    assert "a fixed part as long as 2.75 steps" in verdict.sentence


def test_growth_that_is_no_line_does_not_hold(make_record: MakeRecord) -> None:
    records = [timed(make_record, 100.0 * n**1.3, steps=n) for n in (4, 20, 50)]
    verdict = only(records, "steps-linear")
    assert verdict.finding == "does not hold"
    # An independent oracle of the weighted line: numpy's polynomial fit with weights 1 / y.
    xs, ys = numpy.array([4, 20, 50]), 100.0 * numpy.array([4, 20, 50]) ** 1.3
    slope, intercept = numpy.polyfit(xs, ys, 1, w=1 / ys)
    farthest = max(abs(slope * xs + intercept - ys) / ys)
    assert verdict.judged is not None
    assert verdict.judged.interval.value == pytest.approx(farthest, rel=1e-6)


def test_two_step_counts_are_on_every_line(make_record: MakeRecord) -> None:
    records = [timed(make_record, 100.0 * n**1.3, steps=n) for n in (4, 50)]
    assert only(records, "steps-linear").finding == "not measured"


# Budgets


def test_what_a_budget_affords_stands_beside_the_papers_steps(make_record: MakeRecord) -> None:
    verdict = only(family(make_record, as_the_paper_says, steps=3), "small-wins-at-budget")
    # Quality is not judged by timing.
    assert verdict.finding == "not measured"
    assert verdict.sentence.startswith("needs FID by (size, steps); timing says: ")
    assert column(verdict, "3 of 866M")["83M"] == "23 of 23"
    assert column(verdict, "advantage left at 3")["83M"] == "96% to 104%"
    # The printed 0.13 may be 0.125 to 0.135: 22.2 to 24 steps.
    assert column(verdict, "advantage left at 3")["866M"] == column(verdict, "advantage left at 3")["5B"] == "-"
    half = only(
        family(make_record, lambda size: 25 + 0.5 * as_the_paper_says(size), steps=3), "small-wins-at-budget"
    )
    # 150 ms at 25 + 3.25 ms a step.
    assert column(half, "3 of 866M")["83M"] == "5 of 23"
    assert (
        # 5.31 - 3 of 24 - 3, or of 22.2 - 3.
        "the 83M affords 5, where the paper's cost says 23: 11% to 12% of the advantage in steps is left"
        in half.sentence
    )
    assert "is left (predicted from 3 steps as if nothing were fixed)" in half.sentence
    slower = family(make_record, lambda size: 60.0 if size == "83M" else 50.0, ("83M", "866M"), steps=4)
    told = only(slower, "small-wins-at-budget").sentence
    assert "the 83M affords 2, where" in told
    assert "none of the advantage in steps is left (predicted from 4 steps as if nothing were fixed)" in told


def test_a_fixed_part_takes_from_a_small_budget_most(make_record: MakeRecord) -> None:
    records = [
        timed(make_record, 60.0 + n * as_the_paper_says(size), size, steps=n)
        for size in ("39M", "866M")
        for n in (4, 20)
    ]
    verdict = only(records, "small-wins-at-budget")
    # Both have the same fixed part: all of the advantage is left.
    assert column(verdict, "advantage left at 3")["39M"] == "92% to 108%"
    assert column(verdict, "advantage left at 50")["39M"] == "92% to 108%"
    only_small = [
        timed(make_record, fixed + n * as_the_paper_says(size), size, steps=n)
        for size, fixed in (("39M", 60.0), ("866M", 0.0))
        for n in (4, 20)
    ]
    verdict = only(only_small, "small-wins-at-budget")
    # (150 - 60) / 3.5 - 3 of 3 / 0.065 - 3 and of 3 / 0.075 - 3; (2500 - 60) / 3.5 - 50 likewise.
    assert column(verdict, "advantage left at 3")["39M"] == "53% to 61%"
    assert column(verdict, "advantage left at 50")["39M"] == "90% to 105%"


def test_super_resolution_has_a_table_of_its_own(make_record: MakeRecord) -> None:
    records = family(make_record, as_the_paper_says, task="sr", guidance_scale=1.0)
    assert only(records, "small-wins-at-budget").figures is None
    verdict = only(records, "sr-small-wins-below-20")
    assert verdict.conditions["task"] == "super-resolution"
    assert verdict.sentence.startswith("needs FID, LPIPS; timing says: in the time of 20 steps")
    assert only(family(make_record, as_the_paper_says), "sr-small-wins-below-20").figures is None


def test_the_price_of_the_next_size_is_labelled_where_it_is_predicted(make_record: MakeRecord) -> None:
    verdict = only(family(make_record, as_the_paper_says, steps=50), "large-wins-relaxed")
    assert set(column(verdict, "by").values()) == {"measured"}
    assert column(verdict, "its price")["866M"] == column(verdict, "in the paper")["866M"] == "2.39x"
    assert column(verdict, "paper's FID")["2B"] == "20.98 to 20.14"
    predicted = only(family(make_record, as_the_paper_says, steps=2), "large-wins-relaxed")
    assert set(column(predicted, "by").values()) == {"predicted"}
    assert "(predicted from 2 steps as if nothing were fixed)" in predicted.sentence


def test_where_the_distilled_866m_and_the_83m_cross(make_record: MakeRecord) -> None:
    records = [
        *(timed(make_record, 100.0 * n, "866M", steps=n) for n in (4, 20)),
        *(timed(make_record, 40.0 * n, "83M", steps=n) for n in (4, 20)),
    ]
    verdict = only(records, "distillation-keeps-trend")
    assert verdict.finding == "not measured"
    assert "4 steps of the 866M take as long as 10.00 of the 83M, 31 by the paper's cost" in verdict.sentence
    # 54 and 62 steps are cost 7 and 8 at 0.13 each.
    assert column(verdict, "over 4 steps of 866M")["54"] == "5.40x"
    assert column(verdict, "in the paper")["62"] == f"{62 * 0.13 / 4:.2f}x"
    assert column(verdict, "by") == {"4": "measured", "10": "predicted", "31": "predicted", "54": "predicted",
                                     "62": "predicted"}  # fmt: skip


# Samplers and guidance


def test_the_ratio_of_two_sizes_under_each_sampler(make_record: MakeRecord) -> None:
    pair = ("39M", "866M")
    records = family(make_record, as_the_paper_says, pair)
    records += family(make_record, lambda size: as_the_paper_says(size) + 5.0, pair, sampler="dpmpp_2m")
    verdict = only(records, "sampler-independent")
    assert verdict.finding == "not measured"
    assert verdict.sentence.startswith("needs FID per sampler; timing says: ")
    assert "0.070 with ddim, 0.15 with dpmpp_2m" in verdict.sentence
    assert verdict.figures is not None
    assert ("39M", "dpmpp_2m", "8.500", f"{5 / 8.5:.1%}") == verdict.figures.rows[1][:4]


def test_the_samplers_share_comes_from_the_trace(make_record: MakeRecord) -> None:
    times = (("sampler_update_kernel", 1.0), ("nvjet_gemm", 9.0))
    step = tuple(KernelTime(name=name, launches=1, ms=ms) for name, ms in times)
    trace = Trace(launches=10, launches_per_step=10, busy_ms=200.0, step_busy_ms=10.0, step=step)
    records = [
        timed(make_record, 500.0, size, sampler=sampler, changes={"trace": trace})
        for size in ("39M", "866M")
        for sampler in ("ddim", "ddpm")
    ]
    verdict = only(records, "sampler-independent")
    assert column(verdict, "sampler's share of a step, traced")["39M"] == "10.0%"


def test_the_price_of_guidance(make_record: MakeRecord) -> None:
    records = [
        timed(make_record, ms, "39M", batch=batch, guidance_scale=guidance)
        for batch, guidance, ms in ((1, 1.0, 100.0), (1, 7.5, 110.0), (16, 1.0, 400.0), (16, 7.5, 800.0))
    ]
    verdict = only(records, "cfg-quality-not-alignment")
    assert verdict.finding == "not measured"
    assert verdict.sentence.startswith("needs quality and alignment metrics; timing says: guidance costs 1.10x")
    assert verdict.figures is not None
    assert [(row[1], row[4]) for row in verdict.figures.rows] == [("1", "1.10x"), ("16", "2.00x")]


# Images


@pytest.mark.parametrize(("ms", "finding"), [(1100.0, "holds"), (900.0, "does not hold"), (1000.5, "undecided")])
def test_fifty_steps_are_slow_above_a_second_at_every_size(
    make_record: MakeRecord, ms: float, finding: str
) -> None:
    records = [timed(make_record, ms, "39M", steps=50), timed(make_record, 5 * ms, "866M", steps=50)]
    verdict = only(records, "ddim50-slow")
    assert verdict.finding == finding
    assert "quality is not judged" in verdict.sentence
    assert column(verdict, "by")["39M"] == "measured"


def test_fewer_steps_decide_only_that_fifty_are_slow(make_record: MakeRecord) -> None:
    slow = only([timed(make_record, 1800.0, "39M", steps=2)], "ddim50-slow")
    assert slow.finding == "holds"
    assert "an image is not there before 1800 ms, 2 steps of the 39M" in slow.sentence
    long = only([timed(make_record, 13_343.0, "39M", steps=20)], "ddim50-slow")
    assert re.search(r"before 13343 ms, .* \(interval 1\d{4} to 1\d{4}; above 1000 ms", long.sentence)
    # Of each size the longest trajectory tells most. So the shortest wait need not be that of the fastest size.
    waits = ((2700.0, "39M", 3), (2400.0, "83M", 2), (1800.0, "39M", 2))
    unlike = only([timed(make_record, ms, name, steps=steps) for ms, name, steps in waits], "ddim50-slow")
    assert "before 2400 ms, 2 steps of the 83M, the shortest wait judged (" in unlike.sentence
    fast = only([timed(make_record, 30.0, "39M", steps=2)], "ddim50-slow")
    assert fast.finding == "not measured"
    assert column(fast, "by")["39M"] == "predicted"
    assert fast.sentence.startswith("needs 50 steps of DDIM, or fewer that take above 1000 ms alone, of 39M; ")
    assert "those measured predict 750.0 ms" in fast.sentence
    # A large size that is slow says nothing of the small one; a small one that is fast says that not all are slow.
    slow_866m = timed(make_record, 5000.0, "866M", steps=50)
    mixed = only([slow_866m, timed(make_record, 30.0, "39M", steps=2)], "ddim50-slow")
    assert mixed.finding == "not measured"
    assert "of the others: an image is not there before 5000 ms" in mixed.sentence
    quick = [timed(make_record, 500.0, "39M", steps=50), timed(make_record, 30.0, "83M", steps=2)]
    assert only([slow_866m, *quick], "ddim50-slow").finding == "does not hold"
    # Who waits for an image of a batch waits for the batch.
    batch = only([timed(make_record, 4000.0, "39M", steps=50, batch=8)], "ddim50-slow")
    assert batch.finding == "holds"
    assert "an image of a batch of 8 is not there before 4000 ms" in batch.sentence
    assert column(batch, "ms per image, 50 steps")["39M"] == "500.0"
    # More than 50 steps say nothing of 50.
    assert only([timed(make_record, 1800.0, "39M", steps=100)], "ddim50-slow").finding == "not measured"
    assert only([timed(make_record, 1800.0, steps=50, sampler="ddpm")], "ddim50-slow").figures is None


def rival(make_record: MakeRecord, name: str, ms: float, parameters: int, **fields: Any) -> Record:
    known = {"task": "rival", "sampler": "none", "steps": 1, "guidance_scale": 1.0, "context_tokens": 0}
    return timed(make_record, ms, name, changes={"parameters": parameters}, **(known | fields))


def test_rivals_are_compared_at_like_parameter_counts(make_record: MakeRecord) -> None:
    sizes = [timed(make_record, ms, size, steps=50) for size, ms in (("39M", 500.0), ("866M", 5000.0))]
    cheap = [
        rival(make_record, "vae-decoder-50M", 90.0, 49_500_000),
        rival(make_record, "masked-transformer-600M", 900.0, 600_000_000, steps=12),
    ]
    verdict = only([*sizes, *cheap], "single-shot-cheaper")
    assert verdict.finding == "holds"
    assert column(verdict, "size") == {"masked-transformer-600M": "866M", "vae-decoder-50M": "39M"}
    assert column(verdict, "rival over size")["vae-decoder-50M"] == "0.18x"
    # 90 ms are nine of the 39M's 10 ms steps.
    assert column(verdict, "steps that take as long")["vae-decoder-50M"] == "9.000"
    dear = rival(make_record, "gan-40M", 600.0, 40_000_000)
    verdict = only([*sizes, *cheap, dear], "single-shot-cheaper")
    assert verdict.finding == "does not hold"
    assert "1.20x with gan-40M (torch)" in verdict.sentence
    # 1.6 times the parameters are not alike; nor is another batch.
    unlike = (
        rival(make_record, "gan-62M", 1.0, 62_500_000),
        rival(make_record, "gan-40M", 1.0, 40_000_000, batch=2),
    )
    for other in unlike:
        assert only([*sizes, other], "single-shot-cheaper").figures is None


def test_a_verdict_on_rivals_tells_the_conditions_of_the_family(make_record: MakeRecord) -> None:
    sizes = [timed(make_record, 500.0, "39M", steps=50, sampler=sampler) for sampler in ("ddim", "ddpm")]
    both = verdicts([*sizes, rival(make_record, "gan-30M", 60.0, 30_000_000)], "single-shot-cheaper")
    assert [verdict.conditions["sampler"] for verdict in both] == ["ddim", "ddpm"]
    assert both[0].finding == "holds"
    assert "no vae-decoder and no masked-transformer among them" in both[0].sentence
    assert column(both[0], "its GFLOP")["gan-30M"] == "53.00"


def test_a_rival_is_judged_at_its_fastest_and_one_without_a_size_is_named(make_record: MakeRecord) -> None:
    size = timed(make_record, 500.0, "39M", steps=50)
    eager = rival(make_record, "gan-30M", 600.0, 30_000_000, backend="eager")
    compiled = rival(make_record, "gan-30M", 60.0, 30_000_000, backend="compile")
    large = rival(make_record, "gan-397M", 900.0, 397_000_000, backend="eager")
    verdict = only([size, eager, compiled, large], "single-shot-cheaper")
    assert verdict.finding == "holds"
    assert "is 0.12x with gan-30M (compile); the dearest" in verdict.sentence
    assert "no size of about as many parameters was measured for gan-397M" in verdict.sentence
    slower = rival(make_record, "gan-30M", 900.0, 30_000_000, backend="compile")
    quick = rival(make_record, "gan-30M", 60.0, 30_000_000, backend="eager")
    assert (
        "is 0.12x with gan-30M (eager); the dearest" in only([size, slower, quick], "single-shot-cheaper").sentence
    )
    assert only([size, eager], "single-shot-cheaper").finding == "does not hold"


def test_rivals_with_and_without_guidance_are_told_apart(make_record: MakeRecord) -> None:
    size = timed(make_record, 500.0, "39M", steps=50)
    both = [
        rival(make_record, "masked-transformer-47M", ms, 47_000_000, steps=12, guidance_scale=scale)
        for scale, ms in ((1.0, 100.0), (10.0, 200.0))
    ]
    verdict = only([size, *both], "single-shot-cheaper")
    assert "0.20x with masked-transformer-47M (torch), 0.40x with masked-transformer-47M (torch guided)" in (
        verdict.sentence
    )
    assert verdict.figures is not None
    assert [row[4] for row in verdict.figures.rows] == ["12", "12 guided"]


def test_rivals_are_compared_to_an_image_where_all_decoders_are_timed(make_record: MakeRecord) -> None:
    gan = rival(make_record, "gan-30M", 600.0, 30_000_000)
    size = timed(make_record, 500.0, "39M", steps=50)
    latents = only([gan, size], "single-shot-cheaper")
    assert latents.finding == "does not hold"
    assert "decoders of latents and tokens are not counted" in latents.sentence
    image = only([gan, size.model_copy(update={"decoder_ms": noisy(300.0)})], "single-shot-cheaper")
    assert image.finding == "holds"
    assert "decoders of latents and tokens are counted" in image.sentence
    assert image.judged is not None
    assert image.judged.interval.value == pytest.approx(600 / 800)
    assert column(image, "its ms to an image")["gan-30M"] == "800.0"


def test_a_rival_dearer_than_few_steps_is_not_dearer_than_fifty(make_record: MakeRecord) -> None:
    dear = rival(make_record, "gan-40M", 60.0, 40_000_000)
    verdict = only([timed(make_record, 40.0, "39M", steps=4), dear], "single-shot-cheaper")
    assert verdict.finding == "not measured"
    assert verdict.sentence.startswith(
        "needs 50 steps of the 39M, 500.0 ms per image (predicted from 4 steps as if nothing were fixed): the "
    )
    judged = judge([timed(make_record, 40.0, "39M", steps=4), dear])
    # Timing could judge them: they are not among those that it cannot.
    assert left_open(judged) == ["ddim50-slow", "single-shot-cheaper"]
    assert only_timed(judged) == []
    # One that is cheaper than few is cheaper than 50.
    assert only([timed(make_record, 80.0, "39M", steps=4), dear], "single-shot-cheaper").finding == "holds"


# Energy


def energies(make_record: MakeRecord, joules: Callable[[str], float], sizes: Sequence[str] = SIZES,
             error: float = 0.02) -> list[Record]:  # fmt: skip
    return [
        timed(make_record, 1000.0, size, changes={
            "energy": Energy(joules=10 * 20 * joules(size), window_s=10.0, trajectories=10, counted_s=9.9,
                             relative_error=error)
        })
        for size in sizes
    ]  # fmt: skip


def test_energy_as_flops_say_holds(make_record: MakeRecord) -> None:
    verdict = only(energies(make_record, lambda size: 0.5 * paper_sizes()[size].gflop), "energy-proportional")
    assert verdict.finding == "holds"
    assert "R² of joules over FLOPs is 1.000" in verdict.sentence
    assert column(verdict, "joules per step")["866M"] == "402.1"
    assert column(verdict, "here over FLOPs")["39M"] == "1.00x"


def test_energy_of_waiting_does_not_hold_at_the_smallest_size(make_record: MakeRecord) -> None:
    verdict = only(
        energies(make_record, lambda size: 200 + 0.5 * paper_sizes()[size].gflop), "energy-proportional"
    )
    # R2 is 1: the line has a fixed part, and FLOPs do not predict the smallest.
    assert "R² of joules over FLOPs is 1.000" in verdict.sentence
    assert verdict.finding == "does not hold"


def test_energy_that_flops_do_not_explain_does_not_hold(make_record: MakeRecord) -> None:
    noise = dict(zip(SIZES, (1, 9, 1, 8, 1, 9, 1, 7, 1, 1, 79), strict=True))
    scattered = {size: 53.0 * noise[size] for size in SIZES[:-1]}
    verdict = only(energies(make_record, lambda size: scattered[size], SIZES[:-1]), "energy-proportional")
    assert verdict.finding == "does not hold"


def test_the_counters_error_may_leave_it_undecided(make_record: MakeRecord) -> None:
    def joules(size: str) -> float:
        return (1.12 if size == "39M" else 1.0) * paper_sizes()[size].gflop

    assert only(energies(make_record, joules, error=0.001), "energy-proportional").finding == "does not hold"
    assert only(energies(make_record, joules, error=0.05), "energy-proportional").finding == "undecided"
    assert only(energies(make_record, joules, SIZES[:2]), "energy-proportional").finding == "not measured"


# All claims


def everything(make_record: MakeRecord) -> list[Record]:
    """Records that say something of every claim that timing can speak of."""
    records = [
        timed(
            make_record,
            15.0 + n * (10.0 + as_the_paper_says(size)),
            size,
            sampler=sampler,
            steps=n,
            backend=backend,
        )
        for size in ("39M", "83M", "866M")
        for sampler in ("ddim", "dpmpp_2m")
        for n in (4, 20, 50)
        for backend in ("torch", "diffusers")
    ]
    records += family(make_record, as_the_paper_says, ("39M", "866M"), task="sr", guidance_scale=1.0)
    records += [timed(make_record, 120.0, "39M", steps=4, guidance_scale=1.0)]
    records += [rival(make_record, "gan-40M", 60.0, 40_000_000)]
    for record in energies(make_record, as_the_paper_says):
        case = record.case.model_copy(update={"batch": 2})
        records.append(record.model_copy(update={"case": case, "case_key": case.key}))
    return records


def test_every_claim_has_a_verdict_and_says_what_it_needs(make_record: MakeRecord) -> None:
    for records in ([], everything(make_record)):
        judged = judge(records)
        assert [of.claim for of in judged] == list(all_claims())
        for of in judged:
            for verdict in of.verdicts:
                if verdict.finding == "not measured":
                    assert verdict.sentence.startswith("needs ")
                if of.claim.id not in DECIDED:
                    assert verdict.finding == "not measured"
    told = {of.claim.id: of for of in judge(everything(make_record))}
    assert {name for name, of in told.items() if of.has_figures} == set(RULES)
    assert {name for name, of in told.items() if of.is_judged} == DECIDED
    assert {of.claim.id for of in summaries(tuple(told.values()))} == DECIDED
    assert set(only_timed(told.values())) == set(RULES) - DECIDED
    assert left_open(told.values()) == []


def comparable(judged: Sequence[ClaimVerdicts], *, with_numbers: bool = True) -> list[object]:
    """What must not change: with numbers all of it, else findings, conditions and ratios."""
    if with_numbers:
        return list(judged)
    return [
        (of.claim.id, v.finding, v.conditions, v.sizes, v.samples, None if v.judged is None else v.judged.interval)
        for of in judged
        if of.claim.id != "ddim50-slow"
        for v in of.verdicts
    ]


@settings(max_examples=2, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.randoms(use_true_random=False))
def test_shuffling_records_changes_nothing(make_record: MakeRecord, random: Any) -> None:
    records = everything(make_record)
    older = [r.model_copy(update={"started_at": r.started_at - timedelta(hours=1), "wall_ms": noisy(7.0)})
             for r in records[:6]]  # fmt: skip
    other = [r.model_copy(update={"environment": r.environment.model_copy(update={"torch": "2.14.0"})})
             for r in records[:9]]  # fmt: skip
    whole = [*records, *older, *other]
    shuffled = [
        r.model_copy(update={"wall_ms": Samples.of(random.sample(r.wall_ms.samples, r.wall_ms.n))})
        for r in random.sample(whole, len(whole))
    ]
    assert comparable(judge(shuffled)) == comparable(judge(whole))


@settings(max_examples=2, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from([2.0, 0.5, 4096.0]), st.integers(0, 5))
def test_doubling_all_times_changes_no_ratio(make_record: MakeRecord, factor: float, seed: int) -> None:
    rng = numpy.random.default_rng(seed)

    def jittered(record: Record, scale: float, noise: numpy.ndarray) -> Record:
        samples = [scale * ms * n for ms, n in zip(record.wall_ms.samples, noise, strict=True)]
        return record.model_copy(update={"wall_ms": Samples.of(samples)})

    records = everything(make_record)
    noise = [rng.lognormal(0.0, 0.05, record.wall_ms.n) for record in records]
    once = [jittered(record, 1.0, n) for record, n in zip(records, noise, strict=True)]
    scaled = [jittered(record, factor, n) for record, n in zip(records, noise, strict=True)]
    assert comparable(judge(scaled), with_numbers=False) == comparable(judge(once), with_numbers=False)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_records_are_judged_without_a_number_that_is_none(
    make_record: MakeRecord, data: st.DataObject
) -> None:
    times = st.one_of(st.just(0.0), st.floats(1e-9, 1e9), st.floats(0.1, 1e5))
    records = []
    for _ in range(data.draw(st.integers(1, 12))):
        case = Case(
            unet=data.draw(st.sampled_from(["39M", "83M", "866M", "mine/unet"])),
            task=data.draw(st.sampled_from(["t2i", "sr"])),
            steps=data.draw(st.sampled_from([1, 3, 50])),
            sampler=data.draw(st.sampled_from(["ddim", "ddpm"])),
            guidance_scale=data.draw(st.sampled_from([1.0, 7.5])),
        )
        samples = data.draw(st.lists(times, min_size=1, max_size=4))
        records.append(make_record(case, wall_ms=Samples.of(samples)))
    judged = judge(records)
    for of in judged:
        texts = [summary(of, shared_by_all(judged)).sentence]
        texts += [cell for v in of.verdicts if v.figures is not None for row in v.figures.rows for cell in row]
        assert not [text for text in texts if re.search(r"\b(nan|inf|None)\b", text)]


def test_findings_are_counted_with_their_conditions(make_record: MakeRecord) -> None:
    records = family(make_record, as_the_paper_says)
    records += family(make_record, lambda size: as_the_paper_says(size) + 20, backend="diffusers")
    records += family(make_record, lambda size: as_the_paper_says(size) + 40, backend="diffusers", batch=2)
    (told,) = (one for one in summaries(judge(records)) if one.claim.id == "cost-proportional")
    assert told.finding is None
    assert told.sentence.startswith(
        "holds in 1 of 3 sets of conditions (torch; batch 1); "
        "does not hold in 2 of 3 sets of conditions (diffusers; batch 1 / batch 2); "
        "most clearly (diffusers; batch 2): "
    )


def test_a_throttled_time_is_named_in_its_verdict(make_record: MakeRecord) -> None:
    clean, *others = family(make_record, as_the_paper_says)
    state = DeviceState(throttle_reasons=("SwPowerCap",))
    assert "throttled" not in only([clean, *others], "cost-proportional").sentence
    throttled = clean.model_copy(update={"device_after": state})
    assert "not those of a free GPU (throttled)" in only([throttled, *others], "cost-proportional").sentence


def test_the_catalogue_is_whole() -> None:
    claims = all_claims()
    assert len({claim.id for claim in claims}) == len(claims) == 13
    assert {claim.id for claim in claims if claim.timing is not None} == set(RULES)
    assert all(claim.timing or claim.needs for claim in claims)
    readings = {r for id in (None, *(c.id for c in claims)) for r in published_readings(id)}
    assert len(readings) == 7
    assert all(r.conditions and r.source and set(r.claims) <= {c.id for c in claims} for r in readings)
    assert "25.3" in paper_notes()[0]


def test_the_interval_of_a_verdict_is_that_of_its_samples(make_record: MakeRecord) -> None:
    """An oracle apart from the rules: the bootstrap over one ratio, against the paper's own bounds."""
    small, large = (timed(make_record, ms, size, spread=0.05) for size, ms in (("39M", 500.0), ("866M", 2000.0)))
    verdict = only([small, large], "cost-proportional")
    expected = medians_interval(
        [small.wall_ms.samples, large.wall_ms.samples], lambda over, under: over / under / 0.075
    )
    assert verdict.judged is not None
    assert verdict.judged.interval.low == pytest.approx(expected.low)
    assert verdict.judged.interval.high == pytest.approx(expected.high)


# What is against the times themselves


def test_a_verdict_says_where_its_own_times_are_no_good(make_record: MakeRecord) -> None:
    good = family(make_record, as_the_paper_says)
    assert "; " not in only(good, "cost-proportional").sentence.partition("up to 1.10 holds")[2]
    busy = {"device_before": DeviceState(load_average_1min=9.0)}
    records = [
        *good[:8],
        timed(make_record, 20 * as_the_paper_says(SIZES[8]), SIZES[8], spread=0.4),
        *(timed(make_record, 20 * as_the_paper_says(size), size, changes=busy) for size in SIZES[9:]),
    ]
    sentence = only(records, "cost-proportional").sentence
    assert sentence.endswith("; 1 of its 11 times is unsteady; 2 of its 11 times were measured on a busy machine")
    # Times of other conditions are none of its business.
    others = family(make_record, as_the_paper_says, steps=4, changes=busy)
    by_steps = {v.conditions["steps"]: v.sentence for v in verdicts([*good, *others], "cost-proportional")}
    assert "busy" not in by_steps["20 steps"]
    assert "; 11 of its 11 times were measured on a busy machine" in by_steps["4 steps"]

"""What fits a budget: against brute force, exact lines and doubled times. Nothing exceeds it, nothing is mixed."""

from __future__ import annotations

import itertools
import json
import math
import random
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ldmperf.profiling import Case, Record
from ldmperf.profiling.claims.offers import Budget, Curve, Offer, paper_fid
from ldmperf.profiling.claims.planning import Answer, Plan, answer, pareto_front
from ldmperf.profiling.measure.environment import DeviceState
from ldmperf.profiling.measure.intervals import Interval
from ldmperf.profiling.measure.recorded import Samples
from ldmperf.profiling.options import CaseError, joules, milliseconds
from ldmperf.profiling.paper import paper_sizes
from ldmperf.profiling.report.plan_text import answer_json
from ldmperf.profiling.trajectory.records import Energy

from .conftest import plausible_record

Run = Callable[..., Any]
SIZES = ("39M", "83M", "866M", "5B")
SAMPLERS = ("ddim", "dpmpp_2m", "lcm")
BACKENDS = ("torch", "diffusers")


def record(samples: Sequence[float], per_batch_joules: float | None = None, **case: Any) -> Record:
    energy = None
    if per_batch_joules is not None:
        energy = Energy(joules=8 * per_batch_joules, window_s=2.5, trajectories=8)
    return plausible_record(Case(**{"unet": "39M"} | case), wall_ms=Samples.of(samples), energy=energy)


def straight(fixed: float, slope: float, steps: Sequence[int], **case: Any) -> list[Record]:
    """Records whose times lie on a line over the steps exactly, all samples of a record alike."""
    return [record([fixed + slope * n] * 7, steps=n, **case) for n in steps]


def only_plan(records: Sequence[Record], budget: Budget, **only: Sequence[str]) -> Plan:
    (plan,) = answer(records, budget, only).plans
    return plan


def told(plan: Plan) -> list[tuple[str, str, int, str]]:
    return [(offer.name, offer.case.sampler, offer.case.steps, offer.basis) for offer in plan.offers]


@st.composite
def record_sets(draw: st.DrawFn) -> list[Record]:
    """Sizes, samplers, backends and step counts at random; times near a line, some far from one, a few failed."""
    records = []
    noise = draw(st.sampled_from([0.0, 0.02, 0.5]))
    rng = random.Random(draw(st.integers(0, 2**20)))
    for unet in draw(st.lists(st.sampled_from(SIZES), min_size=1, max_size=3, unique=True)):
        for sampler in draw(st.lists(st.sampled_from(SAMPLERS), min_size=1, max_size=2, unique=True)):
            for steps in draw(
                st.lists(st.sampled_from([1, 4, 20, 40, 50, 60]), min_size=1, max_size=4, unique=True)
            ):
                for backend in draw(st.lists(st.sampled_from(BACKENDS), min_size=1, max_size=2, unique=True)):
                    batch = draw(st.sampled_from([1, 1, 3]))
                    case = Case(unet=unet, sampler=sampler, steps=steps, backend=backend, batch=batch)
                    if rng.random() < 0.1:
                        records.append(plausible_record(case, status="oom"))
                        continue
                    ms = 5 + steps * (1 + SIZES.index(unet)) * (2 if backend == "torch" else 1)
                    samples = [
                        ms * (1 + noise * rng.uniform(-1, 1)) for _ in range(draw(st.sampled_from([1, 3, 7])))
                    ]
                    used = rng.uniform(0.2, 0.4) * ms if rng.random() < 0.8 else None
                    records.append(record(samples, used, **case.model_dump()))
    return records


budgets = st.builds(
    Budget, st.floats(1.0, 500.0), st.none() | st.floats(1.0, 100.0), st.sampled_from(["image", "batch"])
)
quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def median_of(record: Record, budget: Budget) -> float:
    assert record.wall_ms is not None
    share = record.case.batch if budget.per == "image" else 1
    return float(np.median(record.wall_ms.samples)) / share


def joules_of(record: Record, budget: Budget) -> float | None:
    if record.energy is None or record.energy.joules is None:
        return None
    share = record.case.batch if budget.per == "image" else 1
    return record.energy.joules / record.energy.trajectories / share


def fits(record: Record, budget: Budget) -> bool:
    used = joules_of(record, budget)
    energetic = budget.joules is None or (used is not None and used <= budget.joules * (1 + 1e-12))
    return energetic and median_of(record, budget) <= budget.wall_ms * (1 + 1e-12)


@quick
@given(record_sets(), budgets)
def test_what_was_measured_is_planned_as_brute_force_would(records: list[Record], budget: Budget) -> None:
    """Of each batch, network and sampler: the most measured steps, and the paper's 50, each at its least time."""
    for plan in answer(records, budget).plans:
        of_plan = [r for r in records if r.wall_ms is not None and r.case.batch == plan.case.batch]
        for unet in {r.case.unet for r in of_plan}:
            for sampler in SAMPLERS:
                fitting = [
                    r for r in of_plan if (r.case.unet, r.case.sampler) == (unet, sampler) and fits(r, budget)
                ]
                offers = [o for o in plan.offers if (o.name, o.case.sampler) == (unet, sampler)]
                measured = {o.case.steps: o for o in offers if o.basis == "measured"}
                most = max((r.case.steps for r in fitting), default=0)
                assert max(measured, default=0) == most
                assert max((o.case.steps for o in offers), default=0) >= most
                for steps, offer in measured.items():
                    least = min(median_of(r, budget) for r in fitting if r.case.steps == steps)
                    assert offer.ms.value == pytest.approx(least, rel=1e-12)
                if sampler == "ddim" and any(r.case.steps == 50 for r in fitting):
                    assert measured[50].fid == paper_sizes()[unet].fid
        offered = {offer.name for offer in plan.offers}
        assert {offer.name for offer in plan.least} == {r.case.unet for r in of_plan} - offered


@quick
@given(record_sets(), budgets)
def test_nothing_exceeds_the_budget_or_contradicts_a_measurement(records: list[Record], budget: Budget) -> None:
    for plan in answer(records, budget).plans:
        for offer in plan.offers:
            assert 0 < offer.ms.value <= budget.wall_ms
            assert budget.joules is None or (offer.joules is not None and offer.joules <= budget.joules)
            assert offer.ms.low <= offer.ms.value <= offer.ms.high
            assert offer.interval_fits(budget) == (offer.ms.high <= budget.wall_ms)
            same = [
                r
                for r in records
                if r.wall_ms is not None and r.case.model_copy(update={"steps": offer.case.steps}) == offer.case
            ]
            counts = {r.case.steps for r in same}
            assert (offer.case.steps in counts) == (offer.basis == "measured")
            if offer.basis != "measured":
                assert len(counts) >= (2 if offer.basis == "interpolated" else 3)
                inside = min(counts) < offer.case.steps < max(counts)
                assert inside or offer.basis == "extrapolated"
                over = [r.case.steps for r in same if not fits(r, budget)]
                assert offer.case.steps < min(over, default=10**9)
        for offer in plan.beyond:
            assert offer.fid is not None
            assert not offer.fits(budget)


@quick
@given(record_sets(), budgets)
def test_doubling_every_time_and_the_budget_changes_no_plan(records: list[Record], budget: Budget) -> None:
    doubled = [
        r
        if r.wall_ms is None
        else r.model_copy(update={"wall_ms": Samples.of([2 * s for s in r.wall_ms.samples])})
        for r in records
    ]
    before, after = answer(records, budget), answer(doubled, replace(budget, wall_ms=2 * budget.wall_ms))
    assert len(before.plans) == len(after.plans)
    for one, other in zip(before.plans, after.plans, strict=True):
        for mine, theirs in ((one.offers, other.offers), (one.beyond, other.beyond), (one.least, other.least)):
            assert [twice(offer) for offer in mine] == list(theirs)
        assert [twice(offer) for offer in one.front] == list(other.front)
        assert one.limits == other.limits


def twice(offer: Offer) -> Offer:
    ms = offer.ms
    return replace(offer, ms=replace(ms, low=2 * ms.low, value=2 * ms.value, high=2 * ms.high))


@quick
@given(record_sets(), budgets, st.randoms(use_true_random=False))
def test_the_order_of_records_changes_nothing(
    records: list[Record], budget: Budget, shuffled: random.Random
) -> None:
    # Cases measured again, before and in the same second, with other times: which one counts is not the order's.
    again = [
        r.model_copy(update={"started_at": r.started_at.replace(hour=hour), "wall_ms": Samples.of([1.0, 2.0])})
        for r, hour in zip(records[::2], itertools.cycle((8, 12)), strict=False)
        if r.wall_ms is not None
    ]
    other = plausible_record().environment.model_copy(update={"git_commit": "b" * 40})
    elsewhere = [r.model_copy(update={"environment": other}) for r in records[::3]]
    whole = [*records, *again, *elsewhere]
    mixed = list(whole)
    shuffled.shuffle(mixed)
    answered = answer(whole, budget)
    assert answer_json(answer(mixed, budget)) == answer_json(answered)
    # The plans of one environment are those without the other's records.
    own = answer([*records, *again], budget)
    assert [p.offers for p in answered.plans if environment_of(answered, p) != other] == [
        p.offers for p in own.plans
    ]


def environment_of(answered: Answer, plan: Plan) -> Any:
    return answered.shown.environments[plan.environment]


offers = st.builds(
    lambda ms, fid: Offer("x", Case(unet="39M"), Interval(ms, ms, ms), None, "measured", fid),
    st.integers(1, 6).map(float),
    st.none() | st.integers(1, 6).map(float),
)


@given(st.lists(offers, max_size=8, unique_by=lambda offer: (offer.ms.value, offer.fid)))
def test_the_front_is_what_nothing_dominates(some: list[Offer]) -> None:
    def dominates(one: Offer, other: Offer) -> bool:
        assert one.fid is not None
        assert other.fid is not None
        as_good = one.ms.value <= other.ms.value and one.fid <= other.fid
        return as_good and (one.ms.value, one.fid) != (other.ms.value, other.fid)

    known = [offer for offer in some if offer.fid is not None]
    expected = [offer for offer in known if not any(dominates(other, offer) for other in known)]
    front = pareto_front(some)
    assert sorted((o.ms.value, o.fid) for o in front) == sorted((o.ms.value, o.fid) for o in expected)
    assert [o.ms.value for o in front] == sorted(o.ms.value for o in front)


@given(
    fixed=st.integers(0, 40),
    slope=st.integers(1, 9),
    steps=st.lists(st.integers(1, 100), min_size=3, max_size=5, unique=True),
    budget=st.integers(1, 4000),
)
@settings(deadline=None, max_examples=60)
def test_on_an_exact_line_the_most_steps_are_those_of_its_formula(
    fixed: int, slope: int, steps: list[int], budget: int
) -> None:
    # Half a millisecond more than whole ones: no rounding decides.
    plan = only_plan(straight(float(fixed), float(slope), steps, sampler="euler"), Budget(budget + 0.5))
    expected = min((2 * (budget - fixed) + 1) // (2 * slope), 1000)
    if expected < 1:
        assert plan.offers == ()
        return
    most = max(plan.offers, key=lambda offer: offer.case.steps)
    assert most.case.steps == expected
    assert most.ms.value == pytest.approx(fixed + slope * expected)
    inside = min(steps) < expected < max(steps)
    assert most.basis == ("measured" if expected in steps else "interpolated" if inside else "extrapolated")


@pytest.mark.parametrize(
    ("steps", "budget", "expected"),
    [
        # One count tells nothing of others.
        ([20], 100.0, [(20, "measured")]),
        ([20], 20.0, []),
        # Two tell of those between.
        ([4, 20], 14.0, [(12, "interpolated"), (4, "measured")]),
        ([4, 20], 100.0, [(20, "measured")]),
        ([4, 20], 5.0, []),
        # Three of all.
        ([4, 20, 40], 14.0, [(12, "interpolated"), (4, "measured")]),
        ([4, 20, 40], 102.0, [(100, "extrapolated"), (40, "measured")]),
        ([4, 20, 40], 5.0, [(3, "extrapolated")]),
    ],
)
def test_how_far_a_line_tells(steps: list[int], budget: float, expected: list[tuple[int, str]]) -> None:
    records = straight(2.0, 1.0, steps, sampler="euler")
    assert [(n, basis) for _, _, n, basis in told(only_plan(records, Budget(budget)))] == expected


def test_times_that_are_no_line_tell_of_measured_counts_only() -> None:
    times = {4: 10.0, 20: 100.0, 40: 60.0, 60: 500.0}
    records = [record([ms] * 3, steps=n, sampler="euler") for n, ms in times.items()]
    plan = only_plan(records, Budget(80.0))
    assert told(plan) == [("39M", "euler", 40, "measured")]
    (limit,) = plan.limits
    assert "no rising line" in limit
    falling = only_plan(straight(50.0, -0.01, [4, 20, 40], sampler="euler"), Budget(60.0))
    assert told(falling) == [("39M", "euler", 40, "measured")]


def test_a_count_measured_to_exceed_the_budget_bounds_the_line() -> None:
    """Nearly a line, its 20 steps above it: the line would afford 20 and more, the measurement says no."""
    times = {4: 4.0, 20: 21.0, 40: 40.0, 60: 60.0}
    plan = only_plan([record([ms] * 7, steps=n, sampler="euler") for n, ms in times.items()], Budget(20.9))
    assert max(offer.case.steps for offer in plan.offers) == 19


def test_the_papers_steps_are_not_told_against_a_measurement() -> None:
    def steps_of(budget: float, **measured: float) -> tuple[list[int], list[int]]:
        times = {4: 4.0, 20: 20.0, 200: 200.0, 400: 400.0} | {int(n[1:]): ms for n, ms in measured.items()}
        records = [record([ms] * 7, steps=n) for n, ms in times.items()]
        curve = Curve.of(answer(records, Budget(1.0)).shown.rows, Budget(1.0))
        by_line = curve.offer(50)
        assert by_line is not None
        assert by_line.fits(Budget(budget)) == (budget > 50)
        plan = only_plan(records, Budget(budget))
        return [offer.case.steps for offer in plan.offers], [offer.case.steps for offer in plan.beyond]

    # The line affords 50 steps, and 40 were measured to take longer than that.
    assert steps_of(52.8, t40=53.0) == ([39, 20], [])
    # 51 were measured to fit, so 50 are not beyond the budget, whatever the line says.
    assert steps_of(47.0, t40=40.0, t51=46.0) == ([51], [])


@pytest.mark.parametrize(("sampler", "most"), [("lcm", 50), ("ddim", 999), ("euler", 1000)])
def test_no_more_steps_than_the_sampler_takes(sampler: str, most: int) -> None:
    plan = only_plan(straight(1.0, 1.0, [2, 4, 8], sampler=sampler), Budget(1e6))
    assert max(offer.case.steps for offer in plan.offers) == most


def test_the_papers_steps_are_told_by_the_line() -> None:
    plan = only_plan(straight(10.0, 1.0, [4, 20, 100]), Budget(90.0))
    assert told(plan) == [
        ("39M", "ddim", 50, "interpolated"),
        ("39M", "ddim", 80, "interpolated"),
        ("39M", "ddim", 20, "measured"),
    ]
    assert [offer.fid for offer in plan.offers] == [25.30, None, None]


def test_the_best_known_quality_comes_first_then_the_largest_network() -> None:
    records = [
        record([ms], unet=unet, sampler=sampler, steps=steps)
        for unet, sampler, steps, ms in [
            ("39M", "ddim", 50, 10.0),
            ("83M", "ddim", 50, 20.0),
            ("145M", "ddim", 50, 5.0),
            ("866M", "ddim", 50, 500.0),
            ("866M", "euler", 4, 40.0),
            ("39M", "euler", 50, 10.0),
            ("2B", "euler", 4, 90.0),
        ]
    ]
    plan = only_plan(records, Budget(100.0))
    assert told(plan) == [
        ("145M", "ddim", 50, "measured"),
        ("83M", "ddim", 50, "measured"),
        ("39M", "ddim", 50, "measured"),
        ("2B", "euler", 4, "measured"),
        ("866M", "euler", 4, "measured"),
        ("39M", "euler", 50, "measured"),
    ]
    assert [offer.name for offer in plan.front] == ["145M"]
    assert [(offer.name, offer.fid) for offer in plan.beyond] == [("866M", 21.55)]


def test_the_paper_has_a_quality_under_its_conditions_only() -> None:
    case = Case(unet="866M")
    assert paper_fid(case) == 21.55
    changes: list[dict[str, object]] = [
        *({"unet": "rival-50M"}, {"unet": "/models/866M"}, {"weights_sha256": "a" * 64}, {"task": "sr"}),
        *({"sampler": "euler"}, {"steps": 49}, {"guidance_scale": 3.0}, {"latent_width": 96}),
        *({"latent_height": 96}, {"context_tokens": 154}),
    ]
    for change in changes:
        assert paper_fid(case.model_copy(update=change)) is None, change
    same: list[dict[str, object]] = [{"batch": 4}, {"dtype": "float16"}, {"backend": "graph"}, {"seed": 3}]
    for change in same:
        assert paper_fid(case.model_copy(update=change)) == 21.55, change


def test_a_budget_is_per_image_or_per_batch() -> None:
    records = straight(0.0, 1.0, [20, 40, 60], batch=4, sampler="euler")
    assert max(o.case.steps for o in only_plan(records, Budget(10.0)).offers) == 40
    assert max(o.case.steps for o in only_plan(records, Budget(10.0, per="batch")).offers) == 10
    used = [record([100.0], 40.0, batch=4, steps=20)]
    assert [o.joules for o in only_plan(used, Budget(50.0, 10.0)).offers] == [10.0]
    assert only_plan(used, Budget(100.0, 39.0, "batch")).offers == ()


def test_energy_limits_too_and_unknown_energy_fits_no_limit() -> None:
    known = [record([float(n)] * 7, 2.0 * n, steps=n, sampler="euler") for n in (10, 20, 30)]
    assert max(o.case.steps for o in only_plan(known, Budget(1000.0, 50.0)).offers) == 25
    assert only_plan(straight(0.0, 1.0, [10, 20, 30], sampler="euler"), Budget(1000.0, 50.0)).offers == ()
    # Joules beyond those measured are extrapolated, wherever the time is known.
    some = [
        known[0],
        *straight(0.0, 1.0, [20], sampler="euler"),
        known[2],
        record([40.0] * 7, 80.0, steps=40, sampler="euler"),
    ]
    plan = only_plan([*some, *straight(0.0, 1.0, [2], sampler="euler")], Budget(5.0))
    assert told(plan) == [("39M", "euler", 5, "extrapolated"), ("39M", "euler", 2, "measured")]
    assert [offer.joules for offer in plan.offers] == [pytest.approx(10.0), None]


def test_an_interval_that_reaches_beyond_the_budget_is_said() -> None:
    plan = only_plan([record([9.0, 9.1, 9.2, 9.3, 9.4, 9.5, 12.0])], Budget(10.0))
    (offer,) = plan.offers
    assert (offer.ms.low, offer.ms.value, offer.ms.high) == (9.0, 9.3, 12.0)
    assert offer.fits(Budget(10.0))
    assert not offer.interval_fits(Budget(10.0))
    assert offer.interval_fits(Budget(12.0))


@pytest.mark.parametrize("asked", [30, 80])
def test_a_line_is_numpys_and_its_interval_has_the_farthest_deviation(asked: int) -> None:
    """Weighted by 1/time, as in the report; the samples alike, so that deviations alone make the interval."""
    times = {4: 4.2, 20: 20.0, 40: 41.0}
    steps, ms = np.array([*times]), np.array([*times.values()])
    slope, fixed = np.polyfit(steps, ms, 1, w=1 / ms)
    off = float(np.max(np.abs(fixed + slope * steps - ms) / ms))
    curve = Curve.of(
        answer([record([t] * 7, steps=n) for n, t in times.items()], Budget(1.0)).shown.rows, Budget(1.0)
    )
    offer = curve.offer(asked)
    assert offer is not None
    expected = fixed + slope * asked
    assert offer.ms.value == pytest.approx(expected)
    assert (offer.ms.low, offer.ms.high) == pytest.approx((expected * (1 - off), expected * (1 + off)))


@pytest.mark.parametrize("asked", [12, 80])
def test_intervals_by_a_line_cover_the_truth(asked: int) -> None:
    """Between and beyond the counts: at least as often as they say, on noise that is not symmetric."""
    rng = np.random.default_rng(5)
    covered = 0
    trials = 60
    for _ in range(trials):
        records = []
        for n in (4, 20, 50):
            noise = 1 + 0.05 * (rng.exponential(size=8) - math.log(2))
            records.append(record(list((3 + 2 * n) * noise), steps=n))
        shown = answer(records, Budget(1.0)).shown
        offer = Curve.of(shown.rows, Budget(1.0)).offer(asked)
        assert offer is not None
        assert offer.ms.confidence == 0.95
        covered += offer.ms.low <= 3 + 2 * asked <= offer.ms.high
    assert covered >= 0.95 * trials


def test_flags_are_of_every_record_behind_an_offer() -> None:
    first, second, third = straight(0.0, 1.0, [10, 20, 30], sampler="euler")
    throttled = DeviceState(throttle_reasons=("SwPowerCap",))
    records = [first, second.model_copy(update={"device_after": throttled}), third]
    assert [(o.case.steps, o.flags) for o in only_plan(records, Budget(25.0)).offers] == [
        (25, "throttled"),
        (20, "throttled"),
    ]
    assert [o.flags for o in only_plan(records, Budget(30.0)).offers] == [""]


def test_filters_keep_what_they_name_and_refuse_what_no_record_has() -> None:
    records = [record([10.0], unet=u, backend=b) for u in ("39M", "83M") for b in BACKENDS]
    assert {o.name for o in only_plan(records, Budget(20.0), size=["83M"]).offers} == {"83M"}
    assert {o.case.backend for o in only_plan(records, Budget(20.0), backend=["torch"]).offers} == {"torch"}
    for name, value in {
        "size": "7M",
        "sampler": "euler",
        "batch": "2",
        "dtype": "float16",
        "backend": "graph",
    }.items():
        with pytest.raises(CaseError, match=f"--{name}: no {name} '{value}'; choose from "):
            answer(records, Budget(1.0), {name: [value]})
    with pytest.raises(CaseError, match="--size: no value given"):
        answer(records, Budget(1.0), {"size": [","]})


@pytest.mark.parametrize(
    ("text", "ms"),
    [
        ("50ms", 50.0),
        ("2s", 2000.0),
        ("1.5 s", 1500.0),
        ("300us", 0.3),
        ("300µs", 0.3),
        ("2min", 120000.0),
        ("1e3ms", 1e3),
    ],
)
def test_a_time_as_people_write_it(text: str, ms: float) -> None:
    assert milliseconds("budget", text) == pytest.approx(ms)


@pytest.mark.parametrize(
    "text", ["50", "", "ms", "-5ms", "0s", "nan ms", "inf s", "1,5s", "5 hours", "1_0ms", "1e999s"]
)
def test_what_is_no_time_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(CaseError, match=r"--budget: .* is not a time; give a number above 0 with its unit .*50ms"):
        milliseconds("budget", text)


@given(st.text(max_size=12))
def test_any_text_is_an_amount_or_refused(text: str) -> None:
    for read in (milliseconds, joules):
        try:
            value = read("option", text)
        except CaseError:
            continue
        assert 0 < value < math.inf


def test_energies() -> None:
    assert [joules("joules", text) for text in ("5J", "300 mJ", "1.2kJ")] == pytest.approx([5.0, 0.3, 1200.0])


@pytest.fixture
def a_file(tmp_path: Path) -> Path:
    records = [
        *straight(5.0, 1.0, [4, 20, 50], unet="39M"),
        *straight(5.0, 2.0, [4, 20, 50], unet="83M"),
        *straight(5.0, 20.0, [4], unet="/models/bad\x1b[31m\nname"),
    ]
    path = tmp_path / "records.jsonl"
    path.write_text("".join(r.model_dump_json() + "\n" for r in records))
    return path


def test_the_page_shows_what_the_command_prints(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(__file__).parents[1]
    monkeypatch.chdir(root)
    page = (root / "docs" / "planning.md").read_text()
    (block,) = re.findall(r"```console\n\$ ldmperf (.*?)```", page, re.DOTALL)
    command, printed = block.split("\n", 1)
    assert run(*shlex.split(command)).out.startswith(printed)


def test_the_command_prints_the_table(run: Run, a_file: Path) -> None:
    outcome = run("plan", "--budget", "60 ms", a_file)
    assert outcome.code == 0
    rows = [line.split() for line in outcome.out.splitlines() if line.startswith("  39M")]
    assert rows == [
        ["39M", "ddim", "50", "torch", "55.00", "55.00..55.00", "25.30", "front", "measured", "yes"],
        ["39M", "ddim", "55", "torch", "60.00", "60.00..60.00", "not", "known", "-", "extrapolated", "yes"],
    ]
    assert "Of known FID, but beyond the budget: 83M (FID 24.30, ddim 50 torch, 105.0 ms)." in outcome.out
    assert r"No trajectory fits of: bad\x1b[31m\nname (ddim 4 torch, 85.00 ms)" in outcome.out
    assert "\x1b" not in outcome.out


def test_the_command_prints_json(run: Run, a_file: Path) -> None:
    outcome = run("plan", "--budget", "60ms", "--size", "39M,83M", "--json", a_file)
    told = json.loads(outcome.out)
    (plan,) = told["plans"]
    assert told["budget"] == {"wall_ms": 60.0, "joules": None, "per": "image"}
    assert [(o["name"], o["steps"], o["basis"], o["fid"], o["front"]) for o in plan["offers"]] == [
        ("39M", 50, "measured", 25.3, True),
        ("83M", 27, "interpolated", None, False),
        ("83M", 20, "measured", None, False),
        ("39M", 55, "extrapolated", None, False),
    ]
    assert plan["conditions"]["batch"] == 1


def test_the_command_writes_the_chart(run: Run, a_file: Path, tmp_path: Path) -> None:
    outcome = run("plan", "--budget", "60ms", a_file, "--out", tmp_path / "page")
    assert outcome.code == 0
    assert sorted(path.name for path in (tmp_path / "page").iterdir()) == ["pareto.png", "pareto.svg"]
    svg = (tmp_path / "page" / "pareto.svg").read_text()
    for text in ("39M", "83M", "on the front", "beyond the budget", "the paper's FID (less is better)"):
        assert text in svg, text
    # Throttled times have a star; ticks tell the FID of a single point.
    throttled = record([5.0], steps=50).model_copy(
        update={"device_after": DeviceState(throttle_reasons=("SwPowerCap",))}
    )
    (tmp_path / "throttled.jsonl").write_text(throttled.model_dump_json() + "\n")
    assert run("plan", "--budget", "60ms", tmp_path / "throttled.jsonl", "--out", tmp_path / "star").code == 0
    svg = (tmp_path / "star" / "pareto.svg").read_text()
    assert ">39M*<" in svg
    assert "* throttled, or beside another process on the GPU" in svg
    assert ">25.3<" in svg
    # Nothing of known quality: no chart, and none that passes for one.
    outcome = run("plan", "--budget", "60ms", "--size", r"bad\x1b[31m\nname", a_file, "--out", tmp_path / "page")
    assert outcome.code == 2
    lone = tmp_path / "lone.jsonl"
    lone.write_text(record([1.0], steps=4).model_dump_json() + "\n")
    outcome = run("plan", "--budget", "60ms", lone, "--out", tmp_path / "page")
    assert outcome.code == 1
    assert "no chart: it takes a size of the paper at 50 steps" in outcome.err
    assert list((tmp_path / "page").iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--budget"),
        (["--budget", "50"], "give a number above 0 with its unit (us, µs, ms, s, min)"),
        (["--budget", "50ms", "--joules", "5"], "is not an energy"),
        (["--budget", "50ms", "--per", "step"], "'image', 'batch'"),
        (["--budget", "50ms", "--dtype", "int8"], "float32, bfloat16, float16"),
        (["--budget", "50ms", "--size", "7M"], "choose from 39M, 83M"),
        (["--budget", "50ms", "/no/where"], "/no/where"),
    ],
)
def test_a_wrong_call_is_one_line_and_exit_code_2(run: Run, a_file: Path, arguments: list[str], said: str) -> None:
    outcome = run("plan", a_file, *arguments)
    assert outcome.code == 2
    assert said in outcome.err
    assert len(outcome.err.splitlines()) == 1


def test_lines_that_are_no_records_are_told(run: Run, a_file: Path) -> None:
    with a_file.open("a") as file:
        file.write('{"torn\n')
    outcome = run("plan", "--budget", "60ms", a_file)
    assert outcome.code == 1
    assert "1 line set aside" in outcome.err
    assert "  39M" in outcome.out


def test_without_a_time_there_is_nothing_to_plan_with(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text(plausible_record(status="oom").model_dump_json() + "\n")
    outcome = run("plan", "--budget", "60ms", path)
    assert outcome.code == 0
    assert "Nothing to plan with: no case of the family has a time." in outcome.out
    assert "1 of 1 cases without a time: 1 out of memory" in outcome.out


def test_without_a_name_the_latest_run_is_planned_with(
    run: Run, a_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = run("plan", "--budget", "60ms")
    assert outcome.code == 2
    assert "there is no run in runs" in outcome.err
    folder = tmp_path / "runs" / "20260101T000000Z-1a2b3c4"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text("{}")
    a_file.rename(folder / "records.jsonl")
    outcome = run("plan", "--budget", "60ms")
    assert outcome.code == 0
    assert "  39M" in outcome.out

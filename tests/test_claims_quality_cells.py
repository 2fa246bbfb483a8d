"""Which records of closed worlds make a cell: kinds apart, trainings that failed, whose times they take."""

from __future__ import annotations

from dataclasses import replace

import pytest
from quality_worlds import (
    Make,
    MakeRecord,
    as_the_paper_says,
    estimate,
    judged,
    rival,
    rows,
    students,
    times,
    world,
)

from ldmperf.profiling.claims.closed_worlds import ClosedWorld, closed_worlds
from ldmperf.profiling.claims.sample_costs import TimeBudget, budget_units
from ldmperf.profiling.claims.verdict import Verdict
from ldmperf.profiling.figures import overview
from ldmperf.profiling.quality import QualityRecord


def small_wins(records: list[QualityRecord]) -> Verdict:
    return judged(records, "small-wins-at-budget")[0]


def one_world(records: list[QualityRecord]) -> ClosedWorld:
    (found,) = closed_worlds(records)
    return found


def without(records: list[QualityRecord], seed: int, network: str, steps: int) -> list[QualityRecord]:
    place = (seed, network, steps)
    return [r for r in records if (r.case.training_seed, r.case.network, r.case.steps) != place]


# Failures


def test_training_seeds_that_failed_are_counted(make_quality: Make) -> None:
    whole = world(make_quality, seeds=(0, 1, 2))
    failed = [make_quality("w8", 25, training_seed=1, status="error")]
    verdict = small_wins([*without(whole, 1, "w8", 25), *failed])
    assert "; 1 training seed of its cells failed and is left out" in verdict.sentence
    assert verdict.sentence.startswith("in this closed world, ")
    more = [*failed, make_quality("w32", 3, training_seed=2, status="error")]
    two = small_wins([*without(without(whole, 1, "w8", 25), 2, "w32", 3), *more])
    assert "; 2 training seeds of its cells failed and are left out" in two.sentence
    # A cell that several budgets afford is one.
    assert sum(row["its steps"] == "25" for row in rows(two)) > 1


def test_a_failure_that_takes_no_figure_away_is_not_told(make_quality: Make) -> None:
    whole = world(make_quality, seeds=(0, 1))
    said = small_wins(whole)
    failures = [
        # It was run again, with more samples.
        make_quality("w8", 25, training_seed=1, status="error", samples=10),
        # Of no cell: other steps, prompts, guidance, training, kind.
        make_quality("w8", 24, training_seed=2, status="error"),
        make_quality("w8", 25, training_seed=2, status="error", split="held-out"),
        make_quality("w8", 25, training_seed=2, status="error", guidance_scale=3.0, tuned=False),
        make_quality("w8", 25, training_seed=2, status="error", training_steps=5),
        make_quality("w8", 25, training_seed=2, status="error", kind="distilled"),
    ]
    assert small_wins([*whole, *failures]) == said


def test_seeds_that_are_tuned_to_other_rates_share_a_cell(make_quality: Make) -> None:
    """It costs what the guided one costs; a rate that failed for a seed with a figure at another is no failure."""
    guided = make_quality("w8", 4, gflop_per_image=8.0)
    unguided = make_quality("w8", 4, training_seed=1, guidance_scale=1.0, gflop_per_image=4.0)
    failed = make_quality("w8", 4, training_seed=1, status="error")
    cell = one_world([guided, unguided, failed]).cells("ddim")["w8"][4]
    assert (cell.seeds, cell.failed) == ({0, 1}, frozenset())
    assert (cell.guided, cell.gflop_per_image) == (True, 8.0)


def test_failures_are_those_of_cases_without_a_figure_and_of_the_seeds_that_are_asked_for(
    make_quality: Make,
) -> None:
    again = [make_quality("w8", 4, training_seed=1, samples=n, status=of) for n, of in ((10, "error"), (20, "ok"))]
    failed = [make_quality("w8", 4, training_seed=seed, status="error") for seed in (2, 3)]
    found = one_world([make_quality("w8", 4), *again, *failed])
    assert found.failed == tuple(failed)
    cell = found.cells("ddim")["w8"][4]
    assert (cell.seeds, cell.failed) == ({0, 1}, {2, 3})
    part = cell.at_seeds({0, 2})
    assert part is not None
    assert (part.seeds, part.failed) == ({0}, {2})
    assert part.lost < cell.lost
    assert cell.at_seeds({2}) is None


def test_what_is_not_measured_tells_of_failures_too(make_quality: Make) -> None:
    records = [*world(make_quality, steps=(4, 50)), make_quality("w32", 4, training_seed=1, status="error")]
    assert small_wins(records).finding == "not measured"
    assert small_wins(records).sentence.endswith("; 1 training seed of its cells failed and is left out")


# Kinds


def test_each_kind_has_cells_of_its_own(make_quality: Make) -> None:
    """A student has its teacher's label and sampler; from scratch is the family's network, trained otherwise."""
    made = students(make_quality, lambda name: 0.5)
    scratch = world(make_quality, steps=(4,), kind="scratch")
    gan = rival(make_quality, 3.0)
    found = one_world([*world(make_quality), *made, *scratch, gan])
    assert found.networks == ("w8", "w12", "w16", "w24", "w32")
    assert found.samplers == ("ddim",)
    assert found.samplers_of("gan") == ("none",)
    assert {cell.kind for of in found.cells("ddim").values() for cell in of.values()} == {"diffusion"}
    assert [*found.cells("ddim", "distilled")] == ["w8", "w12", "w16", "w24", "w32"]
    assert found.cells("ddim", "gan") == {}
    assert [*found.cells("none", "gan")] == ["w8-gan"]
    assert sorted((cell.kind, cell.network) for cell in found.others("ddim")) == [
        *(("distilled", name) for name in ("w12", "w16", "w24", "w32", "w8")),
        ("gan", "w8-gan"),
    ]


def test_kinds_that_share_a_label_are_not_mixed(make_quality: Make) -> None:
    """The shorter training of the one is the longest of the other."""
    one = rival(make_quality, 3.0, "same", kind="vae", training_steps=10)
    other = rival(make_quality, 5.0, "same", kind="gan", training_steps=20)
    found = one_world([*world(make_quality), one, other]).others("ddim")
    assert [(cell.kind, cell.records[0].case.training_steps) for cell in found] == [("gan", 20), ("vae", 10)]


def test_labels_of_cases_that_share_a_network_differ(make_quality: Make) -> None:
    labels = {make_quality("w8", 4, kind=kind).case.label for kind in ("diffusion", "scratch", "distilled")}
    assert len(labels) == 3
    assert make_quality("w8", 4).case.label == "w8 ddim 4 steps guidance 2 seed 0 20000 training steps test"


# Costs


def test_costs_of_other_kinds_come_from_times_of_what_they_take(
    make_quality: Make, make_record: MakeRecord
) -> None:
    """By hand: 3 ms fixed; a guided step of the w8 takes 1 ms, an unguided one half of that."""
    student = students(make_quality, lambda name: 0.5, networks=("w8",))
    gan = rival(make_quality, 3.0)
    found = one_world([*world(make_quality), *student, gan])
    timed = times(make_record, fixed=3.0)
    timed += times(make_record, lambda name: 0.5, fixed=3.0, guidance_scale=1.0, networks=("w8",))
    unit = next(unit for unit in budget_units(found, overview(timed)) if isinstance(unit, TimeBudget))
    (cell,), (passed,) = (
        [cell for cell in found.others("ddim") if cell.kind == kind] for kind in ("distilled", "gan")
    )
    assert abs((unit.cost(cell) or 0) - 5.0) < 0.01
    assert unit.cost(passed) is None
    assert unit.stand_ins([cell]) == ["distilled networks take the times of their teachers' steps"]
    assert unit.stand_ins([passed]) == []
    assert unit.stand_ins(of[50] for of in found.cells("ddim").values()) == []
    # Two networks of the family make a budget; one and a rival do not.
    of_one = times(make_record, networks=("w8",))
    assert len(budget_units(found, overview(of_one))) == 1


def test_a_pass_takes_the_time_of_a_ddim_step_of_its_own_network(
    make_quality: Make, make_record: MakeRecord
) -> None:
    """By hand, of a batch of 2: 3 ms fixed; an image takes the GAN 0.25 ms, and the w8 1 ms for each step."""
    gan = rival(make_quality, 3.0)
    other = world(make_quality, sampler="ddpm", steps=(4,))
    found = one_world([*world(make_quality), *other, gan])
    timed = times(make_record, fixed=3.0, batch=2)
    own = times(make_record, lambda name: 0.25, fixed=3.0, guidance_scale=1.0, networks=("w8",), batch=2)
    cases = [record.case.model_copy(update={"unet": "w8-gan"}) for record in own]
    timed += [
        record.model_copy(update={"case": case, "case_key": case.key})
        for record, case in zip(own, cases, strict=True)
    ]
    unit = next(unit for unit in budget_units(found, overview(timed)) if isinstance(unit, TimeBudget))
    (passed,) = (cell for cell in found.others("ddim") if cell.kind == "gan")
    assert unit.cost(passed) == pytest.approx(3.0 / 2 + 0.25, rel=1e-3)
    assert unit.stand_ins([passed]) == ["a step of ddim stands in for the pass of w8-gan"]
    ddim, ddpm = (found.cells(sampler)["w8"][4] for sampler in ("ddim", "ddpm"))
    assert unit.cost(ddpm) == unit.cost(ddim) == pytest.approx(3.0 / 2 + 1.0 * 4, rel=1e-3)
    assert unit.stand_ins([ddpm, passed, ddim]) == [
        "ddim's times stand in for those of ddpm",
        "a step of ddim stands in for the pass of w8-gan",
    ]
    # A network of the family and a rival make no budget.
    alone = [record for record in timed if record.case.unet in ("w8", "w8-gan")]
    assert len(budget_units(found, overview(alone))) == 1
    # Times of the same labels for another task are none of these.
    assert len(budget_units(replace(found, task="sr"), overview(timed))) == 1


def test_networks_that_share_a_trajectory_begin_once(make_quality: Make, make_record: MakeRecord) -> None:
    """By hand, of a batch of 2: 3 ms fixed of either, then 3 steps of 1 ms and 1 of 16 ms."""
    takes = (("w8", 3), ("w32", 1))
    stitched = make_quality(kind="stitched", steps=4, takes=takes)
    found = one_world([*world(make_quality), stitched])
    timed = times(make_record, fixed=3.0, batch=2)
    unit = next(unit for unit in budget_units(found, overview(timed)) if isinstance(unit, TimeBudget))
    (cell,) = found.others("ddim")
    assert unit.cost(cell) == pytest.approx(3.0 / 2 + 3 * 1.0 + 16.0, rel=1e-2)
    assert unit.stand_ins([cell]) == []
    # Four steps of either were measured, of both in turn none.
    assert "some times are predicted from other step counts" in unit.notes([cell])


def test_another_kind_that_is_told_by_time_says_whose_time_it_is(
    make_quality: Make, make_record: MakeRecord
) -> None:
    records = [*world(make_quality), *students(make_quality, lambda name: 0.01, networks=("w8",))]
    timed = times(make_record) + times(make_record, lambda name: 0.5, guidance_scale=1.0, networks=("w8",))
    for claim in ("small-wins-at-budget", "large-wins-relaxed"):
        found = judged(records, claim, timed)
        by_time, by_flops = (
            [v for v in found if v.conditions["budget"].startswith(budget)] for budget in ("ms", "FLOPs")
        )
        assert all("distilled networks take the times of their teachers' steps" in v.sentence for v in by_time)
        assert not any("take the times" in v.sentence for v in by_flops)
        assert rows(by_time[0])[-1]["best of another kind"] == "w8 (distilled)"
        assert by_time[0].judged == judged(world(make_quality), claim, timed)[3].judged
    assert as_the_paper_says("w8", 50) > estimate(0.01).value

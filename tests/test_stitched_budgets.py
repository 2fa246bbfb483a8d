"""Whether a stitched trajectory is ahead of every single network at a budget, on families of known quality."""

from __future__ import annotations

import math

import pytest
from quality_worlds import NETWORKS, Make, MakeRecord, as_the_paper_says, estimate, times, world

from ldmperf.profiling.claims.closed_worlds import QUALITY_METRICS, ClosedWorld, closed_worlds
from ldmperf.profiling.claims.quality_budgets import StitchedRow, stitched_rows
from ldmperf.profiling.claims.sample_costs import budget_units
from ldmperf.profiling.figures import overview
from ldmperf.profiling.quality import QualityRecord

FRECHET = QUALITY_METRICS[0]


def shared(make_quality: Make, early: int, late: int, on_test: float, held_out: float) -> list[QualityRecord]:
    """The w8 takes the early steps and the w32 the late ones, by three seeds; held out is the first."""
    takes = (("w8", early), ("w32", late))
    of = {
        "kind": "stitched",
        "steps": early + late,
        "takes": takes,
        "gflop_per_image": 2.0 * (early + 16 * late),
    }
    tests = [make_quality(training_seed=seed, frechet=estimate(on_test), **of) for seed in (0, 1, 2)]
    return [*tests, make_quality(frechet=estimate(held_out), split="held-out", samples=500, tuned=False, **of)]


def family(make_quality: Make) -> list[QualityRecord]:
    held_out = world(make_quality, split="held-out", samples=500, tuned=False)
    return [*world(make_quality, seeds=(0, 1, 2)), *held_out]


def of_flops(world: ClosedWorld) -> dict[int, StitchedRow]:
    (flops,) = budget_units(world, overview([]))
    return {row.steps: row for row in stitched_rows(world, "ddim", flops, FRECHET)}


def test_held_out_prompts_choose_both(make_quality: Make) -> None:
    """Of two trajectories that one has the better tests which had the worse held-out prompts."""
    better, worse = shared(make_quality, 4, 1, 0.9, 0.5), shared(make_quality, 3, 1, 0.1, 0.6)
    (found,) = closed_worlds([*family(make_quality), *better, *worse])
    row = of_flops(found)[3]
    assert row.cost == 2 * 16 * 3
    assert row.stitched.cell.takes == (("w8", 4), ("w32", 1))
    # What 48 steps of the w8 buy, of all sizes: 25 of the w8 itself.
    assert (row.single.cell.network, row.single.cell.steps) == ("w8", 25)
    single = as_the_paper_says("w8", 25)
    assert row.advantage.value == pytest.approx(math.log(single / 0.9))
    assert row.advantage.low < row.advantage.value < row.advantage.high


def test_a_budget_affords_it_or_has_no_row(make_quality: Make, make_record: MakeRecord) -> None:
    """20 GFLOP a step are those of a step and a quarter of the w32; by the clock it is 1.25 of these, too."""
    records = [*family(make_quality), *shared(make_quality, 4, 1, 0.9, 0.5)]
    (found,) = closed_worlds(records)
    assert list(of_flops(found)) == [2, 3, 4, 6, 8, 12, 16, 25, 50]
    _, clock = budget_units(found, overview(times(make_record, lambda name: NETWORKS[name] ** 0.5)))
    # 4 of 1 ms and one of 4 are 8: two steps of the w32.
    rows = stitched_rows(found, "ddim", clock, FRECHET)
    assert [row.steps for row in rows] == [2, 3, 4, 6, 8, 12, 16, 25, 50]
    assert rows[0].cost == pytest.approx(8, rel=1e-2)


def test_it_is_compared_at_the_trainings_that_both_have(make_quality: Make) -> None:
    luck = {0: 0.5, 1: 2.0, 2: 2.0}
    of_family = [
        record
        for seed, of in luck.items()
        for record in world(make_quality, lambda n, s, of=of: of * as_the_paper_says(n, s), seeds=(seed,))
    ]
    held_out = world(make_quality, split="held-out", samples=500, tuned=False)
    once = [r for r in shared(make_quality, 4, 1, 0.9, 0.5) if r.case.training_seed == 0]
    (found,) = closed_worlds([*of_family, *held_out, *once])
    row = of_flops(found)[3]
    assert row.single.figure.seeds == (0,)
    assert row.advantage.value == pytest.approx(math.log(0.5 * as_the_paper_says("w8", 25) / 0.9))


def test_without_held_out_prompts_nothing_is_chosen(make_quality: Make) -> None:
    records = [*family(make_quality), *shared(make_quality, 4, 1, 0.9, 0.5)[:3]]
    (found,) = closed_worlds(records)
    assert of_flops(found) == {}
    (bare,) = closed_worlds([*world(make_quality), *shared(make_quality, 4, 1, 0.9, 0.5)])
    assert of_flops(bare) == {}

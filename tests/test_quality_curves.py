"""Curves of quality: intervals around the mean, the frontier, costs, sweeps, and the page that draws them."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ldmperf.profiling import Case, Record
from ldmperf.profiling.claims.closed_worlds import QualityCell
from ldmperf.profiling.claims.pooled_figures import DIFFERENCE, LOGARITHM, PooledFigure
from ldmperf.profiling.claims.sample_costs import FlopBudget, TimeBudget
from ldmperf.profiling.figures import overview
from ldmperf.profiling.measure.intervals import Interval
from ldmperf.profiling.quality import Estimate, QualityRecord
from ldmperf.profiling.report.drawings import ChartSet, panels_of
from ldmperf.profiling.report.quality_curves import (
    METRICS,
    CostCurves,
    CurvePoint,
    QualityCurves,
    frontier,
    pooled_interval,
    quality_curves,
)

from .quality_worlds import NETWORKS, STEPS, as_the_paper_says, estimate, students, sweep, times, world

Make = Callable[..., QualityRecord]
MakeRecord = Callable[..., Record]
Run = Callable[..., Any]
NOTHING = overview(())


def costs(records: list[QualityRecord], timed: list[Record] | None = None) -> tuple[CostCurves, ...]:
    return quality_curves(records, overview(timed or [])).costs


def names(points: tuple[CurvePoint, ...]) -> list[tuple[str, int]]:
    return [(point.cell.network, point.cell.steps) for point in points]


# Intervals


@settings(deadline=None)
@given(
    values=st.lists(st.floats(0.01, 100.0), min_size=1, max_size=4),
    noise=st.floats(0.0, 0.5),
    count=st.sampled_from((0, 20, 50)),
    scale=st.sampled_from((LOGARITHM, DIFFERENCE)),
)
def test_an_interval_contains_the_mean_over_seeds(
    values: list[float], noise: float, count: int, scale: Any
) -> None:
    draw = random.Random(1)
    estimates = [
        Estimate(value=v, replicates=tuple(1.2 * v + noise * v * draw.gauss(0, 1) for _ in range(count)))
        for v in values
    ]
    figure = PooledFigure.of("w8", scale, [(seed, 64, of) for seed, of in enumerate(estimates)])
    assert figure is not None
    found = pooled_interval(figure)
    mean = math.prod(values) ** (1 / len(values)) if scale is LOGARITHM else sum(values) / len(values)
    assert found.value == pytest.approx(mean)
    assert found.low <= found.value * (1 + 1e-12)
    assert found.high >= found.value * (1 - 1e-12)
    # Without replicates nothing is known of the noise.
    assert (found.low, found.high) == (found.value, found.value) or found.confidence > 0


def test_an_interval_of_one_seed_is_that_of_its_replicates_about_the_value() -> None:
    """By hand: replicates 1.1 +- 0.2 evenly, about a value of 1: the 95 % of them lie within 0.2, and near it."""
    even = Estimate(value=1.0, replicates=tuple(0.9 + 0.4 * k / 200 for k in range(201)))
    figure = PooledFigure.of("w8", DIFFERENCE, [(0, 64, even)])
    assert figure is not None
    found = pooled_interval(figure)
    assert (found.low, found.value, found.high) == pytest.approx((0.81, 1.0, 1.19), abs=0.01)


def test_seeds_are_pooled_and_the_order_of_records_does_not_matter(make_quality: Make) -> None:
    records = [
        make_quality("w8", 4, training_seed=seed, frechet=estimate(value), kid=estimate(value - 3))
        for seed, value in enumerate((1.0, 4.0, 16.0))
    ]
    records += world(make_quality, networks=("w32",), steps=(1, 4))
    (found,) = costs(records)
    (pooled,) = (point for point in found.points if point.cell.network == "w8")
    assert pooled.intervals["frechet"].value == pytest.approx(4.0)
    assert pooled.intervals["kid"].value == pytest.approx(4.0)
    # Seeds that differ by a factor of four leave room for more than their replicates do.
    assert pooled.intervals["frechet"].high > 8.0
    shuffled = random.Random(3).sample(records, len(records))
    assert costs(shuffled) == (found,)


# The frontier


def point(at: float, value: float | None, name: str = "w8") -> CurvePoint:
    intervals = {} if value is None else {"frechet": Interval(value, value, value)}
    return CurvePoint(_cell(name), at, {}, intervals)


def _cell(name: str) -> QualityCell:
    from .conftest import plausible_quality

    return QualityCell((plausible_quality(name, 3),))


POINTS = st.lists(
    st.tuples(st.integers(1, 8), st.one_of(st.none(), st.integers(1, 8)), st.sampled_from(("w8", "w12"))),
    max_size=12,
)


@settings(deadline=None)
@given(made=POINTS, seed=st.integers(0, 99))
def test_the_frontier_has_what_nothing_beats_and_nothing_else(
    made: list[tuple[int, int | None, str]], seed: int
) -> None:
    points = [point(float(at), value, name) for at, value, name in made]
    found = frontier(points, "frechet")
    values = [of.intervals["frechet"].value for of in found]
    assert [of.at for of in found] == sorted({of.at for of in found})
    assert values == sorted({*values}, reverse=True)
    # The best at every budget is on it, by looking at all of them.
    for budget in range(9):
        affordable = [value for at, value, _ in made if at <= budget and value is not None]
        within = [of.intervals["frechet"].value for of in found if of.at <= budget]
        assert min(affordable, default=None) == (within[-1] if within else None)
    shuffled = random.Random(seed).sample(points, len(points))
    assert [(of.at, names((of,))) for of in frontier(shuffled, "frechet")] == [
        (of.at, names((of,))) for of in found
    ]


def test_a_dominated_network_is_never_on_the_frontier(make_quality: Make) -> None:
    """The w24 is as good as the w8 at nine times its cost; each of the others is worth its cost somewhere."""

    def value(name: str, steps: int) -> float:
        return as_the_paper_says("w8" if name == "w24" else name, steps)

    (found,) = costs(world(make_quality, value))
    for metric in METRICS[:3]:
        best = frontier(found.points, metric.field)
        assert {of.cell.network for of in best} == {"w8", "w12", "w16", "w32"}
        # By hand: 2 GFLOP are a step of the w8, and the last is the largest network's 50 steps.
        assert (best[0].at, names(best)[0], names(best)[-1]) == (2.0, ("w8", 1), ("w32", 50))


def test_other_generators_stand_beside_the_family_and_may_be_the_best(make_quality: Make) -> None:
    fast = make_quality("w8-gan", 1, kind="gan", sampler="none", gflop_per_image=1.0, frechet=estimate(0.01))
    takes = (("w8", 20), ("w32", 30))
    stitched = make_quality(kind="stitched", steps=50, takes=takes, gflop_per_image=1000.0, frechet=estimate(9.0))
    curves = quality_curves([*world(make_quality), fast, stitched], NOTHING)
    assert curves.series == (*NETWORKS, "gan", "stitched")
    (found,) = curves.costs
    assert {of.kind for of in found.points} == {"diffusion", "gan", "stitched"}
    assert names(frontier(found.points, "frechet")) == [("w8-gan", 1)]
    # A trajectory that networks share has a sampler; a generator of one pass stands beside every one.
    both = costs([*world(make_quality), *world(make_quality, sampler="ddpm"), fast, stitched])
    kinds = {of.sampler: {point.kind for point in of.points} for of in both}
    assert kinds == {"ddim": {"diffusion", "gan", "stitched"}, "ddpm": {"diffusion", "gan"}}


def test_super_resolution_stands_apart_and_takes_no_mark_away(make_quality: Make) -> None:
    """Networks from drawn weights have the label of pre-trained ones, and no point."""
    t2i = [*world(make_quality), *students(make_quality, lambda name: 0.5)]
    sr = [
        make_quality(f"{name}-sr", steps, kind=kind, task="sr", guidance_scale=1.0, frechet=estimate(value))
        for kind, value in (("diffusion", 2.0), ("scratch", 9.0))
        for name in ("w8", "w32")
        for steps in (4, 16)
    ]
    alone, both = (quality_curves(records, NOTHING) for records in (t2i, [*t2i, *sr]))
    assert alone.series == (*NETWORKS, "distilled")
    assert both.series == (*NETWORKS, "distilled", "w32-sr", "w8-sr")
    first, second = both.costs
    assert (first.world.task, second.world.task) == ("sr", "t2i")
    assert second == alone.costs[0]
    assert {(of.kind, of.intervals["frechet"].value) for of in first.points} == {("diffusion", 2.0)}
    panels, drawing = drawn(both)["frechet-flops"]
    assert [panel.key["task"] for panel in panels] == ["super-resolution", "text-to-image"]
    assert [len(panel.facts) for panel in panels] == [4, 55]
    assert drawing.svg().startswith("<svg")


# Costs


def test_a_student_without_a_cost_is_named_beside_its_teacher(make_quality: Make, make_record: MakeRecord) -> None:
    records = [*world(make_quality), *students(make_quality, lambda name: 0.5, networks=("w8",))]
    of_time = next(of for of in costs(records, times(make_record)) if isinstance(of.unit, TimeBudget))
    assert of_time.without_cost == ("distilled w8",)


def test_without_times_there_are_flops_alone(make_quality: Make, make_record: MakeRecord) -> None:
    (found,) = costs(world(make_quality))
    assert isinstance(found.unit, FlopBudget)
    assert {(*names((of,))[0], of.at) for of in found.points} == {
        (name, steps, 2 * gflop * steps) for name, gflop in NETWORKS.items() for steps in STEPS
    }
    # Times of networks that no quality is known of are no times of these.
    others = [make_record(Case(unet=name, steps=4)) for name in ("39M", "83M")]
    assert [type(of.unit) for of in costs(world(make_quality), others)] == [FlopBudget]


def test_times_of_the_same_networks_are_another_cost(make_quality: Make, make_record: MakeRecord) -> None:
    """By hand: 5 ms fixed, and as many ms a step as the network has GFLOP; of a batch the share of an image."""
    timed = [of for batch in (1, 64) for of in times(make_record, fixed=5.0, batch=batch)]
    gan = make_quality("tiny-gan", 1, kind="gan", sampler="none")
    found = costs([*world(make_quality), gan], timed)
    of_time = {of.unit.batch: of for of in found if isinstance(of.unit, TimeBudget)}
    assert {*of_time} == {1, 64}
    for batch, curves in of_time.items():
        ms = {names((of,))[0]: of.at for of in curves.points}
        assert ms["w12", 8] == pytest.approx(5.0 / batch + 2.25 * 8)
        assert ms["w32", 50] == pytest.approx(5.0 / batch + 16.0 * 50)
        assert [of.at for of in curves.points] == sorted(ms.values())
        assert curves.without_cost == ("tiny-gan",)


def test_records_that_are_not_tuned_or_held_out_have_no_point(make_quality: Make) -> None:
    others = [
        *world(make_quality, tuned=False, guidance_scale=5.0),
        *world(make_quality, split="held-out"),
        make_quality("w8", 7, status="error", tuned=True),
    ]
    assert costs(others) == ()
    records = world(make_quality)
    assert [of.points for of in costs([*records, *others])] == [of.points for of in costs(records)]
    assert not quality_curves(others[-1:], NOTHING)


# The guidance rate


def test_a_sweep_has_each_rate_of_the_seeds_that_have_all(make_quality: Make) -> None:
    def quality(rate: float) -> float:
        return 1.0 + abs(rate - 2.0)

    records = sweep(make_quality, quality, lambda rate: 0.5 + 0.05 * rate)
    records += sweep(make_quality, lambda rate: 50.0, lambda rate: 0.1, rates=(2.0, 4.0), training_seed=1)
    # A rate alone is no sweep.
    records += world(make_quality, networks=("w16",), steps=(50,))
    (found,) = quality_curves(records, NOTHING).guidance
    assert (found.steps, found.split, found.sampler) == (50, "test", "ddim")
    assert [(of.cell.network, of.at) for of in found.points] == [
        (name, rate) for name in ("w8", "w32") for rate in (1.0, 1.5, 2.0, 4.0, 8.0)
    ]
    for of in found.points:
        assert of.intervals["frechet"].value == pytest.approx(quality(of.at))
        assert of.intervals["alignment"].value == pytest.approx(0.5 + 0.05 * of.at)


# Charts


def drawn(curves: QualityCurves, timed: list[Record] | None = None) -> dict[str, Any]:
    charts = ChartSet.of(overview(timed or []), quality=curves)
    return {
        chart.name: (panels_of(chart, charts.facts.table(chart.table)), drawing)
        for chart, drawing in zip(charts.charts, charts.drawings, strict=True)
        if drawing.chart is not None and chart.is_of_quality
    }


def test_a_chart_has_each_cell_once_with_its_front_its_floor_and_its_conditions(
    make_quality: Make, make_record: MakeRecord
) -> None:
    real = make_quality("real", 1, kind="real", sampler="none", frechet=estimate(0.05), kid=estimate(-0.001))
    records = [*world(make_quality), *world(make_quality, sampler="ddpm"), real]
    timed = [of for batch in (1, 64) for of in times(make_record, batch=batch)]
    curves = quality_curves(records, overview(timed))
    found = drawn(curves, timed)
    assert [*found] == [
        *("frechet-ms", "frechet-flops", "kid-ms", "kid-flops"),
        *("sliced-wasserstein-ms", "sliced-wasserstein-flops"),
    ]
    panels, _ = found["frechet-flops"]
    assert [panel.key["sampler"] for panel in panels] == ["ddim", "ddpm"]
    for panel, of_curves in zip(
        panels, (of for of in curves.costs if isinstance(of.unit, FlopBudget)), strict=True
    ):
        assert len(panel.facts) == 50
        on_front = {(f["network"], f["evaluations"]) for f in panel.facts if f["frechet_front"] is not None}
        assert on_front == {*names(frontier(of_curves.points, "frechet"))}
        assert all(f["frechet_low"] <= f["frechet"] <= f["frechet_high"] for f in panel.facts)
        assert {(f["frechet_real"], f["kid_real"]) for f in panel.facts} == {(0.05, -0.001)}
    # No panel has times of two batches; the page's filter of batches goes by the same words.
    panels, _ = found["frechet-ms"]
    assert {(panel.key["sampler"], panel.key["batch"]) for panel in panels} == {
        (sampler, batch) for sampler in ("ddim", "ddpm") for batch in ("batch 1", "batch 64")
    }
    assert "ddim's times stand in for those of ddpm" in panels[-1].facts[0]["frechet_note"]
    assert "one training seed; intervals of 95%" in panels[0].facts[0]["frechet_note"]
    # The alignment has 21 replicates, which give no more.
    assert "intervals of 91%" in panels[0].facts[0]["alignment_note"]


def test_a_distance_of_zero_or_less_breaks_no_chart(make_quality: Make) -> None:
    """A KID below zero is drawn; a logarithm of such is not there."""
    records = world(
        make_quality, frechet=lambda name, steps: 0.0 if name == "w8" else 1.0 / steps, kid_offset=-1.0
    )
    real = make_quality("real", 1, kind="real", sampler="none", frechet=estimate(0.0), kid=estimate(-1e-4))
    found = drawn(quality_curves([*records, real], NOTHING))
    (panel,), drawing = found["frechet-flops"]
    assert {fact["network"] for fact in panel.facts} == {*NETWORKS} - {"w8"}
    assert {fact["frechet_real"] for fact in panel.facts} == {None}
    (panel,), _ = found["kid-flops"]
    assert len(panel.facts) == 50
    assert max(fact["kid"] for fact in panel.facts) < 0
    assert drawing.svg().startswith("<svg")


def test_a_folder_of_quality_alone_has_its_charts_and_no_others(
    make_quality: Make, run: Run, tmp_path: Path
) -> None:
    lines = [
        of.model_dump_json() + "\n"
        for of in (*world(make_quality), *sweep(make_quality, math.sqrt, lambda r: 0.5))
    ]
    (tmp_path / "quality.jsonl").write_text("".join(lines))
    (tmp_path / "frechet-ms.png").write_bytes(b"of an earlier report")
    told = run("report", tmp_path)
    assert told.code == 0, told.err
    charts = {"frechet-flops", "kid-flops", "sliced-wasserstein-flops"}
    charts |= {"guidance-frechet", "guidance-kid", "guidance-sliced-wasserstein", "guidance-alignment"}
    expected = {f"{name}.{kind}" for name in charts for kind in ("png", "svg")} | {"report.html", "quality.jsonl"}
    assert {path.name for path in tmp_path.iterdir()} == expected
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<h1>What quality costs, in a closed world.</h1>" in html
    assert "Not drawn: Frechet distance against measured time (it takes trajectory records" in html
    # What times lack is not said where there are none.
    assert "Images per second" not in html


def test_without_quality_no_chart_of_it_is_asked_for(make_record: MakeRecord) -> None:
    timed = times(make_record, steps=(2, 4, 20))
    charts = ChartSet.of(overview(timed))
    assert [of.column for of in charts.palettes] == ["backend"]
    assert {of.name for of in charts.drawings if of.chart} == {"cost", "images", "steps"}

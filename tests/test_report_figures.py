"""Derived numbers against hand-computed values and numpy; conditions and environments are never mixed."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ldmperf.profiling import Case, Record
from ldmperf.profiling.figures import derived as figures
from ldmperf.profiling.figures import lines, text
from ldmperf.profiling.figures.phrases import differences
from ldmperf.profiling.measure.recorded import Samples
from ldmperf.profiling.paper import paper_sizes
from ldmperf.profiling.report import ladder
from ldmperf.profiling.terminal.layout import number
from ldmperf.profiling.trajectory.records import Harness, Trace

MakeRecord = Callable[..., Record]


def case(unet: str = "39M", **changes: object) -> Case:
    return Case(unet=unet, **({"steps": 4} | changes))


def timed(make_record: MakeRecord, of: Case, *samples_ms: float, **changes: object) -> Record:
    return make_record(of, wall_ms=Samples.of(samples_ms), **changes)


def rows_by(shown: figures.Overview) -> dict[tuple[str, str], figures.Row]:
    return {(row.name, row.record.case.backend): row for row in shown.rows}


def test_paper_costs_are_the_table() -> None:
    sizes = paper_sizes()
    assert len(sizes) == 11
    assert [sizes[name].normalized_cost for name in ("39M", "866M", "5B")] == [0.07, 1.0, 5.17]


@pytest.mark.parametrize(
    ("numerator", "denominator", "expected"),
    [
        (3.0, 2.0, 1.5),
        (None, 2.0, None),
        (3.0, None, None),
        (3.0, 0.0, None),
        (1e308, 1e-10, None),
        (0.0, 2.0, 0.0),
    ],
)
def test_ratio(numerator: float | None, denominator: float | None, expected: float | None) -> None:
    assert figures.ratio(numerator, denominator) == expected


def test_costs_are_relative_to_the_largest_size_and_so_is_the_papers(make_record: MakeRecord) -> None:
    records = [
        timed(make_record, case("145M"), 4000.0, 4000.0, 4400.0),
        timed(make_record, case("39M"), 1000.0, 1200.0, 2000.0),
    ]
    rows = rows_by(figures.overview(records))
    small, large = rows["39M", "torch"], rows["145M", "torch"]
    assert small.cost is not None
    assert large.cost is not None
    assert small.cost.p50 == pytest.approx(1200 / 4000)
    # Linear quantiles of three samples: p20 = a + 0.4 (b - a), p80 = b + 0.6 (c - b).
    assert small.cost.p20 == pytest.approx((1000 + 0.4 * 200) / 4000)
    assert small.cost.p80 == pytest.approx((1200 + 0.6 * 800) / 4000)
    assert small.paper_cost == pytest.approx(0.07 / 0.20)
    assert (large.cost.p50, large.paper_cost, large.reference) == (1.0, 1.0, "145M")
    assert small.reference == "145M"


def test_a_step_is_a_model_evaluation(make_record: MakeRecord) -> None:
    record = timed(make_record, case(sampler="heun"), 700.0, evaluations=7)
    spread = figures.step_ms(record)
    assert spread == figures.Spread(100.0, 100.0, 100.0)


def test_the_peer_is_the_same_case_with_the_other_backend(make_record: MakeRecord) -> None:
    records = [
        timed(make_record, case(), 1000.0),
        timed(make_record, case(backend="diffusers"), 1500.0),
        timed(make_record, case("83M"), 2000.0),
        timed(make_record, case("83M", batch=2, backend="diffusers"), 9000.0),
    ]
    rows = rows_by(figures.overview(records))
    assert rows["39M", "torch"].times_faster == pytest.approx(1.5)
    assert rows["39M", "diffusers"].times_faster is None
    assert rows["83M", "torch"].times_faster is None


def test_a_failed_peer_gives_no_ratio(make_record: MakeRecord) -> None:
    records = [timed(make_record, case(), 1000.0), make_record(case(backend="diffusers"), status="oom")]
    rows = rows_by(figures.overview(records))
    assert rows["39M", "torch"].times_faster is None
    assert rows["39M", "diffusers"].cost is None


def test_a_backend_is_relative_to_the_largest_size_that_it_has_a_time_for(make_record: MakeRecord) -> None:
    records = [
        timed(make_record, case("2B"), 100.0),
        timed(make_record, case("5B"), 250.0),
        timed(make_record, case("866M", backend="diffusers"), 50.0),
        timed(make_record, case("2B", backend="diffusers"), 200.0),
        make_record(case("5B", backend="diffusers"), status="oom"),
    ]
    rows = rows_by(figures.overview(records))
    assert rows["2B", "torch"].cost == figures.Spread(0.4, 0.4, 0.4)
    assert rows["2B", "torch"].paper_cost == pytest.approx(2.39 / 5.17)
    assert rows["866M", "diffusers"].cost == figures.Spread(0.25, 0.25, 0.25)
    assert rows["866M", "diffusers"].paper_cost == pytest.approx(1 / 2.39)
    assert (rows["2B", "diffusers"].reference, rows["5B", "diffusers"].reference) == ("2B", None)


def test_a_checkpoint_has_no_paper_cost_and_is_no_reference_beside_the_papers_sizes(
    make_record: MakeRecord,
) -> None:
    mine = "/models/huge"
    records = [
        timed(make_record, case(), 100.0, gflop_per_forward=53.0),
        timed(make_record, case(mine), 400.0, gflop_per_forward=530.0),
    ]
    rows = rows_by(figures.overview(records))
    assert rows["huge", "torch"].paper_cost is None
    assert rows["huge", "torch"].gflop_ratio == pytest.approx(10.0)
    assert rows["huge", "torch"].cost == figures.Spread(4.0, 4.0, 4.0)
    assert rows["39M", "torch"].paper_cost == 1.0
    assert rows["39M", "torch"].gflop_ratio is None


def test_names_of_checkpoints_are_told_apart(make_record: MakeRecord) -> None:
    unets = ("/a/unet", "/b/unet", "/c/other", "/d/39M", "39M")
    names = figures.network_names([make_record(case(unet)) for unet in unets])
    assert [names[unet] for unet in unets] == ["a/unet", "b/unet", "other", "/d/39M", "39M"]
    # Recorded, two that share a name are told apart by their weights, and none passes for a size.
    weighted = (("x", "1"), ("x", "2"), ("39M", "3"), ("SDXL", "4"))
    recorded = [case(unet, weights_sha256=digit * 64) for unet, digit in weighted]
    names = figures.network_names(
        [make_record(of) for of in (*recorded, case("39M"), case("SDXL"), case("other"))]
    )
    assert list(names.values()) == [
        *(f"{unet} weights={digit * 16}" for unet, digit in weighted), "39M", "SDXL", "other"
    ]  # fmt: skip
    shown = figures.overview([make_record(recorded[2])])
    assert shown.rows[0].paper_cost is None


@pytest.mark.parametrize("field", sorted(set(Case.model_fields) - {"unet", "weights_sha256", "backend"}))
def test_no_condition_is_averaged_over_or_left_unsaid(make_record: MakeRecord, field: str) -> None:
    other: dict[str, object] = {
        "task": "sr", "sampler": "ddpm", "dtype": "bfloat16", "device": "cuda", "guidance_scale": 1.0,
    }  # fmt: skip
    changed = other.get(field, 3)
    shown = figures.overview(
        [
            timed(make_record, case("145M"), 100.0),
            timed(make_record, case("39M"), 40.0),
            timed(make_record, case("39M", **{field: changed}), 10.0),
        ]
    )
    assert sorted(len(section.rows) for section in shown.sections) == [1, 2]
    alone = next(section for section in shown.sections if len(section.rows) == 1)
    assert alone.rows[0].cost == figures.Spread(1.0, 1.0, 1.0)
    headings = {shown.conditions.heading(section) for section in shown.sections}
    assert len(headings) == 2


def test_environments_are_kept_apart(make_record: MakeRecord) -> None:
    here = make_record().environment
    there = here.model_copy(update={"git_commit": "f" * 40, "torch": "2.12.0"})
    records = [
        timed(make_record, case("145M"), 100.0),
        timed(make_record, case("39M"), 20.0, environment=there),
        timed(make_record, case("39M", backend="diffusers"), 20.0),
    ]
    shown = figures.overview(records)
    assert shown.environments == (here, there)
    assert len(shown.sections) == 2
    rows = rows_by(shown)
    assert rows["39M", "torch"].cost == figures.Spread(1.0, 1.0, 1.0)
    assert rows["39M", "torch"].times_faster is None
    assert differences(here, there) == ["torch: 2.13.0+cpu, 2.12.0", "commit: 7d35813a1b2c, ffffffffffff"]


@pytest.mark.parametrize("order", [1, -1])
def test_files_may_be_given_in_any_order(make_record: MakeRecord, order: int) -> None:
    """Environments have their letters, and cases their latest record, by the time of measuring."""
    first = make_record().environment
    second = first.model_copy(update={"torch": "2.14.0"})
    made = [(first, 20.0), (first, 10.0), (second, 30.0)]
    records = [
        timed(make_record, case(), ms, environment=e, started_at=datetime(2026, 11, 26, hour, tzinfo=UTC))
        for hour, (e, ms) in enumerate(made)
    ]
    shown = figures.overview(records[::order])
    assert shown.environments == (first, second)
    assert [row.record.wall_ms.p50 for row in shown.rows] == [10.0, 30.0]


def test_of_a_case_measured_twice_the_later_is_shown_and_the_earlier_counted(make_record: MakeRecord) -> None:
    shown = figures.overview([make_record(case(), status="oom"), timed(make_record, case(), 20.0)])
    assert [row.record.status for row in shown.rows] == ["ok"]
    assert shown.superseded == 1


# Status, how many backends were timed in turn, whether it was cut short, and whether it was traced.
MADE = st.tuples(
    st.sampled_from(["ok", "ok", "ok", "oom", "incorrect"]), st.integers(1, 3), st.booleans(), st.booleans()
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(MADE, min_size=1, max_size=6))
def test_no_other_record_of_the_case_is_better_than_the_one_shown(
    make_record: MakeRecord, made: list[tuple[str, int, bool, bool]]
) -> None:
    records = []
    for position, (status, beside, is_cut, is_traced) in enumerate(made):
        harness = Harness(
            min_count=3,
            min_seconds=0.0,
            warmup_count=1,
            interleaved=("diffusers", "graph", "torch")[:beside],
            stopped_by="seconds" if is_cut else None,
        )
        trace = Trace(launches=1, busy_ms=1.0) if is_traced and status == "ok" else None
        started_at = datetime(2026, 11, 26, 12, position, tzinfo=UTC)
        records.append(make_record(case(), status=status, trace=trace, harness=harness, started_at=started_at))
    shown = figures.overview(records)
    (best,) = (row.record for row in shown.rows)
    assert shown.superseded == len(records) - 1
    later = records[records.index(best) + 1 :]
    # A result that was wrong is not passed over for a time from before it.
    assert not any(record.status == "incorrect" for record in later)
    seen_since = records
    for place, record in enumerate(records):
        if record.status == "incorrect":
            seen_since = records[place:]
    if best.wall_ms is None:
        assert all(record.wall_ms is None for record in seen_since)
        return
    rivals = [record for record in seen_since if record.wall_ms is not None]
    if best.harness.stopped_by is not None:
        assert all(record.harness.stopped_by is not None for record in rivals)
    rivals = [record for record in rivals if record.harness.stopped_by == best.harness.stopped_by]
    assert len(best.harness.interleaved) == max(len(record.harness.interleaved) for record in rivals)
    rivals = [r for r in rivals if r.harness.interleaved == best.harness.interleaved]
    if best.trace is None:
        assert all(record.trace is None for record in rivals)
    assert best == [record for record in rivals if (record.trace is None) == (best.trace is None)][-1]


def test_a_later_part_of_two_backends_does_not_replace_the_ladder(make_record: MakeRecord) -> None:
    def record(backend: str, *beside: str, cut: bool = False, ms: float = 100.0) -> Record:
        harness = Harness(
            min_count=3,
            min_seconds=0.0,
            warmup_count=1,
            interleaved=beside,
            stopped_by="seconds" if cut else None,
        )
        return timed(make_record, case(backend=backend), ms, harness=harness)

    rungs = ("diffusers", "torch", "graph")
    whole = [record(name, *rungs, ms=ms) for name, ms in zip(rungs, (90.0, 60.0, 30.0), strict=True)]
    family = [record(name, "graph", "diffusers", ms=50.0) for name in ("graph", "diffusers")]
    cut = [record(name, *rungs, "triton", cut=True, ms=70.0) for name in rungs]
    for order in ([*whole, *family, *cut], [*cut, *family, *whole], [*family, *cut, *whole]):
        rows = rows_by(figures.overview(order))
        assert {name: row.record.ms_per_step for (_, name), row in rows.items()} == {
            "diffusers": 22.5, "torch": 15.0, "graph": 7.5
        }  # fmt: skip
        assert rows["39M", "graph"].times_faster == 3.0


def test_sizes_are_shown_by_size_whatever_was_measured_first_and_on_what(make_record: MakeRecord) -> None:
    backends = ("graph", "torch", "diffusers")
    measured = [(size, name) for size in ("866M", "39M", "5B", "318M", "2B", "83M") for name in backends]
    # The first column of the tables lacks the smallest size, as where a group was cut short.
    measured.remove(("39M", "torch"))
    extra = make_record(case("39M", backend="triton"))
    shown = figures.overview([make_record(case(size, backend=name)) for size, name in measured] + [extra])
    by_size = ["39M", "83M", "318M", "866M", "2B", "5B"]
    for backend in backends:
        names = [row.name for row in shown.rows if row.record.case.backend == backend]
        assert names == [size for size in by_size if (size, backend) in measured]
    assert [found.name for found in ladder.ladders(shown)] == by_size
    assert [row[0] for row in ladder.costs_grid(shown).rows] == by_size


def test_who_was_done_first_does_not_change_the_order_of_rows(make_record: MakeRecord) -> None:
    records = [make_record(case(backend=name)) for name in ("graph", "diffusers", "of others", "torch", "triton")]
    expected = ["torch", "triton", "graph", "of others", "diffusers"]
    for order in (records, records[::-1]):
        assert [row.record.case.backend for row in figures.overview(order).rows] == expected


def test_a_checkpoint_stands_among_the_papers_sizes_by_its_gflop(make_record: MakeRecord) -> None:
    records = [make_record(case(unet)) for unet in ("866M", "39M")]
    records += [make_record(case(f"/m/of-{gflop}"), gflop_per_forward=gflop) for gflop in (810.0, 40.0, 700.0)]
    order = [row.name for row in figures.overview(records).rows]
    assert order == ["of-40.0", "39M", "of-700.0", "866M", "of-810.0"]


def test_rows_are_ordered_by_size_with_the_peer_last(make_record: MakeRecord) -> None:
    sizes = ["2B", "39M", "866M"]
    records = [make_record(case(size, backend=backend)) for size in sizes for backend in ("diffusers", "torch")]
    order = [(row.record.case.backend, row.name) for row in figures.overview(records).rows]
    assert order == [(backend, size) for backend in ("torch", "diffusers") for size in ("39M", "866M", "2B")]


def test_sections_are_ordered_by_number_not_by_text(make_record: MakeRecord) -> None:
    shown = figures.overview([make_record(case(steps=steps)) for steps in (10, 2, 100, 4)])
    assert [section.case.steps for section in shown.sections] == [2, 4, 10, 100]


def test_a_line_by_hand() -> None:
    # Through (1, 2), (2, 4), (3, 5): slope 3/2, intercept 2/3, residual 1/6 of 14/3.
    line = lines.fit_line([(1, 2), (2, 4), (3, 5)])
    assert line is not None
    assert line.slope == pytest.approx(1.5)
    assert line.intercept == pytest.approx(2 / 3)
    assert line.r2 == pytest.approx(1 - (1 / 6) / (14 / 3))


def test_lines_that_points_do_not_define() -> None:
    assert lines.fit_line([]) is None
    assert lines.fit_line([(4, 10.0)]) is None
    assert lines.fit_line([(4, 10.0), (4, 12.0)]) is None
    assert lines.fit_line([(2, 10.0), (4, 18.0)]) == lines.Line(4.0, 2.0, None)
    assert lines.fit_line([(1, 5.0), (2, 5.0), (3, 5.0)]) == lines.Line(0.0, 5.0, None)


@settings(deadline=None)
@given(
    st.dictionaries(st.integers(1, 1000), st.floats(0.1, 1e6), min_size=3, max_size=8),
)
def test_lines_are_numpys(times: dict[int, float]) -> None:
    points = [(float(n), ms) for n, ms in times.items()]
    line = lines.fit_line(points)
    x, y = (np.array(values) for values in zip(*points, strict=True))
    slope, intercept = np.polyfit(x, y, 1)
    assert line is not None
    scale = y.max()
    assert line.slope == pytest.approx(slope, rel=1e-7, abs=1e-9 * scale)
    assert line.intercept == pytest.approx(intercept, rel=1e-7, abs=1e-7 * scale)
    if line.r2 is not None and np.std(y) > 1e-6 * scale:
        assert line.r2 == pytest.approx(np.corrcoef(x, y)[0, 1] ** 2, abs=1e-6)


def test_a_relative_line_is_numpys_with_weights_of_one_over_y() -> None:
    x, y = np.array([1.0, 4.0, 20.0, 50.0]), np.array([130.0, 420.0, 2300.0, 5100.0])
    line = lines.fit_line(zip(x, y, strict=True), relative=True)
    slope, intercept = np.polyfit(x, y, 1, w=1 / y)
    assert (line.slope, line.intercept) == pytest.approx((slope, intercept))
    # What sets it apart: squares that are not relative.
    assert line.intercept != pytest.approx(np.polyfit(x, y, 1)[1], rel=0.01)


def test_lines_over_steps_are_of_one_size_and_backend(make_record: MakeRecord) -> None:
    records = [timed(make_record, case(steps=n), 40.0 + 10.0 * n) for n in (2, 4, 8)]
    records += [timed(make_record, case(steps=n, backend="diffusers"), 50.0 + 20.0 * n) for n in (2, 4)]
    records += [timed(make_record, case("83M", steps=2), 99.0), make_record(case("83M", steps=4), status="oom")]
    series = {(s.name, s.case.backend): s.line for s in figures.overview(records).series}
    assert set(series) == {("39M", "torch"), ("39M", "diffusers")}
    ours, peers = series["39M", "torch"], series["39M", "diffusers"]
    assert (ours.slope, ours.intercept, ours.r2) == pytest.approx((10.0, 40.0, 1.0))
    assert (peers.slope, peers.intercept) == pytest.approx((20.0, 50.0))
    assert peers.r2 is None


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, "-"), (0.0, "0"), (0.275, "0.2750"), (9.9996, "10.00"), (812.44, "812.4"), (999.96, "1000"),
        (1234.5, "1234"), (20123.4, "20123"), (1.5e9, "1.500e+09"), (0.000012345, "1.234e-05"),
    ],
)  # fmt: skip
def test_numbers_as_text(value: float | None, expected: str) -> None:
    assert number(value) == expected


@pytest.mark.parametrize(
    ("value", "expected"), [(None, "-"), (0.07, "0.070"), (0.01354, "0.014"), (0.354, "0.35"), (1.0, "1.00")]
)
def test_ratios_as_text(value: float | None, expected: str) -> None:
    assert text.short_ratio(value) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, "-"),
        (950, "950"),
        (1500, "1.50k"),
        (38_800_580, "38.8M"),
        (865_910_724, "865.9M"),
        (4_900_198_660, "4.90B"),
    ],
)
def test_parameter_counts_as_text(value: int | None, expected: str) -> None:
    assert text.count(value) == expected

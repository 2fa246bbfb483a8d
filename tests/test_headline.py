"""The first sentence of a report: its figures by hand, its rule by brute force, its doubts one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ldmperf.profiling import Case, Record
from ldmperf.profiling.figures import overview
from ldmperf.profiling.figures.headline import Headline, headline
from ldmperf.profiling.measure.environment import DeviceState
from ldmperf.profiling.measure.recorded import Samples
from ldmperf.profiling.paper import paper_sizes

MakeRecord = Callable[..., Record]
SIZES = tuple(paper_sizes())


def timed(make_record: MakeRecord, unet: str, step_ms: float, **fields: Any) -> Record:
    """Nine samples within 0.4 % of so many ms a step."""
    samples = fields.pop("samples", [1 + 0.001 * place for place in range(-4, 5)])
    changes = fields.pop("changes", {})
    case = Case(unet=unet, **({"steps": 20} | fields))
    wall = Samples.of([case.steps * step_ms * share for share in samples])
    size = paper_sizes().get(unet)
    known = {} if size is None else {"gflop_per_forward": size.gflop, "parameters": size.parameters}
    return make_record(case, **({"wall_ms": wall} | known | changes))


def told(*records: Record) -> Headline:
    found = headline(overview(records))
    assert found is not None
    return found


def test_the_figures_are_a_ratio_of_times_and_a_ratio_of_the_papers_costs(make_record: MakeRecord) -> None:
    found = told(
        timed(make_record, "145M", 100.0), timed(make_record, "83M", 70.0), timed(make_record, "39M", 55.0)
    )
    # The paper: 0.07 of the 866M over 0.20 of it.
    assert found.sentence == "39M costs 0.55 of 145M; its FLOPs say 0.35"
    assert found.conditions.startswith("a step with torch, AMD EPYC, float32, text-to-image, ddim, 20 steps")
    assert found.conditions.endswith("commit 7d35813")
    assert found.doubts == ()
    interval = found.interval
    assert interval is not None
    assert 0.545 < interval.low < 0.55 < interval.high < 0.555
    assert found.certainty == "0.55 with 95% confidence, from the samples of one run"


def test_networks_that_the_paper_does_not_have_are_told_by_their_flops(make_record: MakeRecord) -> None:
    weights = {"weights_sha256": "ab" * 32}
    large, small = (
        timed(make_record, name, ms, **weights, changes={"gflop_per_forward": gflop})
        for name, ms, gflop in (("mine", 80.0, 400.0), ("other", 60.0, 100.0))
    )
    assert told(large, small).sentence == "other costs 0.75 of mine; its FLOPs say 0.25"


def test_without_two_networks_under_the_same_conditions_there_is_none(make_record: MakeRecord) -> None:
    one = timed(make_record, "39M", 50.0)
    assert headline(overview([])) is None
    assert headline(overview([one])) is None
    assert headline(overview([one, timed(make_record, "83M", 60.0, steps=4)])) is None
    assert headline(overview([one, timed(make_record, "83M", 60.0, backend="graph")])) is None
    failed = make_record(Case(unet="83M", steps=20), status="oom")
    assert headline(overview([one, failed])) is None
    elsewhere = one.environment.model_copy(update={"cpu": "Another"})
    assert headline(overview([one, timed(make_record, "83M", 60.0, changes={"environment": elsewhere})])) is None
    zero = timed(make_record, "83M", 0.0)
    assert headline(overview([one, zero])) is None


def test_the_section_with_most_sizes_is_told_then_ours_then_the_highest_rung_then_the_most_steps(
    make_record: MakeRecord,
) -> None:
    def pair(large: str = "145M", **fields: Any) -> list[Record]:
        return [timed(make_record, "39M", 50.0, **fields), timed(make_record, large, 100.0, **fields)]

    def chosen(*records: Record) -> Case:
        return told(*records).small.case

    assert chosen(*pair(backend="diffusers"), *pair()).backend == "torch"
    assert chosen(*pair(), *pair(backend="graph"), *pair(backend="triton")).backend == "graph"
    assert chosen(*pair(backend="diffusers-compile"), *pair()).backend == "torch"
    assert chosen(*pair(steps=4), *pair(), *pair(steps=10)).steps == 20
    more = timed(make_record, "83M", 70.0, backend="diffusers")
    assert chosen(*pair(), *pair(backend="diffusers"), more).backend == "diffusers"
    # However the files are ordered.
    assert chosen(*pair(steps=20), *pair(steps=4)) == chosen(*pair(steps=4), *pair(steps=20))


TIMES = st.lists(
    st.tuples(st.sampled_from(SIZES), st.sampled_from([1, 20]), st.sampled_from(["torch", "graph", "diffusers"]),
              st.floats(0.1, 1e4)),
    max_size=12, unique_by=lambda item: item[:3],
)  # fmt: skip


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(times=TIMES)
def test_it_is_the_smallest_against_the_largest_where_most_were_timed(
    make_record: MakeRecord, times: list[tuple[str, int, str, float]]
) -> None:
    records = [timed(make_record, unet, ms, steps=steps, backend=backend) for unet, steps, backend, ms in times]
    found = headline(overview(records))
    groups: dict[tuple[int, str], dict[str, float]] = {}
    for unet, steps, backend, ms in times:
        groups.setdefault((steps, backend), {})[unet] = ms
    most = max((len(group) for group in groups.values()), default=0)
    assert (found is None) == (most < 2)
    if found is None:
        return
    group = groups[found.small.case.steps, found.small.case.backend]
    assert len(group) == most
    first, *_, last = sorted(group, key=SIZES.index)
    assert (found.small.name, found.large.name) == (first, last)
    assert found.small.cost is not None
    assert found.small.cost.p50 == pytest.approx(group[first] / group[last])


@pytest.mark.parametrize(
    ("fields", "doubt"),
    [
        ({"samples": [1.0, 1.001]}, "2 samples of a time"),
        ({"samples": [0.7, 0.9, 1.0, 1.2, 1.4, 1.0, 1.0]}, "a time is unsteady"),
        ({"changes": {"device_after": DeviceState(throttle_reasons=("SwThermalSlowdown",))}}, "not the times of"),
        ({"changes": {"device_before": DeviceState(load_average_1min=7.0)}}, "busy with other work"),
    ],
)
def test_each_doubt_is_told(make_record: MakeRecord, fields: dict[str, Any], doubt: str) -> None:
    found = told(timed(make_record, "145M", 100.0), timed(make_record, "39M", 50.0, **fields))
    assert any(doubt in one for one in found.doubts)


def test_two_machines_of_one_kind_are_a_doubt(make_record: MakeRecord) -> None:
    here, there = (make_record().environment.model_copy(update={"machine_id": letter * 16}) for letter in "ab")
    large = timed(make_record, "145M", 100.0, changes={"environment": here})
    assert told(large, timed(make_record, "39M", 50.0, changes={"environment": here})).doubts == ()
    found = told(large, timed(make_record, "39M", 50.0, changes={"environment": there}))
    assert found.doubts == ("measured on two machines of one kind",)


def test_a_ratio_that_flops_explain_is_told_to_be_one(make_record: MakeRecord) -> None:
    found = told(timed(make_record, "145M", 100.0), timed(make_record, "39M", 35.0))
    assert found.doubts == ("what its FLOPs say lies within the interval",)


def test_a_higher_rung_is_told_before_a_longer_trajectory(make_record: MakeRecord) -> None:
    made = [
        make_record(Case(unet=unet, steps=steps, backend=backend))
        for unet in ("39M", "83M")
        for backend, steps in (("triton", 2), ("torch", 8))
    ]
    found = headline(overview(made))
    assert found is not None
    assert found.conditions.startswith("a step with triton")

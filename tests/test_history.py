"""Times over commits: their order, what is judged against what, and what is never put into one line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ldmperf.profiling import Case, Record
from ldmperf.profiling.compare.comparison import VerdictRule, compare_sets
from ldmperf.profiling.compare.history import METRIC, History
from ldmperf.profiling.compare.over_commits import history
from ldmperf.profiling.compare.sets import set_of
from ldmperf.profiling.compare.side_by_side import side_by_side
from ldmperf.profiling.measure.recorded import Samples

MakeRecord = Callable[..., Record]
START = datetime(2026, 11, 1, tzinfo=UTC)
CASE = Case(unet="39M", steps=4)


def commit(number: int) -> str:
    return 40 * str(number)


def of_commit(
    make_record: MakeRecord,
    number: int,
    levels_ms: Sequence[float],
    case: Case = CASE,
    *,
    seed: int = 0,
    **where: Any,
) -> list[Record]:
    """A run for each level: seven samples within a percent of it. The later the commit, the higher its number."""
    draw = np.random.default_rng([seed, number])
    known = {"git_commit": commit(number), "commit_time": START + timedelta(days=number), "machine_id": "a" * 16}
    environment = make_record().environment.model_copy(update=known | where)
    return [
        make_record(
            case,
            wall_ms=Samples.of([level * draw.uniform(0.995, 1.005) for _ in range(7)]),
            environment=environment,
            run_id=f"{number}-{run}",
            # Measured in the reverse order of the commits.
            started_at=START + timedelta(days=100 - number, minutes=run),
        )
        for run, level in enumerate(levels_ms)
    ]


def over(records: Sequence[Record]) -> History:
    found = history(records)
    assert found is not None
    return found


LEVELS = (100.0, 100.4, 99.7, 100.1, 99.9, 100.2)


def test_a_slower_commit_is_marked_and_only_where_it_came(make_record: MakeRecord) -> None:
    factors = (1.0, 1.0, 1.1, 1.1, 0.9)
    records = [r for n, f in enumerate(factors) for r in of_commit(make_record, n, [f * ms for ms in LEVELS])]
    (series,) = over(records[::-1]).series
    assert [point.commit for point in series.points] == [commit(n)[:7] for n in range(5)]
    assert [point.verdict for point in series.points] == ["", "SAME", "SLOWER", "SAME", "FASTER"]
    assert [point.is_changed for point in series.points] == [False, False, True, False, True]
    assert [point.at for point in series.points] == [START + timedelta(days=n) for n in range(5)]
    slower = series.points[2]
    assert slower.ratio is not None
    assert slower.ratio.low < 1.1 < slower.ratio.high
    # ms of a step: four of them.
    assert slower.step_ms.p50 == pytest.approx(110 / 4, rel=0.01)
    assert slower.runs == 6
    assert (series.name, series.machine) == ("39M torch", "")
    grid = over(records).grid()
    column = [row[grid.headings.index("verdict")] for row in grid.rows]
    assert column == ["-", "SAME", "SLOWER", "SAME", "FASTER"]


def test_each_step_has_the_verdict_that_comparing_the_two_commits_has(make_record: MakeRecord) -> None:
    """Of one case and two commits: then there is one test to adjust for in both."""
    for seed, factor in enumerate((1.0, 1.005, 1.03, 1.2, 0.8)):
        a = of_commit(make_record, 1, LEVELS, seed=seed)
        b = of_commit(make_record, 2, [factor * ms for ms in LEVELS], seed=seed)
        (series,) = over([*b, *a]).series
        (change,) = compare_sets(
            set_of(a, Path("a")), set_of(b, Path("b")), [METRIC], VerdictRule()
        ).changes  # fmt: skip
        assert change.contrast is not None
        point = series.points[1]
        # Runs that were made one side after the other are not in turn, nor are commits.
        assert (point.verdict, point.ratio) == (change.verdict, change.contrast.ratio)


def test_one_run_each_has_the_assumed_noise_and_few_samples_decide_nothing(make_record: MakeRecord) -> None:
    records = [*of_commit(make_record, 1, [100.0]), *of_commit(make_record, 2, [103.0])]
    (series,) = over(records).series
    assert series.points[1].verdict == "AMBIGUOUS"
    records[1] = records[1].model_copy(update={"wall_ms": Samples.of([300.0, 301.0])})
    point = over(records).series[0].points[1]
    assert (point.verdict, point.ratio) == ("AMBIGUOUS", None)
    assert "samples" in point.why
    (far,) = over([*of_commit(make_record, 1, [100.0]), *of_commit(make_record, 2, [150.0])]).series
    assert far.points[1].verdict == "SLOWER"


def test_a_case_is_judged_against_the_last_commit_that_has_it(make_record: MakeRecord) -> None:
    other = CASE.model_copy(update={"unet": "83M"})
    records = [
        *of_commit(make_record, 1, LEVELS),
        *of_commit(make_record, 2, LEVELS, other),
        *of_commit(make_record, 3, [2 * ms for ms in LEVELS]),
    ]
    # A failure has no time, and is said.
    failed = of_commit(make_record, 2, LEVELS[:1])[0].model_dump()
    records.append(
        make_record(
            CASE,
            status="oom",
            environment=records[6].environment,
            run_id="x",
            started_at=failed["started_at"],
        )
    )
    found = over(records)
    (series,) = found.series
    assert [point.commit for point in series.points] == [commit(1)[:7], commit(3)[:7]]
    assert series.points[1].verdict == "SLOWER"
    assert "1 case without a time on some commit" in " ".join(found.notes)


def test_what_is_of_one_commit_or_of_different_machines_has_no_history(make_record: MakeRecord) -> None:
    one = of_commit(make_record, 1, LEVELS)
    assert history([]) is None
    assert history(one) is None
    for differs in ({"cpu": "Another"}, {"torch": "2.14.0"}, {"torch_threads": 9}):
        assert history([*one, *of_commit(make_record, 2, LEVELS, **differs)]) is None
    # The commit's own version and tuned table may differ, and the machine's id is told.
    later = of_commit(make_record, 2, LEVELS, ldmperf="9", tuned="f" * 16, machine_id="b" * 16)
    assert "not all measured on one machine" in " ".join(over([*one, *later]).notes)


def test_kinds_of_machines_have_lines_of_their_own(make_record: MakeRecord) -> None:
    records = [
        record
        for number in (1, 2)
        for cpu, factor in (("AMD EPYC", 1.0), ("Intel", 3.0))
        for record in of_commit(make_record, number, [factor * ms for ms in LEVELS], cpu=cpu)
    ]
    found = over(records)
    assert {series.machine for series in found.series} == {"AMD EPYC", "Intel"}
    assert all(series.points[1].verdict == "SAME" for series in found.series)
    assert len(found.grid().rows) == 4
    assert "machine" in found.grid().headings


def test_of_several_kinds_of_machines_only_one_with_a_history_has_no_letter(make_record: MakeRecord) -> None:
    other = of_commit(make_record, 1, LEVELS, cpu="Intel")
    found = over([*other, *of_commit(make_record, 1, LEVELS), *of_commit(make_record, 2, LEVELS)])
    assert "AMD EPYC" in found.shared
    # It would be one of a report's environments, which are of a commit each.
    assert "environment" not in found.shared


def test_what_is_not_known_of_a_commit_is_said(make_record: MakeRecord) -> None:
    records = [
        *of_commit(make_record, 1, LEVELS, commit_time=None),
        *of_commit(make_record, 2, LEVELS, git_dirty=True),
        *of_commit(make_record, 2, LEVELS),
        *of_commit(make_record, 3, LEVELS, git_commit=None, commit_time=None),
    ]
    found = over(records)
    notes = " ".join(found.notes)
    assert f"No time of commit is recorded of {commit(1)[:7]}, unknown commit" in notes
    assert f"{commit(2)[:7]} with uncommitted changes: the commit alone does not say what ran" in notes
    assert "without a commit stand together" in notes
    (series,) = found.series
    # Those without a time stand where they were measured: after the others, here in reverse.
    assert [point.commit for point in series.points] == [
        commit(2)[:7], f"{commit(2)[:7]} with uncommitted changes", "unknown commit", commit(1)[:7],
    ]  # fmt: skip


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_points_are_in_order_and_rows_are_the_points(make_record: MakeRecord, data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.sampled_from(["39M", "83M", "145M"]), min_size=1, unique=True))
    records: list[Record] = []
    for unet in sizes:
        numbers = data.draw(st.lists(st.integers(0, 5), min_size=1, unique=True))
        for number in numbers:
            records += of_commit(make_record, number, LEVELS[:1], CASE.model_copy(update={"unet": unet}))
    found = history(data.draw(st.permutations(records)))
    several = {r.case_id for r in records if len([other for other in records if other.case_id == r.case_id]) > 1}
    assert {series.case_id for series in found.series} == several if found else not several
    if found is None:
        return
    assert len(found.grid().rows) == sum(len(series.points) for series in found.series)
    for series in found.series:
        assert all(a.at < b.at for a, b in pairwise(series.points))


# Two commits side by side


def test_two_commits_on_each_kind_of_machine_are_a_comparison_each(make_record: MakeRecord) -> None:
    records = [
        record
        for number, factor in ((1, 1.0), (2, 1.3))
        for cpu in ("AMD EPYC", "Intel")
        for record in of_commit(make_record, number, [factor * ms for ms in LEVELS], cpu=cpu)
    ]
    first, second = side_by_side(records[::-1])
    assert {first.title, second.title} == {
        f"A {commit(1)[:7]} beside B {commit(2)[:7]}, {cpu}" for cpu in ("AMD EPYC", "Intel")
    }
    for found in (first, second):
        assert found.counts == "1 SLOWER"
        ((name, metric, _, _, ratio, *_),) = found.grid.rows
        assert (name, metric) == ("39M torch", "wall_ms")
        assert float(ratio) == pytest.approx(1.3, rel=0.01)
        assert any("FASTER, SLOWER" in note for note in found.notes)


def test_other_than_two_commits_and_none_in_common_are_no_comparison(make_record: MakeRecord) -> None:
    one, two, three = (of_commit(make_record, number, LEVELS) for number in (1, 2, 3))
    assert side_by_side([]) == side_by_side(one) == side_by_side([*one, *two, *three]) == ()
    other = of_commit(make_record, 2, LEVELS, CASE.model_copy(update={"unet": "83M"}))
    assert side_by_side([*one, *other]) == ()
    assert side_by_side([*one, *of_commit(make_record, 2, LEVELS, torch="2.14.0")]) == ()
    (found,) = side_by_side([*one, *two, *other])
    assert found.lists == (("in B only", ("83M torch",)),)

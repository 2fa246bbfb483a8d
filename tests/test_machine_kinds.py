"""Machines of one kind are one environment of a report, and it says so; what differs in kind is never mixed."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from ldmperf.profiling import Case, Record
from ldmperf.profiling.figures import overview
from ldmperf.profiling.measure.environment import Environment, Gpu
from ldmperf.profiling.measure.recorded import Samples
from ldmperf.profiling.report.details import environment_lines
from ldmperf.profiling.report.notes import warnings

MakeRecord = Callable[..., Record]
# What changes from one start of a machine of that kind to the next.
OF_THE_MACHINE: dict[str, Any] = {
    "machine_id": "b" * 16, "logical_cores": 64, "usable_cores": 48, "memory_bytes": 1,
    "commit_time": datetime(2026, 1, 1, tzinfo=UTC),
}  # fmt: skip
OTHERS: dict[str, Any] = {
    "cudnn": 91000, "torch_threads": 7, "cudnn_tf32": True, "cudnn_benchmark": True, "heap": "kept",
    "git_dirty": True, "git_commit": "f" * 40, "gpu": Gpu(name="NVIDIA H200", count=1),
}  # fmt: skip


def at(make_record: MakeRecord, unet: str, ms: float, environment: Environment, **fields: Any) -> Record:
    changes = {"wall_ms": Samples.of([ms] * 3), "environment": environment}
    return make_record(Case(unet=unet, steps=4), **(changes | fields))


def on(make_record: MakeRecord, machine: str, **changes: Any) -> Environment:
    return make_record().environment.model_copy(update={"machine_id": machine} | changes)


def test_four_shards_of_one_kind_have_their_ratios_and_a_note(make_record: MakeRecord) -> None:
    machines = [on(make_record, letter * 16, memory_bytes=10**9 * place) for place, letter in enumerate("abcd")]
    sizes = {"39M": 20.0, "83M": 30.0, "145M": 40.0, "223M": 80.0}
    records = [
        at(make_record, unet, ms, where)
        for (unet, ms), where in zip(sizes.items(), machines, strict=True)
    ]  # fmt: skip
    shown = overview(records)
    assert len(shown.environments) == len(shown.sections) == 1
    assert {row.name: row.cost.p50 for row in shown.rows if row.cost} == {
        "39M": 0.25, "83M": 0.375, "145M": 0.5, "223M": 1.0,
    }  # fmt: skip
    # Each row still knows its own machine.
    assert {row.record.environment.machine_id for row in shown.rows} == {letter * 16 for letter in "abcd"}
    (measured_in,) = shown.measured_in
    assert set(measured_in) == set(machines)
    (note,) = (line for line in warnings(shown) if "machines of one kind" in line)
    assert note.startswith("Measured on 4 machines of one kind (aaaaaaaaaaaaaaaa, bbbbbbbbbbbbbbbb")
    assert "ratios between their cases include what tells the machines apart" in note


def test_the_lines_of_an_environment_have_the_values_of_all_its_machines(make_record: MakeRecord) -> None:
    one, other = on(make_record, "a" * 16), on(make_record, "b" * 16, usable_cores=4)
    lines = dict(environment_lines([one, other]))
    assert lines["machine id"] == f"{'a' * 16} / {'b' * 16}"
    assert lines["cores"] == "2 usable of 2 / 4 usable of 2"
    assert lines["CPU"] == "AMD EPYC"
    assert dict(environment_lines([one]))["machine id"] == "a" * 16


def test_one_machine_has_no_note_however_often_it_was_started(make_record: MakeRecord) -> None:
    records = [
        at(make_record, "39M", 20.0, on(make_record, "a" * 16)),
        at(make_record, "83M", 30.0, on(make_record, "a" * 16, memory_bytes=5, usable_cores=4)),
    ]
    assert not any("machine" in line for line in warnings(overview(records)))
    # Without an id nobody knows.
    unknown = [
        at(make_record, "39M", 20.0, on(make_record, None)),  # type: ignore[arg-type]
        at(make_record, "83M", 30.0, on(make_record, None, memory_bytes=5)),  # type: ignore[arg-type]
    ]
    assert any("may be several machines" in line for line in warnings(overview(unknown)))
    assert not any("machine" in line for line in warnings(overview(unknown[:1])))


@pytest.mark.parametrize("field", [*Environment.model_fields, *(f"gpu.{name}" for name in Gpu.model_fields)])
def test_every_field_that_is_not_the_machines_own_sets_environments_apart(
    make_record: MakeRecord, field: str
) -> None:
    gpu = Gpu(name="NVIDIA H100", count=1)
    here = on(make_record, "a" * 16, gpu=gpu)
    if field.startswith("gpu."):
        name = field.removeprefix("gpu.")
        value: Any = {"count": 8, "memory_bytes": 5, "power_limit_w": 350.0}.get(name, "other")
        there = here.model_copy(update={"gpu": gpu.model_copy(update={name: value})})
        is_alike = name in ("count", "memory_bytes")
    else:
        there = here.model_copy(update={field: (OF_THE_MACHINE | OTHERS).get(field, "other")})
        is_alike = field in OF_THE_MACHINE
    assert there != here
    shown = overview([at(make_record, "39M", 20.0, here), at(make_record, "145M", 40.0, there)])
    assert len(shown.environments) == (1 if is_alike else 2)
    # The rule of `differences`, which decides whether a run may go on.
    assert bool(here.differences(there)) != is_alike
    assert [row.cost.p50 for row in shown.rows if row.cost] == ([0.5, 1.0] if is_alike else [1.0, 1.0])


def test_of_a_case_on_two_machines_of_a_kind_the_best_record_is_shown(make_record: MakeRecord) -> None:
    later = make_record().started_at + timedelta(hours=1)
    records = [
        at(make_record, "39M", 20.0, on(make_record, "a" * 16), started_at=later),
        at(make_record, "39M", 30.0, on(make_record, "b" * 16)),
    ]
    shown = overview(records)
    assert [row.record.environment.machine_id for row in shown.rows] == ["a" * 16]
    assert shown.superseded == 1

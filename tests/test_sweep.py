"""Whatever ends the process that measures a group costs the case in flight, and no other."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ldmperf.profiling import Case, Record
from ldmperf.profiling.measure.timing import RepetitionRule
from ldmperf.profiling.sweep.events import Event, Learned, Recorded, Warned
from ldmperf.profiling.sweep.group_process import measured
from ldmperf.profiling.sweep.group_task import GroupTask
from ldmperf.profiling.sweep import child_process

pytestmark = pytest.mark.usefixtures("_one_thread")
FOLDER = Path(__file__).parent


@pytest.fixture(autouse=True)
def _fakes_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))


def a_case(backend: str = "steady", **changes: Any) -> Case:
    return Case(**({"unet": "39M", "steps": 1, "dtype": "bfloat16", "backend": backend} | changes))


@pytest.fixture
def task_of(make_record: Callable[..., Record]) -> Callable[..., GroupTask]:
    import sweep_fakes

    def task(*backends: str, **changes: Any) -> GroupTask:
        fields = {name: changes.pop(name) for name in ("timeout", "time", "subjects") if name in changes}
        cases = tuple(a_case(backend, **changes) for backend in backends)
        given = GroupTask(
            cases, RepetitionRule(sweep_fakes.COUNT), "run", make_record().environment, subjects=sweep_fakes.fakes
        )
        return replace(given, **fields)

    return task


def records_of(task: GroupTask) -> dict[str, Record]:
    """The records by backend; each comes once."""
    events = list(measured(task))
    records = [event.record for event in events if isinstance(event, Recorded)]
    assert len({record.case_key for record in records}) == len(records)
    return {record.case.backend: record for record in records}


FAULTS = {"SIGSEGV": "was ended by SIGSEGV", "SIGKILL": "was ended by SIGKILL", "exit 3": "ended with exit code 3"}


@pytest.mark.parametrize("phase", ["build", "first call", "reference", "timing", "check"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_process_that_ends_costs_the_case_in_flight(
    task_of: Callable[..., GroupTask], phase: str, fault: str
) -> None:
    task = task_of("steady", f"{phase}:{fault}", "second", "peer")
    records = records_of(task)
    assert list(sorted(records)) == sorted(case.backend for case in task.cases)
    lost = records.pop(f"{phase}:{fault}")
    assert (lost.status, lost.wall_ms) == ("error", None)
    assert lost.message is not None
    assert lost.message.startswith(f"the process that measured it {FAULTS[fault]}")
    assert lost.message.endswith(f" in its {phase}")
    # What lane.record says of a failed case too.
    assert (lost.run_id, lost.environment, lost.evaluations, lost.parameters) == ("run", task.environment, 1, 4)
    assert lost.harness.min_count == 3
    assert lost.phases.weights_ms is not None
    assert Record.model_validate_json(lost.model_dump_json()) == lost
    for record in records.values():
        assert record.status == "ok", record.message
        assert record.wall_ms is not None
        assert record.wall_ms.n == 3

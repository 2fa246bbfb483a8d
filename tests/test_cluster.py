"""A sweep on a Ray cluster of two nodes on this machine, whose workers are lost; and what is decided without Ray."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from ldmperf.profiling import Case, Record
from ldmperf.profiling.measure.folders import RunError
from ldmperf.profiling.measure.timing import Deadline, RepetitionRule
from ldmperf.profiling.options import CaseError
from ldmperf.profiling.sweep import cluster, on_node
from ldmperf.profiling.sweep.cluster import connected, cores_for, reason_of, run_on_cluster
from ldmperf.profiling.sweep.cluster_group import MOST_LOSSES, ClusterGroup
from ldmperf.profiling.sweep.cluster_lines import ClusterLines
from ldmperf.profiling.sweep.events import Completed, Event, Ran, Recorded
from ldmperf.profiling.sweep.group_process import environment_of
from ldmperf.profiling.sweep.group_task import GroupTask
from ldmperf.profiling.sweep.local import Sweep
from ldmperf.profiling.sweep.on_node import Arrived, NodeTask, Refused, thinned, version_differences
from ldmperf.profiling.trajectory.record_parts import Trace
from ldmperf.profiling.trajectory.records import RecordStore

FOLDER = Path(__file__).parent
MakeRecord = Callable[..., Record]


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[str]:
    """The address of a cluster of two nodes with a core each, whose workers find the fakes."""
    pytest.importorskip("ray", reason="pip install 'ldmperf[cluster]'")
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(FOLDER), os.environ.get("PYTHONPATH", "")]))
        patch.syspath_prepend(str(FOLDER))
        nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        try:
            for _ in range(2):
                nodes.add_node(num_cpus=1)
            yield nodes.address
        finally:
            nodes.shutdown()


class FakeSweep(Sweep):
    def task(self, cases: Sequence[Case]) -> GroupTask:
        import sweep_fakes

        return replace(super().task(cases), subjects=sweep_fakes.fakes)


class Lines(ClusterLines):
    """Kills the worker of the first group that has a record, and takes note of who measured what."""

    def __enter__(self) -> Lines:
        super().__enter__()
        self.begun: list[tuple[int, tuple[str, ...]]] = []
        self.killed: list[tuple[int, str]] = []
        self._workers: dict[str, int] = {}
        return self

    def arrived(self, cases: Sequence[Case], host: str, pid: int) -> None:
        super().arrived(cases, host, pid)
        self.begun.append((pid, tuple(case.key for case in cases)))
        self._workers[cases[0].group_key] = pid

    def recorded(self, record: Record) -> None:
        super().recorded(record)
        if not self.killed:
            pid = self._workers[record.case.group_key]
            self.killed.append((pid, record.case_key))
            os.kill(pid, signal.SIGKILL)


def cases_of(steps: Sequence[int], backends: Sequence[str]) -> list[Case]:
    # 0.2 s a trajectory.
    return [
        Case(unet="39M", dtype="bfloat16", steps=count, batch=200, backend=backend)
        for count in steps
        for backend in backends
    ]


def fake_sweep(cases: Sequence[Case], **changes: Any) -> Sweep:
    here = environment_of("cpu").model_copy(update=changes)
    return FakeSweep(tuple(cases), RepetitionRule(3), "run", {"cpu": here})


def test_a_killed_worker_costs_no_row_and_doubles_none(
    two_nodes: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = cases_of((1, 2, 3, 4), ("steady", "second", "peer"))
    store = RecordStore(tmp_path / "records.jsonl")
    console = Console(stderr=True, markup=False, highlight=False)
    sweep = fake_sweep(cases)
    with connected(two_nodes), Lines(console, cases, sweep.rule) as lines:
        made = run_on_cluster(sweep, store, lines, Deadline(None))
    records = store.load()
    assert made == (len(cases), False)
    assert Counter(record.case_key for record in records) == Counter(case.key for case in cases)
    assert {record.status for record in records} == {"ok"}, [record.message for record in records]
    assert {record.environment.torch_threads for record in records} == {1}, "a node's one core"
    # Both nodes worked, and the group that lost its worker began again elsewhere without the row that was back.
    ((killed, done),) = lines.killed
    assert len({pid for pid, _ in lines.begun}) == 3
    first, second = (
        keys
        for _, keys in lines.begun
        if Case.model_validate(cases[0]).group_key and done.rpartition(" ")[0] in keys[0]
    )
    assert set(first) - set(second) >= {done}
    assert set(second) < set(first)
    assert f"lost on " in capsys.readouterr().err

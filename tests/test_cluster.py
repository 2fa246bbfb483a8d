"""A sweep on a Ray cluster of two nodes here, of which a worker is killed; and all that is decided without Ray."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from ldmperf.profiling import Case, Record
from ldmperf.profiling.measure.environment import Environment, Gpu
from ldmperf.profiling.measure.folders import RunError
from ldmperf.profiling.measure.recorded import Samples
from ldmperf.profiling.measure.timing import Deadline, RepetitionRule
from ldmperf.profiling.sweep import cluster, on_node
from ldmperf.profiling.sweep.cluster import connected, cores_for, reason_of, run_on_cluster
from ldmperf.profiling.sweep.cluster_group import MOST_LOSSES, ClusterGroup
from ldmperf.profiling.sweep.cluster_lines import ClusterLines
from ldmperf.profiling.sweep.events import Event, Ran, Recorded
from ldmperf.profiling.sweep.group_process import environment_of
from ldmperf.profiling.sweep.group_task import GroupTask
from ldmperf.profiling.sweep.local import Sweep
from ldmperf.profiling.sweep.on_node import Arrived, NodeEvent, NodeTask, Refused, thinned, version_differences
from ldmperf.profiling.trajectory.records import RecordStore

FOLDER = Path(__file__).parent
MakeRecord = Callable[..., Record]


@pytest.fixture(scope="module")
def gate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file that "gated" cases wait for."""
    return tmp_path_factory.mktemp("gate") / "open"


@pytest.fixture(scope="module")
def two_nodes(gate: Path) -> Iterator[str]:
    """The address of a cluster of two nodes with a core each, whose workers find the fakes."""
    pytest.importorskip("ray", reason="pip install 'ldmperf[cluster]'")
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(FOLDER), os.environ.get("PYTHONPATH", "")]))
        patch.setenv("FAKE_GATE", str(gate))
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
    """Kills the worker of the first group that has a record, then opens the gate; keeps who measured what."""

    gate: Path

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
            self.gate.touch()


def cases_of(steps: Sequence[int], backends: Sequence[str]) -> list[Case]:
    return [
        Case(unet="39M", dtype="bfloat16", steps=count, backend=backend) for count in steps for backend in backends
    ]


def fake_sweep(cases: Sequence[Case], environment: Environment) -> Sweep:
    return FakeSweep(tuple(cases), RepetitionRule(3), "run", {"cpu": environment})


def lines_for(cases: Sequence[Case], kind: type[ClusterLines] = ClusterLines) -> ClusterLines:
    return kind(Console(stderr=True, markup=False, highlight=False), cases, RepetitionRule(3))


def test_a_killed_worker_costs_no_row_and_doubles_none(
    two_nodes: str, gate: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # The first has its row at once; the others wait until its worker is killed.
    cases = cases_of((1, 2, 3, 4), ("build:exit 3", "gated", "peer"))
    store = RecordStore(tmp_path / "records.jsonl")
    sweep = fake_sweep(cases, environment_of("cpu"))
    with connected(two_nodes):
        with lines_for(cases, Lines) as lines:
            assert isinstance(lines, Lines)
            lines.gate = gate
            made = run_on_cluster(sweep, store, lines, Deadline(None))
        # The same nodes, which have another commit than this.
        other = fake_sweep(cases_of((9,), ("steady",)), sweep.environments["cpu"].model_copy(update=OTHER_COMMIT))
        with lines_for(other.cases) as others, pytest.raises(RunError, match=r"^--ray: node .*git_commit: 0000"):
            run_on_cluster(other, store, others, Deadline(None))
    records = store.load()
    assert made == (len(cases), False)
    assert Counter(record.case_key for record in records) == Counter(case.key for case in cases)
    assert Counter(record.status for record in records) == {"error": 4, "ok": 8}
    assert {record.case.backend for record in records if record.status == "error"} == {"build:exit 3"}
    assert {record.environment.torch_threads for record in records} == {1}, "a node's one core"
    # The group that lost its worker began again, by another one, without the row that was back.
    ((killed, done),) = lines.killed
    group = next(case.group_key for case in cases if case.key == done)
    (first, all_rows), (second, rest) = (
        (pid, keys) for pid, keys in lines.begun if keys[0].startswith(group + " ")
    )
    assert first == killed != second
    assert done in all_rows
    assert done not in rest
    assert set(rest) < set(all_rows)
    assert len(lines.begun) == 5
    assert "lost on " in capsys.readouterr().err


OTHER_COMMIT = {"git_commit": "0" * 40}


class FakeRay:
    """Ray without processes: each task that is sent plays the next script of its group, of events and losses."""

    class exceptions:  # noqa: N801
        class RayError(Exception):
            pass

    def __init__(self, scripts: dict[str, list[list[NodeEvent | Exception]]]) -> None:
        self.scripts = scripts
        self.sent: list[NodeTask] = []
        self.cancelled: list[object] = []
        self.asked: list[dict[str, object]] = []

    def nodes(self) -> list[dict[str, Any]]:
        gone = {"Alive": False, "Resources": {"CPU": 1.0}}
        return [{"Alive": True, "Resources": {"CPU": 8.0, "GPU": 2.0}}, gone]

    def remote(self, **_: object) -> Callable[..., Any]:
        def decorated(function: object) -> Any:
            ray = self

            class Remote:
                def options(self, **asked: object) -> Remote:
                    ray.asked.append(asked)
                    return self

                def remote(self, task: NodeTask) -> Iterator[Any]:
                    ray.sent.append(task)
                    return iter(ray.scripts[task.task.cases[0].group_key].pop(0))

            return Remote()

        return decorated

    def wait(self, streams: list[Any], **_: object) -> tuple[list[Any], list[Any]]:
        return streams[-1:], streams[:-1]

    def get(self, event: Any) -> Any:
        if isinstance(event, Exception):
            raise event
        return event

    def cancel(self, stream: object, force: bool) -> None:
        self.cancelled.append(stream)


@pytest.fixture
def here(make_record: MakeRecord) -> Environment:
    return make_record().environment


def played(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    cases: Sequence[Case],
    here: Environment,
    scripts: Sequence[list[NodeEvent | Exception]],
    **options: Any,
) -> tuple[FakeRay, list[Record], tuple[int, bool]]:
    """What becomes of one group whose tasks play these scripts."""
    ray = FakeRay({cases[0].group_key: list(scripts)})
    monkeypatch.setattr(cluster, "_ray", lambda: ray)
    store = RecordStore(tmp_path / "records.jsonl")
    sweep = Sweep(tuple(cases), RepetitionRule(3), "run", {cases[0].device: here})
    with lines_for(cases) as lines:
        made = run_on_cluster(sweep, store, lines, Deadline(None), **options)
    return ray, store.load(), made


LOST = FakeRay.exceptions.RayError("the worker died\nmore of it")


def test_a_group_whose_rows_are_all_back_is_not_begun_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, make_record: MakeRecord, here: Environment
) -> None:
    cases = cases_of((1,), ("torch",))
    script: list[NodeEvent | Exception] = [
        Arrived("a", here, 1),
        Recorded(make_record(cases[0], environment=here)),
        LOST,
    ]
    ray, records, made = played(monkeypatch, tmp_path, cases, here, [script])
    assert (len(ray.sent), len(records), made) == (1, 1, (1, False))


def test_a_group_that_loses_every_worker_ends_as_error_rows(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, make_record: MakeRecord, here: Environment
) -> None:
    cases = cases_of((1,), ("torch", "graph", "diffusers"))
    record = make_record(cases[1], environment=here)
    there = here.model_copy(update={"cpu": "another"})
    scripts: list[list[NodeEvent | Exception]] = [
        [LOST],
        [Arrived("node-a", there, 7), LOST],
        # A new row: workers are lost for another reason than this group.
        [Arrived("node-a", there, 8), Recorded(record), LOST],
        [LOST],
        [Arrived("node-b", there, 9), LOST],
    ]
    ray, records, made = played(monkeypatch, tmp_path, cases, here, scripts)
    assert [task.done for task in ray.sent] == [frozenset()] * 3 + [frozenset({record.case_key})] * 2
    assert made == (3, False)
    statuses = {one.case.backend: one.status for one in records}
    assert statuses == {"graph": "ok", "torch": "error", "diffusers": "error"}
    (message,) = {one.message for one in records if one.status == "error"}
    assert message == ("the worker that measured it was lost 3 times, lastly on node-b: RayError: the worker died")
    assert {one.environment.cpu for one in records if one.status == "error"} == {"another"}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rounds=st.lists(st.lists(st.integers(0, 3), max_size=3), max_size=30))
def test_whatever_comes_back_each_row_is_recorded_once_and_losses_end(
    make_record: MakeRecord, rounds: list[list[int]]
) -> None:
    """Each round: rows that come back before the worker is lost."""
    cases = cases_of((1,), ("torch", "graph", "triton", "diffusers"))
    here = make_record().environment
    group = ClusterGroup(Sweep(tuple(cases), RepetitionRule(3), "run", {"cpu": here}).task(cases), set(), {})
    rows: list[str] = []
    fruitless = 0
    for returned in rounds:
        sent = group.sent(Deadline(None), Deadline(None), 1)
        fruitless += 1
        for case in (cases[place] for place in dict.fromkeys(returned) if cases[place].key not in sent.done):
            group.heard(Recorded(make_record(case)))
            rows.append(case.key)
            fruitless = 0
        # The loss that follows a row is the first one again.
        fruitless = max(fruitless, 1)
        lost = group.lost("gone")
        rows += [record.case_key for record in lost]
        assert group.is_ended == (fruitless == MOST_LOSSES)
        if group.is_ended:
            assert set(rows) == {case.key for case in cases}
            break
    assert len(rows) == len(set(rows))


def test_records_that_are_there_are_not_measured_again_and_only_traced_where_they_were_made(
    monkeypatch: pytest.MonkeyPatch, make_record: MakeRecord, here: Environment
) -> None:
    gpu = here.model_copy(update={"gpu": Gpu(name="NVIDIA H200", count=1)})
    other = gpu.model_copy(update={"gpu": Gpu(name="NVIDIA A100", count=1)})
    cases = [Case(unet="39M", device="cuda", backend=name) for name in ("torch", "graph", "diffusers", "triton")]
    old, of_another, new = (
        make_record(case, environment=environment, gpu_ms=Samples.of([1.0]))
        for case, environment in zip(cases, (gpu, other, gpu), strict=False)
    )
    done: list[GroupTask] = []

    def measured(task: GroupTask) -> Generator[Event, None, None]:
        done.append(task)
        if task.untraced is None:
            yield Recorded(new)

    monkeypatch.setattr(on_node, "measured", measured)
    monkeypatch.setattr(on_node, "environment_of", lambda device: gpu)
    task = Sweep(tuple(cases), RepetitionRule(3), "run", {"cuda": here}).task(cases)
    given = NodeTask(task, frozenset(case.key for case in (cases[0], cases[1])), (old, of_another), 1, time.time())
    events = list(on_node.on_node(given))
    assert [type(event) for event in events] == [Arrived, Recorded]
    timing, tracing = done
    assert timing.cases == tuple(cases[2:])
    assert {timing.environment, tracing.environment} == {gpu}
    assert tracing.untraced == (old, new)


def test_seconds_pass_while_a_task_waits_for_a_node(monkeypatch: pytest.MonkeyPatch, here: Environment) -> None:
    given: list[GroupTask] = []
    monkeypatch.setattr(on_node, "measured", lambda task: iter(given.append(task) or ()))
    monkeypatch.setattr(on_node, "environment_of", lambda device: here)
    cases = cases_of((1,), ("torch",))
    task = Sweep(tuple(cases), RepetitionRule(3), "run", {"cpu": here}).task(cases)
    for ago, least in ((100.0, 100.0), (-100.0, 0.0)):
        list(on_node.on_node(NodeTask(task, threads=1, sent_at=time.time() - ago)))
        assert least <= given.pop().time.elapsed < least + 50


def test_a_node_that_has_other_files_or_versions_measures_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, here: Environment
) -> None:
    monkeypatch.setattr(on_node, "measured", None)
    cases = [Case(unet=str(tmp_path / "unet"), weights_sha256="0" * 64)]
    task = Sweep(tuple(cases), RepetitionRule(3), "run", {"cpu": here}).task(cases)
    monkeypatch.setattr(on_node, "environment_of", lambda device: here)
    (refused,) = on_node.on_node(NodeTask(task))
    assert isinstance(refused, Refused)
    assert str(tmp_path / "unet") in refused.reason
    assert "the same path on all nodes" in refused.reason
    monkeypatch.setattr(on_node, "environment_of", lambda device: here.model_copy(update={"torch": "1.0"}))
    (refused,) = on_node.on_node(NodeTask(task))
    assert isinstance(refused, Refused)
    assert "torch: 2.13.0, 1.0" in refused.reason
    assert "\n" not in refused.reason


def test_versions_count_and_hardware_does_not(here: Environment) -> None:
    for field in ("git_commit", "git_dirty", "ldmperf", "python", "torch", "triton", "numpy", "diffusers"):
        changed = here.model_copy(update={field: "another"})
        assert version_differences(here, changed) == [f"{field}: {_public(field, here)}, another"]
    same = {"cpu": "x", "gpu": Gpu(name="x", count=1), "torch": "2.13.0+cu130", "torch_threads": 9, "cuda": "13.0"}
    assert version_differences(here, here.model_copy(update=same)) == []


def _public(field: str, environment: Environment) -> object:
    return "2.13.0" if field == "torch" else getattr(environment, field)


def test_trajectories_in_quick_succession_are_not_told_one_by_one(make_record: MakeRecord) -> None:
    (case,) = cases_of((1,), ("torch",))
    events: list[Event] = [*(Ran(case, "timing") for _ in range(1000)), Recorded(make_record(case))]
    told = list(thinned(events))
    assert len(told) < 10
    assert told[-1] == events[-1]


@pytest.mark.parametrize(
    ("device", "nodes", "cores"),
    [
        ("cpu", [{"CPU": 64.0}, {"CPU": 32.0}, {"memory": 1.0}], 32),
        ("cuda", [{"CPU": 64.0, "GPU": 8.0}, {"CPU": 96.0, "GPU": 4.0}, {"CPU": 2.0}], 8),
        ("cuda", [{"CPU": 2.0, "GPU": 4.0}], 1),
        ("cuda", [{"CPU": 2.0}], 1),
        ("cpu", [], 1),
    ],
)
def test_a_group_asks_for_what_every_node_can_give(device: str, nodes: list[dict[str, float]], cores: int) -> None:
    assert cores_for(device, nodes) == cores


@pytest.mark.parametrize(("device", "gpus", "cores"), [("cuda", 1, 4), ("cpu", 0, 8)])
def test_a_group_on_cuda_asks_for_one_gpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, here: Environment, device: str, gpus: int, cores: int
) -> None:
    cases = [Case(unet="39M", device=device)]
    ray, _, _ = played(monkeypatch, tmp_path, cases, here, [[]])
    (asked,) = ray.asked
    assert (asked["num_gpus"], asked["num_cpus"], ray.sent[0].threads) == (gpus, cores, cores)


def test_a_card_by_its_number_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, here: Environment, run: Callable[..., Any]
) -> None:
    with pytest.raises(RunError, match="cuda:1"):
        played(monkeypatch, tmp_path, [Case(unet="39M", device="cuda:1")], here, [[]])
    refused = run("profile", "--ray", "auto", "--device", "cuda:1", "--out", tmp_path)
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert "give cpu or cuda" in refused.err


def test_records_are_on_disk_when_something_refuses(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, make_record: MakeRecord, here: Environment
) -> None:
    cases = cases_of((1,), ("torch", "graph"))
    script: list[NodeEvent | Exception] = [
        Arrived("a", here, 1),
        Recorded(make_record(cases[0], environment=here)),
        Refused("no"),
    ]
    with pytest.raises(RunError, match="--ray: no"):
        played(monkeypatch, tmp_path, cases, here, [script])
    assert len(RecordStore(tmp_path / "records.jsonl").load()) == 1
    # What still runs is stopped.
    assert len(cluster._ray().cancelled) == 1


def test_ctrl_c_takes_back_what_no_node_has_begun(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, make_record: MakeRecord, here: Environment
) -> None:
    cases = cases_of((1, 2), ("torch",))
    begun, waiting = cases
    ray = FakeRay({waiting.group_key: [[]], begun.group_key: [[]]})

    def script() -> Iterator[NodeEvent]:
        yield Arrived("a", here, 1)
        os.kill(os.getpid(), signal.SIGINT)
        yield Recorded(make_record(begun, environment=here))

    ray.scripts[begun.group_key] = [script()]  # type: ignore[list-item]
    monkeypatch.setattr(ray, "wait", lambda streams, **_: (streams[:1], streams[1:]))
    monkeypatch.setattr(cluster, "_ray", lambda: ray)
    store = RecordStore(tmp_path / "records.jsonl")
    sweep = Sweep(tuple(cases), RepetitionRule(3), "run", {"cpu": here})
    with interrupted_as_usual(), lines_for(cases) as lines:
        assert run_on_cluster(sweep, store, lines, Deadline(None)) == (1, True)
    assert [record.case_key for record in store.load()] == [begun.key]
    assert len(ray.cancelled) == 1


@contextmanager
def interrupted_as_usual() -> Iterator[None]:
    """Where the suite was started with SIGINT ignored, as by nohup."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def test_when_the_time_is_up_nothing_more_is_begun(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, here: Environment
) -> None:
    cases = cases_of((1, 2), ("torch",))
    ray = FakeRay({case.group_key: [[Arrived("a", here, 1)]] for case in cases})
    monkeypatch.setattr(cluster, "_ray", lambda: ray)
    sweep = Sweep(tuple(cases), RepetitionRule(3), "run", {"cpu": here})
    with lines_for(cases) as lines:
        made = run_on_cluster(sweep, RecordStore(tmp_path / "records.jsonl"), lines, Deadline(0.0))
    assert made == (0, False)
    assert len(ray.cancelled) == 2


def test_what_a_lost_task_says_is_one_line_and_a_node_without_ldmperf_is_refused() -> None:
    class TaskError(Exception):
        cause = ValueError("\n  no such thing\nmore")

    assert reason_of(TaskError()) == "ValueError: no such thing"
    assert reason_of(KeyError()) == "KeyError: no message"
    TaskError.cause = ModuleNotFoundError("No module named 'ldmperf'")
    with pytest.raises(RunError, match="install the same ldmperf on all nodes"):
        reason_of(TaskError())


@pytest.mark.parametrize(
    ("address", "said"),
    [("127.0.0.1:9", "start one with"), ("127.0.0.1:99999", "start one with"), ("ray://a:1", "HOST:PORT")],
)
def test_where_there_is_no_cluster_nothing_is_begun(
    run: Callable[..., Any], tmp_path: Path, address: str, said: str
) -> None:
    pytest.importorskip("ray", reason="pip install 'ldmperf[cluster]'")
    refused = run("profile", "--ray", address, "--preset", "cpu", "--out", tmp_path / "runs")
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert said in refused.err
    assert not (tmp_path / "runs").exists()


def test_without_ray_one_line_says_what_to_install(
    run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    refused = run("profile", "--ray", "auto", "--preset", "cpu", "--out", tmp_path / "runs")
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert "pip install 'ldmperf[cluster]'" in refused.err


def test_what_a_cluster_measures_has_to_be_said(run: Callable[..., Any]) -> None:
    refused = run("profile", "--ray", "auto")
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert "--preset" in refused.err

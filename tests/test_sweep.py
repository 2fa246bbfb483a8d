"""Whatever ends the process that measures a group costs the case in flight, and no other."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from multiprocessing import forkserver
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import pytest
import torch

from ldmperf.profiling import Record
from ldmperf.profiling.measure.timing import RepetitionRule
from ldmperf.profiling.measure.turn import TURNS_VARIABLE, granted
from ldmperf.profiling.sweep import child_process, group_process
from ldmperf.profiling.sweep.events import Event, Queued, Ran, Recorded, TookTurns, Warned
from ldmperf.profiling.sweep.group_process import _Flight, environment_of, measured
from ldmperf.profiling.sweep.group_task import GroupTask, TimeGiven

pytestmark = pytest.mark.usefixtures("_one_thread", "_fakes_found")


@pytest.fixture
def task_of(make_record: Callable[..., Record]) -> Callable[..., GroupTask]:
    import sweep_fakes

    def task(*backends: str, **changes: Any) -> GroupTask:
        fields = {name: changes.pop(name) for name in ("timeout", "time", "subjects") if name in changes}
        cases = tuple(sweep_fakes.a_case(backend, **changes) for backend in backends)
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
    assert sorted(records) == sorted(case.backend for case in task.cases)
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


@pytest.mark.parametrize("phase", ["build", "timing"])
def test_a_case_that_hangs_is_stopped_and_the_others_go_on(task_of: Callable[..., GroupTask], phase: str) -> None:
    """Even in a call that keeps the interpreter to itself."""
    records = records_of(task_of("steady", f"{phase}:hang", "peer", timeout=1.0))
    lost = records.pop(f"{phase}:hang")
    assert lost.status == "error"
    assert (
        lost.message == f"the process that measured it gave no sign of life for 1 s and was stopped in its {phase}"
    )
    assert {name: record.status for name, record in records.items()} == {"steady": "ok", "peer": "ok"}


def test_what_a_process_has_to_load_first_is_no_hang(task_of: Callable[..., GroupTask]) -> None:
    import sweep_fakes

    subjects = sweep_fakes.Changed(time.sleep, (2.0,))
    records = records_of(task_of("steady", "peer", timeout=1.5, subjects=subjects))
    assert {record.status for record in records.values()} == {"ok"}


def test_a_group_whose_every_case_ends_its_process_has_a_record_of_each(task_of: Callable[..., GroupTask]) -> None:
    import sweep_fakes

    backends = [f"{phase}:{fault}" for phase in sweep_fakes.PHASES for fault in ("SIGSEGV", "exit 3")]
    records = records_of(task_of(*backends))
    assert len(records) == len(backends)
    assert {record.status for record in records.values()} == {"error"}


def test_weights_that_end_the_process_cost_the_group_once(task_of: Callable[..., GroupTask]) -> None:
    records = records_of(task_of("steady", "second", unet="weights:SIGSEGV"))
    assert [record.message for record in records.values()] == [
        "the process that measured it was ended by SIGSEGV while its weights were made"
    ] * 2


def test_a_kill_that_the_kernel_counts_is_out_of_memory(
    task_of: Callable[..., GroupTask], monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = iter([3, 4, 4, 4, 4])
    monkeypatch.setattr(group_process, "oom_kills", lambda: next(counts))
    lost = records_of(task_of("timing:SIGKILL", "timing:SIGSEGV"))["timing:SIGKILL"]
    assert (lost.status, lost.message) == (
        "oom", "the process that measured it was killed by the kernel for want of memory in its timing"
    )  # fmt: skip


def test_a_process_that_cannot_begin_costs_its_group(task_of: Callable[..., GroupTask]) -> None:
    import sweep_fakes

    task = task_of("steady", "peer", subjects=sweep_fakes.broken)
    for name, record in records_of(task).items():
        assert (name, record.status, record.message) == (name, "error", "ValueError: no subjects today")


def test_the_next_process_has_the_time_that_is_left(task_of: Callable[..., GroupTask]) -> None:
    """Others' turns take none of it."""
    flight = _Flight(task_of("steady", time=TimeGiven(1e5, 8e4, 5e3)), _begun=time.monotonic() - 3e4)
    assert flight.rest().time == TimeGiven(1e5, 8e4, pytest.approx(3.5e4, abs=500))
    assert list(flight.heard(TookTurns(2e4))) == [TookTurns(2e4)]
    assert flight.rest().time == TimeGiven(1e5, 8e4, pytest.approx(1.5e4, abs=500))


def test_warnings_pass_with_their_place(task_of: Callable[..., GroupTask]) -> None:
    warned = [event for event in measured(task_of("warns", "peer")) if isinstance(event, Warned)]
    assert [(one.text, one.category) for one in warned] == [("beware", RuntimeWarning)] * len(warned)
    assert warned


def test_the_pace_is_the_parents(children: Callable[[], list[int]], task_of: Callable[..., GroupTask]) -> None:
    """Nothing more is measured before an event has been dealt with, and nothing runs once nobody asks any more."""
    with closing(measured(task_of("steady", "peer"))) as events:
        event = next(event for event in events if isinstance(event, Ran))
        time.sleep(0.2)
        following = next(events)
        assert isinstance(following, Ran)
        assert (event.case.backend, following.case.backend) == ("steady", "peer")
        (child,) = children()
        # Where memory runs out the kernel takes it first.
        assert Path(f"/proc/{child}/oom_score_adj").read_text() == "1000\n"
    assert not children()


def test_a_process_has_as_many_threads_as_its_parent() -> None:
    torch.set_num_threads(3)
    assert environment_of("cpu").torch_threads == 3


def test_what_a_process_has_started_ends_with_it(
    task_of: Callable[..., GroupTask], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_PIDS", str(tmp_path / "pids"))
    records = records_of(task_of("build:start and hang", "steady", "peer", timeout=1.0))
    assert {record.status for record in records.values()} == {"error", "ok"}
    (pid,) = map(int, (tmp_path / "pids").read_text().split())
    wait_until(lambda: not Path(f"/proc/{pid}").exists() or state_of(pid) == "Z")


def test_a_fork_server_that_is_killed_is_replaced(task_of: Callable[..., GroupTask]) -> None:
    records_of(task_of("steady", "peer"))
    server = forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]
    os.kill(server, signal.SIGKILL)
    assert {record.status for record in records_of(task_of("steady", "peer", timeout=1.5)).values()} == {"ok"}
    assert server != forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]


def test_the_last_words_of_a_process_are_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where its end comes to be known before them."""
    import sweep_fakes

    def end_first(objects: Sequence[Any], timeout: float) -> list[Any]:
        _, sentinel = objects
        return wait([sentinel], timeout)

    monkeypatch.setattr(child_process, "wait", end_first)
    with child_process.ChildProcess(sweep_fakes.last_words) as child:
        messages = child.messages(lambda: 60.0, lambda message: False)
        assert next(messages) == "last words"
        with pytest.raises(child_process.Died, match="exit code 3"):
            next(messages)


HOLD = """
import sys
from pathlib import Path
from ldmperf.profiling.measure import gpu_lock
gpu_lock.LOCKS, gpu_lock.gpu_uuid = Path(sys.argv[1]), lambda device: "7"
with gpu_lock.held_gpu("cuda", print):
    print("held", flush=True)
    sys.stdin.readline()
"""


def test_waiting_for_the_gpu_is_no_hang(
    children: Callable[[], list[int]], task_of: Callable[..., GroupTask], tmp_path: Path
) -> None:
    import sweep_fakes

    subjects = sweep_fakes.Changed(sweep_fakes.one_gpu, ("7", tmp_path))
    task = task_of("steady", "peer", timeout=1.5, subjects=subjects)
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with closing(measured(task)) as events:
            queued = next(events)
            assert isinstance(queued, Queued)
            assert queued.holder.startswith(f"process {holder.pid} on ")
            threading.Timer(2.0, holder.kill).start()
            assert next(events) == Queued("", is_over=True)
            # The lock is the group's, and goes with its process.
            path = tmp_path / "ldmperf-7.lock"
            assert json.loads(path.read_text())["pid"] in children()
            rest = list(events)
    assert [event.record.status for event in rest if isinstance(event, Recorded)] == ["ok", "ok"]


def test_others_turns_are_no_hang_and_no_time(
    task_of: Callable[..., GroupTask], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = tmp_path / "turns"
    monkeypatch.setenv(TURNS_VARIABLE, str(address))
    with socket.socket(socket.AF_UNIX) as dealer:
        dealer.bind(str(address))
        dealer.listen()

        def deal() -> None:
            connection, _ = dealer.accept()
            with connection:
                for pause in (2.0, 0.0):
                    connection.recv(1)
                    time.sleep(pause)
                    connection.sendall(granted(()))
                connection.recv(1)

        dealing = threading.Thread(target=deal)
        dealing.start()
        # After two turns the dealer ends, and the sweep with it.
        events: list[Event] = []
        with pytest.raises(KeyboardInterrupt, match="has ended"):
            events.extend(measured(task_of("steady", "peer", timeout=1.5)))
        dealing.join()
    turns = [event.seconds for event in events if isinstance(event, TookTurns)]
    assert len(turns) == 2
    assert turns[0] >= 2.0
    assert not [event for event in events if isinstance(event, Recorded)]


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def wait_until(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


PRELOADING = """
import importlib.util, sys
from ldmperf.profiling.sweep.preload import load_peer

load_peer()
assert "diffusers" in sys.modules
assert "xformers" not in sys.modules
assert importlib.util.find_spec("xformers") is not None
"""


def test_the_server_leaves_out_what_would_ask_cuda(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    (tmp_path / "xformers.py").write_text("raise SystemExit('imported')")
    # Without which diffusers takes it for missing.
    described = tmp_path / "xformers-0.0.35.dist-info" / "METADATA"
    described.parent.mkdir()
    described.write_text("Metadata-Version: 2.1\nName: xformers\nVersion: 0.0.35\n")
    paths = os.pathsep.join((str(tmp_path), os.environ.get("PYTHONPATH", "")))
    subprocess.run(
        [sys.executable, "-c", PRELOADING], check=True, timeout=300, env=os.environ | {"PYTHONPATH": paths}
    )

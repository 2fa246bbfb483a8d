"""A sweep on this machine: no row is lost or doubled, whoever kills it and whatever cannot be written."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import time
import warnings
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from functools import partial
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest

from ldmperf.profiling import Case, Record
from ldmperf.profiling.measure import recorded
from ldmperf.profiling.measure.ceilings import CeilingDevice
from ldmperf.profiling.measure.folders import RunError, locked
from ldmperf.profiling.measure.timing import Deadline, RepetitionRule
from ldmperf.profiling.measure.turn import TURNS
from ldmperf.profiling.sweep import group_process
from ldmperf.profiling.sweep.child_process import start_server
from ldmperf.profiling.sweep.events import Completed, Event, Learned, Queued, TookTurns, Warned
from ldmperf.profiling.sweep.group_process import environment_of, measured
from ldmperf.profiling.sweep.group_task import Carried, GroupTask
from ldmperf.profiling.sweep.local import Sweep, run_sweep, trace_tasks
from ldmperf.profiling.trajectory.progress import Remaining
from ldmperf.profiling.trajectory.records import RecordStore
from ldmperf.profiling.trajectory.runner import Listener

pytestmark = pytest.mark.usefixtures("_one_thread", "_fakes_found")


def fake_measured(task: GroupTask, change: Callable[..., None] | None = None) -> Generator[Event, None, None]:
    """In processes of their own, with fakes; `change` is called there first."""
    import sweep_fakes

    subjects = sweep_fakes.Changed(change) if change else sweep_fakes.fakes
    return measured(replace(task, subjects=subjects))


@pytest.fixture
def sweep_of(make_record: Callable[..., Record]) -> Callable[..., Sweep]:
    """A sweep of so many groups of two; each group's trajectories take so many milliseconds."""
    import sweep_fakes

    def made(groups: int, ms: int = 1, backends: tuple[str, ...] = ("steady", "peer"), **fields: Any) -> Sweep:
        cases = [
            sweep_fakes.a_case(backend, seed=seed, batch=ms) for seed in range(groups) for backend in backends
        ]
        environment = make_record().environment
        return Sweep(tuple(cases), RepetitionRule(sweep_fakes.COUNT), "run", {"cpu": environment}, **fields)

    return made


def go_on(
    sweep: Sweep,
    folder: Path,
    listener: Listener | None = None,
    seconds: float | None = None,
    change: Callable[..., None] | None = None,
) -> tuple[int, bool]:
    """As `ldmperf profile --resume`."""
    executor = partial(fake_measured, change=change)
    with locked(folder, print):
        store = RecordStore(folder / "records.jsonl")
        done = {record.case_key for record in store.load() if record.harness.stopped_by is None}
        return run_sweep(sweep, store, listener or Listener(), Deadline(seconds), done, executor)


def rows(folder: Path) -> Counter[str]:
    """How often each case is in the file, every line of which is a record."""
    lines = (folder / "records.jsonl").read_text().splitlines()
    return Counter(Record.model_validate_json(line).case_key for line in lines)


@contextmanager
def forked(work: Callable[[], object]) -> Iterator[int]:
    """A process that does the work, with the fork server of this one; exit code 0 once it is done."""
    start_server()
    pid = os.fork()
    if pid:
        try:
            yield pid
        finally:
            with suppress(ProcessLookupError, ChildProcessError):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
        return
    code = 1
    try:
        # The server is no child of this process, which cannot ask whether it runs.
        forkserver.ensure_running = lambda: None  # type: ignore[assignment]
        forkserver._forkserver.ensure_running = lambda: None  # type: ignore[attr-defined]
        work()
        code = 0
    finally:
        os._exit(code)


def began_or_ended(children: Callable[[], list[int]], pid: int) -> bool:
    """Whether a forked process has children, or has ended: the server may have been about to end itself."""
    return bool(children()) or os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def wait_until(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.005)


def test_killed_at_twenty_moments_and_resumed_no_row_is_lost_or_doubled(
    children: Callable[[], list[int]], sweep_of: Callable[..., Sweep], tmp_path: Path
) -> None:
    sweep, chance = sweep_of(6), random.Random(16)
    wanted = Counter(case.key for case in sweep.cases)
    folder, were_alive, server = tmp_path / "run", 0, 0
    for kill in range(20):
        start_server()
        if server != (server := forkserver._forkserver._forkserver_pid):  # type: ignore[attr-defined]
            # It has loaded all: what is killed is a sweep. One whose client is killed while it asks ends itself.
            environment_of("cpu")
        if folder.exists() and rows(folder) == wanted:
            # Done before the kills are.
            shutil.rmtree(folder)
        folder.mkdir(exist_ok=True)
        with forked(partial(go_on, sweep, folder)) as pid:
            if kill % 2:
                # However long the machine takes to begin.
                wait_until(partial(began_or_ended, children, pid))
            time.sleep(chance.uniform(0.0, 0.1 if kill % 4 == 1 else 0.4))
            were_alive += bool(children())
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        # Those that measure end with it, and nobody holds the folder.
        wait_until(lambda: not children())
        RecordStore(folder / "records.jsonl")
        assert max(rows(folder).values(), default=1) == 1
        assert set(rows(folder)) <= set(wanted)
    assert were_alive >= 3
    go_on(sweep, folder)
    assert rows(folder) == wanted
    assert {record.status for record in RecordStore(folder / "records.jsonl").load()} == {"ok"}


class Hearing(Listener):
    """Does something when so many trajectories have run; keeps what it hears."""

    def __init__(self, at: int = 0, action: Callable[[], None] = lambda: None) -> None:
        self.at, self.action = at, action
        self.ran_count = self.stops = 0
        self.groups: list[list[Case]] = []
        self.lines: list[str] = []

    def begin(self, cases: Any) -> None:
        self.groups.append(list(cases))

    def ran(self, case: Case, phase: str) -> None:
        self.ran_count += 1
        if self.ran_count == self.at:
            self.action()

    def told(self, line: str) -> None:
        self.lines.append(line)

    def stopping(self) -> None:
        self.stops += 1


def interrupt(number: int = signal.SIGINT, times: int = 1) -> Callable[[], None]:
    def action() -> None:
        for _ in range(times):
            os.kill(os.getpid(), number)

    return action


def test_ctrl_c_lets_the_group_in_flight_finish_and_begins_no_other(
    sweep_of: Callable[..., Sweep], tmp_path: Path
) -> None:
    sweep, before = sweep_of(3), signal.getsignal(signal.SIGINT)
    heard = Hearing(3, interrupt())
    assert go_on(sweep, tmp_path, heard) == (2, True)
    assert (len(heard.groups), heard.stops) == (1, 1)
    assert rows(tmp_path) == Counter(case.key for case in sweep.cases[:2])
    assert signal.getsignal(signal.SIGINT) is before
    # In the last group it cuts nothing short.
    assert go_on(sweep, tmp_path, Hearing(10, interrupt())) == (4, False)
    assert rows(tmp_path) == Counter(case.key for case in sweep.cases)


@pytest.mark.parametrize("action", [interrupt(times=2), interrupt(signal.SIGTERM)], ids=["twice", "SIGTERM"])
def test_ctrl_c_twice_and_sigterm_stop_at_once(
    children: Callable[[], list[int]], sweep_of: Callable[..., Sweep], tmp_path: Path, action: Callable[[], None]
) -> None:
    with pytest.raises(KeyboardInterrupt):
        go_on(sweep_of(3, ms=20), tmp_path, Hearing(3, action))
    wait_until(lambda: not children())
    assert not rows(tmp_path)


def test_a_signal_to_all_processes_of_a_job_is_its_first_ones_to_judge(
    children: Callable[[], list[int]], sweep_of: Callable[..., Sweep], tmp_path: Path
) -> None:
    """As Slurm sends SIGTERM at the end of a job's time: the case in flight has not failed."""

    def signal_all_others() -> None:
        for pid in (*children(), forkserver._forkserver._forkserver_pid):  # type: ignore[attr-defined]
            for number in (signal.SIGTERM, signal.SIGINT):
                os.kill(pid, number)

    environment_of("cpu")
    assert go_on(sweep_of(2), tmp_path, Hearing(3, signal_all_others)) == (4, False)
    assert {record.status for record in RecordStore(tmp_path / "records.jsonl").load()} == {"ok"}


def test_ctrl_c_while_the_gpu_is_waited_for_stops_at_once(sweep_of: Callable[..., Sweep], tmp_path: Path) -> None:
    def waiting(task: GroupTask) -> Generator[Event, None, None]:
        yield Queued("process 1")
        interrupt()()
        yield Queued("", is_over=True)

    heard = Hearing()
    with pytest.raises(KeyboardInterrupt):
        run_sweep(sweep_of(1), RecordStore(tmp_path / "r.jsonl"), heard, Deadline(None), (), waiting)
    assert heard.lines == ["waiting for the GPU, which process 1 measures on"]


def test_a_full_disk_stops_the_sweep_with_whole_records_and_it_goes_on_later(
    sweep_of: Callable[..., Sweep], tmp_path: Path
) -> None:
    sweep = sweep_of(2)
    code = tmp_path / "code"

    def until_it_is_full() -> None:
        limit = 9000
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            go_on(sweep, tmp_path)
        except OSError as failure:
            code.write_text(str(failure.strerror))

    with forked(until_it_is_full) as pid:
        assert os.waitpid(pid, 0)[1] == 0
    assert code.read_text() == "File too large"
    store = RecordStore(tmp_path / "records.jsonl")
    assert 0 < len(store.load()) < 4
    go_on(sweep, tmp_path)
    assert rows(tmp_path) == Counter(case.key for case in sweep.cases)


@pytest.mark.parametrize("fault", ["read-only", "torn", "foreign"])
def test_references_that_cannot_be_kept_or_read_cost_nothing(
    sweep_of: Callable[..., Sweep], tmp_path: Path, fault: str
) -> None:
    references = tmp_path / "references"
    sweep = sweep_of(1, references=references)
    if fault == "read-only":
        # Below a file: not even root can write there.
        references.write_text("")
        with pytest.warns(UserWarning, match="no reference can be kept"):
            go_on(sweep, tmp_path)
    else:
        go_on(sweep, tmp_path)
        (kept, *_) = references.glob("*.safetensors")
        kept.write_bytes(kept.read_bytes()[:20] if fault == "torn" else b"\0" * 1000)
        (tmp_path / "records.jsonl").unlink()
        go_on(sweep, tmp_path)
    assert [record.status for record in RecordStore(tmp_path / "records.jsonl").load()] == ["ok", "ok"]


def test_a_clock_that_goes_backwards_changes_nothing(
    sweep_of: Callable[..., Sweep], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backwards = iter(range(2_000_000_000, 0, -10_000_000))
    monkeypatch.setattr(time, "time", lambda: float(next(backwards)))
    sweep = sweep_of(3)
    began = recorded.utc_now()
    assert go_on(sweep, tmp_path, seconds=600.0) == (6, False)
    for record in RecordStore(tmp_path / "records.jsonl").load():
        assert record.status == "ok"
        assert record.harness.stopped_by is None
        assert began <= record.started_at <= recorded.utc_now()


def test_a_clock_that_goes_backwards_in_the_processes_that_measure_changes_no_time(
    sweep_of: Callable[..., Sweep], tmp_path: Path
) -> None:
    import sweep_fakes

    sweep = sweep_of(2, ms=5)
    assert go_on(sweep, tmp_path, seconds=600.0, change=sweep_fakes.clock_backwards) == (4, False)
    records = RecordStore(tmp_path / "records.jsonl").load()
    for record in records:
        assert (record.status, record.harness.stopped_by) == ("ok", None)
        assert record.wall_ms is not None
        assert record.wall_ms.min >= 5.0
    # Nothing is measured again.
    assert records[0].started_at < recorded.utc_now() - timedelta(hours=1)
    assert go_on(sweep, tmp_path) == (0, False)


@pytest.mark.parametrize("content", [b"{", b"\0" * 1000, b'{"device": 7}', None])
def test_ceilings_that_cannot_be_read_or_kept_are_measured_anew(
    sweep_of: Callable[..., Sweep], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None
) -> None:
    """None: the folder is below a file, where not even root can write."""
    import sweep_fakes

    cache, heard = tmp_path / "cache", Hearing()
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    if content is None:
        cache.write_text("")
        said = "the ceilings cannot be kept in "
    else:
        go_on(sweep_of(1), tmp_path, change=sweep_fakes.quick_ceilings)
        (kept,) = cache.rglob("*.json")
        kept.write_bytes(content)
        (tmp_path / "records.jsonl").unlink()
        said = f"{kept} cannot be read ("
    # Once for all groups.
    assert go_on(sweep_of(2), tmp_path, heard, change=sweep_fakes.quick_ceilings) == (4, False)
    assert sum(line.startswith(said) for line in heard.lines) == (1 if content is None else 2)
    assert {record.status for record in RecordStore(tmp_path / "records.jsonl").load()} == {"ok"}
    if content is not None:
        assert kept.read_bytes().startswith(b"{\n")


def test_a_middle_case_that_crashes_leaves_the_times_of_all_others(
    sweep_of: Callable[..., Sweep], tmp_path: Path
) -> None:
    sweep = sweep_of(2, backends=("steady", "timing:SIGSEGV", "peer"))
    go_on(sweep, tmp_path)
    records = RecordStore(tmp_path / "records.jsonl").load()
    assert len(records) == 6
    assert {record.case.backend for record in records if record.wall_ms is None} == {"timing:SIGSEGV"}


def test_nothing_begins_once_the_seconds_are_over_and_the_rest_is_for_later(
    sweep_of: Callable[..., Sweep], tmp_path: Path
) -> None:
    sweep = sweep_of(3)
    assert go_on(sweep, tmp_path, seconds=0.0) == (0, False)
    heard = Hearing()
    # A group gets the time that is left when it begins; it is over within the first.
    made, _ = go_on(sweep_of(3, ms=100), tmp_path, heard, seconds=0.7)
    assert len(heard.groups) < 3
    assert made < 6
    (tmp_path / "records.jsonl").unlink()
    assert go_on(sweep, tmp_path, seconds=600.0) == (6, False)


def test_one_process_times_all_groups_and_another_goes_on_where_it_ends(
    sweep_of: Callable[..., Sweep], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Any] = []

    class Counted(group_process.ChildProcess):
        def __init__(self, *given: Any) -> None:
            started.append(given)
            super().__init__(*given)

    monkeypatch.setattr(group_process, "ChildProcess", Counted)
    heard = Hearing()
    sweep = sweep_of(3, in_one_process=True)
    (tmp_path / "whole").mkdir()
    assert go_on(sweep, tmp_path / "whole", heard) == (6, False)
    assert [len(group) for group in heard.groups] == [2, 2, 2]
    assert len(started) == 1
    records = RecordStore(tmp_path / "whole/records.jsonl").load()
    assert [record.harness.groups_before for record in records] == [0, 0, 1, 1, 2, 2]
    heard, started[:] = Hearing(), []
    sweep = sweep_of(3, backends=("steady", "timing:SIGSEGV", "peer"), in_one_process=True)
    assert go_on(sweep, tmp_path, heard) == (9, False)
    records = RecordStore(tmp_path / "records.jsonl").load()
    assert {record.case.backend for record in records if record.status != "ok"} == {"timing:SIGSEGV"}
    # The process that a crash begins goes on with the rest of that group, and has the next after it.
    crashed = [record.harness.groups_before for record in records if record.status != "ok"]
    assert crashed == [0, 1, 1]
    assert len(heard.groups) == 3
    assert len(started) == 4


def test_weights_that_end_the_one_process_cost_their_group_alone(
    sweep_of: Callable[..., Sweep], tmp_path: Path
) -> None:
    import sweep_fakes

    sweep = sweep_of(3, in_one_process=True)
    faulty = [sweep_fakes.a_case(name, unet="weights:SIGSEGV") for name in ("steady", "peer")]
    sweep = replace(sweep, cases=(*sweep.cases[:2], *faulty, *sweep.cases[2:]))
    heard = Hearing()
    assert go_on(sweep, tmp_path, heard) == (8, False)
    records = RecordStore(tmp_path / "records.jsonl").load()
    assert {record.case.unet for record in records if record.status != "ok"} == {"weights:SIGSEGV"}
    assert rows(tmp_path) == Counter(case.key for case in sweep.cases)
    assert len(heard.groups) == 4


def test_ctrl_c_lets_the_group_of_the_one_process_finish(sweep_of: Callable[..., Sweep], tmp_path: Path) -> None:
    sweep = sweep_of(3, in_one_process=True)
    heard = Hearing(3, interrupt())
    assert go_on(sweep, tmp_path, heard) == (2, True)
    assert (len(heard.groups), heard.stops) == (1, 1)
    assert go_on(sweep, tmp_path) == (4, False)


def test_a_group_knows_what_earlier_ones_found_and_what_time_is_left(
    sweep_of: Callable[..., Sweep], tmp_path: Path, make_record: Callable[..., Record], make_ceilings: Any
) -> None:
    """Energy puts the end of timing off; turns of others count for nothing."""
    found = Carried({"decode": None}, {"cuda": make_ceilings(CeilingDevice.of(make_record().environment))}, 7.0)
    tasks: list[GroupTask] = []

    def noted(task: GroupTask) -> Generator[Event, None, None]:
        tasks.append(task)
        yield TookTurns(1000.0)
        yield Learned(found)

    sweep = sweep_of(2)
    on_a_gpu = tuple(case.model_copy(update={"device": "cuda"}) for case in sweep.cases)
    environments = {"cuda": sweep.environments["cpu"]}
    sweep = replace(sweep, cases=on_a_gpu, environments=environments)
    waited = TURNS.waited
    try:
        run_sweep(sweep, RecordStore(tmp_path / "r.jsonl"), Listener(), Deadline(100.0), (), noted)
    finally:
        TURNS.waited = waited
    first, second = tasks
    assert (first.carried, second.carried) == (Carried(), found)
    assert (first.time.whole, first.time.timing) == (100.0, 80.0)
    assert (second.time.whole, second.time.timing) == (100.0, 87.0)
    assert second.time.elapsed < 60.0
    whole, timing = second.time.deadlines()
    assert timing.left == pytest.approx(87.0 - second.time.elapsed, abs=1.0)
    assert whole.left - timing.left == pytest.approx(13.0, abs=0.01)


def test_all_traces_on_a_device_are_of_one_process(
    sweep_of: Callable[..., Sweep], make_record: Callable[..., Record]
) -> None:
    """One process for each device, whatever the groups; `short_traces` takes the most important backends first."""
    names = ("torch", "diffusers-compile", "graph", "diffusers")
    cases = [Case(unet="39M", device="cuda", seed=seed, backend=name) for seed in (1, 2) for name in names]
    cases += [Case(unet="39M", device="cuda:1", backend="graph"), Case(unet="39M", device="cpu", backend="torch")]
    environment = make_record().environment
    devices = dict.fromkeys(("cuda", "cuda:1", "cpu"), environment)
    sweep = replace(sweep_of(0), cases=tuple(cases), environments=devices)
    records = [make_record(case) for case in reversed(cases)]
    records[2] = make_record(cases[-3], status="oom")
    first, second = trace_tasks(sweep, records, cases)
    assert [one.case_key for one in first.untraced or ()] == [case.key for case in cases[:7]]
    assert [one.case_key for one in second.untraced or ()] == [cases[8].key]
    assert all(task.cases == task.left for task in (first, second))


def test_ctrl_c_lets_the_trace_in_flight_finish(
    sweep_of: Callable[..., Sweep], make_record: Callable[..., Record], tmp_path: Path
) -> None:
    cases = tuple(Case(unet="39M", device="cuda", seed=seed, backend="graph") for seed in range(3))
    sweep = replace(sweep_of(0), cases=cases, environments={"cuda": make_record().environment})
    store = RecordStore(tmp_path / "r.jsonl")
    store.append(*map(make_record, cases))
    closed: list[GroupTask] = []

    def traced_until_interrupted(task: GroupTask) -> Generator[Event, None, None]:
        try:
            for number, record in enumerate(task.untraced or ()):
                if number == 1:
                    os.kill(os.getpid(), signal.SIGINT)
                yield Completed(record, "trace")
        finally:
            closed.append(task)

    keys = {case.key for case in cases}
    assert run_sweep(sweep, store, Listener(), Deadline(None), keys, traced_until_interrupted) == (0, True)
    assert len(closed) == 1
    assert len(store.load()) == 5


def test_a_trace_that_ends_its_process_leaves_the_record_and_the_other_traces(
    sweep_of: Callable[..., Sweep], make_record: Callable[..., Record]
) -> None:
    sweep = sweep_of(1, backends=("first call:SIGSEGV", "steady"))
    untraced = tuple(make_record(case) for case in sweep.cases)
    events = list(fake_measured(replace(sweep.task(sweep.cases), untraced=untraced)))
    lost, nothing = events
    assert isinstance(lost, Warned)
    assert "no trace (the process that measured it was ended by SIGSEGV in its trace)" in lost.text
    # On a CPU the profiler sees no device.
    assert isinstance(nothing, Warned)
    assert "backend=steady: no trace (the profiler saw nothing)" in nothing.text


def test_warnings_are_seen_once(sweep_of: Callable[..., Sweep], tmp_path: Path) -> None:
    sweep = sweep_of(3, backends=("warns", "peer"))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("default")
        go_on(sweep, tmp_path)
    assert [str(one.message) for one in seen if one.category is RuntimeWarning] == ["beware"]


def test_a_process_that_hangs_ends_with_the_sweep_that_is_killed(
    children: Callable[[], list[int]], sweep_of: Callable[..., Sweep], tmp_path: Path
) -> None:
    """In a call that keeps the interpreter to itself: only the kernel can end it."""
    environment_of("cpu")
    with forked(partial(go_on, sweep_of(1, backends=("timing:hang", "peer")), tmp_path)) as pid:
        wait_until(lambda: bool(children()))
        time.sleep(0.5)
        assert children()
        # Meanwhile nobody else measures into the folder.
        with pytest.raises(RunError, match=f"in use by process {pid} on "):
            go_on(sweep_of(1), tmp_path)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        wait_until(lambda: not children())
    assert go_on(sweep_of(1), tmp_path) == (2, False)


def test_the_time_that_the_group_in_flight_will_take() -> None:
    now = [0.0]
    small, large = Case(unet="39M", steps=1), Case(unet="39M", steps=9)
    remaining = Remaining([small, large], RepetitionRule(3), clock=lambda: now[0])
    assert remaining.seconds_of([large]) is None
    now[0] = 10.0
    remaining.ran(small)
    # One of 4 portions of the small case took 10 s; the large one has 36.
    assert remaining.seconds_of([small]) == pytest.approx(30.0)
    assert remaining.seconds_of([large]) == pytest.approx(360.0)
    assert remaining.seconds_of([]) == 0.0

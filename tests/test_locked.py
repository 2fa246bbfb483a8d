"""A folder of records is one process's at a time."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ldmperf.profiling import cli
from ldmperf.profiling.measure import folders as locked
from ldmperf.profiling.measure.environment import collect_environment
from ldmperf.profiling.measure.folders import RunError
from ldmperf.profiling.measure.timing import RepetitionRule
from ldmperf.profiling.trajectory.case import Case
from ldmperf.profiling.trajectory.records import RECORDS_NAME
from ldmperf.profiling.trajectory.runs import create_run

HOLD = """
import sys, time
from collections.abc import Iterator
from pathlib import Path
from ldmperf.profiling.measure.folders import locked
lock = locked(Path(sys.argv[1]), print)
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the folder, until it is killed."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_the_second_says_who_holds_it_until_that_ends_however(
    holder: subprocess.Popen[str], tmp_path: Path
) -> None:
    with pytest.raises(
        RunError, match=rf"in use by process {holder.pid} on .+ since \d{{4}}-.+ UTC; wait"
    ) as raised:
        locked.locked(tmp_path, print)
    assert "\n" not in str(raised.value)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    # The kernel lets go; what the file says of the last one is of no account.
    with locked.locked(tmp_path, print), pytest.raises(RunError, match=f"process {os.getpid()} on"):
        locked.locked(tmp_path, print)
    with locked.locked(tmp_path, print):
        pass


def test_two_that_resume_one_run(
    holder: subprocess.Popen[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # A run in the very folder that is held.
    made = create_run(tmp_path, [Case(unet="39M", steps=1)], RepetitionRule(1, 0.0), collect_environment("cpu"))
    (made / "run.json").rename(tmp_path / "run.json")
    with pytest.raises(SystemExit) as exited:
        cli.main(["profile", "--resume", str(tmp_path)])
    said = capsys.readouterr().err
    assert exited.value.code == 2
    assert said.startswith(f"ldmperf: {tmp_path} is in use by process {holder.pid} on ")
    assert said.count("\n") == 1
    assert not (tmp_path / RECORDS_NAME).exists()


def test_two_benches_of_one_folder(
    holder: subprocess.Popen[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "kernels.jsonl").write_bytes(b"")
    with pytest.raises(SystemExit) as exited:
        cli.main(["kernels", "--device", "cpu", "--resume", str(tmp_path)])
    assert exited.value.code == 2
    assert f"in use by process {holder.pid} on " in capsys.readouterr().err


def test_a_file_system_without_locks_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    said: list[str] = []
    with locked.locked(tmp_path, said.append):
        pass
    (line,) = said
    assert "its file system has no locks; see that no other process measures into it" in line


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": 1}', "\x00"])
def test_a_lock_file_that_says_nothing(tmp_path: Path, content: str) -> None:
    with locked.locked(tmp_path, print):
        (tmp_path / locked.LOCK_NAME).write_text(content)
        with pytest.raises(RunError, match="in use by another process; wait"):
            locked.locked(tmp_path, print)

"""Two processes never measure on one GPU at once; sides of one comparison share it. UUIDs are given: no GPU is."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from ldmperf.profiling.measure import gpu_lock

HOLD = """
import sys, time
from pathlib import Path
from ldmperf.profiling.measure import gpu_lock
gpu_lock.LOCKS = Path(sys.argv[1])
gpu_lock.gpu_uuid = lambda device: sys.argv[2]
tell = lambda *words: print(*words, flush=True)
with gpu_lock.held_gpu("cuda", lambda holder: tell("waits for", holder), lambda: tell("over")):
    print("held", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def uuid() -> str:
    return str(uuid4())


@contextmanager
def holder(folder: Path, uuid: str, turns: str | None = None) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the GPU as soon as it can, until it reads a line."""
    variables = os.environ | ({} if turns is None else {"LDMPERF_TURNS": turns})
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder), uuid],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=variables,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_the_second_waits_is_told_for_whom_and_goes_on_however_the_first_ends(tmp_path: Path, uuid: str) -> None:
    with holder(tmp_path, uuid) as first:
        assert said(first) == "held"
        with holder(tmp_path, uuid) as second, holder(tmp_path, str(uuid4())) as elsewhere:
            assert said(second).startswith(f"waits for process {first.pid} on ")
            assert said(elsewhere) == "held"
            first.send_signal(signal.SIGKILL)
            assert (said(second), said(second)) == ("over", "held")


def test_the_sides_of_a_comparison_share_it_and_others_wait_for_both(tmp_path: Path, uuid: str) -> None:
    one_side, other_side, stranger = (str(tmp_path / name) for name in ("a/0", "a/1", "b/0"))
    with holder(tmp_path, uuid, one_side) as one, holder(tmp_path, uuid, other_side) as other:
        assert (said(one), said(other)) == ("held", "held")
        for turns in (None, stranger):
            with holder(tmp_path, uuid, turns) as waits:
                assert said(waits).startswith("waits for")
        with holder(tmp_path, uuid) as alone:
            assert said(alone).startswith("waits for")
            one.communicate("\n")
            time.sleep(3 * gpu_lock._PAUSE_S)
            other.communicate("\n")
            # Had it not waited for both, the other could not have gone on to its end before.
            assert (said(alone), said(alone)) == ("over", "held")
            with holder(tmp_path, uuid, one_side) as late:
                assert said(late).startswith(f"waits for process {alone.pid} on ")


def test_every_user_may_take_it_and_what_is_no_file_is_not_touched(
    tmp_path: Path, uuid: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_lock, "LOCKS", tmp_path)
    monkeypatch.setattr(gpu_lock, "gpu_uuid", lambda device: uuid)
    path = tmp_path / f"ldmperf-{uuid}.lock"
    before = os.umask(0o077)
    try:
        with gpu_lock.held_gpu("cuda", print):
            assert stat.S_IMODE(path.stat().st_mode) == 0o666
    finally:
        os.umask(before)
    path.unlink()
    target = tmp_path / "precious"
    target.write_text("precious")
    path.symlink_to(target)
    with gpu_lock.held_gpu("cuda", print):
        assert target.read_text() == "precious"
    path.unlink()
    os.mkfifo(path)
    with gpu_lock.held_gpu("cuda", print):
        pass
    # Nowhere to write: nothing is held, and nothing fails.
    monkeypatch.setattr(gpu_lock, "LOCKS", tmp_path / "none")
    with gpu_lock.held_gpu("cuda", print):
        pass


def test_a_hostile_note_is_shown_harmless(tmp_path: Path, uuid: str) -> None:
    with holder(tmp_path, uuid) as first:
        assert said(first) == "held"
        (tmp_path / f"ldmperf-{uuid}.lock").write_text('{"pid": "\\u001b[2J", "host": "h\\n", "since": "x"}')
        with holder(tmp_path, uuid) as second:
            line = said(second)
            assert line.startswith("waits for process")
            assert "\x1b" not in line


def test_kernels_and_trace_hold_it(
    run: Callable[..., Any], tmp_path: Path, uuid: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While another process holds the GPU they say for whom they wait."""
    held: list[str] = []

    @contextmanager
    def noted(device: str, on_wait: Callable[[str], None]) -> Iterator[None]:
        held.append(device)
        on_wait("process 1 on here")
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(gpu_lock, "held_gpu", noted)
    for command in (("kernels",), ("trace", "--size", "39M", "--steps", "1")):
        outcome = run(*command, "--device", "cpu", "--out", tmp_path)
        assert outcome.code == 130
        assert "waiting for the GPU, which process 1 on here measures on" in outcome.err
    assert held == ["cpu", "cpu"]

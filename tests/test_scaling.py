"""Shards by option and of a Slurm array, merged, beside one undivided run; records are made up, not measured."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest

from ldmperf.profiling import Record, load_records
from ldmperf.profiling.commands import profile_command
from ldmperf.profiling.measure.store import write_whole
from ldmperf.profiling.record_files import gather
from ldmperf.profiling.sweep.events import Event, Recorded
from ldmperf.profiling.sweep.group_task import GroupTask
from ldmperf.profiling.sweep.local import Workers

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "examples" / "slurm.sbatch"
# 12 groups of two backends.
SWEEP = ("--preset", "cpu", "--size", "39M,83M", "--steps", "1,2,3", "--batch", "1,2", "--min-count", "1")

# `ldmperf` of the array's tasks: as below without a page, and killed before its second group where STOPS says so.
COMMAND = f"""#!{sys.executable}
import os, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from conftest import plausible_record
from ldmperf.profiling import cli
from ldmperf.profiling.commands import profile_command
from ldmperf.profiling.record_files import gather
from ldmperf.profiling.sweep.events import Recorded
from ldmperf.profiling.sweep.local import Workers

profile_command.report_run = lambda folder: gather([folder])
groups = 0
def measured(task):
    global groups
    groups += 1
    if groups > 1 and os.environ.get("STOPS"):
        os.kill(os.getpid(), 9)
    for case in task.left:
        yield Recorded(plausible_record(case, run_id=task.run_id, environment=task.environment))

cli.main(sys.argv[1:], workers=Workers(measured, lambda device: plausible_record().environment))
"""


@pytest.fixture
def workers(make_record: Callable[..., Record]) -> Workers:
    """Records without measuring."""

    def measured(task: GroupTask) -> Generator[Event, None, None]:
        for case in task.left:
            yield Recorded(make_record(case, run_id=task.run_id, environment=task.environment))

    return Workers(measured, lambda device: make_record().environment)


@pytest.fixture(autouse=True)
def _no_array(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def _no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile_command, "report_run", lambda folder: gather([folder]))


def keys(folder: Path) -> Counter[str]:
    """How often each case has a record in the files below a folder."""
    files = [*folder.rglob("*.jsonl")]
    return Counter(record.case_key for file in files for record in load_records(file)[0])


def run_json(folder: Path) -> Any:
    (path,) = folder.glob("*/run.json")
    return json.loads(path.read_text())


def test_the_array_job_is_a_bash_script() -> None:
    assert os.access(SCRIPT, os.X_OK)
    subprocess.run(["bash", "-n", SCRIPT], check=True, timeout=60)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", SCRIPT], check=True, timeout=60)


@pytest.mark.usefixtures("_no_page")
def test_four_shards_of_an_array_merged_are_one_undivided_run(
    tmp_path: Path, run: Callable[..., Any], workers: Workers
) -> None:
    """One of the tasks is killed and started again."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, text in (("ldmperf", COMMAND), ("srun", '#!/bin/bash\nexec "$@"\n')):
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)

    def start(task: int, **more: str) -> subprocess.Popen[str]:
        array = {"JOB_ID": "77", "TASK_ID": f"{task}", "TASK_COUNT": "4", "TASK_MIN": "0", "TASK_STEP": "1"}
        variables = {f"SLURM_ARRAY_{name}": value for name, value in array.items()}
        path = f"{commands}{os.pathsep}{os.environ['PATH']}"
        return subprocess.Popen(
            [SCRIPT, *SWEEP],
            cwd=tmp_path,
            env=os.environ | variables | {"PATH": path} | more,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    tasks = [start(task, **({"STOPS": "1"} if task == 2 else {})) for task in range(4)]
    told = [task.communicate(timeout=300)[0] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0, -9, 0], told
    for number, text in enumerate(told):
        assert f"shard {number + 1}/4 by the task's place in Slurm's array" in text
    job = tmp_path / "runs" / "slurm-77"
    early = run("merge", job, "--out", tmp_path / "early")
    assert "without a record: 4 planned cases" in early.err
    assert sum(keys(tmp_path / "early").values()) == 20
    again = start(2)
    assert "4 cases to measure, 2 recorded" in again.communicate(timeout=300)[0]
    assert again.returncode == 0

    merged = run("merge", job, "--out", tmp_path / "merged")
    assert (merged.code, merged.err) == (0, "")
    whole = run("profile", *SWEEP, "--out", tmp_path / "whole", workers=workers)
    assert whole.code == 0
    assert keys(tmp_path / "merged") == keys(tmp_path / "whole")
    assert set(keys(tmp_path / "merged").values()) == {1}
    assert len(keys(tmp_path / "merged")) == 24
    plans = {json.dumps(json.loads(path.read_text())["shard"]["plan"]) for path in job.glob("*/*/run.json")}
    assert len(plans) == 1


@pytest.mark.usefixtures("_no_page")
def test_a_shard_measures_its_own_cases_and_resumes_with_them(
    tmp_path: Path, run: Callable[..., Any], workers: Workers
) -> None:
    assert run("profile", *SWEEP, "--shard", "2/5", "--out", "runs", workers=workers).code == 0
    fields = run_json(tmp_path / "runs")
    assert (fields["shard"]["index"], fields["shard"]["count"], fields["shard"]["cases"]) == (2, 5, 24)
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.endswith("-2of5")
    planned = {record.case_key for record in load_records(folder)[0]}
    assert len(planned) == len(fields["cases"]) in (4, 6)
    lines = (folder / "records.jsonl").read_text().splitlines(keepends=True)
    for options in ((), ("--shard", "2/5"), (*SWEEP, "--shard", "2/5"), SWEEP):
        (folder / "records.jsonl").write_text("".join(lines[:-1]))
        resumed = run("profile", "--resume", *options, "--out", "runs", workers=workers)
        assert resumed.code == 0, resumed.err
        assert "1 case to measure" in resumed.err
        assert {record.case_key for record in load_records(folder)[0]} == planned
    assert len(list((tmp_path / "runs").iterdir())) == 1


@pytest.mark.usefixtures("_no_page")
def test_a_run_is_gone_on_with_as_the_shard_that_it_is(
    tmp_path: Path, run: Callable[..., Any], workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("profile", *SWEEP, "--shard", "1/2", "--out", "runs", workers=workers).code == 0
    assert run("profile", *SWEEP, "--shard", "2/2", "--out", "runs", workers=workers).code == 0
    first, _ = sorted((tmp_path / "runs").iterdir())
    wrong = run("profile", "--resume", first, "--shard", "2/2", workers=workers)
    assert (wrong.code, wrong.err.count("\n")) == (2, 1)
    assert f"{first} was begun for shard 1/2, not shard 2/2" in wrong.err
    none = run("profile", "--resume", "--shard", "2/3", "--out", "runs", workers=workers)
    assert (none.code, none.err.count("\n")) == (2, 1)
    assert "no run of shard 2/3" in none.err
    # The latest of the task's own shard, not of all.
    for name, value in (("ID", "5"), ("COUNT", "2"), ("MIN", "5")):
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", value)
    own = run("profile", "--resume", "--out", "runs", workers=workers)
    assert own.code == 0
    assert f"{first.relative_to(tmp_path)}: 0 cases to measure, 12 recorded" in own.err
    # A run that is named is gone on with, in whatever task.
    monkeypatch.setenv("SLURM_ARRAY_TASK_MIN", "4")
    assert run("profile", "--resume", first, workers=workers).code == 0


@pytest.mark.usefixtures("_no_page")
def test_the_option_goes_before_the_array(
    tmp_path: Path, run: Callable[..., Any], workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("ID", "1"), ("COUNT", "9"), ("MIN", "0")):
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", value)
    whole = run("profile", *SWEEP, "--shard", "1/1", "--out", "runs", workers=workers)
    assert "Slurm" not in whole.err
    assert len(run_json(tmp_path / "runs")["cases"]) == 24


def test_a_shard_without_cases_says_so_and_leaves_no_folder(
    tmp_path: Path, run: Callable[..., Any], workers: Workers
) -> None:
    empty = run("profile", *SWEEP, "--shard", "13/13", "--out", "runs", workers=workers)
    assert empty.code == 0
    assert empty.err == "shard 13/13 has nothing to measure: there are fewer groups than shards\n"
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("options", [("--shard", "0/4"), ("--shard", "four"), ("--schema", "--shard", "1/2")])
def test_a_wrong_shard_is_a_wrong_call(tmp_path: Path, run: Callable[..., Any], options: tuple[str, ...]) -> None:
    wrong = run("profile", *SWEEP, *options, "--out", "runs")
    assert (wrong.code, wrong.err.count("\n")) == (2, 1)
    assert not (tmp_path / "runs").exists()


def test_two_machines_that_write_one_file_at_once_both_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Process ids may be the same there, as in two containers."""
    path = tmp_path / "run.json"
    monkeypatch.setattr(os, "getpid", lambda: 1)
    replace = Path.replace

    def interrupted(self: Path, target: Path) -> Path:
        monkeypatch.setattr(Path, "replace", replace)
        write_whole(path, b"theirs")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", interrupted)
    write_whole(path, b"ours")
    assert path.read_bytes() == b"ours"
    assert [file.name for file in tmp_path.iterdir()] == ["run.json"]

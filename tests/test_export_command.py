"""`ldmperf export`, and the line of docs/exporting.md that reads records with DuckDB."""

from __future__ import annotations

import ast
import csv
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ldmperf.profiling import Case, Record, load_records
from ldmperf.profiling.export.formats import FORMATS
from ldmperf.profiling.trajectory.records import RECORDS_NAME, RecordStore
from ldmperf.profiling.trajectory.runs import RUN_NAME

MakeRecord = Callable[..., Record]
Run = Callable[..., Any]
ROOT = Path(__file__).parents[1]
# Those of sweeps: kernels have files of their own.
COMMITTED = sorted(p for p in (ROOT / "bench" / "results").glob("*/*.jsonl") if not p.stem.endswith("-kernels"))
PAGE = ROOT / "docs" / "exporting.md"


def run_folder(folder: Path, *records: Record) -> Path:
    folder.mkdir(parents=True)
    (folder / RUN_NAME).write_text("{}")
    RecordStore(folder / RECORDS_NAME).append(*records)
    return folder


@pytest.mark.parametrize("name", FORMATS)
def test_a_committed_file_to_the_standard_output_and_to_a_file(run: Run, tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    to_stdout, to_file = (run("export", COMMITTED[0], "--format", name, *more) for more in ((), ("--out", out)))
    assert (to_stdout.code, to_stdout.err) == (0, "")
    assert (to_file.code, to_file.out, to_file.err) == (0, "", "")
    assert out.read_text(encoding="utf-8") == to_stdout.out
    ok = [record for record in load_records(COMMITTED[0])[0] if record.status == "ok"]
    assert ok
    assert all(record.case_id in to_stdout.out for record in ok)


def test_the_latest_run_is_exported_unless_told(
    run: Run, make_record: MakeRecord, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for steps, folder in ((2, "runs/20261124T093000Z-1a84ffb"), (3, "runs/20261125T093000Z-1a84ffb")):
        run_folder(Path(folder), make_record(Case(unet="39M", steps=steps)))
    benchmarks = json.loads(run("export", "--format", "bencher", "--metric", "wall_ms").out)
    assert benchmarks.keys() == {Case(unet="39M", steps=3).case_id}


def test_failed_cases_are_counted_and_lines_that_are_no_records_named(
    run: Run, make_record: MakeRecord, tmp_path: Path
) -> None:
    cases = [Case(unet="39M", steps=steps) for steps in (2, 3)]
    folder = run_folder(tmp_path / "run", make_record(cases[0]), make_record(cases[1], status="oom"))
    done = run("export", folder, "--format", "github-action-benchmark")
    assert (done.code, done.err) == (0, "1 case left out: 1 out of memory\n")
    with (folder / RECORDS_NAME).open("a") as file:
        file.write('{"torn')
    done = run("export", folder, "--format", "github-action-benchmark")
    assert done.code == 1
    assert "records.jsonl:3" in done.err
    assert json.loads(done.out)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--format", "xml"], "--format: no format 'xml'; choose from github-action-benchmark, bencher,"),
        (["--format", "csv", "--metric", "speed"], "--metric: no metric 'speed'; choose from wall_ms,"),
        (["--format", "csv", "--metric", ","], "--metric: no value given"),
        (["--format", "pytest-benchmark", "--metric", "registers"], "holds times only; leave out registers"),
        (["--format", "bencher", "--metric", "registers"], "no record has any of registers"),
        ([], "Missing option '--format'"),
    ],
)
def test_a_wrong_call_is_one_line(run: Run, arguments: list[str], told: str) -> None:
    done = run("export", COMMITTED[0], *arguments)
    assert (done.code, done.out) == (2, "")
    assert told in done.err
    assert done.err.count("\n") == 1


def test_several_commits_are_refused_where_there_is_no_place_for_them(run: Run, tmp_path: Path) -> None:
    done = run("export", *COMMITTED[:2], "--format", "bencher", "--out", tmp_path / "out.json")
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
    assert "git_commit: 9b3c50" in done.err
    assert not (tmp_path / "out.json").exists()
    assert run("export", *COMMITTED[:2], "--format", "csv").code == 0


def test_a_file_that_cannot_be_written_is_one_line(run: Run, tmp_path: Path) -> None:
    done = run("export", COMMITTED[0], "--format", "csv", "--out", tmp_path / "nowhere" / "out.csv")
    assert (done.code, done.err.count("\n")) == (1, 1)
    assert "No such file or directory); name another file with --out" in done.err


def test_the_page_and_the_help_name_every_format(run: Run) -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert re.findall(r"^\| `([\w-]+)` \|", page, re.MULTILINE) == list(FORMATS)
    # Wrapped as it is, a name may be broken at its dashes.
    told = "".join(run("export", "--help").out.split())
    assert all(name in told for name in FORMATS)


def test_the_line_of_the_page_reads_records_of_every_version_with_duckdb() -> None:
    pytest.importorskip("duckdb")
    (line,) = re.findall(
        r"<!-- run by .*? -->\n```console\n(.*?)\n```", PAGE.read_text(encoding="utf-8"), re.DOTALL
    )
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", line],
        cwd=ROOT,
        env=os.environ | {"PATH": path},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    least: dict[tuple[str, str], float] = {}
    versions = set()
    for file in COMMITTED:
        versions |= {json.loads(text)["schema_version"] for text in file.read_text().splitlines()}
        for record in load_records(file)[0]:
            if record.wall_ms is not None:
                key = (record.environment.git_commit or "")[:7], record.case_key
                least[key] = min(record.wall_ms.p50, least.get(key, record.wall_ms.p50))
    assert versions == {1, 2, 3}
    assert [ast.literal_eval(text) for text in done.stdout.splitlines()] == sorted(
        (commit, key, ms) for (commit, key), ms in least.items()
    )


def test_a_table_of_all_committed_records_has_their_statuses(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "records.csv"
    assert run("export", *COMMITTED, "--format", "csv", "--metric", "wall_ms", "--out", out).code == 0
    records = [record for path in COMMITTED for record in load_records(path)[0]]
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    told = [(row["case_id"], row["status"], row["wall_ms"], row["git_commit"]) for row in rows]
    assert sorted(told) == sorted(
        (
            record.case_id,
            record.status,
            "" if record.wall_ms is None else repr(record.wall_ms.p50),
            record.environment.git_commit or "",
        )
        for record in records
    )

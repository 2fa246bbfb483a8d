"""`ldmperf compare --json`: the verdicts as numbers."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from ldmperf.profiling import Case, Record
from ldmperf.profiling.measure.recorded import Samples
from ldmperf.profiling.trajectory.records import RECORDS_NAME, RecordStore

MakeRecord = Callable[..., Record]
CASES = [Case(unet="39M", steps=steps) for steps in (2, 3, 4)]


def runs(make_record: MakeRecord, folder: Path, factor: float, first: int, **of_the_last: Any) -> Path:
    """Six runs of three cases, in turn with another side whose `first` is the other; the last case as told."""
    for number in range(6):
        at = make_record().started_at + timedelta(minutes=2 * number + first)
        records = [
            make_record(
                case,
                run_id=f"{folder.name}{number}",
                started_at=at,
                wall_ms=Samples.of([100.0 * factor * (1 + 0.001 * (number % 3))]),
                peak_memory_bytes=2**30,
            )
            for case in CASES[:2]
        ]
        records.append(make_record(CASES[2], run_id=f"{folder.name}{number}", started_at=at, **of_the_last))
        path = folder / str(number)
        path.mkdir(parents=True)
        RecordStore(path / RECORDS_NAME).append(*records)
    return folder


def refuse(constant: str) -> None:
    raise AssertionError(constant)


def test_verdicts_gate_and_lists_are_told_in_numbers(run: Any, make_record: MakeRecord, tmp_path: Path) -> None:
    a, b = runs(make_record, tmp_path / "a", 1.0, 0), runs(make_record, tmp_path / "b", 1.1, 1, status="oom")
    done = run("compare", a, b, "--json", "--fail-over", "wall_ms:5%", "--metric", "wall_ms,peak_memory_bytes")
    assert done.code == 1
    told = json.loads(done.out, parse_constant=refuse)
    assert told["in_turn"] is True
    assert told["a"]["runs"] == [f"a{number}" for number in range(6)]
    assert told["a"]["commits"] == told["b"]["commits"] == ["7d35813"]
    wall, memory = told["changes"][:2]
    assert (wall["case_id"], wall["case_key"], wall["metric"]) == (CASES[0].case_id, CASES[0].key, "wall_ms")
    assert (wall["unit"], wall["verdict"], wall["runs"]) == ("ms", "SLOWER", [6, 6])
    assert wall["a"] == pytest.approx(100.1)
    assert wall["contrast"]["ratio"] == pytest.approx(1.1)
    assert wall["contrast"]["low"] <= 1.1 + 1e-9
    assert wall["contrast"]["basis"] == "in turn"
    assert wall["p"] <= 0.05
    assert (memory["verdict"], memory["p"], memory["contrast"]["ratio"]) == ("SAME", None, 1.0)
    assert [answer["answer"] for answer in told["gate"]] == ["fails", "fails"]
    assert {answer["case_key"] for answer in told["gate"]} == {case.key for case in CASES[:2]}
    (broken,) = told["broken"]
    assert "6 oom of 6 runs" in broken
    assert any("adjusted for" in note for note in told["notes"])


def test_what_has_no_contrast_is_null_and_says_why(run: Any, make_record: MakeRecord, tmp_path: Path) -> None:
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for path in paths:
        RecordStore(path).append(make_record(CASES[0], run_id=path.stem, wall_ms=Samples.of([1.0, 2.0])))
    done = run("compare", *paths, "--json")
    assert done.code == 0
    (change,) = json.loads(done.out, parse_constant=refuse)["changes"]
    assert change["contrast"] is None
    assert change["verdict"] == "AMBIGUOUS"
    assert "6 at least" in change["why"]

"""Qualities as records: their keys and ids, what contradicts itself, the schema, the file, the tables."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from ldmperf.profiling.compare.sets import differences, names_of, set_of
from ldmperf.profiling.export.formats import FORMATS
from ldmperf.profiling.measure.conditions import commit
from ldmperf.profiling.measure.environment import Environment
from ldmperf.profiling.quality import (
    QUALITY_NAME,
    Estimate,
    QualityCase,
    QualityRecord,
    QualityStore,
    quality_schema,
    stitched_label,
)
from ldmperf.profiling.quality.quality_table import (
    print_qualities,
    quality_conditions,
    quality_grid,
    quality_groups,
)
from ldmperf.profiling.record_files import gather

Make = Callable[..., QualityRecord]
SHARED = (("w8", 20), ("w32", 30))


def test_a_record_comes_back_as_it_was_written(tmp_path: Path, make_quality: Make) -> None:
    store = QualityStore(tmp_path / QUALITY_NAME)
    records = [
        make_quality(),
        make_quality("real", 1, kind="real", sampler="none"),
        make_quality(kind="stitched", steps=50, takes=SHARED),
        make_quality("w12", status="error"),
        make_quality("w16", kid=Estimate(value=-0.01)),
    ]
    store.append(*records)
    assert store.load() == records
    assert list(gather([tmp_path]).qualities) == records


def test_the_schema_takes_what_is_written(make_quality: Make) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    schema = quality_schema()
    assert (schema["title"], schema["$id"]) == ("QualityRecord", "urn:ldmperf:schema:quality:3")
    for record in (make_quality(), make_quality(status="error"), make_quality("real", 1, kind="real")):
        jsonschema.validate(json.loads(record.model_dump_json()), schema)
    line = json.loads(make_quality().model_dump_json())
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(line | {"case": line["case"] | {"split": "training"}}, schema)


CHANGED = {
    "world": "scenes-16x16-v1",
    "task": "sr",
    "kind": "distilled",
    "network": "w12",
    "training_seed": 1,
    "training_steps": 9,
    "sampler": "ddpm",
    "steps": 4,
    "guidance_scale": 3.0,
    "split": "held-out",
    "samples": 7,
}


@pytest.mark.parametrize("name", list(QualityCase.model_fields))
def test_key_and_id_tell_every_field_apart(make_quality: Make, name: str) -> None:
    case = make_quality().case
    other = case.model_copy(update={name: CHANGED[name]})
    assert other.key != case.key
    assert other.case_id != case.case_id


@given(value=st.floats(0, 10), commit=st.text("0123456789abcdef", min_size=40, max_size=40))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_the_id_is_of_the_case_alone(make_quality: Make, value: float, commit: str) -> None:
    there = Environment(os="Linux", python="3.12", git_commit=commit)
    record = make_quality(frechet=Estimate(value=value), environment=there, run_id="x")
    assert record.case_id == make_quality().case_id


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"case_key": "forged"}, "case_key is not the key of the case"),
        ({"message": "why"}, "and no message"),
        ({"status": "error"}, "has a message and no figures"),
        ({"frechet": None, "kid": None, "sliced_wasserstein": None, "alignment": None}, "has a figure"),
        ({"frechet": {"value": 1.0, "replicates": [1.0] * 19}}, "at least 20 replicates"),
        ({"frechet": {"value": "NaN"}}, "frechet"),
        ({"alignment": {"value": 1.5}}, "alignment is a share"),
        ({"started_at": "2026-11-27T01:00:00+01:00"}, "in UTC"),
        ({"takes": []}, "takes are empty"),
        ({"takes": [["w8", 2]]}, "do not add up"),
        ({"takes": [["w12", 3]]}, "the network's own"),
    ],
)
def test_what_contradicts_itself_is_no_record(make_quality: Make, changes: dict[str, Any], why: str) -> None:
    fields = json.loads(make_quality().model_dump_json())
    with pytest.raises(ValueError, match=why):
        QualityRecord.model_validate_json(json.dumps(fields | changes))


def test_a_stitched_case_is_called_by_what_it_takes(make_quality: Make) -> None:
    assert stitched_label(SHARED) == "w8x20+w32x30"
    record = make_quality(kind="stitched", steps=50, takes=SHARED)
    fields = json.loads(record.model_dump_json())
    case = record.case.model_copy(update={"network": "w8-w32"})
    fields |= {"case": case.model_dump(), "case_key": case.key}
    with pytest.raises(ValueError, match="'w8x20\\+w32x30'"):
        QualityRecord.model_validate_json(json.dumps(fields))


def test_worlds_stand_apart_and_of_a_case_the_last_of_each_commit_is_shown(make_quality: Make) -> None:
    there = Environment(os="Linux", python="3.12", git_commit="2b95aac" + "0" * 33)
    records = [
        make_quality(),
        make_quality(world="scenes-16x16-v1"),
        make_quality(environment=there),
        make_quality(frechet=Estimate(value=7.25)),
        make_quality("w12", status="error", message="no\x1b weights"),
    ]
    first, *others = quality_groups(records)
    assert [len(group) for group in (first, *others)] == [3, 1]
    grid = quality_grid(first)
    by_commit = {
        (row[grid.headings.index("network")], row[grid.headings.index("commit")]): row[
            grid.headings.index("Frechet")
        ]
        for row in grid.rows
    }
    here = commit(records[0].environment)
    assert len(grid.rows) == 3
    assert by_commit.keys() == {("w8", here), ("w8", "2b95aac"), ("w12", here)}
    assert (by_commit["w8", here], by_commit["w12", here]) == ("7.25", "-")
    assert by_commit["w8", "2b95aac"] != "7.25"
    assert [row[-2] for row in grid.rows].count("error: no\x1b weights") == 1
    assert quality_conditions(first).endswith(", t2i, 2 commits")
    assert quality_conditions(others[0]).endswith(f", t2i, {here}")
    assert "commit" not in quality_grid(others[0]).headings
    buffer = io.StringIO()
    print_qualities(records, Console(file=buffer, width=240))
    assert "\x1b" not in buffer.getvalue()
    assert "closed world only" in " ".join(buffer.getvalue().split())


def test_two_sets_may_not_differ_in_torch_and_have_names(tmp_path: Path, make_quality: Make) -> None:
    here = make_quality().environment
    other = make_quality(run_id="b", environment=here.model_copy(update={"torch": "9.9"}))
    a, b = set_of([make_quality()], tmp_path), set_of([other], tmp_path)
    assert differences(a, b) == ["torch: 2.13.0+cpu, 9.9"]
    busy = make_quality(run_id="b", environment=here.model_copy(update={"cpu": "Intel"}))
    assert differences(a, set_of([busy], tmp_path)) == []
    shared, names = names_of([make_quality()])
    assert list(names.values()) == ["w8 ddim 3 steps guidance 2 seed 0 20000 training steps test"]
    assert shared == ()


def test_a_folder_of_qualities_gets_a_page_and_every_export(
    run: Callable[..., Any], tmp_path: Path, make_quality: Make
) -> None:
    QualityStore(tmp_path / QUALITY_NAME).append(make_quality(), make_quality("w12"))
    outcome = run("report", tmp_path)
    assert outcome.code == 0, outcome.err
    assert "Quality in a closed world" in (tmp_path / "report.html").read_text()
    exported = run("export", tmp_path, "--format", "csv")
    assert exported.code == 0, exported.err
    (first, second) = csv.DictReader(io.StringIO(exported.out))
    assert (first["world"], first["generator"], first["kind"]) == ("scenes-8x8-v1", "diffusion", "quality")
    assert (first["network"], second["network"], first["frechet"]) == ("w8", "w12", "5.0")
    # It holds times only.
    for name in FORMATS.keys() - {"pytest-benchmark"}:
        outcome = run("export", tmp_path, "--format", name, "--metric", "frechet")
        assert outcome.code == 0, outcome.err


def test_two_runs_are_compared_and_kid_below_zero_is_no_ratio(
    run: Callable[..., Any], tmp_path: Path, make_quality: Make
) -> None:
    for name, value in (("a", 5.0), ("b", 6.0)):
        (tmp_path / name).mkdir()
        QualityStore(tmp_path / name / QUALITY_NAME).append(
            make_quality(run_id=name, frechet=Estimate(value=value), kid=Estimate(value=-0.01))
        )
    outcome = run("compare", tmp_path / "a", tmp_path / "b")
    assert outcome.code == 0, outcome.err
    assert "frechet" in outcome.out
    assert "nan" not in outcome.out

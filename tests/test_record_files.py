"""Records of all kinds read from folders and files: mixed, torn, foreign, of every version, named twice."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ldmperf.profiling import Case, Record
from ldmperf.profiling.kernel_bench.kernel_records import KernelRecord
from ldmperf.profiling.measure.folders import RunError
from ldmperf.profiling.measure.recorded import RecordModel, Samples
from ldmperf.profiling.quality import QualityRecord
from ldmperf.profiling.record_files import MARKS, NAMES, gather, kind_of
from ldmperf.profiling.static.inspection_records import InspectionRecord

MakeRecord = Callable[..., Record]
Line = Callable[..., str]
ROOT = Path(__file__).parents[1]
COMMITTED = sorted((ROOT / "bench" / "results").glob("*/*.jsonl"))
MODELS: dict[str, type[RecordModel]] = {
    "trajectory": Record,
    "kernel": KernelRecord,
    "inspection": InspectionRecord,
    "quality": QualityRecord,
}


@pytest.fixture
def kernel_line(make_kernel: Callable[..., Any]) -> Line:
    return lambda *given, **changes: str(make_kernel(*given, **changes).model_dump_json())


@pytest.fixture
def inspection_line(make_inspection: Callable[..., Any]) -> Line:
    return lambda *given, **changes: str(make_inspection(*given, **changes).model_dump_json())


@pytest.fixture
def quality_line(make_quality: Callable[..., Any]) -> Line:
    return lambda steps=1, **changes: str(make_quality("w8", steps, **changes).model_dump_json())


def trajectory_line(make_record: MakeRecord, steps: int = 1, **changes: Any) -> str:
    return make_record(Case(unet="39M", steps=steps), run_id="t", **changes).model_dump_json()


def test_the_marks_of_a_kind_are_always_written_and_are_of_no_other() -> None:
    for kind, marks in MARKS.items():
        for other, model in MODELS.items():
            fields = {*model.model_fields, *model.model_computed_fields}
            assert marks <= fields if kind == other else not marks & fields


def test_the_kind_of_every_committed_line(
    make_record: MakeRecord, kernel_line: Line, inspection_line: Line, quality_line: Line
) -> None:
    assert {kind_of(line) for path in COMMITTED for line in path.read_bytes().splitlines()} == {
        "trajectory",
        "kernel",
    }
    assert kind_of(kernel_line().encode()) == "kernel"
    assert kind_of(inspection_line().encode()) == "inspection"
    assert kind_of(quality_line().encode()) == "quality"


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.name)
def test_every_committed_set_reads_whole(path: Path) -> None:
    found = gather([path])
    assert not found.aside.count
    of_its_kind = found.kernels if path.stem.endswith("-kernels") else found.trajectories
    assert len(of_its_kind) == len({line for line in path.read_text().splitlines() if line})


FOREIGN = (
    "[1, 2]",
    "null",
    '"peer"',
    '{"a": 1}',
    "{",
    "torn",
    "\x00\xff",
    '{"schema_version": 9, "peer": 1}',
    "[" * 5000,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_mix_of_lines_gives_the_whole_records_in_their_order_and_counts_the_rest(
    tmp_path_factory: pytest.TempPathFactory,
    make_record: MakeRecord,
    data: st.DataObject,
    kernel_line: Line,
    inspection_line: Line,
    quality_line: Line,
) -> None:
    """Files of one kind or several, lines cut anywhere, foreign and blank lines between them."""
    numbers = st.integers(1, 6)
    whole = {
        "t": {n: trajectory_line(make_record, n) for n in range(1, 7)},
        "k": {n: kernel_line(n) for n in range(1, 7)},
        "i": {n: inspection_line(n) for n in range(1, 7)},
        "q": {n: quality_line(n) for n in range(1, 7)},
    }
    line = st.one_of(
        st.tuples(st.sampled_from("tkiq"), numbers),
        st.tuples(st.just("cut"), st.tuples(st.sampled_from("tkiq"), numbers, st.floats(0.01, 0.99))),
        st.tuples(st.just("foreign"), st.sampled_from(FOREIGN)),
        st.tuples(st.just("blank"), st.sampled_from(("", "  "))),
    )
    folder = tmp_path_factory.mktemp("mix")
    expected: dict[str, list[str]] = {"t": [], "k": [], "i": [], "q": []}
    paths, bad = [], 0
    for number, lines in enumerate(data.draw(st.lists(st.lists(line, max_size=8), min_size=1, max_size=3))):
        of_file: dict[str, dict[str, None]] = {"t": {}, "k": {}, "i": {}, "q": {}}
        texts, trajectories = [], []
        for kind, drawn in lines:
            if kind in whole:
                text = whole[kind][drawn]
                texts.append(text)
                of_file[kind][text] = None
                trajectories += [text] if kind == "t" else []
            elif kind == "cut":
                text = whole[drawn[0]][drawn[1]]
                texts.append(text[: 1 + int(drawn[2] * (len(text) - 2))])
                bad += 1
            else:
                texts.append(drawn)
                bad += kind == "foreign"
        if not any(of_file.values()):
            bad -= sum(kind in ("cut", "foreign") for kind, _ in lines)
            continue
        # A trajectory measured twice is two records; of a call the last counts.
        expected["t"] += trajectories
        expected["k"] += of_file["k"]
        expected["i"] += of_file["i"]
        expected["q"] += of_file["q"]
        path = folder / f"{number}.jsonl"
        path.write_text("\n".join(texts), encoding="utf-8", errors="surrogateescape")
        paths.append(path)
    if not paths:
        return
    # Some of them twice, by other spellings.
    paths += [folder / "." / path.name for path in data.draw(st.lists(st.sampled_from(paths), max_size=2))]
    found = gather(paths)
    assert [r.model_dump_json() for r in found.trajectories] == expected["t"]
    assert [r.model_dump_json() for r in found.kernels] == expected["k"]
    assert [r.model_dump_json() for r in found.inspections] == expected["i"]
    assert [r.model_dump_json() for r in found.qualities] == expected["q"]
    assert found.aside.in_file == found.aside.count == bad


def test_a_line_that_is_no_record_has_the_reason_of_the_kind_it_looks_most_like(
    tmp_path: Path, kernel_line: Line, inspection_line: Line, quality_line: Line
) -> None:
    torn = {
        "clock: Input should be": json.loads(kernel_line()) | {"clock": "sun"},
        "num_warps: Input should be": json.loads(inspection_line()) | {"num_warps": 0},
        "case_key is not the key of the launch": json.loads(inspection_line()) | {"arch": "sm_80"},
        "the steps of takes do not add up": json.loads(quality_line()) | {"takes": [["w8", 2]]},
        "evaluations: Input should be": json.loads(COMMITTED[-1].read_text().splitlines()[0])
        | {"evaluations": "x"},
    }
    path = tmp_path / "mixed.jsonl"
    path.write_text("\n".join([kernel_line(), *map(json.dumps, torn.values())]))
    found = gather([path])
    for line, reason in zip(found.aside.first, torn, strict=True):
        assert reason in line.reason


def test_folders_of_folders_are_searched_and_each_file_counts_once(
    tmp_path: Path, make_record: MakeRecord, kernel_line: Line, inspection_line: Line, quality_line: Line
) -> None:
    of_each = (trajectory_line(make_record), kernel_line(), inspection_line(), quality_line())
    lines = dict(zip(NAMES, of_each, strict=True))
    for name, line in lines.items():
        folder = tmp_path / "rounds" / "a" / f"run-of-{name}"
        folder.mkdir(parents=True)
        (folder / name).write_text(line + "\n")
    (tmp_path / "link").symlink_to(folder)
    found = gather([tmp_path / "rounds", folder, folder / name, tmp_path / "link"])
    kinds = (found.trajectories, found.kernels, found.inspections, found.qualities)
    assert list(map(len, kinds)) == [1, 1, 1, 1]
    assert found.records == tuple(record for kind in kinds for record in kind)


def test_lines_that_resuming_moved_away_may_be_named_with_their_file(
    tmp_path: Path, make_record: MakeRecord
) -> None:
    """`*.jsonl` names both."""
    (tmp_path / "records.jsonl").write_text(trajectory_line(make_record))
    (tmp_path / "records.rejected.jsonl").write_text('{"torn')
    found = gather(sorted(tmp_path.glob("*.jsonl"), reverse=True))
    assert (len(found.trajectories), found.aside.count, found.aside.in_file) == (1, 1, 0)
    with pytest.raises(RunError, match=r"no record in it \(line 1: no JSON"):
        gather([tmp_path / "records.rejected.jsonl"])


def test_a_call_measured_in_two_runs_counts_in_both(tmp_path: Path, kernel_line: Line) -> None:
    """Merged files hold several runs; within one the last record of a call counts."""
    path = tmp_path / "merged.jsonl"
    lines = [kernel_line(run_id="a"), kernel_line(run_id="b"), kernel_line(run_id="a", ms=Samples.of([0.5]))]
    path.write_text("\n".join(lines))
    found = gather([path]).kernels
    assert [(record.run_id, record.ms.p50 if record.ms else None) for record in found] == [
        ("a", 0.5),
        ("b", 0.125),
    ]


@pytest.mark.parametrize("kinds", ["t", "i", "q", "tiq"])
def test_without_kernels_torch_is_not_loaded(
    tmp_path: Path, make_record: MakeRecord, kinds: str, inspection_line: Line, quality_line: Line
) -> None:
    lines = {"t": trajectory_line(make_record), "i": inspection_line(), "q": quality_line()}
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(lines[kind] for kind in kinds))
    code = f"""
import sys
from pathlib import Path
from ldmperf.profiling.record_files import gather
assert len(gather([Path({str(path)!r})]).records) == {len(kinds)}
assert "torch" not in sys.modules
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr


def test_of_several_paths_the_one_without_a_record_is_named(tmp_path: Path, make_record: MakeRecord) -> None:
    good, bad = tmp_path / "good.jsonl", tmp_path / "bad.jsonl"
    good.write_text(trajectory_line(make_record))
    bad.write_text("torn\n")
    with pytest.raises(RunError, match=r"bad\.jsonl: no record in it"):
        gather([good, bad])
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunError, match="folder without records"):
        gather([good, tmp_path / "empty"])


def test_the_order_is_that_of_the_paths(tmp_path: Path, make_record: MakeRecord) -> None:
    paths = []
    for steps in random.Random(0).sample(range(1, 9), 8):
        path = tmp_path / f"{steps}.jsonl"
        path.write_text(trajectory_line(make_record, steps))
        paths.append(path)
    assert [record.case.steps for record in gather(paths).trajectories] == [int(path.stem) for path in paths]


@pytest.mark.parametrize("version", [1, 2, 3])
def test_kernels_of_every_schema_version_read(tmp_path: Path, kernel_line: Line, version: int) -> None:
    """The first had no ids; a later one than this ldmperf knows is set aside."""
    line = json.loads(kernel_line(schema_version=3)) | {"schema_version": version}
    if version == 1:
        del line["run_id"], line["case_id"]
    if version < 3:
        del line["in_turns"]
    later = line | {"schema_version": 4}
    path = tmp_path / "kernels.jsonl"
    path.write_text(json.dumps(line) + "\n" + json.dumps(later))
    found = gather([path])
    (record,) = found.kernels
    assert (record.schema_version, record.run_id) == (3, None if version == 1 else "kernels")
    assert record.case_id == json.loads(kernel_line())["case_id"]
    assert "of schema version 4" in found.aside.first[0].reason

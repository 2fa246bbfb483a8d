"""`ldmperf report` of whatever holds records: run folders, kernels, bare files, old versions, damaged lines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Generator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ldmperf.profiling import Case, Record, cli, report
from ldmperf.profiling.commands import profile_command
from ldmperf.profiling.kernel_bench.kernel_records import KernelRecord, record_key
from ldmperf.profiling.measure.environment import Environment
from ldmperf.profiling.measure.folders import RunError
from ldmperf.profiling.measure.recorded import Correctness, Samples
from ldmperf.profiling.measure.store import read_lines
from ldmperf.profiling.measure.timing import RepetitionRule
from ldmperf.profiling.step.call import OperatorCall, TensorSpec
from ldmperf.profiling.sweep.events import Event, Recorded
from ldmperf.profiling.sweep.group_task import GroupTask
from ldmperf.profiling.sweep.local import Workers
from ldmperf.profiling.trajectory.records import RECORDS_NAME, RecordStore
from ldmperf.profiling.trajectory.runs import Run, create_run, open_run

MakeRecord = Callable[..., Record]
ROOT = Path(__file__).parents[1]
SETS = sorted((ROOT / "bench" / "results").glob("*/*.jsonl*"))


Run_ = Callable[..., Any]


def kernel_record(rows: int = 6, **changes: Any) -> KernelRecord:
    x = TensorSpec(name="x", shape=(rows, 16), stride=(16, 1), dtype="float32")
    out = TensorSpec(name="result 0", shape=(rows, 8), stride=(8, 1), dtype="float32")
    case = OperatorCall(operator="geglu", dtype="float32", tensors=(x,), results=(out,))
    fields: dict[str, Any] = {
        "case_key": record_key(case, "cpu", "eager", "eager"),
        "size": "39M",
        "batch": 2,
        "case": case,
        "peer": "eager",
        "mode": "eager",
        "device": "cpu",
        "status": "ok",
        "correctness": Correctness(error_before=0.0, error_after=0.0, tolerance=1e-4, reference="float64"),
        "ms": Samples.of([0.125]),
        "clock": "host",
        "calls_per_sample": 1,
        "input_sets": 1,
        "l2": "warm",
        "environment": Environment(os="Linux", python="3.12", cpu="AMD EPYC", torch="2.13.0"),
        "started_at": datetime(2026, 11, 27, 1, tzinfo=UTC),
    }
    return KernelRecord(**(fields | changes))


def as_version_1(record: Record, unet: str | None = None) -> dict[str, Any]:
    """The line that the first release wrote: no ids, a checkpoint by its path."""
    line: dict[str, Any] = json.loads(record.model_dump_json())
    case = line["case"] | ({} if unet is None else {"unet": unet})
    del line["run_id"], line["case_id"], case["weights_sha256"]
    environment = {k: v for k, v in line["environment"].items() if k not in ("machine_id", "commit_time")}
    key = " ".join([f"unet={case['unet']}", *record.case.key.split(" ")[1:]])
    return line | {"schema_version": 1, "case": case, "environment": environment, "case_key": key}


def lines_of(*records: Any) -> bytes:
    texts = (record if isinstance(record, str) else record.model_dump_json() for record in records)
    return "".join(text + "\n" for text in texts).encode()


@pytest.mark.parametrize("path", SETS, ids=lambda path: path.name)
def test_every_committed_set_is_reported_and_nothing_is_written_beside_it(run: Run_, path: Path) -> None:
    before = sorted(path.parent.iterdir())
    outcome = run("report", path)
    assert (outcome.code, outcome.err) == (0, "")
    assert ("866M" if path.stem.endswith("-kernels") else "39M") in outcome.out
    assert sorted(path.parent.iterdir()) == before


def test_a_file_gives_a_page_where_out_says(run: Run_, make_record: MakeRecord, tmp_path: Path) -> None:
    path = tmp_path / "set" / "mine.jsonl"
    path.parent.mkdir()
    path.write_bytes(lines_of(make_record()))
    outcome = run("report", path, "--out", tmp_path / "page")
    assert outcome.code == 0, outcome.err
    assert (tmp_path / "page" / "report.html").exists()
    assert str(tmp_path / "page" / "report.html") in outcome.out
    assert list(path.parent.iterdir()) == [path]


def test_without_scipy_there_is_a_report_without_verdicts(
    run: Run_, make_record: MakeRecord, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "mine.jsonl"
    # Enough samples for order statistics, which are scipy's.
    wall = Samples.of([90.0, 91.0, 92.0, 93.0, 94.0, 95.0, 96.0])
    path.write_bytes(lines_of(*(make_record(Case(unet=unet), wall_ms=wall) for unet in ("39M", "866M"))))
    assert "cost-proportional: " in run("report", path).out
    monkeypatch.setitem(sys.modules, "scipy", None)
    outcome = run("report", path)
    assert outcome.code == 0
    assert "39M" in outcome.out
    assert "cost-proportional: " not in outcome.out
    assert "no verdicts on the claims: scipy is not installed; pip install scipy" in outcome.err


def test_each_line_set_aside_has_its_number_and_its_reason(
    run: Run_, make_record: MakeRecord, tmp_path: Path
) -> None:
    whole = make_record().model_dump_json()
    fields = json.loads(whole)
    lines = {
        "no JSON": whole[:200],
        "no JSON object": "[1, 2]",
        "of schema version 4, which this ldmperf does not know; read it with": json.dumps(
            fields | {"schema_version": 4, "wall_ms": "many"}
        ),
        "case_key is not the key of the case": json.dumps(fields | {"case_key": "forged"}),
        "status: Input should be 'ok', 'incorrect'": json.dumps(fields | {"status": "fine"}),
        "environment: Field required": json.dumps({k: v for k, v in fields.items() if k != "environment"}),
        "the statistics are not those of the samples": json.dumps(
            fields | {"wall_ms": fields["wall_ms"] | {"min": 0.5}}
        ),
    }
    path = tmp_path / "mine.jsonl"
    # The first is whole, and the second blank.
    path.write_text("\n".join([whole, "", *lines.values(), ""]))
    outcome = run("report", path)
    assert outcome.code == 1
    said = outcome.err.splitlines()
    assert said[-1] == "7 lines set aside; no figure comes from them"
    for number, (reason, line) in enumerate(zip(lines, said[:-1], strict=True), 3):
        assert line.startswith(f"{path}:{number}: ")
        assert reason in line
    # Of a run's folder just so, and its page counts them.
    (tmp_path / RECORDS_NAME).write_bytes(path.read_bytes())
    of_folder = run("report", tmp_path)
    assert of_folder.code == 1
    assert f"{tmp_path / RECORDS_NAME}:3: no JSON" in of_folder.err
    assert "7 lines of the record files are no whole record" in (tmp_path / "report.html").read_text()


def test_what_resuming_moved_away_is_told_and_is_no_failure_of_the_file(
    run: Run_, make_record: MakeRecord, tmp_path: Path
) -> None:
    path = tmp_path / RECORDS_NAME
    path.write_bytes(lines_of(make_record()) + b'{"torn')
    RecordStore(path)
    outcome = run("report", path)
    assert outcome.code == 0
    assert f"{tmp_path / 'records.rejected.jsonl'}:1: no JSON" in outcome.err


def test_the_first_release_is_read_with_nothing_made_up(make_record: MakeRecord, tmp_path: Path) -> None:
    record = make_record()
    found = Record.model_validate(as_version_1(record), strict=False)
    assert found == record
    assert (found.schema_version, found.run_id, found.environment.machine_id) == (3, None, None)
    # The same case has the same id, so that old and new are one line of a chart.
    assert found.case_id == record.case_id
    of_path = json.dumps(as_version_1(record, unet="/home/me/my-model"))
    checkpoint = Record.model_validate_json(of_path)
    assert (checkpoint.case.unet, checkpoint.case.label) == ("/home/me/my-model", "my-model")
    assert checkpoint.case.weights_sha256 is None


def test_a_run_folder_of_the_first_release(run: Run_, make_record: MakeRecord, tmp_path: Path) -> None:
    cases = [Case(unet="39M", steps=n) for n in (1, 2)]
    environment = make_record().environment
    folder = create_run(tmp_path, cases, RepetitionRule(1, 0.0), environment)
    plan = json.loads((folder / "run.json").read_text())
    del plan["run_id"]
    for case in plan["cases"]:
        del case["weights_sha256"]
    (folder / "run.json").write_text(json.dumps(plan | {"schema_version": 1}))
    (folder / RECORDS_NAME).write_text(json.dumps(as_version_1(make_record(cases[0]))) + "\n")
    outcome = run("report", folder)
    assert outcome.code == 0, outcome.err
    assert "1 planned case has no record yet" in outcome.err
    assert open_run(folder).cases == tuple(cases)


def test_old_and_new_records_of_a_checkpoint_stand_side_by_side(
    run: Run_, make_record: MakeRecord, tmp_path: Path
) -> None:
    new = make_record(Case(unet="my-model", weights_sha256="ab" * 32))
    old = json.dumps(as_version_1(make_record(Case(unet="39M")), unet="/home/me/my-model"))
    path = tmp_path / "both.jsonl"
    path.write_bytes(lines_of(new, old))
    outcome = run("report", path)
    assert outcome.code == 0, outcome.err
    assert "my-model weights=abababababababab" in outcome.out
    assert "/home/me/my-model" in outcome.out


def test_kernels_are_reported_from_their_folder_and_from_a_file(run: Run_, tmp_path: Path) -> None:
    folder = tmp_path / "20261127T010000Z-7d35813-kernels"
    folder.mkdir()
    first, again = kernel_record(), kernel_record(ms=Samples.of([0.25]))
    old: dict[str, Any] = json.loads(kernel_record(7).model_dump_json()) | {"schema_version": 1}
    (folder / "kernels.jsonl").write_bytes(lines_of(first, json.dumps(old), again))
    outcome = run("report", folder)
    assert outcome.code == 0, outcome.err
    # Of a call that was measured twice the last record counts.
    assert "0.2500" in outcome.out
    assert outcome.out.count("geglu") == 2
    assert outcome.out.splitlines()[-1] == str(folder / "kernels.md")
    assert "0.2500" in (folder / "kernels.md").read_text()

    path = tmp_path / "2026-11-27-7d35813-kernels.jsonl"
    path.write_bytes(lines_of(first, '{"schema_version":9}'))
    outcome = run("report", path)
    assert outcome.code == 1
    assert f"{path}:2: of schema version 9" in outcome.err
    assert "geglu" in outcome.out
    assert not (tmp_path / "kernels.md").exists()
    assert run("report", path, "--out", tmp_path / "page").code == 1
    assert (tmp_path / "page" / "kernels.md").exists()


@pytest.mark.parametrize("name", ["", "nothing", "folder", "x" * 5000, "run"])
def test_what_holds_no_records_is_one_line_that_says_what_to_give(run: Run_, tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    outcome = run("report", tmp_path / name)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.count("\n") == 1
    assert ("measure with: ldmperf profile --resume" if name == "run" else "give a folder with") in outcome.err


def test_records_without_a_plan_are_reported_all_the_same(
    run: Run_, make_record: MakeRecord, tmp_path: Path
) -> None:
    RecordStore(tmp_path / RECORDS_NAME).append(make_record())
    assert (run("report", tmp_path).code, run("report", tmp_path).err) == (0, "")
    (tmp_path / "run.json").write_text('{"schema_version": 7}')
    outcome = run("report", tmp_path)
    assert outcome.code == 0
    assert "of schema version 7" in outcome.err
    with pytest.raises(RunError, match="of schema version 7"):
        open_run(tmp_path)


def test_a_page_that_cannot_be_written_is_one_line(run: Run_, make_record: MakeRecord, tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_bytes(lines_of(make_record()))
    # Below a file not even root can make a folder.
    outcome = run("report", path, "--out", path / "page")
    assert outcome.code == 1
    assert f"cannot write the report to {path / 'page'} (Not a directory)" in outcome.err
    (tmp_path / "kernels.jsonl").write_bytes(lines_of(kernel_record()))
    outcome = run("report", tmp_path, "--out", path / "page")
    assert outcome.code == 1
    assert "cannot write the report to" in outcome.err


def started(*arguments: str | Path, **options: Any) -> subprocess.Popen[bytes]:
    code = "from ldmperf.profiling.cli import main; main()"
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], stderr=subprocess.PIPE, **options)


@pytest.mark.parametrize("kind", ["run", "kernels"])
def test_a_reader_that_has_enough_is_no_failure(make_record: MakeRecord, tmp_path: Path, kind: str) -> None:
    """`ldmperf report | head -1`."""
    if kind == "run":
        (tmp_path / RECORDS_NAME).write_bytes(lines_of(make_record()))
    else:
        (tmp_path / "kernels.jsonl").write_bytes(lines_of(kernel_record()))
    read, write = os.pipe()
    os.close(read)
    process = started("report", tmp_path, stdout=write)
    os.close(write)
    _, said = process.communicate(timeout=120)
    # What a shell tells of a program that SIGPIPE has ended.
    assert (process.returncode, said) == (141, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_is_told(make_record: MakeRecord, tmp_path: Path) -> None:
    (tmp_path / RECORDS_NAME).write_bytes(lines_of(make_record()))
    with Path("/dev/full").open("wb") as full:
        process = started("report", tmp_path, stdout=full)
        _, said = process.communicate(timeout=120)
    assert process.returncode == 1
    assert said.startswith(b"ldmperf: cannot write the output (No space left on device); make room")
    assert said.count(b"\n") == 1


def test_a_label_that_the_terminal_cannot_show_is_escaped(make_record: MakeRecord, tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_bytes(lines_of(make_record(Case(unet="modèle-é", weights_sha256="0" * 64))))
    process = started("report", path, stdout=subprocess.PIPE, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    told, said = process.communicate(timeout=120)
    assert (process.returncode, said) == (0, b"")
    assert rb"mod\xe8le-\xe9" in told


WHOLE = kernel_record().model_dump_json().encode()


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), kernels=st.booleans())
def test_a_line_with_other_bytes_is_read_as_what_it_says_or_told_with_number_and_reason(
    make_record: MakeRecord, capsys: pytest.CaptureFixture[str], tmp_path: Path, data: st.DataObject, kernels: bool
) -> None:
    """Printed, too: no figure of a record that is read makes the table fail."""
    model = KernelRecord if kernels else Record
    whole = WHOLE if kernels else make_record().model_dump_json().encode()
    mutated = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(mutated) - 1))
        change = data.draw(st.sampled_from(["replace", "insert", "delete"]))
        new = data.draw(st.sampled_from(b'0123456789eE-+.,:"[]{}\\nutflas \xff\x00\n'))
        mutated[place : place + (change != "insert")] = b"" if change == "delete" else bytes([new])
    path = tmp_path / "mine.jsonl"
    path.write_bytes(whole + b"\n" + bytes(mutated) + b"\n" + whole + b"\n")
    with pytest.raises(SystemExit) as exited:
        cli.main(["report", str(path)])
    told = capsys.readouterr().err.splitlines()
    parts = [(number, part) for number, part in enumerate(mutated.split(b"\n"), 2) if part.strip()]
    read = [part for _, part in parts if _is_read(part, model)]
    assert len(told) == (len(parts) - len(read) + 1 if len(read) < len(parts) else 0)
    assert exited.value.code == (1 if told else 0)
    for line, (number, _) in zip(told, [p for p in parts if p[1] not in read], strict=False):
        assert line.startswith(f"{path}:{number}: ")
        assert len(line) > len(f"{path}:{number}: ")
    for part in read:
        assert _agree(json.loads(part), json.loads(model.model_validate_json(part).model_dump_json()))


# Derived from the others, or times, which have several spellings.
NOT_COMPARED = {
    *Record.model_computed_fields,
    *KernelRecord.model_computed_fields,
    *("started_at", "commit_time", "schema_version"),
}


def _agree(said: Any, read: Any) -> bool:
    """Whether what was read is what the bytes say; names that no field has are left out."""
    if isinstance(said, dict) and isinstance(read, dict):
        return all(_agree(said[name], read[name]) for name in said.keys() & read.keys() - NOT_COMPARED)
    if isinstance(said, list) and isinstance(read, list):
        return len(said) == len(read) and all(map(_agree, said, read))
    return bool(said == read)


def _is_read(line: bytes, model: type[Record] | type[KernelRecord]) -> bool:
    try:
        model.model_validate_json(line)
    except ValueError:
        return False
    return True


# Below the test's own folder: an absolute name, or one with "..", would leave files of a run elsewhere.
PATHS = st.one_of(
    st.text(st.characters(exclude_characters="\0"), min_size=1, max_size=12),
    st.sampled_from(["runs[/x]", "[bold]", "a\nb", "\x1b[31m", "\udcff", "é/ü", "\u202e", ":smile:", "a b", "'"]),
).filter(lambda name: not Path(name).is_absolute() and ".." not in Path(name).parts)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=PATHS)
def test_a_profile_into_a_path_of_any_name(
    tmp_path_factory: pytest.TempPathFactory,
    make_record: MakeRecord,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    """The path is printed on one line, without markup and with what is unseen made visible."""
    from ldmperf.profiling.terminal.visible import visible

    out = tmp_path_factory.mktemp("any") / name
    try:
        out.mkdir(parents=True, exist_ok=True)
    except (OSError, UnicodeEncodeError):
        # No name on this file system.
        return

    def measured(task: GroupTask) -> Generator[Event, None, None]:
        for case in task.cases:
            yield Recorded(make_record(case.as_recorded(), run_id=task.run_id))

    with monkeypatch.context() as patch:
        # An empty file is enough: names are the subject, and safetensors opens none that is not UTF-8.
        patch.setattr(profile_command, "check_loadable", lambda cases: None)
        patch.setattr(report, "write_report", lambda page, folder: [folder / "report.html"])
        unet = out / "mine.safetensors"
        unet.write_bytes(b"")
        options = ["--unet", str(unet), "--steps", "1", "--device", "cpu", "--backend", "torch"]
        with pytest.raises(SystemExit) as exited:
            cli.main(
                ["profile", *options, "--out", str(out / "runs")],
                workers=Workers(measured, lambda device: make_record().environment),
            )
    captured = capsys.readouterr()
    assert exited.value.code == 0, captured.err
    (folder,) = (out / "runs").iterdir()
    assert captured.err.startswith(f"{visible(str(folder))}: 1 case to measure, 0 recorded\n")
    assert visible(str(folder / "report.html")) in captured.out.splitlines()
    run = open_run(folder)
    assert isinstance(run, Run)
    assert run.cases[0].path == unet
    line = json.loads((folder / RECORDS_NAME).read_text())
    assert line["run_id"] == run.run_id
    assert line["case"]["unet"] == "mine.safetensors"


def test_of_many_lines_set_aside_the_first_are_named_and_the_rest_is_counted(
    run: Run_, make_record: MakeRecord, tmp_path: Path
) -> None:
    path = tmp_path / "mine.jsonl"
    # Long, and unseen characters in it: what a line holds may not flood the terminal.
    forged = json.dumps(json.loads(make_record().model_dump_json()) | {"schema_version": "\x1b" * 5000})
    path.write_bytes(lines_of(make_record(), *[forged] * 5, *["torn"] * 95))
    outcome = run("report", path)
    assert outcome.code == 1
    said = outcome.err.splitlines()
    assert [line.partition(": ")[0] for line in said[:-1]] == [f"{path}:{n}" for n in range(2, 22)]
    assert max(map(len, said)) < len(str(path)) + 310
    assert said[-1] == "100 lines set aside, of which the first 20 are named; no figure comes from them"


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"\x80\x00{\n" * 40_000, "line 1: no JSON object"),
        (b"\n\n{\x1b\n", "line 3: no JSON"),
        (b'{"schema_version": 9}\n', "line 1: of schema version 9"),
        (b"\n", "it is empty"),
    ],
)
def test_a_file_without_a_record_is_a_wrong_call(run: Run_, tmp_path: Path, content: bytes, why: str) -> None:
    path = tmp_path / "xl.safetensors"
    path.write_bytes(content)
    outcome = run("report", path)
    assert (outcome.code, outcome.out, outcome.err.count("\n")) == (2, "", 1)
    assert f"no record in it ({why}" in outcome.err
    assert "give a folder with records.jsonl" in outcome.err


def test_a_folder_without_records_is_called_one(run: Run_, tmp_path: Path) -> None:
    outcome = run("report", tmp_path)
    assert (outcome.code, outcome.out) == (2, "")
    assert f"{tmp_path} is a folder without records; give" in outcome.err


def test_memory_is_that_of_the_longest_line_of_a_foreign_file(tmp_path: Path) -> None:
    path = tmp_path / "many-lines"
    path.write_bytes(b"a\n" * 500_000)
    tracemalloc.start()
    try:
        records, aside = read_lines(path, Record)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (records, aside.count, len(aside.first)) == ([], 500_000, 20)
    assert peak < path.stat().st_size


@pytest.mark.parametrize("inside", ["", RECORDS_NAME, "kernels.jsonl"])
def test_a_pipe_is_refused_and_not_waited_for(run: Run_, tmp_path: Path, inside: str) -> None:
    os.mkfifo(tmp_path / (inside or "pipe"))
    outcome = run("report", tmp_path if inside else tmp_path / "pipe")
    assert (outcome.code, outcome.out, outcome.err.count("\n")) == (2, "", 1)
    assert "is a pipe or a device; write its records to a file" in outcome.err

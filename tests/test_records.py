"""Records: what may be written, and that no intact record is ever lost."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from ldmperf.profiling import Case, Record, load_records
from ldmperf.profiling.measure.recorded import Correctness, Samples, new_run_id
from ldmperf.profiling.measure.store import rejected_path
from ldmperf.profiling.trajectory.records import RECORDS_NAME, RecordStore, Trace, record_schema

MakeRecord = Callable[..., Record]


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7, 20])
def test_statistics_are_numpys(n: int) -> None:
    values = np.random.default_rng(n).gamma(2.0, 10.0, n).tolist()
    samples = Samples.of(values)
    assert samples.samples == tuple(values)
    assert samples.n == n
    assert samples.min == min(values)
    expected = np.quantile(values, [0.2, 0.5, 0.8])
    np.testing.assert_allclose([samples.p20, samples.p50, samples.p80], expected, rtol=1e-12)


def test_samples_refuse_what_is_no_sample() -> None:
    with pytest.raises(ValueError, match="no samples"):
        Samples.of([])
    for wrong in (math.nan, math.inf, -1.0):
        with pytest.raises(ValueError, match="samples"):
            Samples.of([1.0, wrong])


def test_derived_figures_have_the_stated_meaning(make_record: MakeRecord) -> None:
    case = Case(unet="39M", batch=4, steps=10)
    record = make_record(case, wall_ms=Samples.of([100.0, 200.0, 900.0]), evaluations=20)
    assert record.ms_per_step == 200.0 / 20
    assert record.ms_per_image == 200.0 / 4
    assert record.images_per_s == pytest.approx(4 / 0.2)
    failed = make_record(case, status="oom")
    assert (failed.ms_per_step, failed.ms_per_image, failed.images_per_s) == (None, None, None)


@pytest.mark.parametrize("status", ["incorrect", "oom", "unsupported", "error"])
def test_only_a_correct_result_has_a_time(make_record: MakeRecord, status: str) -> None:
    assert make_record(status=status).wall_ms is None
    with pytest.raises(ValidationError, match="message and no time"):
        make_record(status=status, wall_ms=Samples.of([1.0]))
    with pytest.raises(ValidationError, match="message and no time"):
        make_record(status=status, gpu_ms=Samples.of([1.0]))
    with pytest.raises(ValidationError, match="message and no time"):
        make_record(status=status, message=None)


@pytest.mark.parametrize(
    "changes",
    [
        {"wall_ms": None},
        {"message": "why is there one"},
        {"correctness": None},
        {"correctness": Correctness(error_before=2e-4, error_after=0.0, tolerance=1e-4, reference="x")},
        {"correctness": Correctness(error_before=0.0, error_after=2e-4, tolerance=1e-4, reference="x")},
        {"correctness": Correctness(error_before=0.0, tolerance=1e-4, reference="x")},
        {"case_key": "another"},
        {"evaluations": None},
        {"schema_version": 4},
        {"schema_version": True},
        {"gflop_per_forward": math.nan},
    ],
)
def test_an_ok_record_is_whole(make_record: MakeRecord, changes: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        make_record(**changes)


def test_messages_are_one_line(make_record: MakeRecord) -> None:
    for message in ("two\nlines", "two\r\nlines", ""):
        with pytest.raises(ValidationError):
            make_record(status="error", message=message)


def test_a_record_survives_the_round_trip_and_json_has_no_nan(make_record: MakeRecord) -> None:
    record = make_record()
    text = record.model_dump_json()
    assert Record.model_validate_json(text) == record

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    line = json.loads(text, parse_constant=refuse)
    assert line["schema_version"] == 3
    assert line["started_at"] == "2026-11-23T12:00:00Z"
    assert line["ms_per_step"] == record.ms_per_step


def test_the_schema_names_every_field_of_a_line(make_record: MakeRecord) -> None:
    schema = record_schema()
    assert set(json.loads(make_record().model_dump_json())) == set(schema["properties"])
    assert schema["properties"]["schema_version"]["const"] == 3
    assert {"run_id", "case_id"} < set(schema["properties"])
    assert "weights_sha256" in schema["$defs"]["Case"]["properties"]
    assert {"machine_id", "commit_time"} < set(schema["$defs"]["Environment"]["properties"])


def test_the_schema_says_which_it_is_and_others_validate_lines_by_it(make_record: MakeRecord) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    schema = record_schema()
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert schema["$id"] == "urn:ldmperf:schema:record:3"
    jsonschema.Draft202012Validator.check_schema(schema)
    checkpoint = Case(unet="x", weights_sha256="0" * 64)
    for record in (make_record(), make_record(checkpoint, run_id=new_run_id()), make_record(status="oom")):
        jsonschema.validate(json.loads(record.model_dump_json()), schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(json.loads(make_record().model_dump_json()) | {"schema_version": 1}, schema)


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
CASES = st.builds(
    Case,
    unet=TEXTS,
    weights_sha256=st.none() | st.text("0123456789abcdef", min_size=64, max_size=64),
    task=st.sampled_from(["t2i", "sr"]),
    sampler=TEXTS,
    steps=st.integers(1, 1000),
    batch=st.integers(1, 10**6),
    guidance_scale=st.floats(1, allow_infinity=False),
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
    device=st.sampled_from(["cpu", "cuda", "cuda:7"]),
    latent_height=st.integers(1, 2**32 - 1),
    latent_width=st.integers(1, 2**32 - 1),
    context_tokens=st.integers(1, 2**32 - 1),
    seed=st.integers(0, 2**64 - 1),
    backend=TEXTS,
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    case=CASES,
    ms=st.lists(st.floats(0, allow_infinity=False), min_size=1, max_size=5),
    evaluations=st.integers(1, 2**53),
    memory=st.none() | st.integers(0, 2**53),
    message=st.none() | st.from_regex(r"[^\r\n\ud800-\udfff]+", fullmatch=True),
    run_id=st.none() | TEXTS,
)
def test_every_record_comes_back_as_it_was_written(
    make_record: MakeRecord,
    tmp_path_factory: pytest.TempPathFactory,
    case: Case,
    ms: list[float],
    evaluations: int,
    memory: int | None,
    message: str | None,
    run_id: str | None,
) -> None:
    changes: dict[str, object] = {"evaluations": evaluations, "peak_memory_bytes": memory, "run_id": run_id}
    changes |= {"wall_ms": Samples.of(ms)} if message is None else {"status": "error", "message": message}
    record = make_record(case, **changes)
    path = tmp_path_factory.mktemp("run") / RECORDS_NAME
    RecordStore(path).append(record)
    RecordStore(path).append(record)
    assert load_records(path) == ([record, record], 0)
    (line, _) = path.read_text(encoding="utf-8").split("\n")[:2]
    assert json.loads(line)["case_id"] == case.case_id
    # A name alone: whatever it is, the weights tell it apart.
    assert case.as_recorded().key == case.key


def test_committed_records_of_every_day_are_read() -> None:
    """Older ones have no order of rounds, no settings and no evaluations of a trace."""
    files = sorted((Path(__file__).parents[1] / "bench" / "results").glob("*/*.jsonl"))
    files = [path for path in files if not path.stem.endswith("-kernels")]
    assert files
    for path in files:
        lines = [line for line in path.read_text().splitlines() if '"case_key"' in line]
        records, rejected = load_records(path)
        assert (len(records), rejected) == (len(lines), 0), path


def test_a_record_and_the_same_with_its_trace_are_one(make_record: MakeRecord, tmp_path: Path) -> None:
    path = tmp_path / RECORDS_NAME
    first, other = make_record(Case(unet="39M", steps=20)), make_record(Case(unet="39M", steps=2))
    traced = first.model_copy(update={"trace": Trace(launches=8, busy_ms=1.0, evaluations=8, step_busy_ms=0.1)})
    again = first.model_copy(update={"wall_ms": Samples.of([1.0])})
    store = RecordStore(path)
    store.append(first, other)
    store.append(traced)
    # Measured again, it is a record of its own.
    store.append(again)
    assert load_records(path) == ([other, traced, again], 0)
    assert store.load() == [other, traced, again]


def test_the_host_gap_is_of_the_whole_trajectory(make_record: MakeRecord) -> None:
    case = Case(unet="39M", steps=20)

    def gap(**trace: float) -> float | None:
        return make_record(case, wall_ms=Samples.of([10.0]), trace=Trace(launches=8, **trace)).host_gap

    # As long as what was timed, and of older records, which do not say how long.
    assert gap(busy_ms=8.0, evaluations=20) == pytest.approx(0.2)
    assert gap(busy_ms=8.0) == pytest.approx(0.2)
    # Eight of twenty evaluations: twelve steps of 0.4 ms more.
    assert gap(busy_ms=4.0, evaluations=8, step_busy_ms=0.4) == pytest.approx(1 - 0.88)
    assert gap(busy_ms=4.0, evaluations=8) is None


def test_a_field_of_a_newer_writer_is_ignored(make_record: MakeRecord) -> None:
    line = json.loads(make_record().model_dump_json()) | {"joules": 3.0}
    assert Record.model_validate_json(json.dumps(line)) == make_record()


def test_appending_after_a_torn_line_does_not_glue(make_record: MakeRecord, tmp_path: Path) -> None:
    path = tmp_path / RECORDS_NAME
    first, second = (make_record(Case(unet="39M", steps=n)) for n in (1, 2))
    RecordStore(path).append(first)
    with path.open("ab") as file:
        file.write(second.model_dump_json()[:-30].encode())
    assert load_records(path) == ([first], 1)

    store = RecordStore(path)
    store.append(second)
    assert load_records(path) == ([first, second], 1)
    assert load_records(tmp_path) == ([first, second], 1)
    assert rejected_path(tmp_path / RECORDS_NAME).read_bytes() == second.model_dump_json()[:-30].encode() + b"\n"
    # Opened again, nothing more is moved or counted.
    assert RecordStore(path).load() == [first, second]
    assert load_records(path) == ([first, second], 1)


def test_a_whole_last_record_without_its_newline_is_kept(make_record: MakeRecord, tmp_path: Path) -> None:
    path = tmp_path / RECORDS_NAME
    path.write_text(make_record().model_dump_json())
    store = RecordStore(path)
    store.append(make_record())
    assert load_records(path) == ([make_record()] * 2, 0)


LINES = st.one_of(
    st.just("record"),
    st.binary(max_size=40).map(lambda b: b.replace(b"\n", b"")),
    st.sampled_from([b"{}", b"null", b"[1", b"\x00\xff", b'{"schema_version": 1}', b"[" * 5000, b"NaN", b"1e999"]),
    st.integers(1, 400),
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lines=st.lists(LINES, max_size=8), ends_torn=st.booleans())
def test_every_intact_record_survives_any_neighbours(
    make_record: MakeRecord, tmp_path_factory: pytest.TempPathFactory, lines: list[object], ends_torn: bool
) -> None:
    intact = make_record().model_dump_json().encode()
    content, records, rejected = [], 0, 0
    for line in lines:
        # An integer is a record torn after that many bytes; every such prefix is no record.
        raw = intact if line == "record" else intact[:line] if isinstance(line, int) else line
        assert isinstance(raw, bytes)
        content.append(raw)
        records += line == "record"
        rejected += line != "record" and bool(raw.strip())
    path = tmp_path_factory.mktemp("run") / RECORDS_NAME
    path.write_bytes(b"\n".join(content) + (b"" if ends_torn else b"\n"))

    assert load_records(path) == ([make_record()] * records, rejected)
    RecordStore(path).append(make_record())
    assert load_records(path) == ([make_record()] * (records + 1), rejected)


def test_a_missing_file_is_an_oserror(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_records(tmp_path / "nothing.jsonl")

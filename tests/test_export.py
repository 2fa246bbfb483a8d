"""Exporters: each text is read by its format's own parser or schema, and gives back the figures of the records."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from ldmperf.profiling import Case, Record
from ldmperf.profiling.compare.metrics import METRICS, Metric
from ldmperf.profiling.export.csv_table import guarded
from ldmperf.profiling.export.formats import FORMATS, exported
from ldmperf.profiling.export.openmetrics import family
from ldmperf.profiling.kernel_bench.kernel_records import KernelRecord, record_key
from ldmperf.profiling.measure.environment import Environment, Gpu
from ldmperf.profiling.measure.folders import RunError
from ldmperf.profiling.measure.rates import CopyBandwidth
from ldmperf.profiling.measure.recorded import Correctness, Samples, Status
from ldmperf.profiling.options import CaseError
from ldmperf.profiling.record_files import AnyRecord, gather
from ldmperf.profiling.static.inspection_records import InspectionRecord
from ldmperf.profiling.step.call import OperatorCall, TensorSpec
from ldmperf.profiling.terminal.visible import visible
from ldmperf.profiling.trajectory.records import Energy

jsonschema = pytest.importorskip("jsonschema")
prometheus = pytest.importorskip("prometheus_client.openmetrics.parser")
stats = pytest.importorskip("pytest_benchmark.stats")

MakeRecord = Callable[..., Record]
Values = dict[tuple[str, str], float]
ROOT = Path(__file__).parents[1]
# Those of sweeps: kernels have files of their own.
COMMITTED = sorted(p for p in (ROOT / "bench" / "results").glob("*/*.jsonl") if not p.stem.endswith("-kernels"))
WHEN = datetime(2026, 11, 27, 1, tzinfo=UTC)
HERE = Environment(
    os="Linux", python="3.12", cpu="AMD EPYC", torch="2.13.0", machine_id="ab", git_commit="7d" * 20
)
HOSTILE = "=cmd|' /C calc'!A0\",\n\\n\\\"}# EOF\u202e\x1b[2J;<script>"

# ----- the formats, as published -----

NUMBER, TEXT = {"type": "number"}, {"type": "string"}
# https://github.com/benchmark-action/github-action-benchmark, README and src/extract.ts: BenchmarkResult.
ACTION_SCHEMA = {
    "type": "array",
    "minItems": 1,
    "items": {
        "type": "object",
        "properties": {"name": TEXT, "unit": TEXT, "value": NUMBER, "range": TEXT, "extra": TEXT},
        "required": ["name", "unit", "value"],
        "additionalProperties": False,
    },
}
# https://bencher.dev/bmf.json, and the limits of names beside it.
BENCHER_SCHEMA = {
    "$id": "https://bencher.dev/bmf.json",
    "$schema": "http://json-schema.org/draft-07/schema",
    "type": "object",
    "propertyNames": {"maxLength": 1024},
    "patternProperties": {
        ".+": {
            "type": "object",
            "propertyNames": {"maxLength": 64},
            "patternProperties": {
                ".+": {
                    "type": "object",
                    "properties": {"value": NUMBER, "lower_value": NUMBER, "upper_value": NUMBER},
                    "required": ["value"],
                    "additionalProperties": False,
                }
            },
        }
    },
}


def tuple_of(**fields: Any) -> dict[str, Any]:
    return {"type": "object", "properties": fields, "additionalProperties": False}


MAP = {"type": "object", "additionalProperties": TEXT}
UINT32 = {"type": "integer", "minimum": 0, "maximum": 2**32 - 1}
UINT64 = {"type": "integer", "minimum": 0, "maximum": 2**64 - 1}
RUNNER = tuple_of(
    **dict.fromkeys(("name", "type", "cpu_info", "mem_info", "gpu_info", "gpu_mem_info"), TEXT),
    **dict.fromkeys(("cpu_count", "avail_mem_in_gb", "gpu_count", "avail_gpu_mem_in_gb"), UINT32),
    extra_info=MAP,
)
# https://github.com/pytorch/test-infra, clickhouse_db_schema/oss_ci_benchmark_v3/schema.sql.
HUD_SCHEMA = tuple_of(
    timestamp=UINT64,
    schema_version={"const": "v3"},
    **dict.fromkeys(("name", "repo", "head_branch", "head_sha"), TEXT),
    **dict.fromkeys(("workflow_id", "job_id"), UINT64),
    run_attempt=UINT32,
    runners={"type": "array", "items": RUNNER},
    benchmark=tuple_of(name=TEXT, mode=TEXT, dtype=TEXT, extra_info=MAP),
    model=tuple_of(name=TEXT, type=TEXT, backend=TEXT, origins={"type": "array", "items": TEXT}, extra_info=MAP),
    dependencies={
        "type": "object",
        "additionalProperties": tuple_of(repo=TEXT, branch=TEXT, sha=TEXT, version=TEXT, extra_info=MAP),
    },
    metric=tuple_of(
        name=TEXT,
        benchmark_values={"type": "array", "items": NUMBER, "minItems": 1},
        target_value=NUMBER,
        extra_info=MAP,
    ),
)
# Checked once each: `jsonschema.validate` does so at every call.
ACTION, HUD = (jsonschema.Draft202012Validator(schema) for schema in (ACTION_SCHEMA, HUD_SCHEMA))
BENCHER = jsonschema.Draft7Validator(BENCHER_SCHEMA)
# What the CI knows: test-infra's gather_metadata.py.
METADATA = {"name": "job", "repo": "x/y", "head_branch": "main", "head_sha": "0", "workflow_id": 1}
METADATA |= {"run_attempt": 1, "job_id": 2, "timestamp": 0, "schema_version": "v3"}


def strict(text: str) -> Any:
    """JSON without NaN and Infinity, which python reads and others do not."""

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    return json.loads(text, parse_constant=refuse)


def of_action(text: str) -> Values:
    entries = strict(text)
    ACTION.validate(entries)
    found = {tuple(entry["name"].split("/")): entry["value"] for entry in entries}
    assert len(found) == len(entries)
    assert all(
        entry["unit"] == (METRICS[name].unit or "count") for entry, (_, name) in zip(entries, found, strict=True)
    )
    return found


def of_bencher(text: str) -> Values:
    benchmarks = strict(text)
    BENCHER.validate(benchmarks)
    names = {"throughput": ("images_per_s", 1.0)}
    found = {}
    for case_id, measures in benchmarks.items():
        for measure, values in measures.items():
            names["latency"] = ("ms" if case_id in KERNEL_IDS else "wall_ms", 1e6)
            name, factor = names.get(measure, (measure.replace("-", "_"), 1.0))
            found[case_id, name] = values["value"] / factor
            assert values.get("lower_value", 0.0) <= values["value"] <= values.get("upper_value", math.inf)
    return found


def of_hud(text: str) -> Values:
    rows = [METADATA | strict(line) for line in text.splitlines()]
    for row in rows:
        HUD.validate(row)
        assert METADATA.keys() <= row.keys()
    found = {(row["model"]["name"], row["metric"]["name"]): row["metric"]["benchmark_values"][0] for row in rows}
    assert len(found) == len(rows)
    return found


def of_pytest(text: str, folder: Path) -> Values:
    from pytest_benchmark.logger import Logger
    from pytest_benchmark.storage.file import FileStorage

    path = folder / "0001_ldmperf.json"
    path.write_text(text)
    strict(text)
    benches = list(FileStorage(folder, Logger(Logger.QUIET)).load_benchmarks(str(path)))
    assert all(set(bench) >= {*stats.Stats.fields, "data", "group", "params", "extra_info"} for bench in benches)
    found = {tuple(bench["fullname"].split("/")): 1e3 * bench["median"] for bench in benches}
    assert len(found) == len(benches)
    return found


def samples_of(text: str) -> list[Any]:
    families = list(prometheus.text_string_to_metric_families(text))
    return [sample for found in families for sample in found.samples]


def of_openmetrics(text: str) -> Values:
    by_family = {family(metric)[0]: metric for metric in METRICS.values()}
    found: Values = {}
    for sample in samples_of(text):
        if (metric := by_family.get(sample.name)) is None or sample.labels.get("statistic", "p50") != "p50":
            continue
        key = sample.labels["case_id"], metric.name
        assert key not in found
        found[key] = sample.value / 10.0 ** family(metric)[2]
    return found


def of_csv(text: str) -> Values:
    rows = list(csv.DictReader(io.StringIO(text, newline="")))
    assert all(None not in row and None not in row.values() for row in rows)
    found = {}
    for row in rows:
        found |= {(row["case_id"], name): float(row[name]) for name in METRICS if row[name]}
    return found


# ----- records -----

KERNEL_IDS: set[str] = set()


def kernel_record(**changes: Any) -> KernelRecord:
    x = TensorSpec(name="x", shape=(6, 16), stride=(16, 1), dtype="float32")
    out = TensorSpec(name="result 0", shape=(6, 8), stride=(8, 1), dtype="float32")
    case = OperatorCall(operator="geglu", dtype="float32", tensors=(x,), results=(out,))
    device, peer = changes.pop("device", "cpu"), changes.pop("peer", "eager")
    ok = changes.get("status", "ok") == "ok"
    fields: dict[str, Any] = {
        "case_key": record_key(case, device, peer, "eager"),
        "size": "39M",
        "batch": 2,
        "case": case,
        "peer": peer,
        "mode": "eager",
        "device": device,
        "status": "ok",
        "message": None if ok else "RuntimeError: no",
        "correctness": Correctness(error_before=0.0, error_after=0.0, tolerance=1e-4, reference="float64"),
        "ms": Samples.of([0.125, 0.5, 0.25]) if ok else None,
        "clock": "host",
        "calls_per_sample": 1,
        "input_sets": 1,
        "l2": "warm",
        "copy_bandwidth": CopyBandwidth(gb_per_s=10.0, bytes_each=2**20, ms=Samples.of([1.0])),
        "environment": HERE,
        "started_at": WHEN,
    }
    record = KernelRecord(**(fields | changes))
    KERNEL_IDS.add(record.case_id)
    return record


def inspection_record(arch: str = "sm_90", **changes: Any) -> InspectionRecord:
    fields: dict[str, Any] = {
        "case_key": f"geglu_kernel bfloat16 866M batch=2 BLOCK=64 warps=4 arch={arch}",
        "arch": arch,
        "kernel": "geglu_kernel",
        "size": "866M",
        "batch": 2,
        "dtype": "bfloat16",
        "constants": ("BLOCK=64",),
        "num_warps": 4,
        "status": "ok",
        "registers": 32,
        "spills": 0,
        "shared_bytes": 1024,
        "instructions": 77,
        "environment": HERE,
        "started_at": WHEN,
    }
    return InspectionRecord(**(fields | changes))


def figures(record: AnyRecord) -> dict[str, float]:
    """The record's own figures, as its line has them."""
    line = json.loads(record.model_dump_json())
    medians = ("wall_ms", "gpu_ms", "ms", "decoder_ms")
    found = {name: (line.get(name) or {}).get("p50") for name in medians}
    found["first_call_ms"] = line["phases"]["first_call_ms"] if "phases" in line else line.get("first_call_ms")
    found |= {name: line.get(name) for name in METRICS if name not in found}
    return {name: value for name, value in found.items() if value is not None and record.status == "ok"}


def close(found: Values, expected: Values) -> bool:
    """Units are converted, so that the last digit may differ."""
    return found.keys() == expected.keys() and all(
        math.isclose(found[key], expected[key], rel_tol=4e-16, abs_tol=0.0) or found[key] == expected[key]
        for key in found
    )


def written(name: str, records: Sequence[AnyRecord], *metrics: str) -> str:
    form = FORMATS[name]
    return exported(records, name, [METRICS[metric] for metric in metrics or form.usual])[0]


TEXTS = st.one_of(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20), st.just(HOSTILE))
MS = st.floats(0, allow_infinity=False)
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
    seed=st.integers(0, 2**64 - 1),
    backend=TEXTS,
)
GPUS = st.builds(Gpu, name=TEXTS, count=st.integers(1, 8), memory_bytes=st.none() | st.integers(0, 2**40))
ENVIRONMENTS = st.builds(
    Environment,
    os=TEXTS,
    python=TEXTS,
    cpu=st.none() | TEXTS,
    usable_cores=st.none() | st.integers(1, 512),
    memory_bytes=st.none() | st.integers(0, 2**44),
    torch=st.none() | TEXTS,
    machine_id=st.none() | TEXTS,
    gpu=st.none() | GPUS,
    git_commit=st.none() | TEXTS,
    git_dirty=st.none() | st.booleans(),
    commit_time=st.none() | st.just(WHEN),
)
MESSAGES = st.from_regex(r"[^\r\n\ud800-\udfff]+", fullmatch=True) | st.just("=1+1")


@st.composite
def fields_of_a_record(draw: st.DrawFn) -> dict[str, Any]:
    """What `plausible_record` takes."""
    changes: dict[str, Any] = {
        "evaluations": draw(st.integers(1, 2**53)),
        "peak_memory_bytes": draw(st.none() | st.integers(0, 2**53)),
        "run_id": draw(st.none() | TEXTS),
        "started_at": WHEN + timedelta(seconds=draw(st.integers(0, 3))),
    }
    if draw(st.booleans()):
        status = draw(st.sampled_from([status for status in get_args(Status) if status != "ok"]))
        return changes | {"status": status, "message": draw(MESSAGES)}
    samples = st.lists(MS, min_size=1, max_size=6).map(Samples.of)
    changes |= {"wall_ms": draw(samples), "gpu_ms": draw(st.none() | samples)}
    joules = draw(st.none() | st.floats(0, 1e300))
    if joules is not None:
        changes["energy"] = Energy(joules=joules, window_s=2.0, trajectories=3, counted_s=2.0, relative_error=0.0)
    return changes


RECORDS = st.lists(st.tuples(CASES, fields_of_a_record()), min_size=1, max_size=4)
# Without the explanation of a failure, which takes minutes here.
fuzzed = settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink],
)


def one_of_each(make_record: MakeRecord, drawn: Sequence[Any], environment: Environment) -> list[AnyRecord]:
    """Records of different cases of one environment, those of kernels and inspections among them."""
    records = {case.case_id: make_record(case, environment=environment, **fields) for case, fields in drawn}
    others = kernel_record(environment=environment), inspection_record(environment=environment)
    return [*records.values(), *others]


# ----- properties -----


@fuzzed
@given(drawn=RECORDS, environment=ENVIRONMENTS)
def test_every_format_is_valid_and_has_the_records_own_figures(
    make_record: MakeRecord, tmp_path: Path, drawn: Sequence[Any], environment: Environment
) -> None:
    records = one_of_each(make_record, drawn, environment)
    expected = {(record.case_id, name): value for record in records for name, value in figures(record).items()}
    exact = {"github-action-benchmark": of_action, "pytorch-hud-v3": of_hud, "csv": of_csv}
    converted = {
        "bencher": of_bencher,
        "pytest-benchmark": lambda text: of_pytest(text, tmp_path),
        "openmetrics": of_openmetrics,
    }
    for name, read in (exact | converted).items():
        found = read(written(name, records))
        usual = {key: value for key, value in expected.items() if key[1] in FORMATS[name].usual}
        if name in exact:
            assert found == usual, name
        else:
            # What leaves the range of a float in another unit is left out, or loses digits.
            assert found.keys() <= usual.keys(), name
            ids = {record.case_id for record in records if is_plain(record)}
            assert close(*({key: of[key] for key in of if key[0] in ids} for of in (found, usual))), name


def is_plain(record: AnyRecord) -> bool:
    """Whether all its values stay in the range of a normal float in any unit."""
    samples = [
        ms for name in ("wall_ms", "gpu_ms", "ms") if (of := getattr(record, name, None)) for ms in of.samples
    ]
    return all(not value or 1e-280 < value < 1e280 for value in (*samples, *figures(record).values()))


@fuzzed
@given(drawn=RECORDS, environment=ENVIRONMENTS)
def test_texts_of_strangers_come_back_and_break_nothing(
    make_record: MakeRecord, drawn: Sequence[Any], environment: Environment
) -> None:
    records = one_of_each(make_record, drawn, environment)
    by_id = {record.case_id: record for record in records}
    infos = [
        sample for sample in samples_of(written("openmetrics", records)) if sample.name == "ldmperf_record_info"
    ]
    assert {info.labels["case_id"]: info.labels["case"] for info in infos} == {
        case_id: visible(record.case_key) for case_id, record in by_id.items()
    }
    text = written("csv", records)
    assert text.count("\n") == 1 + len(records)
    for row in csv.DictReader(io.StringIO(text, newline="")):
        record = by_id[row["case_id"]]
        told = {"message": record.message, "case_key": record.case_key, "cpu": record.environment.cpu}
        for name, value in told.items():
            cell = row[name]
            assert not cell.startswith(("=", "+", "-", "@", "\t", "\r"))
            assert (cell[1:] if cell.startswith("'") else cell) == visible(value or "")
        assert row["status"] == record.status
        assert row["started_at"] == record.started_at.isoformat()


@fuzzed
@given(drawn=RECORDS, here=ENVIRONMENTS, there=ENVIRONMENTS, seconds=st.integers(0, 10**6))
def test_a_series_is_called_the_same_on_every_commit_machine_and_device_number(
    make_record: MakeRecord,
    tmp_path: Path,
    drawn: Sequence[Any],
    here: Environment,
    there: Environment,
    seconds: int,
) -> None:
    records = one_of_each(make_record, drawn, here)
    elsewhere: list[AnyRecord] = []
    for record in records:
        changes: dict[str, Any] = {"environment": there, "started_at": record.started_at + timedelta(seconds)}
        changes["run_id"] = "another"
        if isinstance(record, Record) and record.case.device != "cpu":
            moved = record.case.model_copy(update={"device": "cuda:3"})
            changes |= {"case": moved, "case_key": moved.key}
        elsewhere.append(record.model_copy(update=changes))
    readers = {
        "github-action-benchmark": of_action,
        "bencher": of_bencher,
        "pytorch-hud-v3": of_hud,
        "pytest-benchmark": lambda text: of_pytest(text, tmp_path),
        "openmetrics": of_openmetrics,
        "csv": of_csv,
    }
    for name, read in readers.items():
        first, other = (read(written(name, some)) for some in (records, elsewhere))
        assert first == other, name


@settings(max_examples=200, deadline=None)
@given(samples=st.lists(st.floats(1e-6, 1e9), min_size=1, max_size=12))
def test_statistics_are_those_that_pytest_benchmark_computes(samples: list[float]) -> None:
    text = written("pytest-benchmark", [kernel_record(ms=Samples.of(samples))])
    (benchmark,) = json.loads(text)["benchmarks"]
    theirs = stats.Stats()
    for ms in samples:
        theirs.update(ms / 1e3)
    expected, scale = theirs.as_dict(), max(samples) / 1e3
    # A value that is its neighbour but for the last digit may be counted on the other side of a limit.
    told = {
        name: value for name, value in benchmark["stats"].items() if "outliers" not in name and "15" not in name
    }
    for name, value in told.items():
        if name not in ("data", "iterations"):
            assert value == pytest.approx(expected[name], rel=1e-9, abs=1e-9 * (1 if name == "ops" else scale)), (
                name
            )
    assert benchmark["stats"]["data"] == theirs.data


def test_outliers_are_counted_as_pytest_benchmark_does() -> None:
    samples = [10.0, 11.0, 12.0, 10.5, 11.5, 40.0, 1.0]
    (benchmark,) = json.loads(written("pytest-benchmark", [kernel_record(ms=Samples.of(samples))]))["benchmarks"]
    theirs = stats.Stats()
    for ms in samples:
        theirs.update(ms / 1e3)
    assert theirs.outliers == "2;2"
    for name in ("outliers", "iqr_outliers", "stddev_outliers", "ld15iqr", "hd15iqr"):
        assert benchmark["stats"][name] == pytest.approx(getattr(theirs, name)) or name == "outliers"
    assert benchmark["stats"]["outliers"] == "2;2"


# ----- examples -----


def test_every_metric_has_a_family_of_openmetrics_of_its_own() -> None:
    names = [family(metric)[0] for metric in METRICS.values()]
    assert len(set(names)) == len(names)
    assert family(METRICS["wall_ms"]) == ("ldmperf_wall_seconds", "seconds", -3)
    assert family(METRICS["gb_per_s"]) == ("ldmperf_kernel_bytes_per_second", "bytes_per_second", 9)


def test_openmetrics_has_spread_status_and_the_commit_beside(make_record: MakeRecord) -> None:
    cases = Case(unet="39M", steps=2), Case(unet="39M", steps=3)
    timed = make_record(cases[0], wall_ms=Samples.of([2000.0, 1000.0, 4000.0]), environment=HERE)
    failed = make_record(cases[1], status="oom", environment=HERE)
    text = written("openmetrics", [timed, failed])
    assert text.endswith("\n# EOF\n")
    samples = samples_of(text)
    wall = [sample for sample in samples if sample.name == "ldmperf_wall_seconds"]
    assert {s.labels["statistic"]: s.value for s in wall} == {"p50": 2.0, "p20": 1.4, "p80": 3.2, "min": 1.0}
    assert {float(s.timestamp) for s in wall} == {timed.started_at.timestamp()}
    assert {s.labels["case_id"] for s in wall} == {timed.case_id}
    states = {
        (s.labels["case_id"], s.labels["ldmperf_status"])
        for s in samples
        if s.name == "ldmperf_status" and s.value
    }
    assert states == {(timed.case_id, "ok"), (failed.case_id, "oom")}
    assert len([s for s in samples if s.name == "ldmperf_status"]) == 2 * len(get_args(Status))
    infos = [s.labels for s in samples if s.name == "ldmperf_record_info"]
    assert {info["git_commit"] for info in infos} == {HERE.git_commit}
    assert "git_commit" not in wall[0].labels


def test_a_series_goes_on_from_commit_to_commit(make_record: MakeRecord) -> None:
    case = Case(unet="39M", steps=2)
    later = HERE.model_copy(update={"git_commit": "8e" * 20})
    records = [
        make_record(case, environment=HERE, run_id="1", started_at=WHEN, wall_ms=Samples.of([1.0])),
        make_record(
            case, environment=later, run_id="2", started_at=WHEN + timedelta(hours=1), wall_ms=Samples.of([2.0])
        ),
    ]
    for order in (records, records[::-1]):
        wall = [
            (sample.value, float(sample.timestamp))
            for sample in samples_of(written("openmetrics", order, "wall_ms"))
            if sample.labels.get("statistic") == "p50"
        ]
        assert wall == [(1e-3, WHEN.timestamp()), (2e-3, WHEN.timestamp() + 3600)]
        rows = [strict(line) for line in written("pytorch-hud-v3", order, "wall_ms").splitlines()]
        assert [(row["head_sha"], row["metric"]["benchmark_values"]) for row in rows] == [
            (HERE.git_commit, [1.0]),
            (later.git_commit, [2.0]),
        ]
        assert [row["timestamp"] for row in rows] == [WHEN.timestamp(), WHEN.timestamp() + 3600]
        assert written("csv", order).count(case.case_id) == 2


@pytest.mark.parametrize("name", ["github-action-benchmark", "bencher", "pytest-benchmark"])
def test_formats_without_a_place_for_them_refuse_several_commits_and_machines(
    make_record: MakeRecord, name: str
) -> None:
    cases = [Case(unet="39M", steps=steps) for steps in (2, 3)]
    here = make_record(cases[0], environment=HERE)
    others = {
        "git_commit": HERE.model_copy(update={"git_commit": "8e" * 20}),
        "cpu: AMD EPYC, Intel": HERE.model_copy(update={"cpu": "Intel"}),
        "torch": HERE.model_copy(update={"torch": "2.14.0"}),
    }
    for told, environment in others.items():
        for other in (
            make_record(cases[1], environment=environment),
            here.model_copy(update={"environment": environment}),
        ):
            with pytest.raises(RunError, match=told) as refused:
                written(name, [here, other])
            assert "ldmperf merge" in str(refused.value)
            assert "\n" not in str(refused.value)
    # Of another kind of record, which no environment is compared with.
    with pytest.raises(RunError, match="git_commit"):
        written(name, [here, kernel_record(environment=others["git_commit"])])
    # One of several like machines, as a sweep over them has.
    twin = HERE.model_copy(update={"machine_id": "cd", "memory_bytes": 5})
    assert written(name, [here, make_record(cases[1], environment=twin)])
    # What another machine compiled, by the same compiler, is the same code.
    compiled = inspection_record(environment=HERE.model_copy(update={"cpu": "Intel"}))
    assert written(name, [here, inspection_record(arch="sm_80"), compiled])


def test_a_repeated_case_has_one_value_that_of_a_report(make_record: MakeRecord, tmp_path: Path) -> None:
    case = Case(unet="39M", steps=2)
    whole = make_record(case, environment=HERE, run_id="1", wall_ms=Samples.of([1.0]), started_at=WHEN)
    short = make_record(
        case,
        environment=HERE,
        run_id="1",
        wall_ms=Samples.of([2.0]),
        started_at=WHEN + timedelta(1),
        harness=whole.harness.model_copy(update={"stopped_by": "seconds"}),
    )
    old, new = (
        kernel_record(ms=Samples.of([5.0])),
        kernel_record(ms=Samples.of([6.0]), started_at=WHEN + timedelta(1)),
    )
    expected = {(case.case_id, "wall_ms"): 1.0, (old.case_id, "ms"): 6.0}
    for records in ([whole, short, old, new], [new, old, short, whole]):
        assert of_action(written("github-action-benchmark", records, "wall_ms", "ms")) == expected
        assert close(of_bencher(written("bencher", records, "wall_ms", "ms")), expected)
        assert of_hud(written("pytorch-hud-v3", records, "wall_ms", "ms")) == expected
        assert close(of_pytest(written("pytest-benchmark", records), tmp_path), expected)
        assert written("csv", records).count("\n") == 5
    # A defect since then: there is no value until the case is measured again.
    defect = make_record(case, environment=HERE, run_id="1", status="incorrect", started_at=WHEN + timedelta(2))
    assert of_action(written("github-action-benchmark", [whole, defect, old], "wall_ms", "ms")).keys() == {
        (old.case_id, "ms")
    }


def test_failed_cases_have_no_value_and_are_counted(make_record: MakeRecord) -> None:
    records: list[AnyRecord] = [
        make_record(Case(unet="39M", steps=steps), status=status)
        for steps, status in enumerate(("oom", "oom", "error", "ok"), 1)
    ]
    records.append(kernel_record(status="unsupported", environment=records[0].environment))
    usual = [METRICS[name] for name in FORMATS["bencher"].usual]
    for name in ("github-action-benchmark", "bencher", "pytest-benchmark", "pytorch-hud-v3"):
        metrics: list[Metric] = usual[:3] if name != "bencher" else usual
        text, told = exported(records, name, metrics)
        assert told == "4 cases left out: 1 failed (1 error), 2 out of memory, 1 unsupported"
        assert records[-2].case_id in text
        assert records[0].case_id not in text
        with pytest.raises(RunError, match=r"no record has any of wall_ms.*4 cases left out"):
            exported([*records[:3], records[-1]], name, [METRICS["wall_ms"]])
    for name in ("csv", "openmetrics"):
        text, told = exported(records, name, usual)
        assert told == ""
        assert all(record.case_id in text for record in records)
    assert "OutOfMemoryError" in written("csv", records)


def test_a_rate_of_an_immeasurably_short_time_is_no_number(make_record: MakeRecord) -> None:
    record = make_record(wall_ms=Samples.of([1e-310]))
    assert record.images_per_s == math.inf
    for name in FORMATS.keys() - {"pytest-benchmark"}:
        metrics = ("wall_ms",) if name == "github-action-benchmark" else ("wall_ms", "images_per_s")
        text = written(name, [record], *metrics).lower()
        assert "infinity" not in text
        assert not re.search(r"[ ,]\+?inf\b", text)
    with pytest.raises(RunError, match="no record has any of images_per_s"):
        written("github-action-benchmark", [record], "images_per_s")


def test_metrics_that_a_format_does_not_hold_are_a_wrong_call(make_record: MakeRecord) -> None:
    records = [make_record()]
    with pytest.raises(CaseError, match="pytest-benchmark holds times only; leave out images_per_s"):
        written("pytest-benchmark", records, "wall_ms", "images_per_s")
    with pytest.raises(CaseError, match="one direction, and of images_per_s more is better"):
        written("github-action-benchmark", records, "wall_ms", "images_per_s")
    assert of_action(written("github-action-benchmark", records, "images_per_s")) == {
        (records[0].case_id, "images_per_s"): records[0].images_per_s
    }


def test_a_formula_is_a_text_and_a_guarded_text_can_be_told() -> None:
    assert guarded("=1+1") == "'=1+1"
    assert guarded("'=1+1") == "''=1+1"
    assert guarded("-5") == "'-5"
    assert guarded("unet=39M") == "unet=39M"
    assert guarded("\t=1") == r"\t=1"


def test_committed_records_of_every_day_are_exported_to_the_formats_that_take_them_together() -> None:
    records = gather(COMMITTED).records
    assert len({record.environment.git_commit for record in records}) > 5
    ok = [record for record in records if record.status == "ok"]
    assert {key for record in ok for key in [(record.case_id, "wall_ms")]} <= of_csv(
        written("csv", records)
    ).keys()
    wall = [
        s for s in samples_of(written("openmetrics", records, "wall_ms")) if s.labels.get("statistic") == "p50"
    ]
    assert sorted(sample.value for sample in wall) == sorted(record.wall_ms.p50 / 1e3 for record in ok)
    assert len(written("pytorch-hud-v3", records, "wall_ms").splitlines()) == len(ok)
    for path in COMMITTED:
        one = gather([path]).records
        assert of_action(written("github-action-benchmark", one)), path


def test_duckdb_reads_the_table_equal(make_record: MakeRecord, tmp_path: Path) -> None:
    duckdb = pytest.importorskip("duckdb")
    records: list[AnyRecord] = [
        make_record(Case(unet=HOSTILE, steps=2), environment=HERE, wall_ms=Samples.of([1.1, 2.2, 3.3])),
        make_record(Case(unet="39M", steps=3), environment=HERE, status="error", message='=1+1,"x";'),
        kernel_record(),
        inspection_record(),
    ]
    path = tmp_path / "records.csv"
    path.write_text(written("csv", records), encoding="utf-8")
    select = "select case_id, status, message, case_key, wall_ms, registers, git_dirty from read_csv(?)"
    found = duckdb.execute(select, [str(path)]).fetchall()
    expected = [
        (
            record.case_id,
            record.status,
            None if record.message is None else guarded(record.message),
            guarded(record.case_key),
            figures(record).get("wall_ms"),
            figures(record).get("registers"),
            record.environment.git_dirty,
        )
        for record in sorted(records, key=lambda record: record.started_at)
    ]
    assert found == expected


def test_pytest_benchmarks_own_command_compares_the_file(make_record: MakeRecord, tmp_path: Path) -> None:
    record = make_record(Case(unet="39M", steps=2), wall_ms=Samples.of([1.0, 2.0, 4.0]))
    for name in ("0001_a.json", "0002_b.json"):
        (tmp_path / name).write_text(written("pytest-benchmark", [record]))
    command = [sys.executable, "-m", "pytest_benchmark", "compare", "--group-by", "fullname", "--csv", "table.csv"]
    files = ["0001_a.json", "0002_b.json"]
    done = subprocess.run(
        [*command, *files], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert f"benchmark '{record.case_id}/wall_ms': 2 tests" in done.stdout
    rows = list(csv.DictReader((tmp_path / "table.csv").open()))
    assert [(row["name"], float(row["median"]), row["param:case"]) for row in rows] == [
        (f"{record.case_id}/wall_ms", 0.002, record.case_key)
    ] * 2

"""Inspections as records: written by `ldmperf inspect --out`, compared, and held to the baseline."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton")

import torch

from ldmperf.profiling.compare.code_gate import regressions
from ldmperf.profiling.measure.environment import Environment
from ldmperf.profiling.record_files import gather
from ldmperf.profiling.static.baseline import baseline_path, entries, read_baseline, write_baseline
from ldmperf.profiling.static.inspection_records import InspectionRecord, compiler_environment, numbered

Run_ = Callable[..., Any]
WHEN = datetime(2026, 11, 27, 1, tzinfo=UTC)
HERE = Environment(os="Linux", python="3.12", triton="3.7.1", ptxas="12.8.93", git_commit="7d35813" + "0" * 33)


def result(**changes: Any) -> dict[str, Any]:
    """What `Inspection.as_json` tells of a launch, as far as a record takes it."""
    told = {
        "kernel": "attention_kernel",
        "arch": "sm_90",
        "size": "39M",
        "batch": 2,
        "dtype": "bfloat16",
        "num_warps": 4,
        "constants": {"BLOCK_M": "8", "HEAD_DIM": "40", "skip_ptr": "None"},
        "tensor_bytes": {"q_ptr": 64, "out_ptr": 64},
        "shared_bytes": 512,
        "faults": [],
        "instructions": 700,
        "resources": {"registers": 56, "spill_loads": 0, "spill_stores": 0},
        "occupancy": {"warps": 36, "limit": "registers"},
        "region": {"loop": False, "instructions": 600},
        "serialized": [],
        "attention": {"overlap": {"beside_scores": 30, "exponentials": 34}},
    }
    return told | changes


def records(*results: dict[str, Any]) -> list[InspectionRecord]:
    return entries(results, HERE, WHEN)


def changed(**changes: Any) -> list[str]:
    """What a compilation after the baseline of `result()` is told to have made worse."""
    return regressions(records(result()), records(result(**changes)))


def test_a_baseline_catches_what_got_worse_and_only_that() -> None:
    assert changed() == []
    assert changed(resources={"registers": 57, "spill_loads": 0, "spill_stores": 0}) == []
    (spills,) = changed(resources={"registers": 56, "spill_loads": 1, "spill_stores": 2})
    assert spills.endswith(": spills 0 -> 3")
    (fewer,) = changed(occupancy={"warps": 35, "limit": "registers"})
    assert fewer.endswith(": warps_per_multiprocessor 36 -> 35")
    (none_fits,) = changed(occupancy={"warps": 0, "limit": "registers"})
    assert none_fits.endswith("36 -> 0")
    assert changed(occupancy={"warps": 40, "limit": "warps"}) == []
    assert changed(region={"loop": False, "instructions": 611}) == []
    (longer,) = changed(region={"loop": False, "instructions": 612})
    assert "hot_instructions 600 -> 612" in longer


def test_a_baseline_catches_matmuls_that_are_serialized_or_waited_for_sooner() -> None:
    (serialized,) = changed(serialized=["C7514"])
    assert "serialized 0 -> 1" in serialized
    (sooner,) = changed(attention={"overlap": {"beside_scores": 29, "exponentials": 34}})
    assert "overlap" in sooner
    (gone,) = changed(attention={"overlap": None})
    assert gone.endswith("-> 0")
    assert changed(attention={"overlap": {"beside_scores": 34, "exponentials": 34}}) == []
    # What was serialized may be so still, or no longer.
    before = records(result(serialized=["C7514"]))
    assert regressions(before, before) == []
    assert regressions(before, records(result())) == []


def test_a_baseline_catches_launches_that_only_one_side_has() -> None:
    new, gone = changed(constants={"BLOCK_M": "4", "HEAD_DIM": "40", "skip_ptr": "None"})
    assert "BLOCK_M=4" in new
    assert "not in the baseline" in new
    assert "BLOCK_M=8" in gone
    assert "no longer compiled" in gone
    assert len(regressions([], records(result()))) == len(regressions(records(result()), [])) == 1


def test_a_launch_keeps_its_name_when_an_argument_is_added() -> None:
    assert changed(constants={"BLOCK_M": "8", "HEAD_DIM": "40", "skip_ptr": "None", "bias_ptr": "None"}) == []


def test_two_launches_of_one_name_are_refused_in_a_baseline_and_numbered_elsewhere() -> None:
    with pytest.raises(ValueError, match="two launches"):
        records(result(), result())
    same = [InspectionRecord.of(result(), HERE, WHEN) for _ in range(3)]
    found = list(numbered(same))
    assert [record.number for record in found] == [1, 2, 3]
    assert found[0] == same[0]
    assert len({record.case_id for record in found}) == len({record.case_key for record in found}) == 3


def test_a_baseline_comes_back_as_it_was_written(tmp_path: Path) -> None:
    amd = {"arch": "gfx942"}
    found = records(result(), result(arch="sm_80"), amd)
    assert len(found) == 2
    assert read_baseline(tmp_path, "9.9.9") is None
    path = write_baseline(tmp_path, "9.9.9", found)
    assert path == baseline_path(tmp_path, "9.9.9")
    assert read_baseline(tmp_path, "9.9.9") == found
    assert list(gather([path]).inspections) == found
    path.write_text(path.read_text()[:-40])
    with pytest.raises(ValueError, match=r"9\.9\.9\.jsonl:2: no JSON"):
        read_baseline(tmp_path, "9.9.9")


def test_a_record_says_what_was_told() -> None:
    (record,) = records(result(resources={"registers": 56, "spill_loads": 1, "spill_stores": 2}))
    assert (record.registers, record.spills, record.spill_loads, record.spill_stores) == (56, 3, 1, 2)
    assert (record.instructions, record.hot_instructions, record.loop) == (700, 600, False)
    assert (record.tensors, record.constants) == (("q", "out"), ("BLOCK_M=8", "HEAD_DIM=40"))
    assert (record.shared_bytes, record.warps_per_multiprocessor, record.occupancy_limit) == (512, 36, "registers")
    assert InspectionRecord.model_validate_json(record.model_dump_json()) == record
    of_amd = {
        name: value
        for name, value in result(arch="gfx942").items()
        if name not in ("region", "occupancy", "serialized")
    }
    resources = {"vgprs": 90, "agprs": 0, "sgprs": 40, "vgpr_spills": 2, "sgpr_spills": 3, "scratch": 8, "lds": 0}
    amd = InspectionRecord.of(of_amd | {"resources": resources}, HERE, WHEN)
    assert (amd.registers, amd.spills, amd.warps_per_multiprocessor, amd.hot_instructions) == (90, 5, None, None)
    without = InspectionRecord.of(of_amd | {"resources": resources | {"scratch": 0}}, HERE, WHEN)
    assert without.spills == 2


@given(
    commit=st.text("0123456789abcdef", min_size=40, max_size=40),
    registers=st.integers(0, 255),
    run_id=st.text(min_size=1, max_size=8),
    arch=st.sampled_from(["sm_80", "sm_90"]),
    tile=st.sampled_from(["8", "16"]),
)
def test_the_id_is_of_the_launch_alone(commit: str, registers: int, run_id: str, arch: str, tile: str) -> None:
    told = result(
        arch=arch, constants={"BLOCK_M": tile}, resources=result()["resources"] | {"registers": registers}
    )
    record = InspectionRecord.of(told, HERE.model_copy(update={"git_commit": commit}), WHEN, run_id)
    plain = {
        (a, t): InspectionRecord.of(result(arch=a, constants={"BLOCK_M": t}), HERE, WHEN).case_id
        for a in ("sm_80", "sm_90")
        for t in ("8", "16")
    }
    assert record.case_id == plain[arch, tile]
    assert len(set(plain.values())) == 4


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"case_key": "forged"}, "case_key is not the key of the launch"),
        ({"registers": None}, "an ok record has registers"),
        ({"message": "why"}, "and no message"),
        ({"status": "error"}, "has a message and no figures"),
        ({"spill_loads": 1}, "spills are not the sum"),
        ({"started_at": "2026-11-27T01:00:00+01:00"}, "in UTC"),
    ],
)
def test_what_contradicts_itself_is_no_record(changes: dict[str, Any], why: str) -> None:
    fields = json.loads(records(result())[0].model_dump_json())
    with pytest.raises(ValueError, match=why):
        InspectionRecord.model_validate_json(json.dumps(fields | changes))


def test_the_compilers_environment_has_no_machine() -> None:
    found = compiler_environment()
    assert found.triton is not None
    assert found.torch == torch.__version__
    assert (found.cpu, found.machine_id, found.gpu, found.memory_bytes) == (None, None, None, None)


@pytest.fixture(scope="module")
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("inspect-out-cache")))
        yield


@pytest.mark.usefixtures("_cache")
def test_records_of_one_kernel_compiled_twice_are_compared(run: Run_, tmp_path: Path) -> None:
    """At one commit nothing differs; with more registers and a spill in B the gate fails, and says where."""
    outcome = run("inspect", "geglu", "--out", tmp_path / "a")
    assert outcome.code == 0, outcome.err
    path = Path(outcome.out.splitlines()[-1])
    assert path.parent.parent == tmp_path / "a"
    assert (path.parent.name[-8:], path.name) == ("-inspect", "inspections.jsonl")
    (record,) = gather([tmp_path / "a"]).inspections
    assert (record.kernel, record.size, record.batch, record.status) == ("geglu_kernel", "64x64", 2, "ok")
    b = tmp_path / "b" / "b.jsonl"
    # Appended to, of two runs.
    for _ in range(2):
        assert run("inspect", "geglu", "--out", b).code == 0
    assert [other.case_id for other in gather([b]).inspections] == 2 * [record.case_id]
    assert run("compare", "--force", tmp_path / "a", b, "--fail-over", "registers:0%,spills:0%").code == 0

    changes = {"registers": 2 * (record.registers or 0), "warps_per_multiprocessor": 8, "run_id": "worse"}
    worse = record.model_copy(update=changes | {"spills": 4, "spill_loads": 2, "spill_stores": 2})
    c = tmp_path / "c.jsonl"
    c.write_text(worse.model_dump_json())
    gates = {"registers:5%": 1, "spills:0%": 1, "warps_per_multiprocessor:10%": 1, "shared_bytes:0%": 0}
    for gate, fails in gates.items():
        outcome = run("compare", "--force", tmp_path / "a", c, "--fail-over", gate)
        assert outcome.code == fails, gate
        assert ("  fails: sm_90 geglu_kernel 64x64 batch=2" in outcome.out) == bool(fails)
        assert "MORE" in outcome.out
    better = run("compare", "--force", c, tmp_path / "a", "--fail-over", "registers:5%,spills:0%")
    assert better.code == 0
    assert "LESS" in better.out


@pytest.mark.usefixtures("_cache")
def test_a_launch_that_does_not_compile_is_a_record_with_the_reason(
    run: Run_, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ldmperf.profiling.static import inspection

    def refused(launch: Any, machine: Any) -> Any:
        raise RuntimeError("PassManager::run failed\nout of \x1b[31mregisters")

    monkeypatch.setattr(inspection, "inspect_launch", refused)
    outcome = run("inspect", "geglu", "--out", tmp_path / "x.jsonl")
    assert outcome.code == 1
    assert "error: out of" in outcome.out
    assert "\x1b" not in outcome.out
    (first,) = gather([tmp_path / "x.jsonl"]).inspections
    assert (first.status, first.registers, first.kernel) == ("error", None, "geglu_kernel")
    # A launch that no longer compiles is a regression.
    before = [
        first.model_copy(update={"status": "ok", "message": None, "registers": 9, "spills": 0, "shared_bytes": 0})
    ]
    (broken,) = regressions(before, [first])
    assert "1 error of 1 run: out of" in broken


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("geglu", "--json", "--out", "x"), "leave --json out"),
        (("geglu", "--sass", "--out", "x"), "leave --sass out"),
        (("39M", "--out", "x"), "39M is a network: leave it out"),
        (("geglu", "--schema"), "give it alone"),
        ((), "name an operator"),
    ],
)
def test_what_does_not_go_with_out_is_refused(run: Run_, arguments: tuple[str, ...], why: str) -> None:
    outcome = run("inspect", *arguments)
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert why in outcome.err


@pytest.mark.usefixtures("_cache")
def test_a_file_of_other_records_is_left_as_it_is(run: Run_, make_record: Any, tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    for content in (make_record().model_dump_json() + "\n", "notes of mine\n"):
        path.write_text(content)
        outcome = run("inspect", "geglu", "--out", path)
        assert outcome.code == 2, outcome.err
        assert path.read_text() == content
        assert list(tmp_path.iterdir()) == [path]


def test_the_schema_of_an_inspection_is_printed(run: Run_) -> None:
    schema = json.loads(run("inspect", "--schema").out)
    assert (schema["title"], schema["$id"]) == ("InspectionRecord", "urn:ldmperf:schema:inspection:3")
    import jsonschema

    jsonschema.validate(json.loads(records(result())[0].model_dump_json()), schema)

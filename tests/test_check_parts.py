"""The parts of a GPU check: their commands, what is compiled before them, the plan, and the count of records."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import check_evidence
import check_parts
import pytest
from check_plan import CORES, CPU_SECONDS, START_SECONDS, plan_lines
from hypothesis import given
from hypothesis import strategies as st

from ldmperf.kernels import OPERATORS
from ldmperf.profiling.kernel_bench.peers import PEERS, usual_peers
from ldmperf.profiling.trajectory.case import PIPELINE_BACKENDS, RUNGS

HAS_XDIST = importlib.util.find_spec("xdist") is not None


def option(given: Any, name: str) -> str:
    command = given.command
    return str(command[command.index(name) + 1]) if name in command else ""


def backends(given: Any) -> list[str]:
    return option(given, "--backend").split(",")


def part(evidence: str, name: str = "part", **options: Any) -> Any:
    return check_parts.Part(name, options.pop("limit", 60.0), options.pop("floor", 10.0), evidence, **options)


def test_the_parts_of_a_gpu_are_the_family_and_of_a_cpu_what_it_can(tmp_path: Path) -> None:
    on_gpu, on_cpu = ({p.name: p for p in check_parts.parts(d, tmp_path)} for d in ("cuda", "cpu"))
    assert tuple(on_gpu) == check_parts.NAMES
    assert list(on_cpu) == ["smoke", "tests", "ladder", "pipelines", "family", "attention", "kernels", "compiled"]
    assert all(0 < p.floor < p.limit for p in (*on_gpu.values(), *on_cpu.values()))
    # Every operator is in one part.
    named = {name for p in on_gpu.values() for name in option(p, "--kernel").split(",") if name}
    assert named == set(OPERATORS)
    peers = option(on_gpu["attention-flex"], "--peer").split(",")
    assert set(peers) < set(PEERS)
    assert set(PEERS) - set(usual_peers("cuda")) < set(peers)
    presets = ("ladder", "drop-in")
    rungs = {name for part in on_gpu.values() if option(part, "--preset") in presets for name in backends(part)}
    assert rungs - {""} == {*RUNGS, "graph+fp8"}
    # Ratios are of one run: who is compared with the peers runs beside them.
    for name in ("headline", "ladder", "compiled", "compiled-max"):
        assert {"diffusers", "graph"} <= set(backends(on_gpu[name]))
    assert not any("compile" in name for name in backends(on_gpu["ladder"]))
    assert option(on_gpu["headline"], "--size") == "866M,39M"
    assert option(on_gpu["headline"], "--dtype") == "float16"
    # Before and after the drop-in are of one run, the compiled peer's too.
    assert {option(on_gpu[name], "--preset") for name in ("drop-in", "drop-in-compiled")} == {"drop-in"}
    eager = ("diffusers", "diffusers-accelerated")
    assert set(backends(on_gpu["drop-in-compiled"])) == {*eager, *(f"{name}-compile" for name in eager)}
    # A pipeline's before and after too, and ours alone beside the compiled one.
    pipes = [set(backends(on_gpu[name])) for name in ("pipelines", "pipelines-compiled")]
    assert set.union(*pipes) == set(PIPELINE_BACKENDS)
    assert set.intersection(*pipes) == {"pipe", "sample-graph"}
    assert option(on_gpu["pipelines"], "--preset") == "pipelines"
    assert (option(on_cpu["pipelines"], "--task"), option(on_cpu["pipelines"], "--size")) == ("pipeline", "SD1.5")
    assert option(on_gpu["family"], "--preset") == "family"
    assert option(on_gpu["family-all"], "--preset") == "family-all"
    assert all(option(on_cpu[name], "--size") == "39M" for name in ("ladder", "compiled", "family"))
    assert all(p.takes_seconds for p in on_gpu.values() if not p.evidence.startswith(("tests", "convolutions")))
    assert not any(p.launches for p in on_cpu.values())
    assert {name for p in on_gpu.values() for name in p.launches} >= {
        "smoke",
        "ladder",
        "family",
        "drop-in",
        "kernels",
        "tests",
    }


def test_every_gpu_test_is_in_one_part_and_the_smoke_comes_first(tmp_path: Path) -> None:
    parts = {p.name: p for p in check_parts.parts("cuda", tmp_path)}
    (smoke,) = [Path(path).name for path in parts["smoke"].command if path.endswith(".py")]
    assert smoke == "test_0_smoke.py"
    files = [path for path in parts["tests"].command if path.endswith(".py")]
    assert files == [path for path in parts["tests-alone"].command if path.endswith(".py")]
    found = check_parts.gpu_test_files(check_parts.ROOT / "tests")
    assert sorted(Path(path).name for path in [*files, smoke]) == sorted(Path(path).name for path in found)
    assert Path(files[0]).name == "test_3_unet.py"
    (sanitizer,) = [path for path in parts["sanitizer"].command if path.endswith(".py")]
    marked = [path for path in found if "mark.sanitizer" in Path(path).read_text()]
    assert [sanitizer] == marked
    chosen = [
        parts[name].command[parts[name].command.index("pytest") + 2]
        for name in ("smoke", "tests", "tests-alone", "sanitizer")
    ]
    assert chosen == ["gpu", "gpu and not alone and not sanitizer", "gpu and alone", "gpu and sanitizer"]
    # compute-sanitizer may be missing: all skipped is no failure there.
    assert parts["sanitizer"].evidence == "tests or skips"
    assert ("worksteal" in parts["tests"].command) == HAS_XDIST
    assert "worksteal" not in parts["tests-alone"].command


@pytest.mark.parametrize("has_xdist", [True, False])
def test_the_tests_run_in_many_processes_where_xdist_is(has_xdist: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: has_xdist or None if name == "xdist" else find(name)
    )
    monkeypatch.setattr(check_parts.os, "cpu_count", lambda: 16)
    made = check_parts.pytest_part("tests", 60, 10, "cuda", marks="gpu and not alone")
    assert (made.command[-4:] == ("-n", "10", "--dist", "worksteal")) == has_xdist
    assert made.processes == (10 if has_xdist else 1)


def test_without_pytest_the_tests_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert check_parts.pytest_part("tests", 60, 10, "cuda").reason == "pytest is not installed"


def test_profiles_share_their_references(tmp_path: Path) -> None:
    for device in ("cpu", "cuda"):
        profiles = [p for p in check_parts.parts(device, tmp_path) if p.evidence == "profile"]
        assert {option(p, "--references") for p in profiles} == {str(tmp_path / "references")}


def test_the_kernels_compiled_peers_are_apart(tmp_path: Path) -> None:
    parts = {p.name: p for p in check_parts.parts("cuda", tmp_path)}
    quick, compiled = (option(parts[name], "--peer").split(",") for name in ("kernels", "kernels-compiled"))
    assert {*quick, *compiled} <= set(PEERS)
    assert not any("compile" in peer for peer in quick)
    assert {peer for peer in PEERS if "compile" in peer} <= set(compiled)
    assert "triton" in quick
    assert "triton" in compiled


def test_the_plan_reaches_the_ladder_within_six_minutes(tmp_path: Path) -> None:
    """By the limits, with the launches that are there today."""
    launches = {"smoke": 40, "ladder": 331, "tests": 1586}

    def find(names: Sequence[str]) -> set[Any]:
        return {(name, number) for name in names for number in range(launches.get(name, 0))}

    chosen = list(check_parts.with_compilations(check_parts.parts("cuda", tmp_path)))
    rows = {line.split()[0]: line.split() for line in plan_lines(chosen, 525.0, 10.0, find)}
    assert float(rows["ladder"][-1]) <= 360


def test_what_later_parts_launch_is_compiled_beside_the_smoke(tmp_path: Path) -> None:
    parts = {p.name: p for p in check_parts.parts("cuda", tmp_path)}
    every = {p.name: p for p in check_parts.with_compilations(list(parts.values()))}
    assert every["smoke"].beside == ("tests",)
    # Not where it would serve nobody; and what it leaves is compiled before the tests.
    (_, smoke) = check_parts.with_compilations([parts["smoke"]])
    assert smoke.beside == ()
    assert every["compile-tests"].own_launches == ("tests",)
    names = [p.name for p in check_parts.with_compilations([parts["tests-alone"], parts["sanitizer"]])]
    assert names == ["tests-alone", "sanitizer"]


def run_of(gpu: str, tuned: str | None) -> str:
    return json.dumps({"environment": {"gpu": {"name": gpu}, "tuned": tuned}})


@pytest.mark.parametrize("name", ["run.json", "kernels.jsonl"])
def test_a_run_of_another_tuned_table_does_not_go_on(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = tmp_path / "tuned.json"
    monkeypatch.setattr(
        "ldmperf.kernels.tuned_table", lambda chip: table if chip.name == "H100" else tmp_path / "no"
    )
    run = tmp_path / "ladder" / "20260101T000000Z-abc"
    run.mkdir(parents=True)
    path = run / name

    def goes_on(text: str) -> bool:
        path.write_text(text)
        return check_evidence.begun(tmp_path / "ladder", name) == ("--resume", str(run))

    assert goes_on(run_of("H100", None))
    table.write_bytes(b"{}")
    digest = "44136fa355b3678a"  # sha256sum of {}
    assert not goes_on(run_of("H100", None))
    assert not goes_on(run_of("H100", "0" * 16))
    assert goes_on(run_of("H100", digest))
    assert goes_on(run_of("H200", None))
    assert not goes_on("")
    if name == "kernels.jsonl":
        # The last record tells, and not a torn one.
        assert goes_on(run_of("H100", digest) + "\n" + run_of("H100", digest)[:-9])


def test_a_run_that_was_begun_goes_on(tmp_path: Path) -> None:
    for name in ("20260101T000000Z-abc", "20260102T000000Z-abc"):
        (tmp_path / "family-all" / name).mkdir(parents=True)
        (tmp_path / "family-all" / name / "run.json").write_text('{"environment": {"gpu": null, "tuned": null}}')
    kernels = tmp_path / "kernels" / "20260101T000000Z-abc-kernels"
    kernels.mkdir(parents=True)
    (kernels / "kernels.jsonl").write_text('{"environment": {"gpu": null, "tuned": null}}')
    parts = {p.name: p for p in check_parts.parts("cuda", tmp_path)}
    resumed = {name: check_evidence.begun(tmp_path / name, p.resumes) for name, p in parts.items() if p.resumes}
    newest = str(tmp_path / "family-all" / "20260102T000000Z-abc")
    assert {name: found for name, found in resumed.items() if found} == {
        "family-all": ("--resume", newest),
        "kernels": ("--resume", str(kernels)),
    }
    assert set(resumed) == {name for name, p in parts.items() if p.evidence in ("profile", "kernels")}


NEEDS = st.lists(
    st.sampled_from(["smoke", "ladder", "family", "kernels", "tests", "tune:linear"]), unique=True, max_size=3
)


@given(st.lists(NEEDS, max_size=8))
def test_what_a_part_launches_is_compiled_once_and_before_it(needs: list[list[str]]) -> None:
    chosen = [part("profile", str(i), launches=tuple(names)) for i, names in enumerate(needs)]
    compiled: list[str] = []
    others = []
    for one in check_parts.with_compilations(chosen):
        if one.evidence == "compilation":
            assert option(one, "--for").split(",") == list(one.own_launches)
            compiled += one.own_launches
            continue
        assert set(one.launches) <= set(compiled)
        others.append(one)
    assert others == chosen
    assert len(compiled) == len(set(compiled))
    assert set(compiled) == {name for names in needs for name in names}


def test_a_part_that_cannot_run_has_nothing_compiled() -> None:
    cannot = part("tests", launches=("tests",), reason="pytest is not installed")
    assert list(check_parts.with_compilations([cannot])) == [cannot]


def test_the_plan_counts_each_launch_once_and_ends_in_time() -> None:
    # The ladder and the smoke have 100 in common, the tests and the ladder 50.
    launches = {"smoke": range(300), "ladder": range(200, 700), "tests": range(650, 2700)}

    def find(names: Sequence[str]) -> set[int]:
        return {number for name in names for number in launches[name]}

    chosen = [
        part("tests", "smoke", launches=("smoke",)),
        part("tests", "tests", launches=("tests",), limit=100.0, floor=40.0),
        part("profile", "ladder", launches=("ladder",), limit=100.0, floor=40.0),
    ]
    lines = plan_lines(list(check_parts.with_compilations(chosen)), 330.0, 10.0, find)
    rows = {line.split()[0]: line.split()[1:] for line in lines}
    assert rows["compile-smoke"][2] == "700"
    assert rows["compile-tests"][2] == "2000"
    assert float(rows["compile-smoke"][3]) == pytest.approx(START_SECONDS + 700 * CPU_SECONDS / CORES, abs=0.5)
    assert float(rows["smoke"][2]) == pytest.approx(START_SECONDS + 700 * CPU_SECONDS / CORES, abs=0.5)
    assert "2700 launches" in lines[-1]
    # 40 + 60 + 76 + 100 s leave 54 s, 10 of them for stopping: enough for the ladder's floor.
    assert float(rows["ladder"][2]) == pytest.approx(276, abs=1)
    short = plan_lines(list(check_parts.with_compilations(chosen)), 320.0, 10.0, find)
    assert short[-2].endswith("if time is left")


TESTS = """
import pytest
@pytest.mark.parametrize("name", ["plain", "with space, PASSED = 3"])
def test_good(name): pass
def test_bad(): assert False, "FAILED here"
def test_left(): pytest.skip("no GPU")
@pytest.fixture
def broken(): raise RuntimeError
def test_broken(broken): pass
"""


# As pytest-xdist 3.8 prints them of two processes.
OF_TWO_PROCESSES = """
2 workers [5 items]
test_some.py::test_good[plain]
[gw0] [ 20%] PASSED test_some.py::test_good[plain]
test_some.py::test_good[with space, PASSED = 3]
[gw0] [ 40%] PASSED test_some.py::test_good[with space, PASSED = 3]
test_some.py::test_broken
test_some.py::test_bad
[gw0] [ 60%] ERROR test_some.py::test_broken
[gw1] [ 80%] FAILED test_some.py::test_bad
test_some.py::test_left
[gw1] [100%] SKIPPED test_some.py::test_left
================== ERRORS ==================
[gw0] linux -- Python 3.12.1 /usr/bin/python
FAILED test_some.py::test_bad - AssertionError: FAILED here
ERROR test_some.py::test_broken - RuntimeError
SKIPPED [1] test_some.py:5: no GPU
== 1 failed, 2 passed, 1 skipped, 1 error ==
"""


def test_outcomes_are_counted_as_pytest_prints_them(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-v", "-rfEs", "--color=no", "-p", "no:cacheprovider", "."]
    told = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False).stdout
    for log in (told, OF_TWO_PROCESSES):
        found = check_evidence.recorded(part("tests"), tmp_path, log)
        assert found == Counter(passed=2, failed=1, skipped=1, error=1), log


def test_records_are_counted_by_status_and_a_torn_one_is_not(tmp_path: Path) -> None:
    run = tmp_path / "ladder" / "20260101T000000Z-abc"
    run.mkdir(parents=True)
    line = json.dumps({"status": "ok"})
    (run / "records.jsonl").write_text(f'{line}\n{{"status": "oom"}}\n{line}\n[]\n{line[:-4]}')
    assert check_evidence.recorded(part("profile", "ladder"), tmp_path, "") == Counter(ok=2, oom=1)
    assert check_evidence.recorded(part("kernels", "ladder"), tmp_path, "") == Counter()
    log = "linear 64x320: 0.01 ms now, 3 of 40 tried, 0 failed: nothing better\nlinear: cannot run\n"
    assert check_evidence.recorded(part("tuning"), tmp_path, log) == Counter(searched=1)
    log = "NVIDIA H100 2.11.0 cuDNN 91900\n39M conv_in 4 channels: 12.3 us  sm90_xmma, nchwToNhwc\n"
    assert check_evidence.recorded(part("convolutions"), tmp_path, log) == Counter(timed=1)


@pytest.mark.parametrize(
    ("evidence", "found", "is_evidence"),
    [
        ("tests", {"skipped": 3}, False),
        ("tests", {"skipped": 3, "passed": 1}, True),
        ("tests or skips", {"skipped": 3}, True),
        ("profile", {"unsupported": 7, "oom": 1}, False),
        ("kernels", {"unsupported": 7, "ok": 1}, True),
        ("tuning", {"searched": 1}, True),
        ("profile", {}, False),
    ],
)
def test_what_shows_that_a_part_did_its_work(evidence: str, found: dict[str, int], is_evidence: bool) -> None:
    assert check_evidence.is_evidence(part(evidence), Counter(found)) == is_evidence

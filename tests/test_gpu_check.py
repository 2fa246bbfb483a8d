"""gpu-check: shares of the time, parts that overrun or are interrupted, and what a light machine can import."""

from __future__ import annotations

import ast
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ldmperf.kernels import OPERATORS
from ldmperf.profiling.cases import BACKENDS
from ldmperf.profiling.kernel_bench.peers import PEERS
from ldmperf.profiling.kernel_bench.run import SLOW

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "bench" / "gpu_check.py"
# What a GPU machine has: everything else must be imported where it is used, or be skipped visibly.
LIGHT = {"torch", "triton", "numpy", "safetensors", "pydantic", "typer", "rich", "pynvml", "pytest", "ldmperf"}

check = SimpleNamespace(**runpy.run_path(str(SCRIPT)))


def part(code: str, name: str = "part", weight: float = 1.0, **options: Any) -> Any:
    return check.Part(name, weight, (sys.executable, "-c", code), **options)


def option(given: Any, name: str) -> str:
    command = given.command
    return str(command[command.index(name) + 1]) if name in command else ""


def backends(given: Any) -> list[str]:
    return option(given, "--backend").split(",")


def ends(process: int) -> bool:
    """Whether the process is gone, or only waits to be collected, within a few seconds."""
    for _ in range(100):
        try:
            if Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.05)
    return False


def test_what_a_part_does_not_use_the_others_get() -> None:
    assert check.shares(90.0, [2, 4, 3]) == 20.0
    assert check.shares(85.0, [4, 3]) == pytest.approx(85 * 4 / 7)
    assert check.shares(30.0, [3]) == 30.0
    assert check.shares(-5.0, [3]) == 0.0


def test_the_parts_of_a_gpu_are_the_family_and_of_a_cpu_what_it_can(tmp_path: Path) -> None:
    on_gpu, on_cpu = ({p.name: p for p in check.parts(d, tmp_path)} for d in ("cuda", "cpu"))
    assert tuple(on_gpu) == check.NAMES
    assert list(on_cpu) == ["tests", "ladder", "compiled", "sweep", "attention", "kernels"]
    # Every operator is in one part.
    named = {name for p in on_gpu.values() for name in option(p, "--kernel").split(",") if name}
    assert named == set(OPERATORS)
    peers = option(on_gpu["attention-flex"], "--peer").split(",")
    assert set(peers) < set(PEERS)
    assert set(SLOW) < set(peers)
    assert on_gpu["tests"].command[3:5] == ("-m", "gpu")
    ladder = {name for part in on_gpu.values() if option(part, "--preset") == "ladder" for name in backends(part)}
    assert ladder == set(BACKENDS)
    # Ratios are of one run: who is compared with the peers runs beside them.
    for name in ("ladder", "compiled", "compiled-max"):
        assert {"diffusers", "graph"} <= set(backends(on_gpu[name]))
    assert option(on_gpu["sweep"], "--preset") == "family"
    assert option(on_gpu["sweep-rest"], "--preset") == "family-all"
    assert all(option(on_cpu[name], "--size") == "39M" for name in ("ladder", "compiled", "sweep"))
    assert on_gpu["kernels"].takes_seconds


def test_a_profile_that_was_begun_goes_on(tmp_path: Path) -> None:
    for name in ("20260101T000000Z-abc", "20260102T000000Z-abc"):
        (tmp_path / "sweep-rest" / name).mkdir(parents=True)
        (tmp_path / "sweep-rest" / name / "run.json").touch()
    parts = {p.name: p for p in check.parts("cuda", tmp_path)}
    newest = str(tmp_path / "sweep-rest" / "20260102T000000Z-abc")
    assert parts["sweep-rest"].command[-2:] == ("--resume", newest)
    assert "--preset" not in parts["sweep-rest"].command
    assert "--resume" not in parts["sweep"].command


def test_a_part_that_overruns_is_stopped_with_what_it_started_and_the_rest_goes_on(tmp_path: Path) -> None:
    ignores = (
        "import signal, subprocess, sys, time\n"
        "for number in (signal.SIGINT, signal.SIGTERM): signal.signal(number, signal.SIG_IGN)\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print('child', child.pid, flush=True)\n"
        "time.sleep(600)"
    )
    outcome = check.run_part(part(ignores), 3.0, tmp_path, grace=0.2)
    assert outcome.text.startswith("stopped at its limit")
    assert ends(int((tmp_path / "part.log").read_text().split()[1]))
    # A suite in the background ignores SIGINT, and so would the part.
    sleeps = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_DFL); time.sleep(600)"
    first, second = check.run_parts([part(sleeps), part("print('hi')", "next")], 8.0, tmp_path)
    assert "limit" in first.text
    assert second.text == "done"
    assert (tmp_path / "next.log").read_text() == "hi\n"


def test_workers_that_outlive_a_part_are_ended(tmp_path: Path) -> None:
    leaves = (
        "import subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print(child.pid, flush=True)"
    )
    assert check.run_part(part(leaves), 30.0, tmp_path).text == "done"
    assert ends(int((tmp_path / "part.log").read_text()))


def test_failures_and_reasons_are_told(tmp_path: Path) -> None:
    failed = check.run_part(part("raise SystemExit(3)"), 30.0, tmp_path)
    assert (failed.ok, "exit code 3" in failed.text) == (False, True)
    skipped = check.run_part(part("", reason="pytest is not installed"), 30.0, tmp_path)
    assert (skipped.ok, skipped.text) == (True, "skipped: pytest is not installed")
    assert check.run_part(part("raise SystemExit(5)", "tests"), 30.0, tmp_path).ok
    (late,) = check.run_parts([part("")], 0.0, tmp_path)
    assert not late.ok


def test_the_deadline_is_passed_on(tmp_path: Path) -> None:
    given = part("import sys; print(sys.argv[1:])", takes_seconds=True)
    check.run_part(given, 100.0, tmp_path)
    assert (tmp_path / "part.log").read_text().strip() == "['--seconds', '80']"


def test_a_signal_stops_what_runs_and_the_table_comes_last(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--only", "kernels", "--device", "cpu", "--out", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log: list[Path] = []
    for _ in range(1200):
        log = list(tmp_path.glob("*/*/*-kernels/kernels.jsonl"))
        if log and log[0].stat().st_size:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, errors
    assert "stopped by a signal" in out
    assert "unsupported" in out
    assert out.strip().splitlines()[-1].endswith("-gpu-check")


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--only", "charts"], "tests, ladder, "),
        (["--out", os.devnull], "--out"),
        (["--resume", "/no/where"], "start a new one without --resume"),
    ],
)
def test_a_wrong_call_says_what_to_do(given: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = check.main([*given, "--device", "cpu"])
    except SystemExit as stopped:
        code = stopped.code
    assert code in (1, 2)
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("path", check.gpu_test_files(ROOT / "tests"), ids=lambda path: Path(path).name)
def test_gpu_tests_import_with_the_light_core(path: str) -> None:
    tree = ast.parse(Path(path).read_text())
    modules = {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module or "" for node in tree.body if isinstance(node, ast.ImportFrom) and not node.level}
    foreign = {name.partition(".")[0] for name in modules} - LIGHT - sys.stdlib_module_names
    assert not foreign, f"{path} imports {foreign}: use pytest.importorskip inside the tests that need it"

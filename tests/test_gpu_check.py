"""gpu-check: limits and floors, parts that overrun, fail or are interrupted, where it runs, its own calls."""

from __future__ import annotations

import ast
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import check_run
import gpu_check
import pytest
import torch
from check_archive import import_archive
from check_parts import NAMES, Part, gpu_test_files, parts
from hypothesis import given
from hypothesis import strategies as st

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "bench" / "gpu_check.py"
# What a GPU machine has: everything else must be imported where it is used, or be skipped visibly.
LIGHT = {"torch", "triton", "numpy", "safetensors", "pydantic", "typer", "rich", "pynvml", "pytest", "ldmperf"}

# A suite in the background ignores SIGINT, and so would the part.
SLEEPS = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_DFL); time.sleep(600)"


def part(
    code: str, name: str = "part", evidence: Any = "compilation", limit: float = 60.0, **options: Any
) -> Part:
    command = (sys.executable, "-c", code)
    return Part(name, limit, options.pop("floor", 1.0), evidence, command, **options)


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


@given(
    seconds=st.floats(0, 600),
    given=st.lists(st.tuples(st.floats(1, 200), st.floats(1, 100), st.floats(0, 300)), max_size=8),
)
def test_no_part_outruns_its_limit_or_the_call_or_begins_below_its_floor(
    seconds: float, given: list[tuple[float, float, float]]
) -> None:
    now = 1000.0
    limits: dict[str, float] = {}
    takes = {str(i): wanted for i, (_, _, wanted) in enumerate(given)}

    def run(one: Part, limit: float, folder: Path) -> Any:
        nonlocal now
        limits[one.name] = limit
        # One that has to be stopped takes all of its grace.
        now += takes[one.name] if takes[one.name] <= limit else limit + check_run.GRACE
        return check_run.Outcome(one, "done", ok=True)

    chosen = [part("", str(i), limit=limit, floor=floor) for i, (limit, floor, _) in enumerate(given)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(check_run.time, "monotonic", lambda: now)
        patch.setattr(check_run, "run_part", run)
        before: list[float] = []
        outcomes = []
        for outcome in check_run.run_parts(chosen, seconds, Path()):
            outcomes.append(outcome)
            before.append(now)
    assert [outcome.part for outcome in outcomes] == chosen
    assert now <= 1000.0 + seconds + 1e-6
    for outcome, then in zip(outcomes, [1000.0, *before], strict=False):
        left = 1000.0 + seconds - then - check_run.GRACE
        assert outcome.was_begun == (left >= outcome.part.floor)
        if outcome.was_begun:
            assert limits[outcome.part.name] == pytest.approx(min(left, outcome.part.limit))
        else:
            assert outcome.ok
            assert "not begun" in outcome.text


def test_a_part_that_overruns_is_stopped_with_what_it_started_and_the_rest_goes_on(tmp_path: Path) -> None:
    ignores = (
        "import signal, subprocess, sys, time\n"
        "for number in (signal.SIGINT, signal.SIGTERM): signal.signal(number, signal.SIG_IGN)\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print('child', child.pid, flush=True)\n"
        "time.sleep(600)"
    )
    two = [part(SLEEPS, "first", limit=3.0), part("print('hi')", "next")]
    with ThreadPoolExecutor(1) as pool:
        beside = pool.submit(lambda: list(check_run.run_parts(two, 60.0, tmp_path)))
        outcome = check_run.run_part(part(ignores), 3.0, tmp_path, grace=0.2)
        first, second = beside.result()
    assert outcome.text.startswith("stopped at its limit")
    assert ends(int((tmp_path / "part.log").read_text().split()[1]))
    assert "limit" in first.text
    assert second.text == "done"
    assert (tmp_path / "next.log").read_text() == "hi\n"


def test_workers_that_outlive_a_part_are_ended(tmp_path: Path) -> None:
    leaves = (
        "import subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print(child.pid, flush=True)"
    )
    assert check_run.run_part(part(leaves), 30.0, tmp_path).text == "done"
    assert ends(int((tmp_path / "part.log").read_text()))


RECORD = "import pathlib; f = pathlib.Path({folder!r}); f.mkdir(parents=True, exist_ok=True)\n"
RECORD += "(f / 'records.jsonl').open('a').write('{{\"status\": \"{status}\"}}\\n')\n"


def test_what_has_no_record_has_failed(tmp_path: Path) -> None:
    def run(folder: Path, code: str, evidence: Any = "profile", **options: Any) -> tuple[bool, str]:
        code, limit = code.replace("FOLDER", str(folder / "part" / "run")), 2.4 if SLEEPS in code else 30.0
        outcome = check_run.run_part(part(code, evidence=evidence, **options), limit, folder, grace=5.0)
        return outcome.ok, outcome.text

    def in_turn(number: int) -> list[tuple[bool, str]]:
        (folder := tmp_path / f"{number}").mkdir()
        return [run(folder, *one) for one in turns[number]]

    ok, wrong = (RECORD.format(folder="FOLDER", status=status) for status in ("ok", "incorrect"))
    passed = "print('tests/test_a.py::test_b PASSED   [100%]', flush=True)\n"
    failed = "print('tests/test_a.py::test_b FAILED   [100%]', flush=True)\n"
    turns: list[list[tuple[str, ...]]] = [
        [("raise SystemExit(3)",), ("",), (SLEEPS,)],
        # With an earlier check's records it may have nothing left to do, but not be stopped without a new one.
        [(ok,), ("",), (SLEEPS,)],
        [(ok,), (ok + SLEEPS,)],
        [(ok,), (wrong + SLEEPS,)],
        # A log goes on from check to check; what it said before counts for nothing now.
        [(passed, "tests"), ("", "tests"), (passed + SLEEPS, "tests")],
        [(passed, "tests"), (passed + failed + SLEEPS, "tests")],
    ]
    # Each in a folder of its own: they wait for their limits side by side.
    with ThreadPoolExecutor(len(turns)) as pool:
        fails, idles, goes_on, errs, tests, breaks = pool.map(in_turn, range(len(turns)))
    assert fails[:2] == [
        (False, "failed (exit code 3); see part.log"),
        (False, "ended without a record; see part.log"),
    ]
    assert fails[2][0] is False
    assert idles[:2] == [(True, "done")] * 2
    assert idles[2] == (False, "stopped at its limit of 2 s without a record; see part.log")
    assert goes_on == [(True, "done"), (True, "stopped at its limit of 2 s")]
    assert errs == [(True, "done"), (False, "stopped at its limit of 2 s; see part.log")]
    assert tests[:2] == [(True, "done"), (False, "ended without a record; see part.log")]
    assert (tests[2][0], breaks[1][0]) == (True, False)
    reason = "pytest is not installed"
    assert run(tmp_path, "", reason=reason) == (False, f"cannot run: {reason}")


def test_after_a_failed_smoke_only_tests_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = [part("", "smoke", "tests"), part("", "headline", "profile")]
    chosen += [part("", "compile-tests", own_launches=("tests",)), part("", "tests", "tests")]
    chosen += [part("", "compile-family", own_launches=("family",)), part("", "sanitizer", "tests or skips")]

    def begun(is_ok: bool, **options: Any) -> list[str]:
        monkeypatch.setattr(
            check_run, "run_part", lambda one, *_: check_run.Outcome(one, "", ok=is_ok or one.name != "smoke")
        )
        outcomes = list(check_run.run_parts(chosen, 600.0, tmp_path, **options))
        assert all(outcome.was_begun or not outcome.ok for outcome in outcomes)
        return [outcome.part.name for outcome in outcomes if outcome.was_begun]

    every = [one.name for one in chosen]
    assert begun(True) == every
    assert begun(False, keep_going=True) == every
    assert begun(False) == ["smoke", "compile-tests", "tests", "sanitizer"]


def test_what_compiles_beside_a_part_ends_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    says = "import os, subprocess, sys, time\nprint(os.getpid(), sys.argv[1:], flush=True)\ntime.sleep(600)"
    monkeypatch.setattr(check_run, "LDMPERF", (sys.executable, "-c", says))
    log = tmp_path / "compile-beside-smoke.log"
    waits = f"import os, time\nwhile not os.path.getsize({str(log)!r}): time.sleep(0.05)\n"
    waits += f"print(os.getpriority(os.PRIO_PROCESS, int(open({str(log)!r}).read().split()[0])))"
    assert check_run.run_part(part(waits, "smoke", beside=("tests",)), 60.0, tmp_path).ok
    process, told = log.read_text().splitlines()[0].split(maxsplit=1)
    assert told == "['compile', '--for', 'tests']"
    assert (tmp_path / "smoke.log").read_text().strip() == "19"
    assert ends(int(process))


def test_a_run_goes_on_as_it_is_when_its_part_begins(tmp_path: Path) -> None:
    run = tmp_path / "ladder" / "20260101T000000Z-abc"
    given = part("import sys; print(sys.argv[1:])", "ladder", resumes="run.json")
    for resumed in ([], ["--resume", str(run)]):
        check_run.run_part(given, 60.0, tmp_path)
        assert (tmp_path / "ladder.log").read_text().splitlines()[-1] == str(resumed)
        run.mkdir(parents=True, exist_ok=True)
        (run / "run.json").write_text('{"environment": {"gpu": null, "tuned": null}}')


def test_a_part_that_ignores_all_signals_ends_soon_after_its_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    class Deaf:
        pid = 0
        waited: ClassVar[list[float]] = []

        def poll(self) -> None: ...

        def wait(self, timeout: float) -> None:
            self.waited.append(timeout)
            raise subprocess.TimeoutExpired("deaf", timeout)

    sent: list[int] = []
    monkeypatch.setattr(check_run.os, "killpg", lambda _, number: sent.append(number))
    check_run.end(Deaf(), check_run.GRACE)  # type: ignore[arg-type]
    assert sent == [signal.SIGINT, signal.SIGTERM, signal.SIGKILL, signal.SIGKILL]
    assert sum(Deaf.waited) <= check_run.GRACE + 4


def test_the_deadline_is_passed_on(tmp_path: Path) -> None:
    given = part("import sys; print(sys.argv[1:])", takes_seconds=True)
    for limit, told in ((100.0, "80"), (40.0, "30")):
        (tmp_path / "part.log").unlink(missing_ok=True)
        check_run.run_part(given, limit, tmp_path)
        assert (tmp_path / "part.log").read_text().strip() == f"['--seconds', '{told}']"


def test_many_processes_have_no_pools_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHINDUCTOR_COMPILE_THREADS", raising=False)
    says = "import os; print(os.environ.get('TORCHINDUCTOR_COMPILE_THREADS'))"
    for processes in (1, 10):
        check_run.run_part(part(says, processes=processes), 60.0, tmp_path)
    assert (tmp_path / "part.log").read_text().split() == ["None", "1"]


def test_the_children_have_this_checkout_and_tritons_own_ptxas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_PTXAS_PATH", raising=False)
    monkeypatch.setenv("PYTHONPATH", "/some/where")
    ptxas = Path(check_run.environment()["TRITON_PTXAS_PATH"])
    assert ptxas.exists()
    assert "triton" in ptxas.parts
    monkeypatch.setenv("TRITON_PTXAS_PATH", "/my/ptxas")
    assert check_run.environment()["TRITON_PTXAS_PATH"] == "/my/ptxas"
    for is_elsewhere, expected in ((False, "/some/where"), (True, f"{ROOT / '.types'}:/some/where")):
        monkeypatch.setattr(check_run, "is_elsewhere", lambda is_elsewhere=is_elsewhere: is_elsewhere)
        assert check_run.environment()["PYTHONPATH"] == expected


def test_it_runs_from_a_plain_checkout_without_installation_or_git(tmp_path: Path) -> None:
    """A copy elsewhere, of which neither python nor git knows, beside another ldmperf that is installed."""
    copy = tmp_path / "plain"
    for name in (".types", "bench", "kernels", "model", "profiling", "samplers"):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    where = "import sys; sys.path[0] = 'bench'; import check_run; check_run.find_this_checkout()\n"
    where += "import ldmperf.kernels, os, subprocess; print(ldmperf.kernels.__file__, flush=True)\n"
    where += "subprocess.run([sys.executable, '-c', 'import ldmperf.profiling as p; print(p.__file__)'],"
    where += " env=check_run.environment())"
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    others = os.pathsep.join(path for path in given if not (Path(path) / "ldmperf").exists())
    told = subprocess.run(
        [sys.executable, "-c", where],
        cwd=copy,
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": others},
    ).stdout
    assert [Path(line).resolve().parent for line in told.split()] == [copy / "kernels", copy / "profiling"]


def test_a_signal_stops_what_runs_and_the_table_comes_last(tmp_path: Path) -> None:
    archive = tmp_path / "a.txz"
    command = [sys.executable, str(SCRIPT), "--only", "kernels", "--device", "cpu", "--out", str(tmp_path)]
    command += ["--archive", str(archive)]
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
    assert re.search(r"stopped by a signal  \[\d ok", out)
    assert out.strip().splitlines()[-1].endswith("-gpu-check")
    assert "new records" in import_archive(archive, tmp_path / "checkout", tmp_path / "laid")[0]


def test_unseen_characters_of_an_archive_are_spelled_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        gpu_check, "import_archive", lambda path, root, out: ["\x1b[2J: 3 files"] * (out == tmp_path)
    )
    assert gpu_check.import_archives([tmp_path / "a\x1b.txz"], tmp_path) == 0
    assert gpu_check.import_archives([tmp_path / "a\x1b.txz"], tmp_path / "other") == 0
    assert capsys.readouterr().out == "\\x1b[2J: 3 files\n" + f"{tmp_path}/a\\x1b.txz: nothing new\n"


def outcome(name: str, **options: Any) -> Any:
    return check_run.Outcome(part("", name), "text", **({"ok": True} | options))


@pytest.mark.parametrize(
    ("outcomes", "code"),
    [
        ([outcome("smoke"), outcome("ladder", was_begun=False)], 0),
        ([outcome("smoke"), outcome("ladder", ok=False)], 1),
        ([outcome("smoke", was_begun=False)], 1),
        ([], 1),
    ],
)
def test_the_exit_code_tells_of_failures_and_of_nothing_done(
    outcomes: list[Any],
    code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(gpu_check, "run_parts", lambda *_: iter(outcomes))
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    archive = tmp_path / "archives" / "a.txz"
    given = ["--device", "cpu", "--out", str(tmp_path / "runs"), "--archive", str(archive)]
    assert gpu_check.main(given) == code
    assert archive.exists()
    told = capsys.readouterr().out
    assert ("go on with: --only ladder" in told) == (len(outcomes) == 2 and not outcomes[1].was_begun)


def test_parts_are_chosen_by_name_or_from_one_on(tmp_path: Path) -> None:
    def chosen(*given: str, device: str = "cpu") -> list[str]:
        options = gpu_check.arguments(given)
        return [one.name for one in gpu_check.chosen_parts(options, device, tmp_path)]

    on_cpu = [one.name for one in parts("cpu", tmp_path)]
    assert chosen() == on_cpu
    # In the order given: what was tuned is measured after it.
    assert chosen("--only", "kernels,tests") == ["kernels", "tests"]
    assert chosen("--from", "family") == on_cpu[on_cpu.index("family") :]
    on_gpu = chosen("--from", "ladder", device="cuda")
    assert on_gpu[:2] == ["compile-ladder", "ladder"]
    assert [name for name in on_gpu if name in NAMES] == list(NAMES[NAMES.index("ladder") :])


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--only", "charts"], "smoke, headline, "),
        (["--from", "charts"], "smoke, headline, "),
        (["--from", "ladder", "--only", "tests"], "one of them"),
        (["--out", os.devnull], "--out"),
        (["--resume", "/no/where"], "start a new one without --resume"),
        (["--import", "/no/where.txz"], "give a file of --archive"),
        (["--archive", "/dev/null/a.txz", "--only", "tests"], "/dev/null"),
    ],
)
def test_a_wrong_call_says_what_to_do(
    given: list[str],
    told: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(gpu_check, "run_parts", lambda *_: pytest.fail("a part was begun"))
    out = [] if "--out" in given else ["--out", str(tmp_path)]
    try:
        code = gpu_check.main([*given, *out, "--device", "cpu"])
    except SystemExit as stopped:
        code = stopped.code
    assert code in (1, 2)
    assert told in capsys.readouterr().err


def test_on_a_gpu_records_name_a_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_check, "run_parts", lambda *_: iter([outcome("smoke")]))
    monkeypatch.setattr(gpu_check, "chosen_parts", lambda *_: [])
    monkeypatch.setattr(signal, "signal", lambda *_: None)

    def code(root: Path, commit: str, device: str = "cuda") -> int:
        monkeypatch.setattr(gpu_check, "ROOT", root)
        monkeypatch.setenv("LDMPERF_COMMIT", commit)
        return gpu_check.main(["--device", device, "--out", str(tmp_path / f"{root.name}-{commit}-{device}")])

    assert code(tmp_path, "") == 2
    told = capsys.readouterr().err
    assert "set LDMPERF_COMMIT" in told
    assert len(told.splitlines()) == 1
    assert code(tmp_path, "main") == 2
    assert code(tmp_path, "7d35813") == 0
    assert code(tmp_path, "", "cpu") == 0
    assert code(ROOT, "") == 0
    head = subprocess.run(
        ["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    ).stdout
    if not head:
        pytest.skip("this is no checkout: no .git can differ from LDMPERF_COMMIT")
    capsys.readouterr()
    assert code(ROOT, head[:9]) == 0
    capsys.readouterr()
    assert code(ROOT, "0123456") == 2
    told = capsys.readouterr().err
    assert "LDMPERF_COMMIT is 0123456, and .git here is at" in told
    assert len(told.splitlines()) == 1


def test_an_archive_is_written_again_only_where_something_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[int] = []
    monkeypatch.setattr(gpu_check, "run_parts", lambda *_: iter([outcome("smoke"), outcome("ladder")]))
    monkeypatch.setattr(gpu_check, "write_archive", lambda *_: written.append(1) or [])
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    gpu_check.main(["--device", "cpu", "--out", str(tmp_path), "--archive", str(tmp_path / "a.txz")])
    # At the start and after each part, and not at the end.
    assert len(written) == 3


@pytest.mark.parametrize("path", gpu_test_files(ROOT / "tests"), ids=lambda path: Path(path).name)
def test_gpu_tests_import_with_the_light_core(path: str) -> None:
    tree = ast.parse(Path(path).read_text())
    modules = {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module or "" for node in tree.body if isinstance(node, ast.ImportFrom) and not node.level}
    foreign = {name.partition(".")[0] for name in modules} - LIGHT - sys.stdlib_module_names
    assert not foreign, f"{path} imports {foreign}: use pytest.importorskip inside the tests that need it"


def test_the_summary_counts_records(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    found = outcome("ladder", seconds=61.4, records=Counter(ok=3, oom=1))
    gpu_check.print_summary(tmp_path, [found, outcome("family", was_begun=False)])
    told = capsys.readouterr().out
    assert "3 ok, 1 oom" in told
    assert "time did not reach: family" in told


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_it_says_so_before_anything_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main(["--out", str(tmp_path / "runs")]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "no GPU is here" in told
    assert "--device cpu" in told
    assert not (tmp_path / "runs").exists()

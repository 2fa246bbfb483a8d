"""`ldmperf compare --commits` in small repositories: worktrees, turns, whose code runs."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from ldmperf.profiling import Record
from ldmperf.profiling.compare.turns import OUT, RoundFailed, Side, orders, run_rounds
from ldmperf.profiling.compare.worktrees import git, worktrees

Run = Callable[..., Any]
MakeRecord = Callable[..., Record]

# A shell starts what it runs in the background with SIGINT ignored, and so this suite.
MAIN = (
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "from ldmperf.profiling.cli import main; main()"
)

# Writes a record as this project's code does: of the checkout that it lies in.
WRITER = """
    import json, os, subprocess, sys, time, uuid
    from datetime import UTC, datetime
    from pathlib import Path

    def main():
        here = Path(__file__).resolve().parent
        record = json.loads((here / "record.json").read_text())
        head = subprocess.check_output(["git", "-C", here, "rev-parse", "HEAD"], text=True).strip()
        record["environment"]["git_commit"] = os.environ.get("LIE", head)
        record["run_id"] = uuid.uuid4().hex
        place, counter = Path(os.environ["LOG"]), len(Path(os.environ["LOG"]).read_text().splitlines())
        # Seconds of their own, as real runs have.
        record["started_at"] = datetime.fromtimestamp(1e9 + counter, UTC).isoformat()
        with place.open("a") as file:
            file.write(f"{head} {os.getcwd()} {' '.join(sys.argv[1:-1])}\\n")
        out = Path(sys.argv[-1])
        out.mkdir(parents=True, exist_ok=True)
        (out / "records.jsonl").write_text(json.dumps(record) + "\\n")

    if __name__ == "__main__":
        main()
"""


def commit(repository: Path, text: str) -> str:
    git(repository, "add", "--all")
    git(repository, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "--quiet", "--message", text)
    return git(repository, "rev-parse", "HEAD")


@pytest.fixture
def repository(tmp_path: Path, make_record: MakeRecord, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two commits of a repository in this project's form, the second a tenth slower; the current folder."""
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    folder = tmp_path / "a repository"
    package = folder / "profiling"
    package.mkdir(parents=True)
    (folder / ".types" / "ldmperf").mkdir(parents=True)
    (folder / ".types" / "ldmperf" / "profiling").symlink_to(Path("..", "..", "profiling"))
    (package / "__init__.py").touch()
    (package / "cli.py").write_text(textwrap.dedent(WRITER))
    git(tmp_path, "init", "--quiet", str(folder))
    record = json.loads(make_record().model_dump_json())
    for factor in (1.0, 1.1):
        samples = [100 * factor, 100 * factor]
        figures = dict.fromkeys(("p20", "p50", "p80", "min"), 100 * factor)
        record["wall_ms"] = {"samples": samples, "n": 2, **figures}
        (package / "record.json").write_text(json.dumps(record))
        commit(folder, f"{factor} times")
    (tmp_path / "log").touch()
    monkeypatch.setenv("LOG", str(tmp_path / "log"))
    monkeypatch.chdir(folder)
    return folder


def compare(run: Run, tmp_path: Path, *command: str, options: tuple[str, ...] = ("--rounds", "3")) -> Any:
    return run("compare", "--commits", "HEAD~1", "HEAD", "--out", tmp_path / "runs", *options, "--", *command)


def nothing_is_left(repository: Path) -> bool:
    listed = git(repository, "worktree", "list", "--porcelain").split("\n\n")
    return len([entry for entry in listed if entry.strip()]) == 1


def test_each_commit_runs_its_own_code_in_turn_the_order_flipped(
    run: Run, repository: Path, tmp_path: Path
) -> None:
    told = compare(run, tmp_path, "profile", "--steps", "3", options=("--rounds", "4"))
    assert told.code == 0, told.err
    old, new = git(repository, "rev-parse", "HEAD~1"), git(repository, "rev-parse", "HEAD")
    ran = [line.split(maxsplit=1) for line in (tmp_path / "log").read_text().splitlines()]
    assert [head for head, _ in ran] == [old, new, new, old, old, new, new, old]
    assert all("profile --steps 3 --out" in rest and str(repository) not in rest for _, rest in ran)
    assert f"A: commit {old[:7]}, 4 runs" in told.out
    assert "SLOWER" in told.out
    assert "made in turn" in told.out
    assert nothing_is_left(repository)
    # The records stay, to be compared again.
    (folder,) = (tmp_path / "runs").iterdir()
    assert run("compare", folder / "a", folder / "b", "--fail-over", "wall_ms:10%").code == 1


def test_one_commit_twice_is_an_aa_run(run: Run, repository: Path, tmp_path: Path) -> None:
    told = run("compare", "--commits", "HEAD", "HEAD", "--rounds", "3", "--out", tmp_path / "r", "--", "profile")
    assert told.code == 0, told.err
    assert "A/A: both sides are one commit" in told.out
    assert "1 SAME" in told.out


def test_whole_runs_are_asked_for_with_commits_alone(run: Run, repository: Path, tmp_path: Path) -> None:
    cli = repository / "profiling" / "cli.py"
    cli.write_text(
        cli.read_text().replace("def main():", "def main():\n    assert 'LDMPERF_TURNS' not in os.environ")
    )
    commit(repository, "takes no turns")
    whole = ("--rounds", "3", "--whole-runs")
    told = run("compare", "--commits", "HEAD", "HEAD", "--out", tmp_path / "r", *whole, "--", "profile")
    assert told.code == 0, told.err
    (folder,) = (tmp_path / "r").iterdir()
    told = run("compare", folder / "a", folder / "b", "--whole-runs")
    assert (told.code, "--whole-runs is for --commits" in told.err) == (2, True)


def test_records_of_other_code_end_the_comparison(
    run: Run, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIE", "0" * 40)
    told = compare(run, tmp_path, "profile")
    assert told.code == 1
    assert "its records are of commit 0000000" in told.err
    assert nothing_is_left(repository)


def test_any_command_of_another_repository_in_its_folder(run: Run, repository: Path, tmp_path: Path) -> None:
    """A repository without .types/ldmperf is the user's: its commits are what is compared."""
    git(repository, "rm", "-r", "--quiet", ".types")
    commit(repository, "no longer ours")
    (repository / "profiling" / "new").touch()
    commit(repository, "one more")
    os.chdir(repository / "profiling")
    told = compare(run, tmp_path, sys.executable, "cli.py", "--to", "{out}")
    assert told.code == 0, told.err
    assert "the installed ldmperf" in told.err
    places = [line.split()[1] for line in (tmp_path / "log").read_text().splitlines()]
    assert all(Path(place).name == "profiling" for place in places)
    assert len(set(places)) == 2
    assert nothing_is_left(repository)


@pytest.mark.parametrize(
    ("end", "said"),
    [
        ("raise KeyError(7)", "ended with exit code 1 before its time: KeyError: 7"),
        ("os.kill(os.getpid(), 9)", "signal 9"),
    ],
)
def test_a_run_that_crashes_after_some_records_ends_the_comparison(
    run: Run, repository: Path, tmp_path: Path, end: str, said: str
) -> None:
    """Its other cases would be missing on one side, and no gate would see them."""
    cli = repository / "profiling" / "cli.py"
    cli.write_text(
        cli.read_text().replace("def main():", "def main():\n    made()\n    " + end + "\n\ndef made():")
    )
    commit(repository, "crashes")
    told = compare(run, tmp_path, "profile", options=("--fail-over", "wall_ms:5%"))
    assert told.code == 1
    assert said in told.err.splitlines()[-1]
    assert nothing_is_left(repository)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["HEAD", "nothing", "--", "profile"], 2, "no commit 'nothing'"),
        (["HEAD", "--force", "--", "profile"], 2, "no commit '--force'"),
        (["HEAD~1", "HEAD", "--rounds", "2", "--", "profile"], 2, "from 3 to 999"),
        (["HEAD~1", "HEAD"], 2, "no command"),
        (["HEAD~1", "HEAD", "--", "ldmperf"], 2, "no command"),
        (["HEAD~1", "HEAD", "--", "make", "bench"], 2, "write {out}"),
        (["HEAD~1", "HEAD", "--", "no-such-program", "{out}"], 2, "cannot run 'no-such-program'"),
        (
            ["HEAD~1", "HEAD", "--", "sh", "-c", "echo once; echo broken; exit 3", "{out}"],
            1,
            "(exit code 3): broken",
        ),
        (["HEAD~1", "HEAD", "--", "sh", "-c", "exit 2", "{out}"], 2, "it said nothing"),
    ],
)
def test_what_cannot_be_run_is_one_line(
    run: Run, repository: Path, tmp_path: Path, arguments: list[str], code: int, said: str
) -> None:
    told = run("compare", "--out", tmp_path / "runs", "--commits", *arguments)
    assert told.code == code
    assert said in told.err.splitlines()[-1]
    assert nothing_is_left(repository)


def test_uncommitted_changes_are_in_neither_commit(run: Run, repository: Path, tmp_path: Path) -> None:
    assert "has uncommitted changes" not in compare(run, tmp_path, "profile").err
    (repository / "profiling" / "cli.py").write_text("raise KeyError")
    told = compare(run, tmp_path / "again", "profile")
    assert told.code == 0, told.err
    assert "has uncommitted changes, which are in neither commit and are not measured" in told.err


def test_outside_a_repository_it_is_a_wrong_call(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    told = compare(run, tmp_path, "profile")
    assert told.code == 2
    assert "is in no git repository" in told.err


def test_in_a_hook_gits_variables_do_not_reach_the_worktrees(
    run: Run, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GIT_DIR", str(repository / ".git"))
    monkeypatch.setenv("GIT_INDEX_FILE", str(repository / ".git" / "index"))
    assert compare(run, tmp_path, "profile").code == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_stops_what_runs_and_removes_the_worktrees(
    repository: Path, tmp_path: Path, number: signal.Signals
) -> None:
    script = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    process = subprocess.Popen(
        [
            *(sys.executable, "-c", MAIN, "compare", "--commits"),
            *("HEAD~1", "HEAD", "--out", str(tmp_path / "runs"), "--", sys.executable, "-c", script, "{out}"),
        ],
        stderr=subprocess.PIPE,
        text=True,
    )
    while process.poll() is None and not ((tmp_path / "pid").exists() and (tmp_path / "pid").read_text()):
        time.sleep(0.02)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "the worktrees are removed" in err.splitlines()[-1]
    assert nothing_is_left(repository)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_worktrees_are_removed_whatever_is_raised_and_with_what_was_written(repository: Path) -> None:
    head = git(repository, "rev-parse", "HEAD")
    seen: list[Path] = []

    def work() -> None:
        with worktrees(repository, [head, head]) as places:
            seen.extend(places)
            for place in places:
                (place / "untracked").write_text("x")
                (place / "profiling" / "cli.py").write_text("changed")
            raise KeyError

    with pytest.raises(KeyError):
        work()
    assert nothing_is_left(repository)
    assert not any(place.parent.exists() for place in seen)


def test_two_sides_flip_and_three_have_every_place_equally_often() -> None:
    assert list(islice(orders("ab"), 5)) == [tuple("ab"), tuple("ba"), tuple("ab"), tuple("ba"), tuple("ab")]
    found = list(islice(orders("abc"), 6))
    for place in range(3):
        assert Counter(order[place] for order in found) == {"a": 2, "b": 2, "c": 2}


# A side: asks for turns, and tells in a log when it takes a sample and when it is done with it.
SIDE = """
    import os, sys, time
    from pathlib import Path

    name, count, log, record, out = sys.argv[1:]

    def tell(what):
        with open(log, "a") as file:
            file.write(f"{name} {what}\\n")

    from ldmperf.profiling.measure.turn import TURNS

    {BEGIN}
    tell(f"{os.getpid()} {len(TURNS.waiting)}")
    for number in range(int(count)):
        TURNS.end()
        tell(f"begins {len(TURNS.waiting)}")
        time.sleep(0.01)
        tell("ends")
    {END}
    Path(out, "records.jsonl").write_text(Path(record).read_text() + "\\n")
"""


@pytest.fixture
def sides(tmp_path: Path, make_record: MakeRecord) -> Callable[..., list[Side]]:
    """Sides by name, and how many turns each asks for.

    `begin`, `end`: what each runs before and after; `shell`: each within a shell.
    """
    (tmp_path / "record.json").write_text(make_record().model_dump_json())

    def made(counts: dict[str, int], end: str = "", begin: str = "", shell: bool = False) -> list[Side]:
        script = tmp_path / "side.py"
        script.write_text(textwrap.dedent(SIDE).replace("{BEGIN}", begin).replace("{END}", end))
        found = []
        for name, count in counts.items():
            arguments = (str(script), name, str(count), str(tmp_path / "log"), str(tmp_path / "record.json"), OUT)
            command = (sys.executable, *arguments)
            if shell:
                command = ("sh", "-c", f"{shlex.join(command)}; exit $?")
            found.append(Side(name, command, tmp_path / name, tmp_path, dict(os.environ)))
        return found

    return made


def log_of(tmp_path: Path) -> list[str]:
    """The lines but those with process ids."""
    return [line for line in (tmp_path / "log").read_text().splitlines() if not is_start(line)]


def is_start(line: str) -> bool:
    """Whether it has the process that starts."""
    return line.split()[1].isdigit()


@pytest.mark.parametrize("shell", [False, True])
def test_sides_take_samples_in_turn_and_never_at_once(
    sides: Callable[..., list[Side]], tmp_path: Path, shell: bool
) -> None:
    told: list[str] = []
    a, b = run_rounds(sides({"a": 3, "b": 3}, shell=shell), 1, told.append)
    lines = log_of(tmp_path)
    assert [line[0] for line in lines[::2]] == list("ababab")
    for begin, end in zip(lines[::2], lines[1::2], strict=True):
        assert (begin.split()[:2], end.split()) == ([begin[0], "begins"], [begin[0], "ends"])
    # The other one waits, but for the last turn, when it has ended. The second to start finds the first waiting.
    assert [line.split()[2] for line in lines[::2]] == list("111110")
    starts = filter(is_start, (tmp_path / "log").read_text().splitlines())
    assert [line.split()[2] for line in starts] == ["0", "1"]
    assert [len(side.runs) for side in (a, b)] == [1, 1]
    assert told[0].startswith("round 1 of 1: a ")
    assert told[0].count("s in 4 turns") == 2


def test_one_that_is_done_leaves_the_others_their_turns(sides: Callable[..., list[Side]], tmp_path: Path) -> None:
    run_rounds(sides({"a": 1, "b": 3, "c": 0}), 1, lambda line: None)
    lines = log_of(tmp_path)
    assert Counter(line for line in lines if line.endswith("ends")) == {"a ends": 1, "b ends": 3}
    assert [line[0] for line in lines] == [name for name in "".join(line[0] for line in lines[::2]) for _ in "12"]


@pytest.mark.parametrize("is_linux", [True, False])
def test_whole_runs_ask_nobody(
    sides: Callable[..., list[Side]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_linux: bool
) -> None:
    """Where they are asked for, and where a system has no turns."""
    monkeypatch.setattr("ldmperf.profiling.compare.turns.CAN_TAKE_TURNS", is_linux)
    run_rounds(sides({"a": 2, "b": 2}), 2, lambda line: None, whole_runs=is_linux)
    assert [line[0] for line in log_of(tmp_path)[::2]] == list("aabbbbaa")


@pytest.mark.parametrize(
    "end", ["sys.exit(3)", "os.kill(os.getpid(), 9)", "time.sleep(60) if name == 'b' else 1 / 0"]
)
def test_a_side_that_fails_stops_the_one_that_waits(
    sides: Callable[..., list[Side]], tmp_path: Path, end: str
) -> None:
    with pytest.raises(RoundFailed, match=r"^[ab]: no record from"):
        run_rounds(sides({"a": 2, "b": 3}, end), 1, lambda line: None)
    assert len(started(tmp_path)) == 2
    assert not any(map(is_running, started(tmp_path)))


def started(tmp_path: Path) -> list[int]:
    """The processes of the log."""
    return [int(line.split()[1]) for line in (tmp_path / "log").read_text().splitlines() if is_start(line)]


def is_running(pid: int) -> bool:
    """Whether it is still there after a moment; one that has ended may wait for whoever reaps orphans."""
    for _ in range(100):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return False
        except OSError:
            return False
        time.sleep(0.02)
    return True


def test_what_a_side_leaves_running_ends_with_it(sides: Callable[..., list[Side]], tmp_path: Path) -> None:
    """A shell that is killed leaves a process that would go on beside the other side."""
    end = "name == 'b' and os.kill(os.getppid(), 9); time.sleep(60)"
    with pytest.raises(RoundFailed, match=r"^b: "):
        run_rounds(sides({"a": 4, "b": 1}, end, shell=True), 1, lambda line: None)
    assert len(started(tmp_path)) == 2
    assert not any(map(is_running, started(tmp_path)))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_stops_the_side_that_runs_and_the_one_that_waits(
    repository: Path, tmp_path: Path, number: signal.Signals
) -> None:
    log = tmp_path / "pids"
    script = (
        "import os, time; from ldmperf.profiling.measure.turn import TURNS\n"
        f"open({str(log)!r}, 'a').write(f'{{os.getpid()}}\\n')\n"
        "if TURNS.waiting: time.sleep(60)\nTURNS.end()"
    )
    process = subprocess.Popen(
        [
            *(sys.executable, "-c", MAIN, "compare", "--commits"),
            *("HEAD~1", "HEAD", "--out", str(tmp_path / "runs"), "--", sys.executable, "-c", script, "{out}"),
        ],
        stderr=subprocess.PIPE,
        text=True,
    )
    while process.poll() is None and not (log.exists() and log.read_text().count("\n") == 2):
        time.sleep(0.02)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "the worktrees are removed" in err.splitlines()[-1]
    assert not any(map(is_running, map(int, log.read_text().split())))


def test_all_processes_of_a_side_that_ask_have_its_turn(sides: Callable[..., list[Side]], tmp_path: Path) -> None:
    begin = "pid = os.fork() if name == 'a' else 0"
    end = "name == 'b' or (os.waitpid(pid, 0) if pid else os._exit(0))"
    run_rounds(sides({"a": 2, "b": 2}, end, begin=begin), 1, lambda line: None)
    lines = log_of(tmp_path)
    assert Counter(line for line in lines if line.endswith("ends")) == {"a ends": 4, "b ends": 2}


def test_a_folder_too_deep_for_a_socket_is_a_line_that_says_what_to_do(
    sides: Callable[..., list[Side]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = tmp_path / ("x" * 100)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    with pytest.raises(RoundFailed, match=r"no socket at .*; set TMPDIR to a shorter path") as failed:
        run_rounds(sides({"a": 1}), 1, lambda line: None)
    assert failed.value.code == 2
    run_rounds(sides({"b": 1}), 1, lambda line: None, whole_runs=True)

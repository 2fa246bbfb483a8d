"""`ldmperf compare --commits` in small repositories: worktrees, the order of runs, whose code runs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ldmperf.profiling import Record
from ldmperf.profiling.compare.turns import orders
from ldmperf.profiling.compare.worktrees import git, worktrees

Run = Callable[..., Any]
MakeRecord = Callable[..., Record]

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
            *(sys.executable, "-c", "from ldmperf.profiling.cli import main; main()", "compare", "--commits"),
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
    assert list(orders("ab", 5)) == [tuple("ab"), tuple("ba"), tuple("ab"), tuple("ba"), tuple("ab")]
    found = list(orders("abc", 6))
    for place in range(3):
        assert Counter(order[place] for order in found) == {"a": 2, "b": 2, "c": 2}

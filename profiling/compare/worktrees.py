"""Two commits of a git repository, checked out beside each other for as long as they are measured."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ..measure.folders import RunError
from ..options import CaseError

# Where this project's own repository shows its folders as the package `ldmperf`.
_OWN_PACKAGE = Path(".types") / "ldmperf"


def git(place: Path, *arguments: str) -> str:
    """What git prints, run in that folder. Raises RunError with the last line that git says."""
    try:
        done = subprocess.run(
            ["git", "-C", str(place), *arguments], capture_output=True, text=True, check=False, env=outside_git()
        )
    except FileNotFoundError:
        raise RunError("git is not installed; --commits needs it") from None
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise RunError(f"git {arguments[0]} failed: {said[-1]}")
    return done.stdout.strip()


def outside_git() -> dict[str, str]:
    """The environment without what git tells its hooks: in a hook, those would override each folder's own."""
    local = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_PREFIX", "GIT_COMMON_DIR", "GIT_OBJECT_DIRECTORY")
    return {name: value for name, value in os.environ.items() if name not in local}


def repository_of(place: Path) -> Path:
    """The top folder of the repository that a folder is in. Raises CaseError where it is in none."""
    try:
        return Path(git(place, "rev-parse", "--show-toplevel"))
    except RunError as failure:
        raise CaseError(f"--commits: {place} is in no git repository ({failure}); go into one") from None


def commit_named(repository: Path, name: str) -> str:
    """The full hash of a commit, branch or tag. Raises CaseError."""
    try:
        return git(repository, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{name}^{{commit}}")
    except RunError:
        raise CaseError(f"--commits: no commit {name!r} in {repository}; `git log` lists them") from None


@contextmanager
def worktrees(repository: Path, commits: Sequence[str]) -> Iterator[list[Path]]:
    """A folder for each commit, below one temporary folder; all are removed at the end, however that comes."""
    with tempfile.TemporaryDirectory(prefix="ldmperf-compare-") as temporary:
        folders = [Path(temporary) / f"{place}-{commit[:7]}" for place, commit in zip("ab", commits, strict=True)]
        try:
            for folder, commit in zip(folders, commits, strict=True):
                git(repository, "worktree", "add", "--detach", "--quiet", str(folder), commit)
            yield folders
        finally:
            for folder in folders:
                # One that was not made is no loss; what git forgets to unlink, the temporary folder's end removes.
                _remove(repository, folder)


def _remove(repository: Path, folder: Path) -> None:
    try:
        git(repository, "worktree", "remove", "--force", str(folder))
    except RunError:
        # Not made to the end; with its folder gone, its entry is stale.
        if folder.exists():
            shutil.rmtree(folder, ignore_errors=True)
        git(repository, "worktree", "prune")


def is_ours(worktree: Path) -> bool:
    """Whether it is of this project: the package `ldmperf` is then that commit's own."""
    return (worktree / _OWN_PACKAGE / "profiling").exists()


def python_path(worktree: Path) -> str:
    """PYTHONPATH under which `import ldmperf.profiling` takes the worktree's code, not what is installed."""
    before = os.environ.get("PYTHONPATH")
    return os.pathsep.join([str(worktree / _OWN_PACKAGE.parent), *([before] if before else [])])

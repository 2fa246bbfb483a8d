"""The commit of the code that runs: of the checkout that holds it, or as LDMPERF_COMMIT tells."""

from __future__ import annotations

import os
import re
import subprocess
from datetime import UTC, datetime
from pathlib import Path

from ..options import CaseError

# The commit of code that came without its .git.
COMMIT_VARIABLE = "LDMPERF_COMMIT"


def _git(*arguments: str) -> str | None:
    folder = Path(__file__).resolve().parent
    try:
        answer = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, ValueError, subprocess.SubprocessError):
        # No git, no repository, or one that git refuses: the commit is not known.
        return None
    return answer.stdout.strip()


def checkout() -> tuple[str | None, bool | None]:
    """Commit and dirty flag of the checkout that holds this file; untracked files do not count as dirty."""
    # A wheel in a .venv inside some checkout is not that checkout's code: git must track this very folder.
    if _git("ls-files", "--error-unmatch", "__init__.py") is None:
        return _told_commit(), None
    status = _git("status", "--porcelain", "--untracked-files=no")
    return _git("rev-parse", "HEAD"), None if status is None else bool(status)


def commit_time(commit: str | None) -> datetime | None:
    """When the commit was made, in UTC; None where git does not know it."""
    made = None if commit is None else _git("show", "-s", "--format=%cI", commit)
    try:
        return None if made is None else datetime.fromisoformat(made).astimezone(UTC)
    except ValueError:
        return None


def _told_commit() -> str | None:
    """LDMPERF_COMMIT, None if it is not set. Raises CaseError for what is no commit's name."""
    commit = os.environ.get(COMMIT_VARIABLE, "").strip().lower()
    if commit and re.fullmatch("[0-9a-f]{7,40}", commit) is None:
        raise CaseError(
            f"{COMMIT_VARIABLE} is {commit!r}, which is no commit: set it to what `git rev-parse HEAD` prints, "
            "or unset it"
        )
    return commit or None

"""Folders of records: made under a new name, held by one process at a time."""

from __future__ import annotations

import fcntl
import json
import os
import socket
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import IO

from .conditions import commit_name
from .environment import Environment
from .recorded import utc_now
from .store import NO_LOCKS

# Hidden, so that neither a listing nor an archive of a run has it.
LOCK_NAME = ".lock"
_LONGEST_NOTE = 1000


def locked(folder: Path, told: Callable[[str], None]) -> IO[str]:
    """Holds the folder until the file that is returned is closed, or this process ends, however it ends.

    Raises RunError, which says who holds it, where another process does. Where the file system has no locks (some
    network file systems), `told` is called with a line, and nothing is held. Raises OSError where the folder
    cannot be written.
    """
    file = (folder / LOCK_NAME).open("a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = holder_of(file)
        file.close()
        raise RunError(f"{folder} is in use by {holder}; wait until it ends, or stop it, then go on") from None
    except OSError as failure:
        if failure.errno not in NO_LOCKS:
            file.close()
            raise
        told(f"{folder}: its file system has no locks; see that no other process measures into it")
    sign(file)
    return file


def sign(file: IO[str]) -> None:
    """Writes into a lock's file that this process holds it."""
    file.seek(0)
    file.truncate(0)
    mine = {"pid": os.getpid(), "host": socket.gethostname(), "since": f"{utc_now():%Y-%m-%d %H:%M:%S} UTC"}
    file.write(json.dumps(mine))
    file.flush()


def holder_of(file: IO[str]) -> str:
    """Who holds the lock, as the file says; the holder may not have written it yet."""
    try:
        file.seek(0)
        told = json.loads(file.read(_LONGEST_NOTE))
        return f"process {told['pid']} on {told['host']} since {told['since']}"
    except (OSError, ValueError, TypeError, KeyError):
        return "another process"


class RunError(ValueError):
    """A run folder that cannot be used as asked; the text is one line that says what to do."""


def holds(folder: Path, name: str) -> bool:
    """Whether the folder has something of that name; no for a path that cannot be."""
    try:
        return (folder / name).exists()
    except OSError:
        # A name that is too long, a folder that may not be read.
        return False


def new_folder(out: Path, now: datetime, environment: Environment, suffix: str = "") -> Path:
    """A new folder in `out` (made if need be): <time>-<commit><suffix>, with a counter where that is taken."""
    return folder_of_time(out, now, commit_name(environment) + suffix)


def folder_of_time(out: Path, now: datetime, what: str) -> Path:
    """A new folder in `out` (made if need be): <time>-<what>, with a counter where that is taken."""
    name = f"{now:%Y%m%dT%H%M%SZ}-{what}"
    out.mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        folder = out / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir()
        except FileExistsError:
            number += 1
        else:
            return folder


def check_environment(folder: Path, begun: Environment, now: Environment, what: str) -> None:
    """Raises RunError where the environments differ: times of both side by side would pass for a comparison.

    what: the noun for what is to be begun anew instead.
    """
    if differences := begun.differences(now):
        raise RunError(
            f"{folder} was begun in another environment ({'; '.join(differences[:3])}); "
            f"start a new {what} without --resume"
        )

"""One process at a time in a folder of records."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import IO

from .records import utc_now
from .runs import RunError

# Hidden, so that neither a listing nor an archive of a run has it.
LOCK_NAME = ".lock"


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
        holder = _holder(file)
        file.close()
        raise RunError(f"{folder} is in use by {holder}; wait until it ends, or stop it, then go on") from None
    except OSError as failure:
        if failure.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
            file.close()
            raise
        told(f"{folder}: its file system has no locks; see that no other process measures into it")
    file.truncate(0)
    mine = {"pid": os.getpid(), "host": socket.gethostname(), "since": f"{utc_now():%Y-%m-%d %H:%M:%S} UTC"}
    file.write(json.dumps(mine))
    file.flush()
    return file


def _holder(file: IO[str]) -> str:
    """Who holds the lock, as the file says; the holder may not have written it yet."""
    try:
        file.seek(0)
        told = json.loads(file.read())
        return f"process {told['pid']} on {told['host']} since {told['since']}"
    except (OSError, ValueError, TypeError, KeyError):
        return "another process"

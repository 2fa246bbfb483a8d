"""One measurement at a time on a GPU: a lock by the GPU's UUID that all processes of a host share.

Processes that take turns (`ldmperf compare --commits`) hold it together: of them one runs at a time anyway.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import secrets
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from ..terminal.visible import visible
from .folders import holder_of, sign
from .turn import TURNS_VARIABLE

# The same for all users, whatever their TMPDIR; not seen from another container.
LOCKS = Path("/tmp")
# Seconds between two looks at a lock that others hold.
_PAUSE_S = 0.2
# The bytes of the file are places (fcntl(2), POSIX locks): the first is held while who holds the lock is looked up
# or changed. Each party has one of the others, which it holds for reading.
_PLACES = 2**40


def gpu_uuid(device: str) -> str | None:
    """The UUID of a CUDA device; None of another device, and where it cannot be told."""
    if not device.startswith("cuda"):
        return None
    import torch

    try:
        return str(torch.cuda.get_device_properties(device).uuid)
    except Exception:
        return None


def waits_for_gpu(holder: str) -> str:
    """The line that says so."""
    return f"waiting for the GPU, which {holder} measures on"


@contextmanager
def held_gpu(
    device: str, on_wait: Callable[[str], None], on_held: Callable[[], None] | None = None
) -> Iterator[None]:
    """Holds the GPU of that device inside, for this process; a CPU needs no holding.

    Where another process holds it, `on_wait` is told who, once, and `on_held` that it is over. Where the file
    cannot be made, nothing is held.
    """
    uuid = gpu_uuid(device)
    file = None if uuid is None else _opened(LOCKS / f"ldmperf-{uuid}.lock")
    if file is None:
        yield
        return
    with file:
        place = 1 + _party() % _PLACES
        has_waited = False
        while not _taken(file, place):
            if not has_waited:
                has_waited = True
                on_wait(visible(holder_of(file)))
            time.sleep(_PAUSE_S)
        if has_waited and on_held is not None:
            on_held()
        yield


def _party() -> int:
    """What this process holds locks as: the sides of a comparison share a number, all others have their own."""
    turns = os.environ.get(TURNS_VARIABLE)
    if not turns:
        return secrets.randbits(64)
    # The sockets of a round's sides lie in one folder.
    return int.from_bytes(hashlib.sha256(os.fsencode(os.path.dirname(turns))).digest()[:8])


def _taken(file: IO[str], place: int) -> bool:
    """Whether no other party has the lock, and this one has it now."""
    descriptor = file.fileno()
    fcntl.lockf(descriptor, fcntl.LOCK_EX, 1, 0)
    try:
        # Writing needs all places of others, whose holders only read; given back at once.
        for start, length in ((1, place - 1), (place + 1, 0)):
            if start == 1 and not length:
                continue
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, length, start)
            fcntl.lockf(descriptor, fcntl.LOCK_UN, length, start)
        fcntl.lockf(descriptor, fcntl.LOCK_SH, 1, place)
        sign(file)
    except BlockingIOError:
        return False
    finally:
        fcntl.lockf(descriptor, fcntl.LOCK_UN, 1, 0)
    return True


def _opened(path: Path) -> IO[str] | None:
    """The lock's file, which every user may write; None where there is none and none can be made."""
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
    descriptor = None
    for more in (0, os.O_CREAT | os.O_EXCL, 0):
        # Not with O_CREAT alone: where others own it the kernel refuses that (fs.protected_regular).
        with suppress(OSError):
            descriptor = os.open(path, flags | more, 0o666)
            break
    if descriptor is None:
        return None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        return None
    with suppress(OSError):
        # Whatever the umask is; refused to who does not own it.
        os.fchmod(descriptor, 0o666)
    return os.fdopen(descriptor, "r+", encoding="utf-8")

"""The end of a process that measures: how it speaks to the one that has started it, and ends with it."""

from __future__ import annotations

import fcntl
import gc
import os
import pickle
import select
import signal
import struct
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import NoReturn

# Before each value its length; after each, from the other side, that it has been dealt with.
HEADER = struct.Struct("!I")
TAKEN = b"."
# What stops a command is for its first process to judge: a terminal sends the one to all in its group, a batch
# system the other to all of a job.
STOPS = frozenset({signal.SIGINT, signal.SIGTERM})
# fcntl.h; python's fcntl has no name for it before 3.13.
_F_SETSIG = 10
# Warnings may come from other threads.
_SPEAKING = threading.RLock()


@dataclass(frozen=True)
class ParentPipe:
    """The child's end: what it says, and when that was taken."""

    said: Connection
    taken: Connection
    alive: Connection

    def say(self, message: object) -> None:
        """Sends a value and waits until it has been dealt with; where there is no parent, the process ends."""
        content = pickle.dumps(message)
        with _SPEAKING:
            try:
                _write(self.said.fileno(), HEADER.pack(len(content)) + content)
                taken = os.read(self.taken.fileno(), 1)
            except OSError:
                taken = b""
        if not taken:
            end_group()


def run_child(
    parent: ParentPipe,
    variables: dict[str, str],
    threads: int | None,
    work: Callable[..., None],
    arguments: tuple[object, ...],
) -> NoReturn:
    """The whole of a child: stands in for the process that started it, then does the work."""
    # A session: no terminal's signals, and one group with all that it starts.
    os.setsid()
    _die_with_parent(parent.alive)
    for number in STOPS:
        # Not SIG_IGN, which what this process starts would inherit.
        signal.signal(number, lambda *_: None)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
    # What was loaded is no garbage: looking through it would copy its pages into this process.
    gc.freeze()
    os.environ.clear()
    os.environ.update(variables)
    _offer_to_the_oom_killer()
    if threads is not None:
        import torch

        if threads != torch.get_num_threads():
            torch.set_num_threads(threads)
    code = 1
    try:
        work(parent, *arguments)
        code = 0
    finally:
        if code:
            sys.excepthook(*sys.exc_info())
        for stream in filter(None, (sys.stdout, sys.stderr)):
            with suppress(OSError, ValueError):
                stream.flush()
        # All is said. Taking down CUDA and pools of threads may take seconds, hang or crash.
        os._exit(code)


def _die_with_parent(alive: Connection) -> None:
    """Has this process's group killed as soon as the parent's end of the pipe is closed: when the parent ends.

    The kernel does it where it can (fcntl(2): O_ASYNC with F_SETSIG), whatever this process hangs in; elsewhere a
    thread does.
    """
    descriptor = alive.fileno()
    try:
        if sys.platform != "linux":
            raise OSError
        fcntl.fcntl(descriptor, fcntl.F_SETOWN, -os.getpgid(0))
        fcntl.fcntl(descriptor, _F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) | os.O_ASYNC)
    except OSError:
        threading.Thread(target=_wait_for_the_end, args=(descriptor,), daemon=True).start()
        return
    # It may have ended before.
    if select.select([descriptor], [], [], 0)[0]:
        end_group()


def _wait_for_the_end(descriptor: int) -> None:
    os.read(descriptor, 1)
    end_group()


def end_group() -> NoReturn:
    """Ends this process and all that it has started, at once."""
    os.killpg(0, signal.SIGKILL)
    os._exit(1)


def _offer_to_the_oom_killer() -> None:
    """Where memory runs out the kernel takes this process, and not the one that keeps the records."""
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")


def _write(descriptor: int, content: bytes) -> None:
    while content:
        content = content[os.write(descriptor, content) :]

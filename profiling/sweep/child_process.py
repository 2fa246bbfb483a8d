"""A process of its own for what may crash or hang: started from a server, listened to, ended with all it started.

Where there is a fork server (Linux, macOS), it has loaded torch and this package, once, and no process of it has
ever touched CUDA: a child is a fork of it and starts in some milliseconds. Elsewhere a child loads them itself.

The child sends what it has to tell and then waits until that has been taken: while it measures, its parent sleeps,
and a record is on disk before the next measurement begins.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import signal
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, NoReturn

from .preload import PRELOADED

# fcntl.h; python's fcntl has no name for it before 3.13.
_F_SETSIG = 10
_HEADER = struct.Struct("!I")
_TAKEN = b"."
_CHUNK = 1 << 20
# poll(2) takes milliseconds as an int.
_LONGEST_WAIT_S = 1e6
# How long a child whose last word was heard may take to end, and one that was killed to be gone.
_TO_END_S = 10.0


class Hung(Exception):
    """A child that gave no sign of life for `seconds`."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"no sign of life for {seconds:g} s")
        self.seconds = seconds


class Died(Exception):
    """A child that ended before its last word. code: minus its signal, or what it exited with."""

    def __init__(self, code: int) -> None:
        super().__init__(how_it_ended(code))
        self.code = code


def how_it_ended(code: int) -> str:
    """ "was ended by SIGSEGV", "ended with exit code 3"."""
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"was ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"was ended by signal {-code}"


@dataclass(frozen=True)
class Mouth:
    """The child's end: what it says, and when that was taken."""

    said: Connection
    taken: Connection
    alive: Connection

    def say(self, sign: object) -> None:
        """Sends a value and waits until it has been dealt with; where there is no parent, the process ends."""
        content = pickle.dumps(sign)
        with _SPEAKING:
            try:
                _write(self.said.fileno(), _HEADER.pack(len(content)) + content)
                taken = os.read(self.taken.fileno(), 1)
            except OSError:
                taken = b""
        if not taken:
            end_group()


# Warnings may come from other threads.
_SPEAKING = threading.RLock()


class ChildProcess:
    """A process that runs `work(mouth, *arguments)`. As a context it leaves nothing that runs."""

    def __init__(self, work: Callable[..., None], *arguments: object) -> None:
        context = start_server()
        self._heard, said = context.Pipe(duplex=False)
        taken, self._taking = context.Pipe(duplex=False)
        alive, self._alive = context.Pipe(duplex=False)
        torch = sys.modules.get("torch")
        threads = None if torch is None else torch.get_num_threads()
        self._process = context.Process(
            target=_run, args=(Mouth(said, taken, alive), dict(os.environ), threads, work, arguments)
        )
        try:
            self._process.start()
        except BaseException:
            self._close()
            raise
        finally:
            for end in (said, taken, alive):
                end.close()
        os.set_blocking(self._heard.fileno(), False)
        self._buffer = bytearray()

    def __enter__(self) -> ChildProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    @property
    def pid(self) -> int:
        pid: int | None = self._process.pid
        assert pid is not None
        return pid

    def signs(self, patience: Callable[[], float], is_last: Callable[[Any], bool]) -> Iterator[Any]:
        """What the child says, up to its last word; each is taken when the next one is asked for.

        Raises Hung where nothing comes within the seconds of `patience`, asked anew each time, and Died.
        """
        while True:
            seconds = patience()
            sign = self._next(seconds)
            yield sign
            if is_last(sign):
                return
            # A child that died meanwhile is heard of at the next turn.
            with suppress(BrokenPipeError):
                os.write(self._taking.fileno(), _TAKEN)

    def _next(self, seconds: float) -> Any:
        until = time.monotonic() + seconds
        while True:
            if (sign := self._whole()) is not None:
                return sign
            left = until - time.monotonic()
            if left <= 0:
                raise Hung(seconds)
            ready = wait([self._heard, self._process.sentinel], min(left, _LONGEST_WAIT_S))
            if self._heard in ready:
                try:
                    received = os.read(self._heard.fileno(), _CHUNK)
                except BlockingIOError:
                    continue
                if received:
                    self._buffer += received
                    continue
            elif not ready:
                continue
            # The pipe is closed, or the process has ended and said nothing more.
            self._process.join(_TO_END_S)
            code = self._process.exitcode
            self.end()
            raise Died(-signal.SIGKILL if code is None else code)

    def _whole(self) -> Any:
        """The next value that has been received to its end; None where there is none."""
        if len(self._buffer) < _HEADER.size:
            return None
        (length,) = _HEADER.unpack_from(self._buffer)
        if len(self._buffer) < _HEADER.size + length:
            return None
        content = bytes(self._buffer[_HEADER.size : _HEADER.size + length])
        del self._buffer[: _HEADER.size + length]
        return pickle.loads(content)

    def end(self) -> None:
        """Kills it, if it still runs, and all that it has started; what it said last stays unheard."""
        if self._heard.closed:
            return
        # Its group first, whose number is the child's as long as one of it runs.
        for kill in (os.killpg, os.kill):
            with suppress(ProcessLookupError, PermissionError):
                kill(self.pid, signal.SIGKILL)
        self._process.join(_TO_END_S)
        self._close()

    def _close(self) -> None:
        for end in (self._heard, self._taking, self._alive):
            end.close()


def start_server() -> Any:
    """The context of multiprocessing for children; its fork server, if it has one, is starting or there."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    from multiprocessing import forkserver

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", *PRELOADED])
    with _interrupts_held_back():
        forkserver.ensure_running()
    return context


@contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """Blocks SIGINT: what is started inside never gets it, as the terminal's Ctrl-C is for this process alone."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _run(
    mouth: Mouth,
    variables: dict[str, str],
    threads: int | None,
    work: Callable[..., None],
    arguments: tuple[object, ...],
) -> NoReturn:
    """In the child: stands in for the process that started it, then does the work."""
    # A session: no terminal's signals, and one group with all that it starts.
    os.setsid()
    _die_with_parent(mouth.alive)
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
        work(mouth, *arguments)
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
    import fcntl
    import select

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

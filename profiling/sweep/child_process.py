"""A process of its own for what may crash or hang: started from a server, listened to, ended with all it started.

Where there is a fork server (Linux, macOS), it has loaded torch and this package, once, and no process of it has
ever touched CUDA: a child is a fork of it and starts in some milliseconds. Elsewhere a child loads them itself.

The child sends what it has to tell and then waits until that has been taken: while it measures, its parent sleeps,
and a record is on disk before the next measurement begins.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import wait
from typing import Any

from .child_end import HEADER, STOPS, TAKEN, ParentPipe, run_child
from .preload import PRELOADED

_CHUNK = 1 << 20
# A server that is killed takes a moment to be gone.
_MOST_TRIES, _PAUSE_S = 20, 0.1
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


class ChildProcess:
    """A process that runs `work(parent, *arguments)`. As a context it leaves nothing that runs."""

    def __init__(self, work: Callable[..., None], *arguments: object) -> None:
        context = start_server()
        self._heard, said = context.Pipe(duplex=False)
        taken, self._taking = context.Pipe(duplex=False)
        alive, self._alive = context.Pipe(duplex=False)
        torch = sys.modules.get("torch")
        threads = None if torch is None else torch.get_num_threads()
        self._process = context.Process(
            target=run_child, args=(ParentPipe(said, taken, alive), dict(os.environ), threads, work, arguments)
        )
        try:
            self._start()
        except BaseException:
            self._close()
            raise
        finally:
            for end in (said, taken, alive):
                end.close()
        os.set_blocking(self._heard.fileno(), False)
        self._buffer = bytearray()

    def _start(self) -> None:
        """Starts it; where the fork server has just been killed, from another one."""
        for _ in range(_MOST_TRIES):
            try:
                self._process.start()
                return
            except (ConnectionError, EOFError):
                time.sleep(_PAUSE_S)
                start_server()
        self._process.start()

    def __enter__(self) -> ChildProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    @property
    def pid(self) -> int:
        pid: int | None = self._process.pid
        assert pid is not None
        return pid

    def messages(self, patience: Callable[[], float], is_last: Callable[[Any], bool]) -> Iterator[Any]:
        """What the child says, up to its last word; each is taken when the next one is asked for.

        Raises Hung where nothing comes within the seconds of `patience`, asked anew each time, and Died.
        """
        while True:
            seconds = patience()
            message = self._next(seconds)
            yield message
            if is_last(message):
                return
            # A child that died meanwhile is heard of at the next turn.
            with suppress(BrokenPipeError):
                os.write(self._taking.fileno(), TAKEN)

    def _next(self, seconds: float) -> Any:
        until = time.monotonic() + seconds
        while True:
            if (message := self._whole()) is not None:
                return message
            left = until - time.monotonic()
            if left <= 0:
                raise Hung(seconds)
            ready = wait([self._heard, self._process.sentinel], min(left, _LONGEST_WAIT_S))
            if not ready:
                continue
            # What it said comes before that it has ended: both may come to be known in one wait, in either order.
            try:
                received = os.read(self._heard.fileno(), _CHUNK)
            except BlockingIOError:
                if self._process.sentinel not in ready:
                    continue
                received = b""
            if received:
                self._buffer += received
                continue
            # The pipe is closed, or the process has ended and said nothing more.
            self._process.join(_TO_END_S)
            code = self._process.exitcode
            self.end()
            raise Died(-signal.SIGKILL if code is None else code)

    def _whole(self) -> Any:
        """The next value that has been received to its end; None where there is none."""
        if len(self._buffer) < HEADER.size:
            return None
        (length,) = HEADER.unpack_from(self._buffer)
        if len(self._buffer) < HEADER.size + length:
            return None
        content = bytes(self._buffer[HEADER.size : HEADER.size + length])
        del self._buffer[: HEADER.size + length]
        return pickle.loads(content)

    def end(self) -> None:
        """Kills it, if it still runs, and all that it has started; what it said last stays unheard."""
        if self._heard.closed:
            return
        # Its group first, whose number is the child's as long as one of it runs.
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        # It may not have a group yet. The number of one that has ended may be another process's by now.
        if self._process.exitcode is None:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(self.pid, signal.SIGKILL)
        self._process.join(_TO_END_S)
        self._close()

    def _close(self) -> None:
        for end in (self._heard, self._taking, self._alive):
            end.close()


def start_server() -> Any:
    """The context of multiprocessing for children; its fork server, if it has one, is starting or there."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    from multiprocessing import forkserver, resource_tracker

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", *PRELOADED])
    # First: where it starts, it lets signals through again.
    resource_tracker.ensure_running()
    with _stops_held_back():
        forkserver.ensure_running()
    return context


@contextmanager
def _stops_held_back() -> Iterator[None]:
    """Blocks `STOPS`: what is started inside never gets them, which are for this process alone to judge."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

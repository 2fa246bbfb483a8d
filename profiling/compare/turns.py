"""Sides measured in turn on this machine: each round runs every side once, each in a process of its own.

Of a round's processes one runs at a time. A side runs until it asks for a turn, which `interleave` does before
each round of samples, or until it ends; then the next one runs, always in the same order. So samples of all sides
are taken within moments of one another, each after one of another side, whatever the machine does meanwhile.

A side finds a socket named in LDMPERF_TURNS. It asks with a byte, and waits; a line grants it the next turn, with
the processes of the other sides that wait. What never asks runs whole: other commands, and commits from before
there were turns. Processes of one side that run at the same time are one to this module: all have the turn.
"""

from __future__ import annotations

import itertools
import os
import select
import shlex
import signal
import socket
import struct
import subprocess
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..measure.folders import RunError
from ..measure.timing import round_order
from ..measure.turn import ASKED, TURNS_VARIABLE, WAITING_VARIABLE, granted, named
from ..terminal.visible import counted
from .sets import RecordSet, read_set

# Stands in a command for the folder that its records go to.
OUT = "{out}"
# A process is waited for together with sockets by its descriptor, which Linux alone has.
CAN_TAKE_TURNS = hasattr(os, "pidfd_open")
# How long a side that is told to stop may take to put its records away.
_PATIENCE_S = 30.0


@dataclass(frozen=True)
class Side:
    """What is run in each round: a command, in a folder, with these variables, its records below `out`.

    commit: the commit that its records must say they come from, by the code that made them; None where the code
    that is compared is not this project's, and records cannot tell.
    """

    name: str
    command: tuple[str, ...]
    out: Path
    place: Path
    variables: Mapping[str, str]
    commit: str | None = None


class RoundFailed(Exception):
    """A side that made no records, or records of other code; the text is one line. `code`: of the exit."""

    def __init__(self, text: str, code: int = 1) -> None:
        super().__init__(text)
        self.code = code


def orders(names: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """Who runs in each round, in that order: of two sides the order is flipped each round (`round_order`)."""
    queue = deque(names)
    for number in itertools.count():
        yield round_order(queue, mirrored=bool(number // len(names) % 2))
        queue.rotate(-1)


def run_rounds(
    sides: Sequence[Side], rounds: int, told: Callable[[str], None], *, whole_runs: bool = False
) -> list[RecordSet]:
    """Runs every side once in each round; the records of each side. `told` gets a line on each round.

    whole_runs: no turns within a round, so that no two sides are in memory together. Each run's output is in a log
    beside its records. Raises RoundFailed. An interrupt stops what is running and passes through.
    """
    by_name = {side.name: side for side in sides}
    for number, order in enumerate(itertools.islice(orders(list(by_name)), rounds), 1):
        took = _run_round([by_name[name] for name in order], number, whole_runs)
        told(f"round {number} of {rounds}: {', '.join(took)}")
    return [read_set(side.out) for side in sides]


def _run_round(sides: Sequence[Side], number: int, whole_runs: bool) -> list[str]:
    """Runs every side once, by turns; what each took, in words."""
    with tempfile.TemporaryDirectory(prefix="ldmperf-") as folder, ExitStack() as stack:
        is_whole = whole_runs or not CAN_TAKE_TURNS
        sockets = [None if is_whole else Path(folder, str(place)) for place in range(len(sides))]
        runs = [
            stack.enter_context(_Run(side, number, address)) for side, address in zip(sides, sockets, strict=True)
        ]
        going = deque(runs)
        while going:
            run = going.popleft()
            if run.turn([process for other in going for process in other.asking]):
                going.append(run)
        return [f"{run.side.name} {run.seconds:.1f} s in {counted(run.turns, 'turn')}" for run in runs]


class _Run:
    """A side's process in one round. Its first turn starts it; as a context it leaves nothing that runs.

    address: of the socket at which it may ask for turns; None where it is to run whole.
    """

    def __init__(self, side: Side, number: int, address: Path | None) -> None:
        self.side = side
        self.out = side.out / f"round-{number:02}"
        self.log = side.out / f"round-{number:02}.log"
        self.command = [part.replace(OUT, str(self.out)) for part in side.command]
        self.turns = 0
        self.seconds = 0.0
        self._address = address
        self._resources = ExitStack()
        self._process: subprocess.Popen[bytes] | None = None
        self._listener: socket.socket | None = None
        self._connections: list[socket.socket] = []
        self._asking: list[socket.socket] = []

    def __enter__(self) -> _Run:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None and self._process.returncode is None:
            _stop(self._process)
        self._resources.close()

    @property
    def asking(self) -> list[int]:
        """The processes that wait for a turn."""
        return [_process_of(connection) for connection in self._asking]

    def turn(self, waiting: Sequence[int]) -> bool:
        """Lets it run until it asks for its next turn, or to its end; whether it asked.

        waiting: processes of the other sides. Raises RoundFailed where it cannot run, and where it has ended
        without the records that it should have made.
        """
        start = time.monotonic()
        process = self._process or self._start(waiting)
        for connection in self._asking:
            # One that is gone has nothing to wait for.
            with suppress(OSError):
                connection.sendall(granted(waiting))
        self._asking = []
        has_ended = self._wait(process)
        self.turns += 1
        self.seconds += time.monotonic() - start
        if has_ended:
            if process.returncode is None:
                # Before it is waited for, as its number may be another's then.
                _kill(process)
            self._check(process.wait())
        return not has_ended

    def _start(self, waiting: Sequence[int]) -> subprocess.Popen[bytes]:
        self.out.mkdir(parents=True)
        ours = (TURNS_VARIABLE, WAITING_VARIABLE)
        variables = {name: value for name, value in self.side.variables.items() if name not in ours}
        if self._address is not None:
            self._listener = self._resources.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            try:
                self._listener.bind(str(self._address))
            except OSError as failure:
                reason = failure.strerror or failure
                raise RoundFailed(
                    f"no socket at {self._address} ({reason}); set TMPDIR to a shorter path", 2
                ) from None
            self._listener.listen()
            variables |= {TURNS_VARIABLE: str(self._address), WAITING_VARIABLE: named(waiting)}
        with self.log.open("wb") as file:
            try:
                # A session of its own: Ctrl-C reaches it by us alone, and what it has started is stopped with it.
                self._process = subprocess.Popen(
                    self.command,
                    cwd=self.side.place,
                    env=variables,
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            except OSError as failure:
                raise RoundFailed(
                    f"{self.side.name}: cannot run {self.command[0]!r} ({failure.strerror})", 2
                ) from None
        return self._process

    def _wait(self, process: subprocess.Popen[bytes]) -> bool:
        """Until a process of the side asks for a turn, or the side's own ends; whether it has ended."""
        if not CAN_TAKE_TURNS:
            process.wait()
            return True
        ended = os.pidfd_open(process.pid)
        try:
            while not self._asking:
                sources: list[Any] = [ended, *filter(None, [self._listener]), *self._connections]
                ready, _, _ = select.select(sources, [], [])
                if ended in ready:
                    return True
                if self._listener is not None and self._listener in ready:
                    self._connections.append(self._resources.enter_context(self._listener.accept()[0]))
                for connection in [one for one in self._connections if one in ready]:
                    if _received(connection) == ASKED:
                        self._asking.append(connection)
                    else:
                        self._connections.remove(connection)
                        connection.close()
        finally:
            os.close(ended)
        return False

    def _check(self, code: int) -> None:
        """Raises RoundFailed where the records of a run that has ended are not those of all its cases."""
        side, log, command = self.side, self.log, shlex.join(self.command)
        try:
            made = read_set(self.out)
        except RunError:
            raise RoundFailed(
                f"{side.name}: no record from {command} (exit code {code}): {_last_line(log)}; see {log}",
                code if code == 2 else 1,
            ) from None
        # A run in which a case failed ends with 1, and says so in its records. What crashed has left cases out.
        if code < 0 or (code > 0 and all(record.status == "ok" for record in made.all_records)):
            ended = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
            raise RoundFailed(f"{side.name}: {command} {ended} before its time: {_last_line(log)}; see {log}")
        # Written by the code that ran, about the checkout that it lies in.
        commits = {record.environment.git_commit for record in made.all_records}
        if side.commit is not None and commits != {side.commit}:
            raise RoundFailed(f"{side.name}: its records are of commit {', '.join(map(str, commits))}; see {log}")


def _received(connection: socket.socket) -> bytes:
    """A byte; none from a process that has ended, whichever way."""
    try:
        return connection.recv(1)
    except OSError:
        return b""


def _process_of(connection: socket.socket) -> int:
    """The process at the other end (unix(7): SO_PEERCRED, whose first number it is)."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    number: int = struct.unpack("3i", credentials)[0]
    return number


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ends a session, and kills what has not ended in time."""
    try:
        # At once: Ctrl-C would let cases in flight finish.
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(_PATIENCE_S)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        pass
    _kill(process)
    process.wait()


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kills what is left of a session: what a process has started may wait for a turn, or compute."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="backslashreplace").splitlines() if line.strip()]
    return lines[-1].strip() if lines else "it said nothing"

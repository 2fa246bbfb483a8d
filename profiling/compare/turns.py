"""Sides measured in turn on this machine: each round runs every side once, each in a process of its own."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..measure.folders import RunError
from ..measure.timing import round_order
from .sets import RecordSet, read_set

# Stands in a command for the folder that its records go to.
OUT = "{out}"
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


def orders(names: Sequence[str], rounds: int) -> Iterator[tuple[str, ...]]:
    """Who runs in each round, in that order: of two sides the order is flipped each round (`round_order`)."""
    queue = deque(names)
    for number in range(rounds):
        yield round_order(queue, mirrored=bool(number // len(names) % 2))
        queue.rotate(-1)


def run_rounds(sides: Sequence[Side], rounds: int, told: Callable[[str], None]) -> list[RecordSet]:
    """Runs every side once in each round; the records of each side. `told` gets a line on each round.

    Each run's output is in a log beside its records. Raises RoundFailed. An interrupt stops the run in flight and
    passes through.
    """
    by_name = {side.name: side for side in sides}
    for number, order in enumerate(orders(list(by_name), rounds), 1):
        took = []
        for name in order:
            start = time.monotonic()
            _run_once(by_name[name], number)
            took.append(f"{name} {time.monotonic() - start:.1f} s")
        told(f"round {number} of {rounds}: {', then '.join(took)}")
    return [read_set(side.out) for side in sides]


def _run_once(side: Side, number: int) -> None:
    out = side.out / f"round-{number:02}"
    out.mkdir(parents=True)
    log = side.out / f"round-{number:02}.log"
    command = [part.replace(OUT, str(out)) for part in side.command]
    code = _finished(command, side, log)
    try:
        made = read_set(out)
    except RunError:
        raise RoundFailed(
            f"{side.name}: no record from {shlex.join(command)} (exit code {code}): {_last_line(log)}; see {log}",
            code if code == 2 else 1,
        ) from None
    # A run in which a case failed ends with 1, and says so in its records. What crashed has left cases out.
    if code < 0 or (code > 0 and all(record.status == "ok" for record in made.all_records)):
        ended = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
        raise RoundFailed(
            f"{side.name}: {shlex.join(command)} {ended} before its time: {_last_line(log)}; see {log}"
        )
    # Written by the code that ran, about the checkout that it lies in.
    commits = {record.environment.git_commit for record in made.all_records}
    if side.commit is not None and commits != {side.commit}:
        raise RoundFailed(f"{side.name}: its records are of commit {', '.join(map(str, commits))}; see {log}")


def _finished(command: Sequence[str], side: Side, log: Path) -> int:
    """The exit code of the command, once it and all that it started have ended."""
    with log.open("wb") as file:
        try:
            # A session of its own: Ctrl-C reaches it by us alone, and what it has started is stopped with it.
            process = subprocess.Popen(
                command,
                cwd=side.place,
                env=dict(side.variables),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as failure:
            raise RoundFailed(f"{side.name}: cannot run {command[0]!r} ({failure.strerror})", 2) from None
        try:
            return process.wait()
        finally:
            if process.poll() is None:
                _stop(process)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Interrupts a session, as Ctrl-C does, and kills what has not ended in time."""
    try:
        os.killpg(process.pid, signal.SIGINT)
        process.wait(_PATIENCE_S)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="backslashreplace").splitlines() if line.strip()]
    return lines[-1].strip() if lines else "it said nothing"

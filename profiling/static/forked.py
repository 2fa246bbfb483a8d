"""Work by forked processes: they inherit what cannot be sent, and one that dies costs only its item."""

from __future__ import annotations

import multiprocessing
import os
import signal
import warnings
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Lost:
    """In place of a result: the item's process died, or its work raised."""

    reason: str


def usable_cores() -> int:
    """The cores that this process may run on."""
    return len(os.sched_getaffinity(0))


def map_forked(work: Callable[[T], R], items: Sequence[T], processes: int) -> Generator[tuple[T, R | Lost]]:
    """(item, work(item)) as they come; begun in order, by `processes` processes forked from this one.

    Results are sent and must pickle; items and `work` need not. Nothing may have initialized CUDA here that `work`
    uses. When the iterator ends or is closed, and when this process dies, its processes end.
    """
    context = multiprocessing.get_context("fork")
    running: dict[Connection, tuple[Any, int]] = {}
    numbers = iter(range(len(items)))

    def begin(number: int) -> None:
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(work, items, theirs, [*running, ours]), daemon=True)
        with warnings.catch_warnings():
            # Idle threads of libraries; from Python 3.12 on forking beside them is warned of.
            warnings.simplefilter("ignore", DeprecationWarning)
            process.start()
        # A process that dies is seen by its pipe's end, which nobody else may hold.
        theirs.close()
        running[ours] = (process, number)
        ours.send(number)

    def go_on(connection: Connection, process: Any) -> None:
        number = next(numbers, None)
        if number is None:
            connection.close()
            process.join()
        else:
            running[connection] = (process, number)
            connection.send(number)

    try:
        for _, number in zip(range(processes), numbers, strict=False):
            begin(number)
        while running:
            for connection in wait(list(running)):
                assert isinstance(connection, Connection)
                process, number = running.pop(connection)
                try:
                    result = connection.recv()
                except EOFError:
                    connection.close()
                    process.join()
                    if (following := next(numbers, None)) is not None:
                        begin(following)
                    result = Lost(f"its process ended with code {process.exitcode}")
                else:
                    go_on(connection, process)
                yield items[number], result
    finally:
        for process, _ in running.values():
            process.terminate()
        for connection, (process, _) in running.items():
            process.join()
            connection.close()


def _serve(work: Callable[[Any], Any], items: Sequence[Any], theirs: Connection, others: list[Connection]) -> None:
    """Answers each number with the work on that item, until nobody asks any more."""
    # Ctrl-C reaches every process of a terminal's; the first ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for connection in others:
        connection.close()
    while True:
        try:
            number = theirs.recv()
        except EOFError:
            # Without the parent's handlers: they are the parent's to run.
            os._exit(0)
        try:
            result = work(items[number])
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            result = Lost(f"{type(error).__name__}: {lines[0]}")
        theirs.send(result)

"""Progress through a known number of things: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from .visible import say, visible

# Seconds between lines where there is no bar.
INTERVAL = 5.0


@contextmanager
def counting(
    console: Console, total: int, what: str, clock: Callable[[], float] = time.monotonic
) -> Iterator[Callable[[str], None]]:
    """A function to call with the name of each thing that is done. `what`: the plural noun of what is counted.

    These calls draw the bar, no thread does: a process forked beside a thread could inherit the thread's lock.
    """
    if console.is_terminal:
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=console, auto_refresh=False, transient=True) as bar:
            task = bar.add_task(what, total=total)
            yield lambda name: bar.update(task, advance=1, description=visible(name), refresh=True)
        return
    done, said = 0, clock()

    def count(name: str) -> None:
        nonlocal done, said
        done += 1
        if clock() - said >= INTERVAL:
            said = clock()
            say(console, f"{done} of {total} {what}: {name}")

    yield count

"""Tasks beside each other, each in a process of one thread, under a bar that moves while they run."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import MutableSequence, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import replace
from functools import partial

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from .study import Study
from .tasks import Task

# Seconds between two looks at what is done.
_LOOK = 0.5
# How much of each task is done, in memory that a worker shares with the process of the bar. A killed worker leaves
# neither a lock nor half a message there: a number is written whole.
_shares: MutableSequence[float]


def run_all(name: str, tasks: Sequence[Task], study: Study, workers: int) -> None:
    """Runs the tasks, the longest first. The first that fails ends it, once those in flight are done.

    Raises what that one raised, or BrokenProcessPool where a worker was killed.
    """
    context = multiprocessing.get_context("spawn")
    ordered = sorted(tasks, key=lambda task: -task.cost)
    shares = context.RawArray("d", len(ordered))
    times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), *times)
    with (
        Progress(*columns, console=Console(stderr=True)) as progress,
        ProcessPoolExecutor(workers, context, _begin_worker, (shares,)) as pool,
    ):
        bar = progress.add_task(name, total=sum(task.cost for task in tasks))
        # Workers start here. One that still imports answers Ctrl-C by a traceback: its signal waits until then.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            running = {pool.submit(_run, task, study, place) for place, task in enumerate(ordered)}
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        try:
            while running:
                done, running = wait(running, _LOOK, FIRST_COMPLETED)
                for future in done:
                    future.result()
                costs = (task.cost * share for task, share in zip(ordered, shares, strict=True))
                progress.update(bar, completed=sum(costs))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _run(task: Task, study: Study, place: int) -> None:
    """In a worker: the task, whose share is that at its place."""
    task.run(replace(study, tell=partial(_shares.__setitem__, place)))
    _shares[place] = 1.0


def _begin_worker(shares: MutableSequence[float]) -> None:
    """One thread. Ctrl-C ends it at once: Python's own handler would print a traceback and take the next task."""
    global _shares
    _shares = shares
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})

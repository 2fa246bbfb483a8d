"""Tasks beside each other, each in a process of one thread, under a bar."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from .study import Study
from .tasks import Task


def run_all(name: str, tasks: Sequence[Task], study: Study, workers: int) -> None:
    """Runs the tasks, the longest first. The first that fails ends it, once those in flight are done.

    Raises what that one raised, or BrokenProcessPool where a worker was killed.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with (
        Progress(*columns, console=Console(stderr=True)) as progress,
        ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _begin_worker) as pool,
    ):
        bar = progress.add_task(name, total=sum(task.cost for task in tasks))
        ordered = sorted(tasks, key=lambda task: -task.cost)
        # Workers start here. One that still imports answers Ctrl-C by a traceback: its signal waits until then.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            running = {pool.submit(task.run, study): task for task in ordered}
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        try:
            for done in as_completed(running):
                done.result()
                progress.advance(bar, running[done].cost)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _begin_worker() -> None:
    """One thread. Ctrl-C ends it at once: Python's own handler would print a traceback and take the next task."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})

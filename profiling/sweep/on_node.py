"""What a node of a cluster does with a group: checks that it may, times the group, and traces it."""

from __future__ import annotations

import math
import os
import socket
import time
from collections.abc import Generator, Iterable
from dataclasses import dataclass, replace
from typing import TypeAlias

from ..measure.environment import Environment
from ..options import CaseError
from ..trajectory.checkpoints import check_unchanged
from ..trajectory.records import Record
from ..trajectory.short_traces import wants_trace
from .events import Completed, Event, Ran, Recorded
from .group_process import environment_of, measured
from .group_task import GroupTask

# Trajectories of some milliseconds are not told one by one.
_RAN_EVERY_S = 0.5


@dataclass(frozen=True)
class Arrived:
    """A group begins on that node, by the worker with that process id; its records will have that environment."""

    host: str
    environment: Environment
    pid: int


@dataclass(frozen=True)
class Refused:
    """The node may not measure: whatever it did would not belong beside the others' records."""

    reason: str


NodeEvent: TypeAlias = Event | Arrived | Refused


@dataclass(frozen=True)
class NodeTask:
    """A group as it is sent to a node.

    task: with all cases of the group, and the environment of the driver. done: the keys of those that are not to
    be timed. untraced: records of theirs that a trace is still to be made of. threads: torch's. sent_at: the
    driver's clock when it was sent, in seconds since the epoch.
    """

    task: GroupTask
    done: frozenset[str] = frozenset()
    untraced: tuple[Record, ...] = ()
    threads: int = 1
    sent_at: float = 0.0


def on_node(given: NodeTask) -> Generator[NodeEvent, None, None]:
    """Does the task on this machine and yields what happens; the first event is `Arrived` or `Refused`."""
    import torch

    # Processes that measure have as many.
    torch.set_num_threads(given.threads)
    host = socket.gethostname()
    task = given.task
    environment = environment_of(task.cases[0].device)
    if reasons := version_differences(task.environment, environment):
        yield Refused(
            f"node {host} has another ldmperf or other versions than this machine ({'; '.join(reasons[:3])}); "
            "install the same on both"
        )
        return
    try:
        check_unchanged(task.cases)
    except CaseError as wrong:
        yield Refused(f"node {host}: {wrong}; a checkpoint has to lie at the same path on all nodes")
        return
    yield Arrived(host, environment, os.getpid())
    begun = time.monotonic()
    # Clocks of machines may differ by more than it was on its way.
    elapsed = task.time.elapsed + max(time.time() - given.sent_at, 0.0)
    task = replace(task, environment=environment, time=replace(task.time, elapsed=elapsed))
    made = {record.case_key: record for record in given.untraced}
    for event in thinned(measured(task.without(given.done))):
        if isinstance(event, Recorded | Completed):
            made[event.record.case_key] = event.record
        yield event
    untraced = tuple(
        record
        for record in made.values()
        # A trace on another kind of card would not be that record's.
        if wants_trace(record) and not environment.differences(record.environment)
    )
    elapsed += time.monotonic() - begun
    if untraced and elapsed < task.time.whole:
        yield from measured(replace(task, untraced=untraced, time=replace(task.time, elapsed=elapsed)))


def thinned(events: Iterable[Event]) -> Generator[Event, None, None]:
    """The events, without those trajectories that follow another one too soon to be worth a message."""
    last = -math.inf
    for event in events:
        if isinstance(event, Ran):
            if time.monotonic() - last < _RAN_EVERY_S:
                continue
            last = time.monotonic()
        yield event


# What has to be the same on all nodes for their records to belong together.
_VERSIONS = ("git_commit", "git_dirty", "ldmperf", "python", "torch", "triton", "numpy", "diffusers")


def version_differences(driver: Environment, node: Environment) -> list[str]:
    """What differs, as "field: the driver's, the node's". Builds of torch may: a driver needs no CUDA."""

    def version(environment: Environment, name: str) -> str:
        value = getattr(environment, name)
        return str(value).partition("+")[0] if name == "torch" else str(value)

    pairs = [(name, version(driver, name), version(node, name)) for name in _VERSIONS]
    return [f"{name}: {ours}, {theirs}" for name, ours, theirs in pairs if ours != theirs]

"""The state of a machine that a reader of its times has to know, in words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from ..terminal.visible import counted
from .environment import DeviceState, Environment

# Our own threads make a load of 1 for each core; a quarter above is somebody else's.
CROWDED_LOAD = 1.25


def commit(environment: Environment) -> str:
    """The short commit, marked when the checkout had changes on top."""
    if environment.git_commit is None:
        return "unknown commit"
    return environment.git_commit[:7] + (" with uncommitted changes" if environment.git_dirty else "")


def commit_name(environment: Environment) -> str:
    """The short commit as a part of file names; the version where there is no commit."""
    return environment.git_commit[:7] if environment.git_commit else f"v{environment.ldmperf}"


class Measured(Protocol):
    """A record of whatever was measured."""

    @property
    def device_before(self) -> DeviceState: ...
    @property
    def device_after(self) -> DeviceState: ...
    @property
    def environment(self) -> Environment: ...


def busy_notes(records: Sequence[Measured], noun: str) -> list[str]:
    """A note where the load around some of the records is more than our own threads make."""
    loads = []
    for record in records:
        states = (record.device_before.load_average_1min, record.device_after.load_average_1min)
        highest = max((load for load in states if load is not None), default=0.0)
        cores = record.environment.usable_cores
        if cores and highest > CROWDED_LOAD * cores:
            loads.append(highest)
    if not loads:
        return []
    return [
        f"The machine was probably busy with other work: {len(loads)} of {counted(len(records), noun)} saw "
        f"a load average above {CROWDED_LOAD:g} per usable core, up to {max(loads):.2f}."
    ]

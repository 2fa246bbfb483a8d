"""What the process that measures a group tells the one that started it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from ..measure.recorded import Status
from ..trajectory.case import Case
from ..trajectory.records import Record
from .group_task import Carried


@dataclass(frozen=True)
class Ran:
    """One more trajectory is done, as `Listener.ran` says."""

    case: Case
    phase: str


@dataclass(frozen=True)
class Recorded:
    """A case is done, failed or not."""

    record: Record


@dataclass(frozen=True)
class Completed:
    """The record of a case that was recorded before, now with its energy or its trace (`phase`)."""

    record: Record
    phase: str


@dataclass(frozen=True)
class Told:
    """A line for people."""

    line: str


@dataclass(frozen=True)
class Warned:
    """A warning, and where it was raised."""

    text: str
    category: type[Warning]
    filename: str
    line_number: int


@dataclass(frozen=True)
class TookTurns:
    """Other sides of a comparison had their turns for so many seconds, which count for no deadline."""

    seconds: float


@dataclass(frozen=True)
class Learned:
    """What later groups need not find out again."""

    carried: Carried


@dataclass(frozen=True)
class Queued:
    """Another process holds the GPU, and `holder` says which; nothing is measured until it `is_over`."""

    holder: str
    is_over: bool = False


@dataclass(frozen=True)
class GroupBegun:
    """From here on these cases are measured, all of one group; the process may have measured others before."""

    cases: tuple[Case, ...]


# What `measured` yields.
Event: TypeAlias = GroupBegun | Ran | Recorded | Completed | Told | Warned | TookTurns | Learned | Queued


@dataclass(frozen=True)
class Started:
    """The process is there, with all that it has to load."""


@dataclass(frozen=True)
class Entered:
    """A case's phase begins, as `Listener.entered` says; it is done within `patience` seconds unless it hangs."""

    case: Case
    phase: str
    patience: float


@dataclass(frozen=True)
class GroupKnown:
    """What all records of the group say is known: a record of its first case that says nothing else."""

    template: Record


@dataclass(frozen=True)
class AwaitsTurn:
    """Waits for its turn among the sides of a comparison."""


@dataclass(frozen=True)
class Interrupted:
    """Whoever dealt turns has ended: nothing more is to be measured."""

    reason: str


@dataclass(frozen=True)
class Broken:
    """What is left cannot be measured by this process, which ends; `blames_all`: nor by another one."""

    status: Status
    message: str
    blames_all: bool


@dataclass(frozen=True)
class Finished:
    """Everything that there was time for is done."""


# What goes over the pipe.
Message: TypeAlias = Event | Started | Entered | GroupKnown | AwaitsTurn | Interrupted | Broken | Finished

"""A group that is measured on a cluster: what came back of it, and what is left when its worker is lost."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace

from ..measure.timing import Deadline
from ..trajectory.case import Case
from ..trajectory.records import Record
from ..trajectory.short_traces import wants_trace
from .events import Completed, Recorded
from .group_process import lost_record
from .group_task import GroupTask, TimeGiven
from .on_node import Arrived, NodeEvent, NodeTask

# Workers that a group may lose in a row, without a new record in between.
MOST_LOSSES = 3


@dataclass
class ClusterGroup:
    """What is known of a group. task: as it would be done here, with all its cases; done: keys of those that have
    a record. untraced: by key, records that a trace is still to be made of. host: where it runs, None while it
    waits for a node."""

    task: GroupTask
    done: set[str]
    untraced: dict[str, Record]
    host: str | None = None
    losses: int = 0
    is_ended: bool = field(default=False)

    @property
    def left(self) -> list[Case]:
        """The cases without a record."""
        return [case for case in self.task.cases if case.key not in self.done]

    def sent(self, whole: Deadline, timing: Deadline, threads: int) -> NodeTask:
        """What a node is to do now."""
        task = replace(self.task, time=TimeGiven.of(whole, timing))
        return NodeTask(task, frozenset(self.done), tuple(self.untraced.values()), threads, time.time())

    def heard(self, event: NodeEvent) -> None:
        """Takes note of what a node says."""
        match event:
            case Arrived(host, environment, _):
                # What is lost there is of that environment.
                self.host, self.task = host, replace(self.task, environment=environment)
            case Recorded(record) | Completed(record):
                if record.case_key not in self.done:
                    self.done.add(record.case_key)
                    self.losses = 0
                if wants_trace(record):
                    self.untraced[record.case_key] = record
                else:
                    self.untraced.pop(record.case_key, None)

    def lost(self, reason: str) -> list[Record]:
        """Its worker is gone. Where that was once too often it is ended: records of the cases that are left."""
        where = "" if self.host is None else f" on {self.host}"
        self.host, self.losses = None, self.losses + 1
        if self.losses < MOST_LOSSES:
            return []
        self.is_ended = True
        message = f"the worker that measured it was lost {self.losses} times, lastly{where}: {reason}"
        return [lost_record(self.task, case, "error", message) for case in self.left]

"""A group, measured by processes of their own: what ends one of them costs the case in flight, and no other."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field, replace

from ..measure.environment import Environment, state_now
from ..measure.nvml import NO_SENSOR
from ..measure.oom_kills import oom_kills
from ..measure.recorded import Status
from ..trajectory.case import Case
from ..trajectory.group_facts import GroupFacts
from ..trajectory.records import Record
from .child_process import ChildProcess, Died, Hung, how_it_ended
from .events import (
    AwaitsTurn,
    Broken,
    Completed,
    Entered,
    Event,
    Finished,
    GroupBegun,
    GroupKnown,
    Interrupted,
    Learned,
    Message,
    Queued,
    Recorded,
    Started,
    TookTurns,
    Warned,
)
from .group_child import collect, measure_group
from .group_task import GroupTask
from .patience import LEAST_S


def environment_of(device: str) -> Environment:
    """The environment of a device, collected by a process that ends: this one never touches CUDA.

    Raises what collecting raises, and RuntimeError where its process ends otherwise.
    """
    with ChildProcess(collect, device) as child:
        try:
            found = next(child.messages(lambda: LEAST_S, lambda message: True))
        except (Died, Hung) as failure:
            raise RuntimeError(f"the process that asks what is here: {failure}") from None
    if isinstance(found, Exception):
        raise found
    assert isinstance(found, Environment)
    return found


def measured(task: GroupTask) -> Generator[Event, None, None]:
    """Does the task and yields what happens, records first of all; closing the iterator stops it at once.

    The process that measures goes on when the next event is asked for: what is done with one disturbs no sample.
    Where it crashes, hangs or is killed, the case in flight gets a record that says so, and another process goes
    on with what is left. Each process does away with at least one case. A case that there was no time for has no
    record. Raises KeyboardInterrupt where whoever dealt turns has ended.
    """
    while task.left:
        flight = _Flight(task)
        with ChildProcess(measure_group, task) as child:
            try:
                for message in child.messages(flight.patience, flight.is_last):
                    yield from flight.heard(message)
            except (Died, Hung) as failure:
                status, why = flight.judged(failure)
                yield from flight.lost(status, why)
        if flight.is_finished:
            return
        task = flight.rest()


@dataclass
class _Flight:
    """What is known of one process: what it does at the moment, and what it has done."""

    task: GroupTask
    # What is timed now; empty before the first and while traces are made.
    group: tuple[Case, ...] = ()
    case: Case | None = None
    phase: str = ""
    has_started: bool = False
    is_waiting: bool = False
    is_finished: bool = False
    done: set[str] = field(default_factory=set)
    template: Record | None = None
    oom_kills: int | None = field(default_factory=oom_kills)
    # When it began, of a clock that others' turns put back.
    _begun: float = field(default_factory=time.monotonic)
    _patience: float = LEAST_S

    def patience(self) -> float:
        """Seconds that may pass before the next sign of life."""
        if self.is_waiting:
            return math.inf
        # What it has to load first may take longer.
        if self.task.timeout is not None and self.has_started:
            return self.task.timeout
        return self._patience

    @staticmethod
    def is_last(message: Message) -> bool:
        return isinstance(message, Finished | Broken | Interrupted)

    def heard(self, message: Message) -> Iterator[Event]:
        """Takes note of what was said; yields what others are to hear of it."""
        self.is_waiting = isinstance(message, AwaitsTurn) or (isinstance(message, Queued) and not message.is_over)
        match message:
            case Started():
                self.has_started = True
            case Entered(case, phase, seconds):
                self.case, self.phase, self._patience = case, phase, seconds
            case GroupKnown(template):
                self.template = template
            case Interrupted(reason):
                raise KeyboardInterrupt(reason)
            case Finished():
                self.is_finished = True
            case Broken(status, why, blames_all):
                if blames_all:
                    yield from self._lose(self._left_of_group(), status, why)
            case AwaitsTurn():
                pass
            case _:
                if isinstance(message, GroupBegun):
                    self.group, self.case, self.phase, self.template = message.cases, None, "", None
                if isinstance(message, Learned):
                    self.task = replace(self.task, carried=message.carried)
                if isinstance(message, TookTurns):
                    self._begun += message.seconds
                if isinstance(message, Recorded | Completed):
                    self.done.add(message.record.case_key)
                    if self.case is not None and message.record.case_key == self.case.key:
                        self.case = None
                yield message

    def judged(self, failure: Died | Hung) -> tuple[Status, str]:
        """The status of the case in flight, and why its process is gone, without where that was."""
        if isinstance(failure, Hung):
            return (
                "error",
                f"the process that measured it gave no sign of life for {failure.seconds:g} s and was stopped",
            )
        if failure.code == -signal.SIGKILL:
            if self.oom_kills is not None and (oom_kills() or 0) > self.oom_kills:
                return "oom", "the process that measured it was killed by the kernel for want of memory"
            return "error", (
                "the process that measured it was ended by SIGKILL (by somebody, or for want of memory where the "
                "kernel does not count that)"
            )
        return "error", f"the process that measured it {how_it_ended(failure.code)}"

    def lost(self, status: Status, why: str) -> Iterator[Event]:
        """What is lost with the process: the case in flight; all that is left of its group where none was."""
        case, phase = self.case, self.phase
        if case is not None and case.key in self.done:
            # Only energy was still to come.
            yield _warning(f"{case.key}: {why} in its {phase}")
            return
        if case is not None and case.key not in {one.key for one in self.task.cases}:
            # The decode of its samples, which is no case of the run.
            decodes = {**self.task.carried.decodes, case.key: None}
            carried = replace(self.task.carried, decodes=decodes)
            self.task = replace(self.task, carried=carried)
            yield _warning(f"no time of {case.unet}: {why} in its {phase}")
            yield Learned(carried)
        elif case is not None and phase != "weights":
            yield from self._lose((case,), status, f"{why} in its {phase}")
        elif not self.done & {one.key for one in self.group or self.task.cases}:
            where = "while its weights were made" if phase == "weights" else "before it began"
            yield from self._lose(self._left_of_group(), status, f"{why} {where}")

    def _left_of_group(self) -> tuple[Case, ...]:
        """What the group in flight has no record of; of the whole task where none has begun."""
        return tuple(case for case in self.group or self.task.left if case.key not in self.done)

    def _lose(self, cases: tuple[Case, ...], status: Status, message: str) -> Iterator[Event]:
        for case in cases:
            self.done.add(case.key)
            if self.task.untraced is not None:
                yield _warning(f"{case.key}: no trace ({message})")
            else:
                yield Recorded(self._failed(case, status, message))

    def _failed(self, case: Case, status: Status, message: str) -> Record:
        if self.template is None:
            return lost_record(self.task, case, status, message)
        told = {"case": case.as_recorded(), "case_key": case.key, "status": status, "message": message}
        return self.template.model_copy(update=told)

    def rest(self) -> GroupTask:
        """What another process is to go on with."""
        given = self.task.time
        elapsed = given.elapsed + time.monotonic() - self._begun
        return replace(self.task.without(self.done), time=replace(given, elapsed=elapsed))


def lost_record(task: GroupTask, case: Case, status: Status, message: str) -> Record:
    """The record of a case of a group of which nothing is known but its task."""
    backends = tuple(one.backend for one in task.cases if one.group_key == case.group_key)
    before = state_now(NO_SENSOR)
    facts = GroupFacts(task.run_id, task.environment, task.rule, backends, lambda case, phase: None, before)
    return facts.lost(case, status, message)


def _warning(text: str) -> Warned:
    return Warned(text, UserWarning, __file__, 0)

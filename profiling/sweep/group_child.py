"""What a process that measures does: times groups or traces cases, and tells the process that has started it."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TextIO

import torch

from ..measure.ceiling_cache import KeptCeilings
from ..measure.environment import collect_environment
from ..measure.gpu_lock import held_gpu
from ..measure.outcomes import failure
from ..measure.turn import TURNS
from ..options import CaseError
from ..rivals.decoding import decoder_case
from ..trajectory.backend import Subject
from ..trajectory.case import Case, Task
from ..trajectory.decoder_times import DecoderTimes
from ..trajectory.energy_windows import EnergyTime
from ..trajectory.floors import Floors
from ..trajectory.network import Networks
from ..trajectory.records import Record
from ..trajectory.runner import GroupRunner, Listener, all_backends_of, groups
from ..trajectory.short_traces import short_traces
from ..trajectory.trace import traced
from .child_end import ParentPipe
from .events import (
    AwaitsTurn,
    Broken,
    Completed,
    Entered,
    Finished,
    GroupBegun,
    GroupKnown,
    Interrupted,
    Learned,
    Queued,
    Ran,
    Recorded,
    Started,
    Told,
    TookTurns,
    Warned,
)
from .group_task import Carried, GroupTask
from .patience import patience


def collect(parent: ParentPipe, device: str) -> None:
    """Tells the environment of a device, or what went wrong with asking for it."""
    try:
        parent.say(collect_environment(device))
    except CaseError as wrong:
        parent.say(wrong)
    except Exception as error:
        parent.say(RuntimeError(failure(error)[1]))


def measure_group(parent: ParentPipe, task: GroupTask) -> None:
    """Does the task and tells of it, to the end of the process."""
    warnings.showwarning = partial(_warned, parent)
    TURNS.on_wait = _TurnsTold(parent)
    parent.say(Started())
    device = task.cases[0].device
    whole, timing = task.time.deadlines()
    try:
        # Before anything is computed there: who only waits takes nothing of the GPU.
        with held_gpu(device, lambda holder: parent.say(Queued(holder)), lambda: parent.say(Queued("", True))):
            work = _Work(parent, task, EnergyTime(whole, timing, lambda _: None, task.carried.energy_s))
            if task.untraced is not None:
                work.trace()
            elif not timing.passed:
                work.time()
    except KeyboardInterrupt as interrupt:
        # Whoever dealt turns has ended.
        parent.say(Interrupted(str(interrupt)))
    except Exception as error:
        parent.say(Broken(*failure(error), blames_all=True))
    parent.say(Finished())


@dataclass
class _Work:
    parent: ParentPipe
    task: GroupTask
    energy: EnergyTime
    ceilings: KeptCeilings = field(init=False)
    subjects: Mapping[Task, Subject] = field(init=False)
    _patience: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.subjects = self.task.subjects()
        self.energy.on_record = partial(self._completed, "energy")
        self.ceilings = KeptCeilings(lambda line: self.parent.say(Told(line)), known=self.task.carried.ceilings)

    def time(self) -> None:
        task, timing = self.task, self.energy.timing
        decodes = DecoderTimes(decoder_case, self.subjects, timing, dict(task.carried.decodes))
        told = _Teller(self.parent, self._entering)
        runner = GroupRunner(
            task.rule,
            task.run_id,
            told,
            told.recorded,
            lambda device: task.environment,
            all_backends_of(self.subjects),
            Networks(self.subjects),
            timing,
            self.energy,
            Floors(self.ceilings),
            task.references,
            decodes if task.with_decoder else None,
        )
        told.runner = runner
        told.learned = lambda: Carried(dict(decodes.known), dict(self.ceilings.known), self.energy.taken)
        for cases in groups(task.cases):
            if timing.passed:
                break
            # Its records share nothing with those of the group before.
            told.known = -1
            self.parent.say(GroupBegun(tuple(cases)))
            runner.measure(cases)
        self.parent.say(Learned(told.learned()))

    def trace(self) -> None:
        task = self.task
        assert task.untraced is not None
        located = {case.key: case for case in task.cases}
        for record in short_traces(
            task.untraced,
            Networks(self.subjects),
            all_backends_of(self.subjects),
            self.energy.whole,
            traced,
            located,
            lambda case, phase: self.parent.say(self._entering(case, phase)),
        ):
            self._completed("trace", record)

    def _entering(self, case: Case, phase: str) -> Entered:
        if case.key not in self._patience:
            self._patience[case.key] = patience(case, self.task.rule, self.subjects)
        return Entered(case, phase, self._patience[case.key])

    def _completed(self, phase: str, record: Record) -> None:
        self.parent.say(Completed(record, phase))


class _Teller(Listener):
    """Tells the parent what the runner says."""

    runner: GroupRunner
    learned: Callable[[], Carried]
    known: int | None = -1

    def __init__(self, parent: ParentPipe, entering: Callable[[Case, str], Entered]) -> None:
        self._say, self.entering = parent.say, entering

    def entered(self, case: Case, phase: str) -> None:
        facts = self.runner.facts
        if facts is not None and facts.evaluations != self.known:
            self.known = facts.evaluations
            self._say(GroupKnown(facts.lost(case, "error", "nothing else is known")))
        if phase == "weights":
            self._say(Learned(self.learned()))
        self._say(self.entering(case, phase))

    def ran(self, case: Case, phase: str) -> None:
        self._say(Ran(case, phase))

    def recorded(self, record: Record) -> None:
        self._say(Recorded(record))
        if record.status == "error" and record.case.device != "cpu" and (reason := _cuda_is_broken()):
            self._say(Broken("error", reason, blames_all=False))


def _cuda_is_broken() -> str | None:
    """What CUDA answers where an error has ended this process's use of it, as an illegal address does."""
    try:
        torch.cuda.synchronize()
    except Exception as error:
        return failure(error)[1]
    return None


class _TurnsTold:
    """Told of turns by `Turns.on_wait`, tells the parent: waiting is no hang, and counts for no deadline."""

    def __init__(self, parent: ParentPipe) -> None:
        self._say = parent.say
        self._waited = TURNS.waited

    def __call__(self, is_waiting: bool) -> None:
        if is_waiting:
            self._say(AwaitsTurn())
            return
        self._say(TookTurns(TURNS.waited - self._waited))
        self._waited = TURNS.waited


def _warned(
    parent: ParentPipe,
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """In place of `warnings.showwarning`."""
    is_named = getattr(sys.modules.get(category.__module__), category.__name__, None) is category
    parent.say(Warned(str(message), category if is_named else UserWarning, filename, lineno))

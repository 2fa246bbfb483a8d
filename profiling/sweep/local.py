"""A run's groups on this machine, in a process each or all in one; first timed, then traced."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeAlias

from ..measure.environment import Environment
from ..measure.gpu_lock import waits_for_gpu
from ..measure.timing import Deadline, RepetitionRule
from ..measure.turn import TURNS
from ..trajectory.case import Case
from ..trajectory.records import Record, RecordStore
from ..trajectory.runner import Listener, groups, to_trace, wanted_and_left
from ..trajectory.short_traces import timing_deadline
from .events import Completed, Event, GroupBegun, Learned, Queued, Ran, Recorded, Told, TookTurns, Warned
from .group_process import environment_of, measured
from .group_task import Carried, GroupTask, TimeGiven
from .interrupts import Interrupts

# Does a task and yields what happens: `measured`, or what stands for it.
Executor: TypeAlias = Callable[[GroupTask], Generator[Event, None, None]]


@dataclass(frozen=True)
class Workers:
    """Who does the tasks of a sweep, and who tells the environment of a device: processes of their own."""

    executor: Executor = measured
    environment_of: Callable[[str], Environment] = environment_of


@dataclass(frozen=True)
class Sweep:
    """What is to be measured, and how: the fields of all its tasks. `environments`: by device.

    in_one_process: a process times all groups of a device, and another one goes on where it ends.
    """

    cases: tuple[Case, ...]
    rule: RepetitionRule
    run_id: str
    environments: Mapping[str, Environment]
    references: Path | None = None
    with_decoder: bool = False
    timeout: float | None = None
    in_one_process: bool = False

    def task(self, cases: Sequence[Case]) -> GroupTask:
        """The task of timing these cases, all on one device."""
        return GroupTask(
            tuple(cases),
            self.rule,
            self.run_id,
            self.environments[cases[0].device],
            references=self.references,
            with_decoder=self.with_decoder,
            timeout=self.timeout,
        )


def run_sweep(
    sweep: Sweep,
    store: RecordStore,
    listener: Listener,
    deadline: Deadline,
    skip: Collection[str] = (),
    executor: Executor = measured,
) -> tuple[int, bool]:
    """Measures the cases whose key is not in `skip`; how many records were made, and whether Ctrl-C cut it short.

    Each record is in the store before the next measurement begins. Raises KeyboardInterrupt on the second Ctrl-C,
    on SIGTERM, and where nothing is measured that could be finished; OSError where the store cannot be written.
    """
    wanted, left = wanted_and_left(sweep.cases, skip)
    timing = timing_deadline(wanted, deadline)
    with Interrupts(listener.stopping) as interrupts:
        run = SweepRun(store, listener, deadline, timing, executor, interrupts)
        for cases in groups(left) if not sweep.in_one_process else by_device(left):
            if interrupts.is_asked:
                return run.recorded, True
            if timing.passed:
                break
            # From here on Ctrl-C lets this group finish.
            interrupts.is_measuring = True
            run.do(sweep.task(cases))
            if run.is_cut_short:
                return run.recorded, True
        for task in trace_tasks(sweep, store.load(), wanted):
            if interrupts.is_asked:
                return run.recorded, True
            if deadline.passed:
                break
            run.do(task)
        return run.recorded, run.is_cut_short


def by_device(cases: Sequence[Case]) -> list[list[Case]]:
    """The cases of each device, in the order of first appearance."""
    found: dict[str, list[Case]] = {}
    for case in cases:
        found.setdefault(case.device, []).append(case)
    return list(found.values())


def trace_tasks(sweep: Sweep, records: Sequence[Record], cases: Sequence[Case]) -> list[GroupTask]:
    """The tasks of tracing what has a time and no trace yet: one for each device, over all groups.

    A process for each group would begin with a context, libraries and a network of its own, for traces that take
    less. A process that ends costs the trace in flight, and another one goes on.
    """
    located = {case.key: case for case in cases}
    untraced = {record.case_key: record for record in to_trace(records, located)}
    return [
        replace(sweep.task(cases), untraced=tuple(untraced[case.key] for case in cases))
        for cases in by_device([located[key] for key in untraced])
    ]


@dataclass
class SweepRun:
    """A sweep that goes on; `recorded` counts its records. `is_cut_short`: Ctrl-C has ended a task early."""

    store: RecordStore
    listener: Listener
    whole: Deadline
    timing: Deadline
    executor: Executor
    interrupts: Interrupts
    recorded: int = 0
    is_cut_short: bool = False
    carried: Carried = field(default_factory=Carried)
    _seen: dict[str | tuple[str, type[Warning], int], int] = field(default_factory=dict)

    def do(self, task: GroupTask) -> None:
        """Does one task to its end; after Ctrl-C to the end of the group or of the trace in flight."""
        task = replace(task, time=TimeGiven.of(self.whole, self.timing), carried=self.carried)
        self.interrupts.is_measuring = True
        group = task.cases[0].group_key
        try:
            if task.untraced is None:
                self.listener.begin(groups(task.cases)[0])
            with closing(self.executor(task)) as events:
                for event in events:
                    if isinstance(event, GroupBegun) and event.cases[0].group_key != group:
                        if self.interrupts.is_asked:
                            self.is_cut_short = True
                            break
                        group = event.cases[0].group_key
                        self.listener.end()
                        self.listener.begin(event.cases)
                    self.heard(event)
                    if task.untraced is not None and self.interrupts.is_asked and isinstance(event, Completed):
                        self.is_cut_short = True
                        return
            if task.untraced is None:
                self.listener.end()
        finally:
            self.interrupts.is_measuring = False

    def heard(self, event: Event) -> None:
        """Does what is to be done about an event: records go to the store, all else to people."""
        match event:
            case Recorded(record):
                self.store.append(record)
                self.recorded += 1
                self.listener.recorded(record)
            case Completed(record, phase):
                self.store.append(record)
                self.listener.ran(record.case, phase)
            case Ran(case, phase):
                self.listener.ran(case, phase)
            case Told(line):
                self.listener.told(line)
            case Queued(holder, is_over):
                # While it waits there is nothing that Ctrl-C could let finish.
                self.interrupts.is_measuring = is_over
                if not is_over:
                    self.listener.told(waits_for_gpu(holder))
            case TookTurns(seconds):
                TURNS.waited += seconds
            case Learned(carried):
                taken = carried.energy_s - self.carried.energy_s
                if self.timing is not self.whole:
                    self.timing.put_off(taken)
                self.carried = carried
            case Warned(text, category, filename, number):
                # Once each, as in one process.
                warnings.warn_explicit(text, category, filename, number, registry=self._seen)

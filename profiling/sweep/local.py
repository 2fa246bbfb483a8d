"""A run's groups, one after the other on this machine, each in a process of its own; first timed, then traced."""

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
from .events import Completed, Event, Learned, Queued, Ran, Recorded, Told, TookTurns, Warned
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
    """What is to be measured, and how: the fields of all its tasks. `environments`: by device."""

    cases: tuple[Case, ...]
    rule: RepetitionRule
    run_id: str
    environments: Mapping[str, Environment]
    references: Path | None = None
    with_decoder: bool = False
    timeout: float | None = None

    def task(self, cases: Sequence[Case]) -> GroupTask:
        """The task of timing one group."""
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
        for cases in groups(left):
            if interrupts.is_asked:
                return run.recorded, True
            if timing.passed:
                break
            # From here on Ctrl-C lets this group finish.
            interrupts.is_measuring = True
            listener.begin(cases)
            run.do(sweep.task(cases))
            listener.end()
        for task in trace_tasks(sweep, store.load(), wanted):
            if interrupts.is_asked:
                return run.recorded, True
            if deadline.passed:
                break
            run.do(task)
        return run.recorded, run.is_cut_short


def trace_tasks(sweep: Sweep, records: Sequence[Record], cases: Sequence[Case]) -> list[GroupTask]:
    """The tasks of tracing what has a time and no trace yet: one for each device, over all groups.

    A process for each group would begin with a context, libraries and a network of its own, for traces that take
    less. A process that ends costs the trace in flight, and another one goes on.
    """
    located = {case.key: case for case in cases}
    by_device: dict[str, list[Record]] = {}
    for record in to_trace(records, located):
        by_device.setdefault(located[record.case_key].device, []).append(record)
    return [
        replace(sweep.task([located[record.case_key] for record in untraced]), untraced=tuple(untraced))
        for untraced in by_device.values()
    ]


@dataclass
class SweepRun:
    """A sweep that goes on; `recorded` counts its records. `is_cut_short`: Ctrl-C has ended a task of traces."""

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
        """Does one task to its end; one of traces, after Ctrl-C, to the end of the trace in flight."""
        task = replace(task, time=TimeGiven.of(self.whole, self.timing), carried=self.carried)
        self.interrupts.is_measuring = True
        try:
            with closing(self.executor(task)) as events:
                for event in events:
                    self.heard(event)
                    if task.untraced is not None and self.interrupts.is_asked and isinstance(event, Completed):
                        self.is_cut_short = True
                        return
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

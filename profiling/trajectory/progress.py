"""A profile's progress: a line for each case, and on a terminal a live bar with the time that remains."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from ..measure.timing import Clock, Deadline, RepetitionRule
from ..terminal.visible import counted, say, visible
from .backend import Subject
from .case import Case, Task
from .group import warmup_rounds
from .network import FAMILY_SUBJECTS
from .records import Record
from .runner import Listener, groups

# A checkpoint's, whose size is not known before it is loaded: that of the family's middle.
_UNKNOWN_GFLOP = 300.0


def expected_work(
    case: Case, rule: RepetitionRule, subjects: Mapping[Task, Subject] = FAMILY_SUBJECTS
) -> tuple[float, int]:
    """GFLOP of one trajectory of the case, and how many trajectories it will take at least."""
    gflop = subjects[case.task].gflop(case) or _UNKNOWN_GFLOP
    return gflop * case.model_batch * case.steps, 1 + warmup_rounds(case) + rule.min_count


class Remaining:
    """Estimates the time left from the work done so far, counting work in GFLOP of trajectories."""

    def __init__(
        self,
        cases: Sequence[Case],
        rule: RepetitionRule,
        clock: Clock = time.monotonic,
        deadline: Deadline | None = None,
        subjects: Mapping[Task, Subject] = FAMILY_SUBJECTS,
    ) -> None:
        self._work = {case.key: expected_work(case, rule, subjects) for case in cases}
        self._clock = clock
        self._start = clock()
        self._deadline = deadline or Deadline(None)
        self._done: dict[str, float] = {}

    def ran(self, case: Case) -> None:
        """One more trajectory of the case is done; those beyond the expected count add nothing."""
        if case.key not in self._work:
            # Traced now, measured by the run that this one goes on with.
            return
        gflop, count = self._work[case.key]
        self._done[case.key] = min(self._done.get(case.key, 0.0) + gflop, gflop * count)

    def end(self, case: Case) -> None:
        """The case is done, whether all its trajectories ran or not."""
        gflop, count = self._work[case.key]
        self._done[case.key] = gflop * count

    def seconds_of(self, cases: Sequence[Case]) -> float | None:
        """What is left to do of these cases, in seconds at the pace so far; None before anything is done."""
        done = sum(self._done.values())
        if not done:
            return None
        left = 0.0
        for case in cases:
            gflop, count = self._work[case.key]
            left += gflop * count - self._done.get(case.key, 0.0)
        return (self._clock() - self._start) * left / done

    @property
    def fraction(self) -> float:
        """The share of the work that is done."""
        total = sum(gflop * count for gflop, count in self._work.values())
        return sum(self._done.values()) / total if total else 1.0

    @property
    def seconds(self) -> float | None:
        """Time left, no more than the deadline leaves; None before anything is done."""
        if not self.fraction:
            return None
        return min((self._clock() - self._start) * (1.0 / self.fraction - 1.0), self._deadline.left)


def readable(seconds: float | None) -> str:
    """ "about 2 min left", or nothing while that is unknown."""
    if seconds is None:
        return ""
    if seconds < 90:
        return f"about {max(1, round(seconds))} s left"
    return f"about {round(seconds / 60)} min left"


class ProgressLines(Listener):
    """Writes a line per group begun and per record, with a live bar on a terminal."""

    def __init__(
        self,
        console: Console,
        cases: Sequence[Case],
        rule: RepetitionRule,
        deadline: Deadline | None = None,
        subjects: Mapping[Task, Subject] = FAMILY_SUBJECTS,
    ) -> None:
        self._console = console
        self._deadline = deadline or Deadline(None)
        self._remaining = Remaining(cases, rule, deadline=self._deadline, subjects=subjects)
        self._total = len(groups(cases))
        self._number = 0
        self._in_flight: list[Case] = []
        self._bar: Progress | None = None
        if console.is_terminal:
            self._bar = Progress(
                SpinnerColumn("dots" if console.encoding.startswith("utf") else "line"),
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[left]}", markup=False),
                TimeElapsedColumn(),
                console=console,
                transient=True,
            )
            self._task = self._bar.add_task("", total=1.0, left="")

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def begin(self, cases: Sequence[Case]) -> None:
        self._number += 1
        self._in_flight = list(cases)
        self._write(f"[{self._number}/{self._total}] {heading(cases)}")
        self._update(f"{self._number}/{self._total} {cases[0].label}")

    def ran(self, case: Case, phase: str) -> None:
        self._remaining.ran(case)
        self._update(f"{self._number}/{self._total} {case.label} {case.backend}: {phase}")

    def recorded(self, record: Record) -> None:
        self._remaining.end(record.case)
        self._in_flight = [case for case in self._in_flight if case.key != record.case_key]
        self._write(f"    {summary(record)}")

    def end(self) -> None:
        for case in self._in_flight:
            self._write(f"    {case.backend}: no time was left; no record")
        if self._number < self._total:
            left = "the time is up" if self._deadline.passed else readable(self._remaining.seconds)
            self._write(f"    {self._total - self._number} to go" + (f", {left}" if left else ""))

    def told(self, line: str) -> None:
        self._write(line)

    def stopping(self) -> None:
        # Of a group whose cases are all recorded energy is in flight, after all groups a trace.
        what = "what is in flight is done"
        if self._in_flight:
            left = readable(self._remaining.seconds_of(self._in_flight))
            cases = counted(len(self._in_flight), "case")
            what = f"the group in flight is done ({cases} to go{left and ', ' + left})"
        self._write(f"stopping once {what}; Ctrl-C again stops at once")

    def _write(self, line: str) -> None:
        say(self._console, line)

    def _update(self, text: str) -> None:
        if self._bar is not None:
            self._bar.update(
                self._task,
                description=visible(text),
                completed=self._remaining.fraction,
                left=readable(self._remaining.seconds),
            )


def heading(cases: Sequence[Case]) -> str:
    """One line: what a group measures, and its backends."""
    case = cases[0]
    backends = ", ".join(c.backend for c in cases)
    sizes = f"latent {case.latent_height}x{case.latent_width}, {counted(case.context_tokens, 'token')}"
    return (
        f"{case.label} {case.task} {case.sampler} {counted(case.steps, 'step')}, batch {case.batch}, "
        f"guidance {case.guidance_scale:g}, {sizes}, seed {case.seed}, {case.dtype} on {case.device}: {backends}"
    )


def summary(record: Record) -> str:
    """One line: the backend and its time, or why there is none."""
    if record.wall_ms is None:
        return f"{record.case.backend}: {record.status}: {record.message}"
    cut = "" if record.harness.stopped_by is None else ", cut short"
    return (
        f"{record.case.backend}: {record.wall_ms.p50:.1f} ms a trajectory, {record.ms_per_step:.1f} ms a step "
        f"(median of {record.wall_ms.n}{cut})"
    )

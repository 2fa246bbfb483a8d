"""What one process is to do: time the cases of groups, or trace cases. A value that crosses machines."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..measure.ceilings import Ceilings
from ..measure.environment import Environment
from ..measure.recorded import Samples
from ..measure.timing import Deadline, RepetitionRule
from ..rivals.subjects import all_subjects
from ..trajectory.backend import Subject
from ..trajectory.case import Case, Task
from ..trajectory.records import Record


@dataclass(frozen=True)
class TimeGiven:
    """A profile's --seconds when a group begins; all infinite without.

    whole: from its start. timing: from the same start to when timing ends, put off by what energy took. elapsed:
    since that start, of a clock that stands while others have their turns.
    """

    whole: float = math.inf
    timing: float = math.inf
    elapsed: float = 0.0

    @classmethod
    def of(cls, whole: Deadline, timing: Deadline) -> TimeGiven:
        return cls(whole.seconds, timing.seconds, whole.elapsed)

    def deadlines(self) -> tuple[Deadline, Deadline]:
        """The whole time and that of timing, in this process; one deadline where they are the same."""
        whole = Deadline.begun(self.whole, self.elapsed)
        return whole, whole if self.timing == self.whole else Deadline.begun(self.timing, self.elapsed)


@dataclass(frozen=True)
class Carried:
    """What groups of a run found out that later ones need not find out again.

    decodes: samples of decodes by key (`DecoderTimes.known`). ceilings: by device. energy_s: what windows of
    energy took so far.
    """

    decodes: Mapping[str, Samples | None] = field(default_factory=dict)
    ceilings: Mapping[str, Ceilings] = field(default_factory=dict)
    energy_s: float = 0.0


@dataclass(frozen=True)
class GroupTask:
    """The cases of one group, or of several on one device, and how they are measured (`profile`).

    environment: of the device, collected once for all groups. timeout: seconds without a sign of life
    until the process is given up; None for those of `patience`. untraced: records of these cases to complete by
    a trace; None to time the cases. subjects: makes what is measured; pickled by its name.
    """

    cases: tuple[Case, ...]
    rule: RepetitionRule
    run_id: str
    environment: Environment
    time: TimeGiven = TimeGiven()
    references: Path | None = None
    with_decoder: bool = False
    timeout: float | None = None
    untraced: tuple[Record, ...] | None = None
    carried: Carried = Carried()
    subjects: Callable[[], Mapping[Task, Subject]] = all_subjects

    @property
    def left(self) -> tuple[Case, ...]:
        """What is to be timed, or traced."""
        if self.untraced is None:
            return self.cases
        keys = {record.case_key for record in self.untraced}
        return tuple(case for case in self.cases if case.key in keys)

    def without(self, done: Collection[str]) -> GroupTask:
        """The same task for what has none of these keys."""
        if self.untraced is None:
            return replace(self, cases=tuple(case for case in self.cases if case.key not in done))
        return replace(self, untraced=tuple(one for one in self.untraced if one.case_key not in done))

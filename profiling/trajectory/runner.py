"""Cases to records, group by group."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..measure.ceiling_cache import CeilingSource
from ..measure.environment import Environment, collect_environment, state_now
from ..measure.nvml import Sensor
from ..measure.recorded import new_run_id
from ..measure.settings import measuring_settings
from ..measure.timing import Deadline, RepetitionRule
from .backend import Backend, Subject
from .case import Case, Task
from .check import References, code_identity
from .checkpoints import identified
from .decoder_times import DecoderTimes
from .energy_windows import EnergyTime
from .floors import Floors
from .group import Group
from .group_facts import GroupFacts
from .network import FAMILY_SUBJECTS, Networks
from .records import Record, RecordStore
from .short_traces import Tracer, short_traces, timing_deadline, wants_trace
from .trace import traced


class Listener:
    """Who is told how a profile goes on; called between measurements, never inside one. This one says nothing."""

    def begin(self, cases: Sequence[Case]) -> None:
        """These cases, of one group, are in flight now."""

    def entered(self, case: Case, phase: str) -> None:
        """The case's phase begins: should its process end now, this is what ended it.

        Phases: "weights" (of all cases of the group), "build", "first call", "reference", "warm-up", "timing",
        "check", "energy", "trace".
        """

    def ran(self, case: Case, phase: str) -> None:
        """One more trajectory is done, or the case's "energy" or "trace".

        Other values of `phase` are "first call", "warm-up", "timing" and "check".
        """

    def recorded(self, record: Record) -> None:
        """The case is timed and, given a store, its record on disk; others of its group may be in flight."""

    def end(self) -> None:
        """The group is done; of a case that there was no time for there is no record."""

    def told(self, line: str) -> None:
        """A line for people, on what is done beside measuring."""

    def stopping(self) -> None:
        """The group in flight is to be the last one."""


@dataclass
class GroupRunner:
    """Measures groups in this process, one after the other; references of a device serve all of them.

    on_record: called with each record when its case is done. environment_of: of a device. until: when timing ends.
    facts: those of the group that is measured now, or was last.
    """

    rule: RepetitionRule
    run_id: str
    listener: Listener
    on_record: Callable[[Record], None]
    environment_of: Callable[[str], Environment]
    backends: Mapping[str, Backend]
    networks: Networks
    until: Deadline
    energy: EnergyTime
    floors: Floors
    references: Path | None = None
    decodes: DecoderTimes | None = None
    facts: GroupFacts | None = None
    _kept: dict[str, References] = field(default_factory=dict)
    _groups: int = 0

    def measure(self, cases: Sequence[Case]) -> None:
        """Times the cases of one group; raises an interrupt, and what `on_record` raises."""
        device = cases[0].device
        with measuring_settings():
            environment = self.environment_of(device)
            self.floors.prepare(device)
            if device not in self._kept:
                self._kept[device] = References(self.references, code_identity(environment))
            sensor = Sensor.of(device)
            self.facts = GroupFacts(
                self.run_id,
                environment,
                self.rule,
                tuple(case.backend for case in cases),
                self.listener.ran,
                state_now(sensor),
                sensor,
                entered=self.listener.entered,
                groups_before=self._groups,
            )
            self._groups += 1
            kept = self._kept[device]
            if self.decodes is not None:
                self.facts.decoder_ms = self.decodes.of(cases[0], self.facts, kept)
            group = Group(
                cases, self.backends, self.facts, kept, self.on_record, self.until, self.floors, self.energy
            )
            group.measure(self.networks)


def profile(
    cases: Iterable[Case],
    *,
    rule: RepetitionRule | None = None,
    store: RecordStore | None = None,
    skip: Collection[str] = (),
    listener: Listener | None = None,
    backends: Mapping[str, Backend] | None = None,
    deadline: Deadline | None = None,
    references: Path | None = None,
    tracer: Tracer | None = None,
    run_id: str | None = None,
    ceilings: CeilingSource | None = None,
    subjects: Mapping[Task, Subject] = FAMILY_SUBJECTS,
    decoder: Callable[[Case], Case | None] | None = None,
) -> list[Record]:
    """Measures the cases in this process and returns a record for each, failures included, as they were done.

    Cases that differ only in the backend run interleaved. Each record goes to `store` as soon as its case is done;
    cases whose key is in `skip` are left out. An interrupt (KeyboardInterrupt) passes through: what is in the
    store stays. `rule` defaults to three repetitions. Once `deadline` has passed, no group, backend or sample is
    begun: what has a sample by then is checked and recorded, what has none is left out. On a GPU the cases (of the
    store too) that have a time and no trace are traced at the end, and their records written again with it; of a
    deadline's time the last fifth is for that (`timing_deadline`).
    `references`: a folder where float32 references are kept for other profiles. `tracer` stands for torch's
    profiler. `run_id` goes into the records; a new one unless told. `ceilings` tells those of each device, from
    which records get the floor of a step; without it they have none. `subjects`: what is measured, by task, with
    its backends unless `backends` are given; a case of another task is `unsupported`. `decoder`: the decode of a
    case's samples, whose times its records get (`DecoderTimes`). Raises CaseError for a checkpoint that cannot be
    read (`checkpoints.identified`).
    """
    listener = listener or Listener()
    backends = backends or all_backends_of(subjects)
    deadline = deadline or Deadline(None)
    records: list[Record] = []

    def recorded(record: Record) -> None:
        if store is not None:
            store.append(record)
        records.append(record)
        listener.recorded(record)

    def completed(record: Record, phase: str) -> None:
        if store is not None:
            store.append(record)
        records[:] = [record if other.case_key == record.case_key else other for other in records]
        listener.ran(record.case, phase)

    wanted, left = wanted_and_left(cases, skip)
    until = timing_deadline(wanted, deadline)
    runner = GroupRunner(
        rule or RepetitionRule(),
        run_id or new_run_id(),
        listener,
        recorded,
        # Once: the code that runs is what was loaded, whatever is committed meanwhile.
        functools.cache(collect_environment),
        backends,
        Networks(subjects),
        until,
        EnergyTime(deadline, until, functools.partial(completed, phase="energy")),
        Floors(ceilings),
        references,
        None if decoder is None else DecoderTimes(decoder, subjects, until),
    )
    for cases_in_flight in groups(left):
        if until.passed:
            break
        listener.begin(cases_in_flight)
        runner.measure(cases_in_flight)
        listener.end()
    located = {case.key: case for case in wanted}
    untraced = to_trace(records if store is None else store.load(), located)
    for record in short_traces(
        untraced, runner.networks, backends, deadline, tracer or traced, located, listener.entered
    ):
        completed(record, "trace")
    return records


def all_backends_of(subjects: Mapping[Task, Subject]) -> Mapping[str, Backend]:
    """The backends of all subjects, by name."""
    return {name: backend for subject in subjects.values() for name, backend in subject.backends.items()}


def wanted_and_left(cases: Iterable[Case], skip: Collection[str]) -> tuple[list[Case], list[Case]]:
    """The cases, their checkpoints identified, and those of them whose key is not in `skip`."""
    given = list(cases)
    wanted = identified(given)
    skipped = {case.key for case in identified(case for case in given if case.key in skip)} | set(skip)
    return wanted, [case for case in wanted if case.key not in skipped]


def to_trace(records: Iterable[Record], located: Mapping[str, Case]) -> list[Record]:
    """The last record of each of the cases (by key), where it has a time and no trace yet."""
    latest = {record.case_key: record for record in records}
    return [latest[key] for key in located if key in latest and wants_trace(latest[key])]


def groups(cases: Iterable[Case]) -> list[list[Case]]:
    """The cases by what they share but the backend, in the order of first appearance, each case once."""
    found: dict[str, list[Case]] = {}
    for case in dict.fromkeys(cases):
        found.setdefault(case.group_key, []).append(case)
    return list(found.values())

"""Cases to records, group by group."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path

from ..measure.ceiling_cache import CeilingSource
from ..measure.environment import collect_environment, state_now
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
from .lane import GroupFacts
from .network import FAMILY_SUBJECTS, Networks
from .records import Record, RecordStore
from .short_traces import Tracer, short_traces, timing_deadline, wants_trace
from .trace import traced


class Listener:
    """Who is told how a profile goes on; called between measurements, never inside one. This one says nothing."""

    def begin(self, cases: Sequence[Case]) -> None:
        """These cases, of one group, are in flight now."""

    def ran(self, case: Case, phase: str) -> None:
        """One more trajectory is done, or the case's "energy" or "trace".

        Other values of `phase` are "first call", "warm-up", "timing" and "check".
        """

    def recorded(self, record: Record) -> None:
        """The case is timed and, given a store, its record on disk; others of its group may be in flight."""

    def end(self) -> None:
        """The group is done; of a case that there was no time for there is no record."""


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
    """Measures the cases and returns a record for each, failures included, in the order in which they were done.

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
    backends = backends or {name: of for subject in subjects.values() for name, of in subject.backends.items()}
    deadline = deadline or Deadline(None)
    networks = Networks(subjects)
    floors = Floors(ceilings)
    # Once: the code that runs is what was loaded, whatever is committed meanwhile.
    environment_of = functools.cache(collect_environment)
    kept: dict[str, References] = {}
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

    given = list(cases)
    wanted = identified(given)
    skipped = {case.key for case in identified(case for case in given if case.key in skip)} | set(skip)
    run_id = run_id or new_run_id()
    until = timing_deadline(wanted, deadline)
    energy_time = EnergyTime(deadline, until, functools.partial(completed, phase="energy"))
    decodes = None if decoder is None else DecoderTimes(decoder, subjects, until)
    for cases_in_flight in groups(case for case in wanted if case.key not in skipped):
        if until.passed:
            break
        device = cases_in_flight[0].device
        listener.begin(cases_in_flight)
        with measuring_settings():
            environment = environment_of(device)
            floors.prepare(device)
            if device not in kept:
                kept[device] = References(references, code_identity(environment))
            sensor = Sensor.of(device)
            shared = GroupFacts(
                run_id,
                environment,
                rule or RepetitionRule(),
                tuple(case.backend for case in cases_in_flight),
                listener.ran,
                state_now(sensor),
                sensor,
            )
            if decodes is not None:
                shared.decoder_ms = decodes.of(cases_in_flight[0], shared, kept[device])
            Group(cases_in_flight, backends, shared, kept[device], recorded, until, floors, energy_time).measure(
                networks
            )
        listener.end()
    located = {case.key: case for case in wanted}
    latest = {record.case_key: record for record in (records if store is None else store.load())}
    untraced = [latest[key] for key in located if key in latest and wants_trace(latest[key])]
    for record in short_traces(untraced, networks, backends, deadline, tracer or traced, located):
        completed(record, "trace")
    return records


def groups(cases: Iterable[Case]) -> list[list[Case]]:
    """The cases by what they share but the backend, in the order of first appearance, each case once."""
    found: dict[str, list[Case]] = {}
    for case in dict.fromkeys(cases):
        found.setdefault(case.group_key, []).append(case)
    return list(found.values())

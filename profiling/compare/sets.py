"""A set of records: the runs below a path, each with the record of each of its cases."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from ..figures.best import best_of_case
from ..figures.derived import network_names
from ..figures.phrases import Conditions
from ..figures.text import joined
from ..measure.conditions import commit
from ..measure.environment import Environment
from ..measure.folders import RunError
from ..quality import QualityRecord
from ..record_files import AnyRecord, gather_files
from ..static.inspection_records import InspectionRecord
from ..static.inspection_table import launch_names
from ..trajectory.case import Case
from ..trajectory.records import Record

if TYPE_CHECKING:
    from ..kernel_bench.kernel_records import KernelRecord

# What the commit decides: it is what two sides may differ in.
OF_THE_COMMIT = ("git_commit", "git_dirty", "ldmperf", "tuned")


@dataclass(frozen=True)
class MeasuredRun:
    """One process's records, by the keys of their cases; `started_at` is when its first case began."""

    id: str
    started_at: datetime
    records: Mapping[str, AnyRecord]


@dataclass(frozen=True)
class RecordSet:
    """The runs below a path, in the order of their start. `aside`: how many lines are no records."""

    path: Path
    runs: tuple[MeasuredRun, ...]
    aside: int = 0

    @property
    def keys(self) -> list[str]:
        return list(dict.fromkeys(key for run in self.runs for key in run.records))

    def of(self, key: str) -> list[AnyRecord]:
        """The records of a case, one for each run that has it."""
        return [run.records[key] for run in self.runs if key in run.records]

    @property
    def all_records(self) -> list[AnyRecord]:
        return [record for run in self.runs for record in run.records.values()]

    @property
    def commits(self) -> list[str]:
        return list(dict.fromkeys(commit(record.environment) for record in self.all_records))


def read_set(path: Path) -> RecordSet:
    """The records of a run's folder, of a folder of such folders, or of a file. Changes nothing on disk.

    A case that a run measured twice counts once, as in a report. Raises RunError where there are no records.
    """
    found: dict[str, list[AnyRecord]] = {}
    files = gather_files([path])
    for file, part in files.items():
        for record in part.records:
            # Version 1 has no run_id: its file is the run.
            found.setdefault(record.run_id or file, []).append(record)
    aside = sum(part.aside.in_file for part in files.values())
    return RecordSet(path, _runs(found), aside)


def set_of(records: Iterable[AnyRecord], path: Path) -> RecordSet:
    """The same of records that were read already, under a name; those without a run_id count as one run."""
    found: dict[str, list[AnyRecord]] = {}
    for record in records:
        found.setdefault(record.run_id or "", []).append(record)
    return RecordSet(path, _runs(found))


def _runs(found: Mapping[str, Sequence[AnyRecord]]) -> tuple[MeasuredRun, ...]:
    """The runs of records by their names, in the order of their start."""
    runs = (
        MeasuredRun(name, min(record.started_at for record in records), _one_of_each(records))
        for name, records in found.items()
    )
    return tuple(sorted(runs, key=lambda run: run.started_at))


def machine_kind(environment: Environment) -> tuple[tuple[str, object], ...]:
    """What two records of different commits must share to be compared: the machine's kind, versions, settings."""
    return tuple(item for item in environment.kind if item[0] not in OF_THE_COMMIT)


def _one_of_each(records: Sequence[AnyRecord]) -> dict[str, AnyRecord]:
    by_key: dict[str, list[AnyRecord]] = {}
    for record in records:
        by_key.setdefault(record.case_key, []).append(record)
    return {key: best_of_case(of_case) for key, of_case in by_key.items()}


def measured(records: Iterable[AnyRecord]) -> list[Record | KernelRecord]:
    """Those that a machine's state counts for: inspections and qualities have no times."""
    return [record for record in records if not isinstance(record, InspectionRecord | QualityRecord)]


def in_turn(a: RecordSet, b: RecordSet) -> bool:
    """Whether the runs of two sets were made in turn: in the order of time every two are one of each set."""
    order = sorted([(run.started_at, 0) for run in a.runs] + [(run.started_at, 1) for run in b.runs])
    sides = [side for _, side in order]
    return len(a.runs) == len(b.runs) and all(
        first != second for first, second in zip(sides[::2], sides[1::2], strict=True)
    )


def differences(a: RecordSet, b: RecordSet) -> list[str]:
    """Why the sets are not to be compared, each reason once: other hardware, versions or settings, dirty commits.

    Compared are the environments of each case of both, and those of one set among themselves; the commits of the
    two sets may differ.
    """
    found: list[str] = []
    for name, side in (("A", a), ("B", b)):
        if any(record.environment.git_dirty for record in side.all_records):
            found.append(f"{name} was measured with uncommitted changes")
        if len(side.commits) > 1:
            found.append(f"{name} has records of several commits ({', '.join(side.commits[:3])})")
    turns = [{_in_turns(record) for record in measured(side.all_records)} for side in (a, b)]
    if len(turns[0] | turns[1]) > 1:
        found.append("samples of some were taken in turn with another side, of others not (in_turns)")
    for key in dict.fromkeys([*a.keys, *b.keys]):
        records = [record for side in (a, b) for record in side.of(key)]
        differ = _of_the_machine if measured(records) else _of_the_compiler
        if isinstance(records[0], QualityRecord):
            differ = _of_the_arithmetic
        environments = list(dict.fromkeys(record.environment for record in records))
        for other in environments[1:]:
            found += differ(environments[0], other)
    return list(dict.fromkeys(found))


def _in_turns(record: Record | KernelRecord) -> bool:
    return record.harness.in_turns if isinstance(record, Record) else record.in_turns


def _of_the_machine(first: Environment, other: Environment) -> list[str]:
    return [line for line in first.differences(other) if line.partition(":")[0] not in OF_THE_COMMIT]


def _of_the_compiler(first: Environment, other: Environment) -> list[str]:
    """What makes other code of the same kernel; older baselines do not say with which ptxas."""
    pairs = {"triton": (first.triton, other.triton), "ptxas": (first.ptxas, other.ptxas)}
    return [f"{name}: {a}, {b}" for name, (a, b) in pairs.items() if a and b and a != b]


def _of_the_arithmetic(first: Environment, other: Environment) -> list[str]:
    """What may round samples otherwise: torch, and the kind of GPU."""
    gpus = [environment.gpu.name if environment.gpu else None for environment in (first, other)]
    pairs = {"torch": (first.torch, other.torch), "gpu.name": (gpus[0], gpus[1])}
    return [f"{name}: {a}, {b}" for name, (a, b) in pairs.items() if a != b]


def check_comparable(a: RecordSet, b: RecordSet, force: bool) -> list[str]:
    """The reasons against comparing, empty where there are none. Raises RunError for them unless `force`.

    Raises RunError in any case where a run is in both sets, or no case is.
    """
    if shared := {run.id for run in a.runs} & {run.id for run in b.runs}:
        raise RunError(f"A and B share {len(shared)} of their runs, which says nothing: name two sets of runs")
    if not set(a.keys) & set(b.keys):
        raise RunError(
            f"no case is in both {a.path} and {b.path}: measure both with the same options of ldmperf profile"
        )
    found = differences(a, b)
    if found and not force:
        more = f"; and {len(found) - 5} more" if len(found) > 5 else ""
        raise RunError(
            f"A and B are not to be compared: {'; '.join(found[:5])}{more}. Measure both alike, or give --force"
        )
    return found


@dataclass(frozen=True)
class _Place:
    """A case for `Conditions`, which names what varies."""

    case: Case
    environment: int = 0


def names_of(records: Sequence[AnyRecord]) -> tuple[tuple[str, ...], dict[str, str]]:
    """The conditions that all trajectories share, in words, and for each case what sets it apart, by its key."""
    trajectories = [record for record in records if isinstance(record, Record)]
    places = [_Place(record.case) for record in trajectories]
    conditions = Conditions.of(tuple(record.environment for record in records[:1]), places)
    networks = network_names(trajectories)
    names = {
        record.case_key: joined(
            (f"{networks[record.case.network]} {record.case.backend}", conditions.heading(_Place(record.case)))
        )
        for record in trajectories
    }
    for record in records:
        if isinstance(record, QualityRecord):
            names[record.case_key] = record.case.label
        elif not isinstance(record, Record | InspectionRecord):
            names[record.case_key] = f"{record.case.operator} {record.case.label} {record.peer} {record.mode}"
    names |= launch_names([record for record in records if isinstance(record, InspectionRecord)])
    return conditions.shared, names

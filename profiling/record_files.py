"""Records of all kinds, read from run folders, folders of such, and files: the one way to read them."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar

from .kernel_bench import KERNELS_NAME
from .measure.folders import RunError, holds
from .measure.store import Aside, parsed, read_parsed, rejected_path
from .quality import QUALITY_NAME, QualityRecord
from .static import INSPECTIONS_NAME
from .static.inspection_records import InspectionRecord
from .trajectory.records import RECORDS_NAME, Record, without_completed
from .trajectory.runs import RUN_NAME, resume_command

if TYPE_CHECKING:
    from .kernel_bench.kernel_records import KernelRecord

    R = TypeVar("R", KernelRecord, InspectionRecord, QualityRecord)

AnyRecord: TypeAlias = "Record | KernelRecord | InspectionRecord | QualityRecord"
Kind = Literal["trajectory", "kernel", "inspection", "quality"]

# The files of a folder that have records, by kind.
NAMES = (RECORDS_NAME, KERNELS_NAME, INSPECTIONS_NAME, QUALITY_NAME)
# Fields that a kind always writes, and no other kind has.
MARKS: Mapping[Kind, frozenset[str]] = {
    "trajectory": frozenset(("harness", "phases", "wall_ms", "evaluations")),
    "kernel": frozenset(("peer", "mode", "clock", "interleaved")),
    "inspection": frozenset(("arch", "kernel", "constants", "num_warps")),
    "quality": frozenset(("takes", "frechet", "kid", "sliced_wasserstein")),
}
_GIVE = (
    f"give a folder with {RECORDS_NAME}, {KERNELS_NAME}, {INSPECTIONS_NAME} or {QUALITY_NAME}, a folder of such, "
    "or a file of records"
)


@dataclass(frozen=True)
class Gathered:
    """What some paths hold, in their order and that of the lines; lines that are no records are set aside.

    A trajectory's record that was appended again with its energy or its trace counts once; of any other case that
    a run has twice the last counts.
    """

    trajectories: tuple[Record, ...] = ()
    kernels: tuple[KernelRecord, ...] = ()
    inspections: tuple[InspectionRecord, ...] = ()
    qualities: tuple[QualityRecord, ...] = ()
    aside: Aside = field(default_factory=Aside)

    @property
    def records(self) -> tuple[AnyRecord, ...]:
        return (*self.trajectories, *self.kernels, *self.inspections, *self.qualities)


def gather(paths: Sequence[Path]) -> Gathered:
    """The records of run folders, folders of such, and files, of every kind and schema version.

    A file that is named twice, or found twice, counts once. Changes nothing on disk. Raises RunError for a path
    that cannot be read or has no record.
    """
    return joined_files(gather_files(paths).values())


def gather_files(paths: Sequence[Path]) -> dict[str, Gathered]:
    """As `gather`, of each file apart, by its real path."""
    files = {path: record_files(path) for path in paths}
    # A store's rejected lines are read with its file: `*.jsonl` names them too.
    rejected = {os.path.realpath(rejected_path(file)) for found in files.values() for file in found}
    read: dict[str, Gathered] = {}
    for path, found in files.items():
        places = {os.path.realpath(file): file for file in found}
        for place in rejected & places.keys():
            del places[place]
        for place, file in places.items():
            if place not in read:
                read[place] = read_file(file)
        if places and not any(read[place].records for place in places):
            if holds(path, RUN_NAME) and not any(read[place].aside.count for place in places):
                raise _begun(path)
            raise RunError(f"{path}: no record in it ({_first_reason(read[place] for place in places)}); {_GIVE}")
    return read


def _begun(folder: Path) -> RunError:
    """Of a run that was stopped before its first record."""
    return RunError(f"{folder} has no record yet; measure with: {resume_command(folder)}")


def record_files(path: Path) -> list[Path]:
    """The files of records at a path: itself, in it, or in the folders in it and in those. Raises RunError."""
    try:
        if not stat.S_ISDIR(path.stat().st_mode):
            return [path]
        folders = folders_at(path)
    except OSError as failure:
        raise _unreadable(path, failure) from None
    files = [folder / name for folder in folders for name in NAMES if holds(folder, name)]
    if not files:
        raise _begun(path) if holds(path, RUN_NAME) else RunError(f"{path} is a folder without records; {_GIVE}")
    return files


def folders_at(path: Path) -> list[Path]:
    """A folder, those in it and those in these: a folder of runs, or one of rounds with a folder of runs each.

    Raises OSError for one that cannot be read.
    """
    return [path, *sorted(inner for depth in ("*", "*/*") for inner in path.glob(depth) if inner.is_dir())]


def read_file(path: Path) -> Gathered:
    """The records of a file, which may have several kinds. Raises RunError where it cannot be read."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            # A pipe nobody writes to would be waited for.
            raise RunError(f"{path} is a pipe or a device; write its records to a file, and give that")
        records, aside = read_parsed(path, of_its_kind)
    except OSError as failure:
        raise _unreadable(path, failure) from None

    def of(kind: Kind) -> list[Any]:
        return [record for its, record in records if its == kind]

    trajectories = without_completed(of("trajectory"))
    kernels, inspections, qualities = _latest(of("kernel")), _latest(of("inspection")), _latest(of("quality"))
    return Gathered(tuple(trajectories), kernels, inspections, qualities, aside)


def record_kind(record: AnyRecord) -> Kind:
    """The kind of a record."""
    if isinstance(record, Record):
        return "trajectory"
    if isinstance(record, QualityRecord):
        return "quality"
    return "inspection" if isinstance(record, InspectionRecord) else "kernel"


def kind_of(line: bytes) -> Kind:
    """What a line is a record of, or looks most like: the kind of which it has most fields that no other has."""
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError):
        return "trajectory"
    names = fields.keys() if isinstance(fields, dict) else ()
    # Of equals the first.
    return max(MARKS, key=lambda kind: len(MARKS[kind].intersection(names)))


def of_its_kind(line: bytes) -> tuple[Kind, AnyRecord] | str:
    """A line's record, or why it is none."""
    kind = kind_of(line) if line.lstrip().startswith(b"{") else "trajectory"
    record = parsed(line, _model(kind))
    return record if isinstance(record, str) else (kind, record)


def _model(kind: Kind) -> type[AnyRecord]:
    """The model of a kind; that of kernels loads torch, which the others do not need."""
    if kind == "kernel":
        from .kernel_bench.kernel_records import KernelRecord

        return KernelRecord
    if kind == "quality":
        return QualityRecord
    return InspectionRecord if kind == "inspection" else Record


def _latest(records: Iterable[R]) -> tuple[R, ...]:
    """The last record of each key in a run, where its first was."""
    return tuple({(record.run_id, record.case_key): record for record in records}.values())


def joined_files(parts: Iterable[Gathered]) -> Gathered:
    """The parts one after the other."""
    parts = tuple(parts)
    aside = Aside()
    for part in parts:
        aside.extend(part.aside)
    return Gathered(
        tuple(record for part in parts for record in part.trajectories),
        tuple(record for part in parts for record in part.kernels),
        tuple(record for part in parts for record in part.inspections),
        tuple(record for part in parts for record in part.qualities),
        aside,
    )


def _first_reason(parts: Iterable[Gathered]) -> str:
    """Why there is no record: the first line's reason."""
    aside = joined_files(parts).aside
    return f"line {aside.first[0].number}: {aside.first[0].reason}" if aside.in_file else "it is empty"


def _unreadable(path: Path, failure: OSError) -> RunError:
    return RunError(f"{path} is no run folder and no file of records ({failure.strerror}); {_GIVE}")

"""Records of many runs as one file for each kind of machine: lines as they were written, each case once.

A kind of machine is what `Environment.differences` does not tell apart: equal cards in several hosts are one kind.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Container, Hashable, Iterable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import TypeVar

from ..figures.best import best_of_case, by_time
from ..measure.conditions import commit_name
from ..measure.environment import Environment
from ..measure.folders import RunError
from ..measure.store import Aside, read_parsed, write_whole
from ..record_files import AnyRecord, Kind, gather_files, of_its_kind
from ..trajectory.records import Record, without_completed

T = TypeVar("T", bound=Hashable)
V = TypeVar("V")
# What follows the name of a file, by the kind of its records.
_SUFFIXES: dict[Kind, str] = {
    "trajectory": "",
    "kernel": "-kernels",
    "inspection": "-inspections",
    "quality": "-quality",
}
# What says nothing in a processor's name: "Intel(R) Xeon(R) Processor @ 2.20GHz".
_NOISE = re.compile(r"\((r|tm)\)|\b(processor|cpu)\b|@.*", re.IGNORECASE)


@dataclass(frozen=True)
class WrittenLine:
    """A record, the line that it was read from, without its end, and the file."""

    record: AnyRecord
    kind: Kind
    line: bytes
    file: Path


@dataclass(frozen=True)
class Repeats:
    """How many lines were left out: the same record again; a record written again later with its energy or trace;
    a case measured again on the same kind of machine."""

    same: int = 0
    completed: int = 0
    superseded: int = 0

    def __add__(self, other: Repeats) -> Repeats:
        return Repeats(
            self.same + other.same, self.completed + other.completed, self.superseded + other.superseded
        )


@dataclass(frozen=True)
class MergedFile:
    """The lines of one kind of machine and of records, by time.

    `path` is <machine>/<date>-<commit>.jsonl; kinds of machines with the same `name` differ in `environment`.
    """

    path: Path
    name: str
    environment: Environment
    written: tuple[WrittenLine, ...]

    @property
    def content(self) -> bytes:
        return b"".join(each.line + b"\n" for each in self.written)


@dataclass(frozen=True)
class Merge:
    """The files, and what was left out of them."""

    files: tuple[MergedFile, ...]
    repeats: Repeats

    @property
    def differences(self) -> list[str]:
        """A line for each kind of machine whose name another has too: in what it differs from the first such."""
        first: dict[str, MergedFile] = {}
        lines: dict[str, None] = {}
        for file in self.files:
            other = first.setdefault(file.name, file)
            if differences := other.environment.differences(file.environment):
                lines[f"{file.path.parent} is apart from {other.path.parent}: {'; '.join(differences[:3])}"] = None
        return list(lines)


def read_written(paths: Sequence[Path]) -> tuple[list[WrittenLine], Aside]:
    """The lines of run folders, folders of such and files that are records, of any kind, and those that are none.

    Raises RunError for a path that cannot be read or has no record.
    """
    aside = Aside()
    written: list[WrittenLine] = []
    for place, gathered in gather_files(paths).items():
        aside.extend(gathered.aside)
        file = Path(place)

        def parse(line: bytes, file: Path = file) -> WrittenLine | str:
            found = of_its_kind(line)
            return found if isinstance(found, str) else WrittenLine(found[1], found[0], line.rstrip(b"\n"), file)

        written += read_parsed(file, parse)[0]
    return written, aside


def check_one_commit(written: Iterable[WrittenLine]) -> None:
    """Raises RunError for records of several commits, and for those of a checkout with uncommitted changes."""
    files: dict[str, Path] = {}
    for each in written:
        environment = each.record.environment
        name = commit_name(environment)
        if environment.git_dirty:
            raise RunError(
                f"{each.file} has records of {name} with uncommitted changes, which nobody else can have: commit, "
                "and measure them again, or leave them out"
            )
        files.setdefault(name, each.file)
    if len(files) > 1:
        found = ", ".join(f"{name} ({file})" for name, file in sorted(files.items())[:4])
        raise RunError(f"records of {len(files)} commits are not merged: {found}; merge each commit apart")


def merged(written: Iterable[WrittenLine]) -> Merge:
    """The lines by kind of machine and of records, each case once; the order of the lines does not matter.

    Of a record that was written twice the longer line stays; of the records of one case the one that a report
    shows (`best_of_case`). Raises RunError as `check_one_commit`.
    """
    lines = list(written)
    check_one_commit(lines)
    repeats = Repeats()
    kinds: list[dict[Kind, list[WrittenLine]]] = []
    for of_machine in _by_machine(lines):
        kept: dict[Kind, list[WrittenLine]] = {}
        for kind, of_kind in _grouped(of_machine, attrgetter("kind")).items():
            kept[kind], dropped = _each_case_once(of_kind)
            repeats += dropped
        kinds.append(kept)
    # By what is kept: merged again, the same records have the same names.
    kinds.sort(key=lambda kept: min(_by_time(lines[0]) for lines in kept.values()))
    files: list[MergedFile] = []
    for kept in kinds:
        environments = [each.record.environment for kind in _SUFFIXES for each in kept.get(kind, ())]
        name = machine_folder(environments)
        folder = _free(name, {file.path.parts[0] for file in files})
        for kind, suffix in _SUFFIXES.items():
            if kind in kept:
                first = kept[kind][0].record
                date = f"{first.started_at:%Y-%m-%d}-{commit_name(first.environment)}"
                path = Path(folder) / f"{date}{suffix}.jsonl"
                files.append(MergedFile(path, name, environments[0], tuple(kept[kind])))
    return Merge(tuple(files), repeats)


def write_merged(out: Path, merge: Merge) -> list[Path]:
    """Writes the files below `out`, all or none, and returns their paths. A file that is there already stays.

    Raises RunError where one of them has other content, OSError where one cannot be written.
    """
    contents = {out / file.path: file.content for file in merge.files}
    for path, content in contents.items():
        if path.exists() and path.read_bytes() != content:
            raise RunError(f"{path} has other records; merge into another folder, or move that file away")
    begun: list[Path] = []
    try:
        for path, content in contents.items():
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                begun.append(path)
                write_whole(path, content)
    except BaseException:
        for path in begun:
            path.unlink(missing_ok=True)
        raise
    return list(contents)


def _by_machine(lines: Iterable[WrittenLine]) -> list[list[WrittenLine]]:
    """The lines of each kind of machine."""
    kinds: list[tuple[Environment, list[WrittenLine]]] = []
    for environment, of_environment in _grouped(lines, attrgetter("record.environment")).items():
        alike = (found for first, found in kinds if not first.differences(environment))
        if (found := next(alike, None)) is None:
            kinds.append((environment, found := []))
        found += of_environment
    return [found for _, found in kinds]


def _free(name: str, taken: Container[str]) -> str:
    """The name, numbered where it is taken, as that of one GPU with two drivers: "nvidia-h200-2"."""
    numbered = (f"{name}-{number}" for number in itertools.count(2))
    return next(free for free in itertools.chain([name], numbered) if free not in taken)


def machine_folder(environments: Sequence[Environment]) -> str:
    """A folder's name for a kind of machine: "nvidia-h200", "cpu-intel-xeon-2-cores" (the fewest seen)."""
    first = environments[0]
    if first.gpu is not None:
        return _slug(first.gpu.name) or "gpu"
    cores = [environment.usable_cores for environment in environments if environment.usable_cores]
    name = _slug(_NOISE.sub(" ", first.cpu or "")) or "unknown"
    return f"cpu-{name}" + (f"-{min(cores)}-{'core' if min(cores) == 1 else 'cores'}" if cores else "")


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _each_case_once(lines: Sequence[WrittenLine]) -> tuple[list[WrittenLine], Repeats]:
    """The lines of one kind of machine and of records without repeats, by time."""
    # The longest line last: it has all that any of them says of the record.
    longest = sorted(lines, key=lambda each: (len(each.line), each.line))
    distinct = {each.record: each for each in longest}
    records = sorted(distinct, key=lambda record: _by_time(distinct[record]))
    complete: list[AnyRecord] = list(records)
    if trajectories := [record for record in records if isinstance(record, Record)]:
        complete = list(without_completed(trajectories))
    # A report's order: two may have been begun in the same second.
    best = [best_of_case(of_case) for of_case in _grouped(by_time(complete), attrgetter("case_id")).values()]
    kept = sorted((distinct[record] for record in best), key=_by_time)
    dropped = Repeats(len(lines) - len(records), len(records) - len(complete), len(complete) - len(best))
    return kept, dropped


def _by_time(each: WrittenLine) -> tuple[object, ...]:
    return each.record.started_at, each.record.case_key, each.line


def _grouped(values: Iterable[V], key: Callable[[V], T]) -> dict[T, list[V]]:
    found: dict[T, list[V]] = {}
    for value in values:
        found.setdefault(key(value), []).append(value)
    return found

"""Records in a file, one JSON line each, on disk before the next measurement begins."""

from __future__ import annotations

import codecs
import errno
import fcntl
import json
import os
import secrets
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ValidationError

from ..terminal.visible import visible

M = TypeVar("M", bound=BaseModel)
T = TypeVar("T")
_LONGEST_REASON = 300
# The lines set aside that are kept to be named; the others are counted.
MOST_NAMED = 20
# What a lock raises where the file system has none, as some network file systems.
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)


@dataclass(frozen=True)
class SetAside:
    """A line that is no whole record: its file, its number there from 1 on, and why, in one line."""

    path: Path
    number: int
    reason: str

    def __str__(self) -> str:
        return f"{self.path}:{self.number}: {self.reason}"


@dataclass
class Aside:
    """The lines set aside while a file was read: how many, how many of them in the file itself, and the first."""

    count: int = 0
    in_file: int = 0
    first: list[SetAside] = field(default_factory=list)

    def add(self, path: Path, number: int, reason: str) -> None:
        self.count += 1
        if len(self.first) < MOST_NAMED:
            self.first.append(SetAside(path, number, reason))

    def extend(self, other: Aside) -> None:
        """Takes in the lines set aside of another file."""
        self.count += other.count
        self.in_file += other.in_file
        self.first = (self.first + other.first)[:MOST_NAMED]


def load_lines(path: Path, model: type[M]) -> tuple[list[M], int]:
    """The records of a file, and how many lines were set aside (`read_lines`)."""
    records, aside = read_lines(path, model)
    return records, aside.count


def read_lines(path: Path, model: type[M]) -> tuple[list[M], Aside]:
    """The records of a file, and the lines that were set aside. Changes nothing on disk.

    A line that is not a whole record of `model` (torn, foreign, another version) is set aside, never fatal. Lines
    that a `Store` moved beside the file are among them, and say so by their path. Raises OSError when it cannot be
    read.
    """
    return read_parsed(path, lambda line: parsed(line, model))


def read_parsed(path: Path, parse: Callable[[bytes], T | str]) -> tuple[list[T], Aside]:
    """As `read_lines`, by a function that makes a record of a line, or says in one line why there is none."""
    records: list[T] = []
    aside = Aside()
    with path.open("rb") as file:
        for number, line in _lines(file):
            record = parse(line)
            if isinstance(record, str):
                aside.add(path, number, record)
            else:
                records.append(record)
    aside.in_file = aside.count
    moved = rejected_path(path)
    if moved.is_file():
        whole = f"a whole record; append it to {path.name} to have it back"
        with moved.open("rb") as file:
            for number, line in _lines(file):
                record = parse(line)
                aside.add(moved, number, record if isinstance(record, str) else whole)
    return records, aside


def rejected_path(path: Path) -> Path:
    """Where lines of that file go that are no whole record: records.jsonl -> records.rejected.jsonl."""
    return path.with_name(f"{path.stem}.rejected{path.suffix}")


class Store(Generic[M]):
    """Appends records to a file, each on disk before `append` returns.

    Several processes may open and append to one file: each waits until no other one is at it (`flock`). Only where
    the file system has no locks nobody waits. Opening an existing file first moves what is no whole record to a
    file beside it. Raises OSError where the folder cannot be written.
    """

    def __init__(self, path: Path, model: type[M]) -> None:
        self.path = path
        self.model = model
        with _held(path) as file:
            self._set_aside(file.readall())
        _sync_folder(path.parent)

    def append(self, *records: M) -> None:
        """Writes the records in one go, flushed through to the disk; none of them where it raises OSError.

        A last line that was torn since the file was opened is ended first, so that no record is glued to it.
        """
        lines = "".join(record.model_dump_json() + "\n" for record in records).encode()
        with _held(self.path) as file:
            size = file.seek(0, os.SEEK_END)
            torn = size > 0 and os.pread(file.fileno(), 1, size - 1) != b"\n"
            try:
                _write_all(file, b"\n" * torn + lines)
            except OSError:
                # A full disk took a part.
                with suppress(OSError):
                    file.truncate(size)
                raise

    def load(self) -> list[M]:
        """The records on disk."""
        return load_lines(self.path, self.model)[0]

    def _set_aside(self, content: bytes) -> None:
        kept: list[bytes] = []
        rejected: list[bytes] = []
        for _, line in _lines(content.split(b"\n")):
            (rejected if isinstance(parsed(line, self.model), str) else kept).append(line + b"\n")
        if b"".join(kept) == content:
            return
        # First keep the rejected lines, then drop them from the file: a crash between the two counts them twice.
        if rejected:
            _write_durably(rejected_path(self.path), b"".join(rejected), "ab")
        write_whole(self.path, b"".join(kept))


@contextmanager
def _held(path: Path) -> Iterator[FileIO]:
    """The file at its beginning, to read and to append to, made if need be; no other process has it meanwhile."""
    while True:
        with path.open("a+b", buffering=0) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError as failure:
                if failure.errno not in NO_LOCKS:
                    raise
            # Whoever held it may have put another file in its place.
            if _is_at(file, path):
                file.seek(0)
                yield file
                return


def _is_at(file: FileIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def write_whole(path: Path, content: bytes) -> None:
    """Replaces a file's content at once: who reads it, or a crash, meets the old or the new, never a part."""
    # No two processes share it, on whatever machines: ids of processes are alike there.
    replacement = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        _write_durably(replacement, content, "wb")
        replacement.replace(path)
    finally:
        replacement.unlink(missing_ok=True)
    _sync_folder(path.parent)


def _lines(content: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    """The lines that are not blank, by their numbers from 1 on, without the mark that some editors add."""
    unmarked = ((n, line.removeprefix(codecs.BOM_UTF8)) for n, line in enumerate(content, 1))
    return ((n, line) for n, line in unmarked if line.strip())


def parsed(line: bytes, model: type[M]) -> M | str:
    """The model's value, or in one short line why there is none."""
    # Most lines of a foreign file end here, and it may have millions.
    if not line.lstrip().startswith(b"{"):
        return "no JSON object: torn, or no record at all"
    try:
        return model.model_validate_json(line)
    except ValidationError as error:
        return visible(_reason(line, error))[:_LONGEST_REASON]


def _reason(line: bytes, error: ValidationError) -> str:
    try:
        fields: Any = json.loads(line)
    except (ValueError, RecursionError):
        return "no JSON: torn, or no record at all"
    problems = error.errors(include_url=False, include_context=False, include_input=False)
    # Of another version every field may differ: the version alone says what to do.
    version = next((problem for problem in problems if problem["loc"] == ("schema_version",)), None)
    if version is not None:
        return (
            f"of schema version {fields['schema_version']!r:.20}, which this ldmperf does not know; read it with "
            "the one that wrote it, or a newer one"
        )
    place = ".".join(map(str, problems[0]["loc"]))
    others = f", and {len(problems) - 1} more" if len(problems) > 1 else ""
    said = problems[0]["msg"].removeprefix("Value error, ")
    return f"{place + ': ' if place else ''}{said}{others}"


def _write_durably(path: Path, content: bytes, mode: Literal["ab", "wb"]) -> None:
    with path.open(mode, buffering=0) as file:
        _write_all(file, content)


def _write_all(file: FileIO, content: bytes) -> None:
    """Writes through to the disk. Unbuffered, as what a full disk refused must not be written at closing."""
    rest = memoryview(content)
    while rest:
        rest = rest[file.write(rest) :]
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    # A new or renamed file survives a power cut only once its folder is on disk.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

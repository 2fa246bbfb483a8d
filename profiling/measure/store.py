"""Records in a file, one JSON line each, on disk before the next measurement begins."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ValidationError

from ..terminal.visible import visible

M = TypeVar("M", bound=BaseModel)
T = TypeVar("T")
_LONGEST_REASON = 300
# The lines set aside that are kept to be named; the others are counted.
MOST_NAMED = 20


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

    Opening an existing file first moves what is no whole record to a file beside it, so that nothing is ever glued
    to a torn last line. Raises OSError where the folder cannot be written.
    """

    def __init__(self, path: Path, model: type[M]) -> None:
        self.path = path
        self.model = model
        if path.exists():
            self._set_aside()
        else:
            _write_durably(path, b"", "xb")
            _sync_folder(path.parent)

    def append(self, *records: M) -> None:
        """Writes the records in one go, flushed through to the disk."""
        lines = "".join(record.model_dump_json() + "\n" for record in records)
        _write_durably(self.path, lines.encode(), "ab")

    def load(self) -> list[M]:
        """The records on disk."""
        return load_lines(self.path, self.model)[0]

    def _set_aside(self) -> None:
        content = self.path.read_bytes()
        kept: list[bytes] = []
        rejected: list[bytes] = []
        for _, line in _lines(content.split(b"\n")):
            (rejected if isinstance(parsed(line, self.model), str) else kept).append(line + b"\n")
        if b"".join(kept) == content:
            return
        # First keep the rejected lines, then drop them from the file: a crash between the two counts them twice.
        _write_durably(rejected_path(self.path), b"".join(rejected), "ab")
        write_whole(self.path, b"".join(kept))


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
    """The lines that are not blank, by their numbers from 1 on."""
    return ((n, line) for n, line in enumerate(content, 1) if line.strip())


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


def _write_durably(path: Path, content: bytes, mode: Literal["ab", "wb", "xb"]) -> None:
    with path.open(mode) as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    # A new or renamed file survives a power cut only once its folder is on disk.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

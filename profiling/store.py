"""Records in a file, one JSON line each, on disk before the next measurement begins."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Generic, Literal, TypeVar

from pydantic import BaseModel, ValidationError

M = TypeVar("M", bound=BaseModel)


def load_lines(path: Path, model: type[M]) -> tuple[list[M], int]:
    """The records of a file, and how many lines were set aside. Changes nothing on disk.

    A line that is not a whole record of `model` (torn, foreign, another version) is counted, never fatal; lines
    that a `Store` moved beside the file count too. Raises OSError when it cannot be read.
    """
    records, rejected = _parse(path.read_bytes(), model)
    aside = rejected_path(path)
    moved = _lines(aside.read_bytes()) if aside.exists() else []
    return records, len(rejected) + len(moved)


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
        for line in _lines(content):
            (kept if _record(line, self.model) else rejected).append(line + b"\n")
        if b"".join(kept) == content:
            return
        # First keep the rejected lines, then drop them from the file: a crash between the two counts them twice.
        _write_durably(rejected_path(self.path), b"".join(rejected), "ab")
        write_whole(self.path, b"".join(kept))


def write_whole(path: Path, content: bytes) -> None:
    """Replaces a file's content at once: who reads it, or a crash, meets the old or the new, never a part."""
    replacement = path.with_suffix(".tmp")
    _write_durably(replacement, content, "wb")
    replacement.replace(path)
    _sync_folder(path.parent)


def _lines(content: bytes) -> list[bytes]:
    return [line for line in content.split(b"\n") if line.strip()]


def _record(line: bytes, model: type[M]) -> M | None:
    try:
        return model.model_validate_json(line)
    except ValidationError:
        return None


def _parse(content: bytes, model: type[M]) -> tuple[list[M], list[bytes]]:
    records: list[M] = []
    rejected: list[bytes] = []
    for line in _lines(content):
        record = _record(line, model)
        if record is None:
            rejected.append(line)
        else:
            records.append(record)
    return records, rejected


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

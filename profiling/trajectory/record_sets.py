"""Records of several run folders and files, read as one set."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from ..measure.folders import RunError
from ..measure.store import Aside
from .records import RECORDS_NAME, Record, read_records

T = TypeVar("T")

_GIVE = f"give run folders, or files of records such as {RECORDS_NAME}"


def readable(path: Path, read: Callable[[Path], T], give: str = _GIVE) -> T:
    """What `read` makes of a file, or of a folder that it knows; RunError, which ends in `give`, if it cannot."""
    try:
        mode = path.stat().st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            # It is read twice, and a pipe nobody writes to would be waited for.
            raise RunError(f"{path} is a pipe or a device; write its records to a file, and give that")
        if stat.S_ISDIR(mode) and not (path / RECORDS_NAME).exists():
            raise RunError(f"{path} is a folder without records; {give}")
        return read(path)
    except OSError as failure:
        raise RunError(f"{path} is no run folder and no file of records ({failure.strerror}); {give}") from None


def first_reason(aside: Aside) -> str:
    """Why a file has no record: its first line's reason."""
    return f"line {aside.first[0].number}: {aside.first[0].reason}" if aside.in_file else "it is empty"


def read_sets(paths: Sequence[Path]) -> tuple[list[Record], Aside]:
    """The records of all run folders and files, of every schema version, and the lines that are none.

    A file that is named twice counts once. Raises RunError for one that cannot be read or has no record.
    """
    records: list[Record] = []
    aside = Aside()
    for path in {os.path.realpath(path): path for path in paths}.values():
        found, of_file = readable(path, read_records)
        if not found:
            raise RunError(f"{path}: no record in it ({first_reason(of_file)}); {_GIVE}")
        records += found
        aside.extend(of_file)
    return records, aside

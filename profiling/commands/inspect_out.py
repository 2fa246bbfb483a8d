"""`ldmperf inspect OPERATOR --out`: what the compiler made of the launches, as records."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..measure.folders import RunError, new_folder
from ..measure.recorded import new_run_id, utc_now
from ..record_files import gather
from ..static import INSPECTIONS_NAME
from ..static.inspection_records import InspectionRecord, InspectionStore, compiler_environment, numbered
from .shared import stop


def write_inspections(results: Iterable[Mapping[str, Any]], out: Path) -> tuple[Path, list[InspectionRecord]]:
    """Writes the record of each result (`InspectionRecord.of`) when it is there; the file, and the records.

    out: a .jsonl file, which is appended to, or the place of a new folder. Raises RunError for a file of something
    else; ends the command where it cannot be written.
    """
    environment, run_id = compiler_environment(), new_run_id()
    made = (InspectionRecord.of(told, environment, utc_now(), run_id) for told in results)
    records = []
    try:
        if out.suffix == ".jsonl":
            _check_file(out)
            out.parent.mkdir(parents=True, exist_ok=True)
            store = InspectionStore(out)
        else:
            store = InspectionStore(new_folder(out, utc_now(), environment, "-inspect") / INSPECTIONS_NAME)
        for record in numbered(made):
            store.append(record)
            records.append(record)
    except OSError as failure:
        stop(f"cannot write to {out} ({failure.strerror}); choose another place with --out", 1)
    return store.path, records


def _check_file(path: Path) -> None:
    """A store moves lines that are not its own out of its file: other records are left alone."""
    if not path.exists() or (path.is_file() and not path.stat().st_size):
        return
    found = gather([path])
    if path.is_dir() or found.trajectories or found.kernels:
        raise RunError(f"{path} holds records of another kind; give --out a file of inspections, or a new one")

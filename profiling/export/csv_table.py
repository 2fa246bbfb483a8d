"""CSV (RFC 4180): a row for each record, failed and repeated ones included; the columns are always the same."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..compare.metrics import Metric
from ..record_files import record_kind
from ..terminal.visible import visible
from ..trajectory.case import Case
from .series import (
    ENVIRONMENT_FIELDS,
    OF_INSPECTIONS,
    OF_KERNELS,
    OF_QUALITIES,
    OF_TRAJECTORIES,
    conditions,
    environment,
    processor,
)

if TYPE_CHECKING:
    from ..record_files import AnyRecord

_FIRST = ("kind", "case_id", "status", "message", "case_key", "run_id", "started_at", "processor")
_OWN = (*OF_TRAJECTORIES, *OF_KERNELS, *OF_INSPECTIONS, *OF_QUALITIES, "generator")
_CONDITIONS = tuple(dict.fromkeys((*Case.model_fields, *_OWN)))
# A spreadsheet takes a text for a formula that begins with one of these; the quote itself, to be told from ours.
_GUARDED = ("=", "+", "-", "@", "'")


def csv_table(records: Sequence[AnyRecord], metrics: Sequence[Metric]) -> str:
    """The table: texts are quoted, numbers are not, and what is null is an empty text."""
    spread = ("p20", "p80", "min")
    names = [
        name
        for metric in metrics
        for name in (metric.name, *(f"{metric.name}_{part}" for part in spread if metric.sampled))
    ]
    columns = (*_FIRST, *names, *_CONDITIONS, *ENVIRONMENT_FIELDS)
    file = io.StringIO(newline="")
    writer = csv.writer(file, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
    writer.writerow(columns)
    for record in sorted(records, key=lambda record: record.started_at):
        cells = _first(record) | conditions(record) | environment(record)
        for metric in metrics:
            if record.status == "ok" and (figure := metric.figure(record)) is not None:
                cells |= {metric.name: figure.value, f"{metric.name}_p20": figure.p20}
                cells |= {f"{metric.name}_p80": figure.p80, f"{metric.name}_min": figure.min}
        writer.writerow([_cell(cells.get(column)) for column in columns])
    return file.getvalue()


def _first(record: AnyRecord) -> dict[str, object]:
    return {
        "kind": record_kind(record),
        "case_id": record.case_id,
        "status": record.status,
        "message": record.message,
        "case_key": record.case_key,
        "run_id": record.run_id,
        "started_at": record.started_at.isoformat(),
        "processor": processor(record),
    }


def _cell(value: object) -> object:
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    return value if isinstance(value, int | float) else guarded(str(value))


def guarded(text: str) -> str:
    """The visible text, with a quote before it where a spreadsheet would take it for a formula."""
    shown = visible(text)
    return f"'{shown}" if shown.startswith(_GUARDED) else shown

"""Which record of a case is shown, out of several, and the order in which records were made."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from itertools import groupby

from ..measure.recorded import FAILED
from ..trajectory.records import Record


def by_time(records: Sequence[Record]) -> list[Record]:
    """In the order of their start; what was started in one second by key, then by content."""
    ordered = []
    for _, alike in groupby(sorted(records, key=_started), key=_started):
        same = list(alike)
        ordered += sorted(same, key=lambda record: record.model_dump_json()) if len(same) > 1 else same
    return ordered


def _started(record: Record) -> tuple[datetime, str]:
    return record.started_at, record.case_key


def best_record(records: Sequence[Record]) -> Record:
    """The record to show of a case, out of those of one kind of environment in the order in which they were made.

    Preferred in this order: a record with a time; one that was not cut short; one timed in turn with more backends
    (the ladder's ratios are within one group); one with a trace; the latest. What was measured before a defect
    (`FAILED`) does not count: the defect is shown until the case is measured again.
    """
    defects = [place for place, record in enumerate(records) if record.status in FAILED]
    since = records[defects[-1] :] if defects else records

    def merit(numbered: tuple[int, Record]) -> tuple[object, ...]:
        place, record = numbered
        harness = record.harness
        is_timed, is_whole = record.wall_ms is not None, harness.stopped_by is None
        return is_timed, is_whole, len(harness.interleaved), record.trace is not None, place

    return max(enumerate(since), key=merit)[1]

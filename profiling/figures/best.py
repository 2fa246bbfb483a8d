"""Which record of a case is shown, out of several, and the order in which records were made."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime
from itertools import groupby
from typing import TypeVar, cast

from ..measure.recorded import since_defect
from ..quality import QualityRecord
from ..record_files import AnyRecord
from ..static.inspection_records import InspectionRecord
from ..trajectory.records import Record

R = TypeVar("R", bound="AnyRecord")


def by_time(records: Iterable[R]) -> list[R]:
    """In the order of their start; what was started in one second by key, then by content."""
    ordered: list[R] = []
    for _, alike in groupby(sorted(records, key=_started), key=_started):
        same = list(alike)
        ordered += sorted(same, key=lambda record: record.model_dump_json()) if len(same) > 1 else same
    return ordered


def _started(record: AnyRecord) -> tuple[datetime, str]:
    return record.started_at, record.case_key


def best_of_case(records: Sequence[AnyRecord]) -> AnyRecord:
    """The record to show of a case, as `best_record`, whatever kind of records they are.

    Of a kernel's call as `best_kernel`. Of a launch the latest: a compiler does not vary. Of a quality the latest.
    """
    last = records[-1]
    if isinstance(last, Record):
        return best_record(cast("Sequence[Record]", records))
    if isinstance(last, InspectionRecord | QualityRecord):
        return last
    # Loads torch, which whoever has a kernel's record has loaded.
    from ..kernel_bench.kernel_records import KernelRecord, best_kernel

    return best_kernel(cast("Sequence[KernelRecord]", records))


def best_record(records: Sequence[Record]) -> Record:
    """The record to show of a case, out of those of one kind of environment in the order in which they were made.

    Preferred in this order: a record with a time; one that was not cut short; one timed in turn with more backends
    (the ladder's ratios are within one group); one with a trace; the latest. What was measured before a defect
    does not count (`since_defect`).
    """

    def merit(numbered: tuple[int, Record]) -> tuple[object, ...]:
        place, record = numbered
        harness = record.harness
        is_timed, is_whole = record.wall_ms is not None, harness.stopped_by is None
        return is_timed, is_whole, len(harness.interleaved), record.trace is not None, place

    return max(enumerate(since_defect(records)), key=merit)[1]

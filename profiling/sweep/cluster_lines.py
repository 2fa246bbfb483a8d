"""The progress of groups that are measured side by side: each line begins with its group's number."""

from __future__ import annotations

from collections.abc import Sequence

from ..trajectory.case import Case
from ..trajectory.progress import ProgressLines, heading, readable, summary
from ..trajectory.records import Record


class ClusterLines(ProgressLines):
    """As `ProgressLines`; groups have numbers in the order in which nodes begin them."""

    def __enter__(self) -> ClusterLines:
        super().__enter__()
        self._numbers: dict[str, int] = {}
        return self

    def arrived(self, cases: Sequence[Case], host: str, pid: int) -> None:
        """These cases of a group, what is left of it, are measured on that host now, by that worker."""
        key = cases[0].group_key
        self._number = self._numbers.setdefault(key, len(self._numbers) + 1)
        self._write(f"[{self._number}/{self._total}] {host} (worker {pid}): {heading(cases)}")

    def recorded(self, record: Record) -> None:
        self._remaining.end(record.case)
        left = readable(self._remaining.seconds)
        self._write(f"[{self._numbers.get(record.case.group_key, '-')}] {summary(record)}{left and ', ' + left}")

    def lost(self, cases: Sequence[Case], host: str | None, reason: str) -> None:
        """What measured the group is gone."""
        place = "" if host is None else f" on {host}"
        self._write(f"[{self._numbers.get(cases[0].group_key, '-')}] lost{place}: {reason}")

    def stopping(self) -> None:
        self._write("stopping once the groups in flight are done; Ctrl-C again stops at once")

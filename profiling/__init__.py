"""What one sample of each size costs in wall-clock time."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .trajectory.case import Case
from .trajectory.records import Record, load_records

if TYPE_CHECKING:
    from .trajectory.runner import profile

__all__ = ["Case", "Record", "load_records", "profile"]


def __getattr__(name: str) -> object:
    # The runner brings torch along, which reading records and `ldmperf --help` do without.
    if name == "profile":
        from .trajectory.runner import profile

        return profile
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

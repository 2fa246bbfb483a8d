"""What one sample of each size costs in wall-clock time."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .trajectory.case import Case
    from .trajectory.records import Record, load_records
    from .trajectory.runner import profile

__all__ = ["Case", "Record", "load_records", "profile"]

# Imported when first asked for: the runner brings torch along, records bring pydantic, and every pytest session
# imports this package for its plugin.
_HOMES = {
    "Case": "trajectory.case",
    "Record": "trajectory.records",
    "load_records": "trajectory.records",
    "profile": "trajectory.runner",
}


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""Commits and kinds of machines of records: their order and their names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime

from ..figures.phrases import machine_name
from ..figures.text import joined, value_of
from ..measure.conditions import commit
from ..measure.environment import Environment
from ..record_files import AnyRecord
from .sets import OF_THE_COMMIT


def commit_order(records: Iterable[AnyRecord]) -> dict[str, datetime]:
    """The commits, the oldest first, with the time of each: when it was made, or else first measured."""
    made: dict[str, datetime] = {}
    measured: dict[str, datetime] = {}
    for record in records:
        name, time = commit(record.environment), record.environment.commit_time
        measured[name] = min(measured.get(name, record.started_at), record.started_at)
        if time is not None:
            made[name] = time
    times = measured | made
    # A commit comes before what was changed on top of it, which has its time.
    return {name: times[name] for name in sorted(times, key=lambda name: (times[name], measured[name], name))}


def machine_names(environments: Sequence[Environment]) -> list[str]:
    """Kinds of machines in words: GPU or processor, and what differs between kinds with the same."""
    names = list(map(machine_name, environments))
    told = []
    for name, environment in zip(names, environments, strict=True):
        others = [e for other, e in zip(names, environments, strict=True) if other == name]
        fields = dict.fromkeys(line.partition(":")[0] for e in others for line in environment.differences(e))
        kind = dict(environment.kind)
        apart = [f"{field} {value_of(kind.get(field))}" for field in fields if field not in OF_THE_COMMIT]
        told.append(joined((name, *apart)))
    return told

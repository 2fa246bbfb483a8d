"""The state of a machine that a reader of its times has to know, in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Protocol

from ..terminal.visible import counted
from .environment import DeviceState, Environment
from .nvml import UNTHROTTLED
from .recorded import Samples

# Our own threads make a load of 1 for each core; a quarter above is somebody else's.
CROWDED_LOAD = 1.25
# Of the median, between p20 and p80.
WIDE_SPREAD = 0.1


def commit(environment: Environment) -> str:
    """The short commit, marked when the checkout had changes on top."""
    if environment.git_commit is None:
        return "unknown commit"
    return environment.git_commit[:7] + (" with uncommitted changes" if environment.git_dirty else "")


def commit_name(environment: Environment) -> str:
    """The short commit as a part of file names; the version where there is no commit."""
    return environment.git_commit[:7] if environment.git_commit else f"v{environment.ldmperf}"


def crowded(load_average: float | None, cores: int | None) -> bool:
    """Whether so much load on so many usable cores is more than our own threads make; not where one is unknown."""
    return bool(load_average is not None and cores and load_average > CROWDED_LOAD * cores)


def is_unsteady(times: Samples | None) -> bool:
    """Whether p20 to p80 spans so much of the median that two digits of a comparison mean nothing."""
    return times is not None and times.p80 - times.p20 > WIDE_SPREAD * times.p50


class Measured(Protocol):
    """A record of whatever was measured."""

    @property
    def device_before(self) -> DeviceState: ...
    @property
    def device_during(self) -> DeviceState: ...
    @property
    def device_after(self) -> DeviceState: ...
    @property
    def environment(self) -> Environment: ...


def flags(record: Measured) -> tuple[str, ...]:
    """What makes a GPU's time not the time of a free GPU: "throttled: SwPowerCap", "shared GPU: 1 other process".

    Empty where nothing is known against it. The throttle reasons are those seen while it was measured; of records
    that have none, those after it.
    """
    during, after = record.device_during, record.device_after
    seen = after.throttle_reasons if during.throttle_reasons is None else during.throttle_reasons
    reasons = [reason for reason in seen or () if reason not in UNTHROTTLED]
    counts = [state.foreign_processes for state in (record.device_before, during, after)]
    others = max((count for count in counts if count is not None), default=0)
    return (
        *([f"throttled: {', '.join(reasons)}"] if reasons else []),
        *([f"shared GPU: {counted(others, 'other process', 'other processes')}"] if others else []),
    )


def marks(*records: Measured) -> str:
    """The flags of any of them without details, for a cell: "throttled, shared GPU"; empty without flags."""
    return ", ".join(dict.fromkeys(flag.partition(":")[0] for record in records for flag in flags(record)))


def flag_notes(records: Sequence[Measured], noun: str) -> list[str]:
    """A note for each flag that some of the records have: what the marks in a table stand for."""
    found = Counter(flag for record in records for flag in flags(record))
    of = counted(len(records), noun)
    return [
        f"{times} of {of} marked {flag}, seen while they were measured. Such a time is not that of a free GPU."
        for flag, times in sorted(found.items())
    ]


def is_busy(record: Measured) -> bool:
    """Whether the load around a record is more than our own threads make."""
    return crowded(_highest_load(record), record.environment.usable_cores)


def _highest_load(record: Measured) -> float:
    states = record.device_before.load_average_1min, record.device_after.load_average_1min
    return max((load for load in states if load is not None), default=0.0)


def busy_notes(records: Sequence[Measured], noun: str) -> list[str]:
    """A note where the load around some of the records is more than our own threads make."""
    loads = [_highest_load(record) for record in records if is_busy(record)]
    if not loads:
        return []
    return [
        f"The machine was probably busy with other work: {len(loads)} of {counted(len(records), noun)} saw "
        f"a load average above {CROWDED_LOAD:g} per usable core, up to {max(loads):.2f}."
    ]

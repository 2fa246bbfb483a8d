"""What a GPU says of itself while something is measured on it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from .environment import DeviceState, throttle_reasons
from .nvml import NO_SENSOR, Sensor


@dataclass
class DeviceWatch:
    """The state while something is measured, put together from readings. Without a GPU it stays empty.

    state: the last whole reading, with the throttle reasons of all readings and the most foreign processes.
    """

    sensor: Sensor = NO_SENSOR
    state: DeviceState = field(default_factory=DeviceState)

    def read_throttling(self) -> None:
        """One quick reading, right after a sample: what slowed the sample still holds, and no sample waits for it.

        A reading after the case would find an idle GPU.
        """
        if self.sensor.missing is None:
            self.add(self.state.model_copy(update={"throttle_reasons": throttle_reasons(self.sensor)}))

    def add(self, reading: DeviceState) -> None:
        """A whole reading."""
        seen = (self.state.throttle_reasons, reading.throttle_reasons)
        others = (self.state.foreign_processes, reading.foreign_processes)
        self.state = reading.model_copy(
            update={
                "throttle_reasons": _union(reasons for reasons in seen if reasons is not None),
                "foreign_processes": max((count for count in others if count is not None), default=None),
            }
        )


def _union(readings: Iterable[tuple[str, ...]]) -> tuple[str, ...] | None:
    """All reasons in order; None where there is no reading."""
    known = list(readings)
    return tuple(sorted({reason for reasons in known for reason in reasons})) if known else None

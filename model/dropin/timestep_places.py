"""`TimestepPlaces`: where a timestep stands among those of a run, without waiting for the device."""

from __future__ import annotations

from typing import Any

from torch import Tensor


class TimestepPlaces:
    """The timesteps of a run, on the host and on their device.

    A pipeline hands over elements of `timesteps`, views of its memory: their place is an offset. A number or a
    tensor on the CPU is searched for on the host. Another tensor on a GPU is read, for which the host waits.
    """

    def __init__(self, host: Tensor, timesteps: Tensor) -> None:
        self.host = host
        self.timesteps = timesteps

    def place(self, timestep: Any) -> int:
        """The first place of the timestep; ValueError for one that is not of this run."""
        at = self.offset(timestep)
        if at is not None:
            return at
        value = timestep.item() if isinstance(timestep, Tensor) else timestep
        places = (self.host == value).nonzero()
        if len(places) == 0:
            raise ValueError(f"timestep {value} is not one of this run's: pass an element of scheduler.timesteps")
        return int(places[0])

    def on_host(self, timestep: Any) -> Any:
        """The timestep as an element of `host`, or as it is."""
        at = self.offset(timestep)
        return timestep if at is None else self.host[at]

    def check(self, timestep: Any, place: int) -> None:
        """ValueError for a timestep that is known not to be the one at `place`."""
        at = self.offset(timestep)
        if at is None:
            on_gpu = isinstance(timestep, Tensor) and timestep.device.type != "cpu"
            is_other = not on_gpu and place < len(self.host) and bool(self.host[place] != timestep)
        else:
            is_other = at != place
        if is_other:
            raise ValueError("timesteps must follow each other: pass the elements of scheduler.timesteps in order")

    def offset(self, timestep: Any) -> int | None:
        """The place of an element of `timesteps`, which is not read; None for any other value."""
        ours = self.timesteps
        if not isinstance(timestep, Tensor) or timestep.numel() != 1 or timestep.dtype != ours.dtype:
            return None
        if timestep.untyped_storage().data_ptr() != ours.untyped_storage().data_ptr():
            return None
        at = int(timestep.storage_offset() - ours.storage_offset())
        return at if 0 <= at < len(ours) else None

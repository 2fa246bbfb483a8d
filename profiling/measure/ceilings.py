"""Ceilings of a device: the most bytes, FLOPs and exponentials a second that were ever seen here.

`ceiling_probes` measures them, `ceiling_cache` keeps them.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import AwareDatetime, Field

from ..options import DTYPES, DType
from .conditions import crowded
from .environment import Environment
from .recorded import RecordModel, short_id

# Times the fastest matmul, and no implementation is faster: what other hours of the machine may add (a neighbour
# that left, a higher clock), and what Winograd's algorithm saves beyond the quarter on 8x8 tiles (5.06 times).
MARGIN = 1.5
# Products of 16-bit parts that make one of float32's accuracy (bf16x3).
PARTS_OF_FLOAT32 = 3


class Ceiling(RecordModel):
    """A rate, how it was reached and when; where `per_s` is null, `message` says why."""

    per_s: Annotated[float | None, Field(gt=0)] = None
    how: str | None = None
    at: AwareDatetime
    message: str | None = None


class CeilingDevice(RecordModel):
    """Whose the ceilings are; those of another device, torch or number of threads are other ceilings.

    `threads` and `cores` (usable ones) are null for a GPU.
    """

    machine_id: str | None
    device: str
    torch: str | None
    threads: int | None = None
    cores: int | None = None

    @classmethod
    def of(cls, environment: Environment) -> CeilingDevice:
        """The device that an environment measures on."""
        if environment.gpu is not None:
            return cls(machine_id=environment.machine_id, device=environment.gpu.name, torch=environment.torch)
        return cls(
            machine_id=environment.machine_id,
            device=environment.cpu or "cpu",
            torch=environment.torch,
            threads=environment.torch_threads,
            cores=environment.usable_cores,
        )

    @property
    def key(self) -> str:
        """16 hexadecimal digits."""
        return short_id(self.model_dump())


class Ceilings(RecordModel):
    """The ceilings of a device. `measured`: how often; `load_average_1min`: the least before any of them."""

    device: CeilingDevice
    bytes: Ceiling
    flop: dict[DType, Ceiling]
    exponentials: Ceiling
    measured: Annotated[int, Field(ge=1)] = 1
    last: AwareDatetime
    load_average_1min: float | None = None

    @property
    def crowded(self) -> bool:
        """Whether other work ran on the CPU whenever they were measured, so that they may be too low."""
        return self.device.threads is not None and crowded(self.load_average_1min, self.device.cores)

    def flop_per_s(self, dtype: DType) -> float | None:
        """The ceiling of matmuls in that dtype; of a 16-bit one at least float32's, to which values widen.

        A processor without 16-bit units emulates their matmuls, at less.
        """
        rates = [self._flop(dtype), None if dtype == "float32" else self._flop("float32")]
        return None if rates[0] is None else max(rate for rate in rates if rate is not None)

    def least_flop_per_s(self, dtype: DType) -> float | None:
        """What no implementation of that dtype's accuracy exceeds: the fastest of its ways, times `MARGIN`.

        A 16-bit result may come from any dtype, a float32 one from three products of 16-bit parts.
        """
        shares = {name: 1 / PARTS_OF_FLOAT32 if dtype == "float32" != name else 1.0 for name in DTYPES}
        rates = [share * rate for name, share in shares.items() if (rate := self._flop(name)) is not None]
        return MARGIN * max(rates) if rates and self._flop(dtype) is not None else None

    def missing(self, dtype: DType) -> str | None:
        """Why there is no roofline in that dtype; None where there is one."""
        needed = {"bytes": self.bytes, f"{dtype} matmuls": self.flop.get(dtype), "exponentials": self.exponentials}
        reasons = [
            f"{name}: {'not measured' if ceiling is None else ceiling.message}"
            for name, ceiling in needed.items()
            if ceiling is None or ceiling.per_s is None
        ]
        return "; ".join(reasons) or None

    def _flop(self, dtype: DType) -> float | None:
        return self.flop[dtype].per_s if dtype in self.flop else None


def best_of(known: Ceilings, new: Ceilings) -> Ceilings:
    """The larger rate of each, of one device; counts and dates are of both. Raises ValueError for two devices."""
    if known.device != new.device:
        raise ValueError(f"ceilings of {known.device.device} and of {new.device.device} are not one device's")
    names = dict.fromkeys((*known.flop, *new.flop))
    loads = [load for load in (known.load_average_1min, new.load_average_1min) if load is not None]
    return new.model_copy(
        update={
            "bytes": _larger(known.bytes, new.bytes),
            "flop": {name: _larger(known.flop.get(name), new.flop.get(name)) for name in names},
            "exponentials": _larger(known.exponentials, new.exponentials),
            "measured": known.measured + new.measured,
            "load_average_1min": min(loads, default=None),
        }
    )


def _larger(known: Ceiling | None, new: Ceiling | None) -> Ceiling:
    """The one with the larger rate; without rates the new one, whose reason is of now."""
    there = [one for one in (new, known) if one is not None]
    return max(there, key=lambda ceiling: ceiling.per_s or 0.0)

"""Ceilings of a device: the most bytes, FLOPs and exponentials a second that were ever seen here.

A ceiling is an upper bound, so it is the best of many short samples at several sizes, never a median; noise makes
a sample slower, never faster. Sizes differ in what serves them best: a CPU multiplies matrices fastest that its
cache holds.

    bytes         reads and writes of a copy much larger than the caches
    FLOP          square matmuls in bfloat16, float16 and float32 (no TF32), two per multiply-add
    exponentials  on a CPU torch.exp of float32 numbers that a core's cache holds, so that memory does not bound it
                  on a GPU 16 a clock and multiprocessor at the highest clock, by design: memory and caches bound
                  every elementwise operator there
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated

import torch
from pydantic import AwareDatetime, Field

from ..machines import Rates
from ..options import DTYPES, DType
from .environment import Environment, device_state
from .outcomes import failure, release_memory
from .rates import (
    DELAY_CYCLES,
    NO_CLOCK,
    Call,
    copy_call,
    device_ms,
    exponential_call,
    matmul_call,
    multiprocessors_and_clock,
)
from .recorded import RecordModel, short_id, utc_now
from .settings import measuring_settings
from .timing import Clock, Timed, garbage_collection_paused, timed

# Of each of the five rates; all sizes of a rate share it.
SECONDS_EACH = 0.8
# A sample is as many calls as take this long, many times the clock's resolution.
SAMPLE_MS = 2.0
# Times the fastest matmul, and no implementation is faster: what other hours of the machine may add (a neighbour
# that left, a higher clock), and what Winograd's algorithm saves beyond the quarter on 8x8 tiles (5.06 times).
MARGIN = 1.5
# Products of 16-bit parts that make one of float32's accuracy (bf16x3).
PARTS_OF_FLOAT32 = 3

_COPY_SIZES = {"cpu": (2**26, 2**27, 2**28), "cuda": (2**28, 2**29, 2**30)}
_MATMUL_SIZES = {"cpu": (256, 512, 768, 1024, 2048), "cuda": (4096, 8192, 16384)}
# Numbers of each thread.
_EXPONENTIALS = (2**14, 2**15, 2**16, 2**17)


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
    """The ceilings of a device. `measured`: how often; `load_average_1min`: before the last time."""

    device: CeilingDevice
    bytes: Ceiling
    flop: dict[DType, Ceiling]
    exponentials: Ceiling
    measured: Annotated[int, Field(ge=1)] = 1
    last: AwareDatetime
    load_average_1min: float | None = None

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
    return new.model_copy(
        update={
            "bytes": _larger(known.bytes, new.bytes),
            "flop": {name: _larger(known.flop.get(name), new.flop.get(name)) for name in names},
            "exponentials": _larger(known.exponentials, new.exponentials),
            "measured": known.measured + new.measured,
        }
    )


def _larger(known: Ceiling | None, new: Ceiling | None) -> Ceiling:
    """The one with the larger rate; without rates the new one, whose reason is of now."""
    there = [one for one in (new, known) if one is not None]
    return max(there, key=lambda ceiling: ceiling.per_s or 0.0)


# What a call takes on the device, as `timed` has it.
Timer = Callable[[Call, torch.device], Timed[object]]


def _timer(call: Call, device: torch.device) -> Timed[object]:
    return timed(call, device, delay_cycles=DELAY_CYCLES)


def measure_ceilings(
    device: str,
    environment: Environment,
    *,
    seconds_each: float = SECONDS_EACH,
    timer: Timer = _timer,
    clock: Clock = time.monotonic,
) -> Ceilings:
    """Measures them now, in about `seconds_each` for each of five rates; a rate that fails has none, and a reason.

    A call in flight is not stopped: the smallest size runs at least twice.
    """
    on = torch.device(device)
    load = device_state(device).load_average_1min
    best = partial(_best, device=on, seconds=seconds_each, timer=timer, clock=clock)
    with measuring_settings(), garbage_collection_paused(), torch.inference_mode():
        moved = best(_copies(on))
        flop = {name: best(_matmuls(on, getattr(torch, name))) for name in DTYPES}
        exponentials = _design_exponentials(on) if on.type == "cuda" else best(_exponentials(on))
    release_memory()
    return Ceilings(
        device=CeilingDevice.of(environment),
        bytes=moved,
        flop=flop,
        exponentials=exponentials,
        last=utc_now(),
        load_average_1min=load,
    )


@dataclass(frozen=True)
class _Probe:
    """Work of one size: its name, how much of the rate's unit a call does, and what makes the call."""

    how: str
    amount: float
    make: Callable[[], Call]


def _copies(device: torch.device) -> list[_Probe]:
    sizes = _COPY_SIZES[device.type]
    return [_Probe(f"copy of {n >> 20} MiB", 2.0 * n, partial(copy_call, device, n)) for n in sizes]


def _matmuls(device: torch.device, dtype: torch.dtype) -> list[_Probe]:
    sizes = _MATMUL_SIZES[device.type]
    return [_Probe(f"matmul of {n} x {n}", 2.0 * n**3, partial(matmul_call, device, dtype, n)) for n in sizes]


def _exponentials(device: torch.device) -> list[_Probe]:
    counts = [n * torch.get_num_threads() for n in _EXPONENTIALS]
    return [_Probe(f"exp of {n} numbers", float(n), partial(exponential_call, device, n)) for n in counts]


def _best(probes: Sequence[_Probe], device: torch.device, seconds: float, timer: Timer, clock: Clock) -> Ceiling:
    """The best rate of several sizes, the smallest first; one that fails, for want of memory say, is left out."""
    reasons: list[str] = []
    found: list[tuple[float, str]] = []
    end = clock() + seconds
    for left, probe in zip(range(len(probes), 0, -1), probes, strict=True):
        if found and clock() >= end:
            break
        try:
            samples = _samples(probe.make(), device, (end - clock()) / left, timer, clock)
        except Exception as error:
            reasons.append(failure(error)[1])
            release_memory()
        else:
            found += [(probe.amount / s, probe.how) for s in samples]
    if not found:
        return Ceiling(at=utc_now(), message=(reasons or ["no sample has a length"])[0])
    per_s, how = max(found)
    return Ceiling(per_s=per_s, how=how, at=utc_now())


def _samples(call: Call, device: torch.device, seconds: float, timer: Timer, clock: Clock) -> Sequence[float]:
    """Seconds of a call: each sample is the mean over as many as fill `SAMPLE_MS`; those of no length left out."""
    end = clock() + seconds
    call()
    first_ms = device_ms(timer(call, device))
    calls = min(max(int(SAMPLE_MS / first_ms), 1), 1000) if first_ms > 0 else 1000

    def repeated() -> None:
        for _ in range(calls):
            call()

    # The first one may be all that there is time for.
    found = [first_ms] if calls == 1 else []
    while not found or clock() < end:
        found.append(device_ms(timer(repeated, device)) / calls)
    return [1e-3 * ms for ms in found if ms > 0]


def _design_exponentials(device: torch.device) -> Ceiling:
    multiprocessors, clock_ghz = multiprocessors_and_clock(device)
    if clock_ghz is None:
        return Ceiling(at=utc_now(), message=NO_CLOCK)
    per_s = 1e3 * Rates(0.0, multiprocessors, clock_ghz).exponentials_per_ms
    how = f"16 a clock on each of {multiprocessors} multiprocessors at {clock_ghz:g} GHz, by design"
    return Ceiling(per_s=per_s, how=how, at=utc_now())

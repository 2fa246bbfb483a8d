"""Measures what a device does at most: copies, matmuls, exponentials.

A ceiling is an upper bound, so it is the best of many short samples at several sizes, never a median; noise makes
a sample slower, never faster. Sizes differ in what serves them best: a CPU multiplies matrices fastest that its
cache holds. On a CPU each size runs on all threads and on one: beside other work threads wait for each other, and
one alone reaches more than all of them.

    bytes         reads and writes of a copy much larger than the caches
    FLOP          square matmuls in bfloat16, float16 and float32 (no TF32), two per multiply-add
    exponentials  on a CPU torch.exp of float32 numbers that a core's cache holds, so that memory does not bound it
                  on a GPU 16 a clock and multiprocessor at the highest clock, by design: memory and caches bound
                  every elementwise operator there
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from ..machines import Rates
from ..options import DTYPES
from ..terminal.visible import counted
from .ceilings import Ceiling, CeilingDevice, Ceilings
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
from .recorded import utc_now
from .settings import measuring_settings, torch_threads
from .timing import Clock, Timed, garbage_collection_paused, timed

# Of each of the five rates; all sizes of a rate share it.
SECONDS_EACH = 1.0
# A sample is as many calls as take this long, many times the clock's resolution.
SAMPLE_MS = 2.0

_COPY_SIZES = {"cpu": (2**26, 2**27, 2**28), "cuda": (2**28, 2**29, 2**30)}
_MATMUL_SIZES = {"cpu": (256, 512, 768, 1024, 2048), "cuda": (4096, 8192, 16384)}
# Numbers of each thread.
_EXPONENTIALS = (2**14, 2**15, 2**16, 2**17)

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
    """Work of one size: its name, how much of the rate's unit a call does, what makes the call, and on how many of
    the CPU's threads it runs."""

    how: str
    amount: float
    make: Callable[[], Call]
    threads: int | None = None

    def on(self, threads: int) -> _Probe:
        return replace(self, how=f"{self.how} on {counted(threads, 'thread')}", threads=threads)


def _copies(device: torch.device) -> list[_Probe]:
    sizes = _COPY_SIZES[device.type]
    probes = [_Probe(f"copy of {n >> 20} MiB", 2.0 * n, partial(copy_call, device, n)) for n in sizes]
    return _on_threads(probes, device)


def _matmuls(device: torch.device, dtype: torch.dtype) -> list[_Probe]:
    sizes = _MATMUL_SIZES[device.type]
    probes = [_Probe(f"matmul of {n} x {n}", 2.0 * n**3, partial(matmul_call, device, dtype, n)) for n in sizes]
    return _on_threads(probes, device)


def _exponentials(device: torch.device) -> list[_Probe]:
    def probes(threads: int) -> list[_Probe]:
        counts = [n * threads for n in _EXPONENTIALS]
        return [_Probe(f"exp of {n} numbers", float(n), partial(exponential_call, device, n)) for n in counts]

    return [probe.on(threads) for threads in _thread_counts() for probe in probes(threads)]


def _on_threads(probes: Sequence[_Probe], device: torch.device) -> list[_Probe]:
    """On a CPU each on all threads and on one, by size; elsewhere as they are."""
    if device.type != "cpu":
        return list(probes)
    return [probe.on(threads) for probe in probes for threads in _thread_counts()]


def _thread_counts() -> list[int]:
    return sorted({1, torch.get_num_threads()})


def _best(probes: Sequence[_Probe], device: torch.device, seconds: float, timer: Timer, clock: Clock) -> Ceiling:
    """The best rate of several sizes, the smallest first; one that fails, for want of memory say, is left out."""
    reasons: list[str] = []
    found: list[tuple[float, str]] = []
    end = clock() + seconds
    for left, probe in zip(range(len(probes), 0, -1), probes, strict=True):
        if found and clock() >= end:
            break
        try:
            with torch_threads(probe.threads):
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

"""What a device does a second: copies, matmuls and exponentials, each timed alone, call by call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..machines import Rates
from .environment import max_sm_clock_mhz
from .recorded import RecordModel, Samples
from .settings import measuring_settings
from .timing import Timed, timed

Call = Callable[[], Any]

# Rows of the square matrices whose matmul keeps every multiprocessor busy for a while.
_MATRIX_SIZE = 8192
_COPY_BYTES = {"cuda": 2**29, "cpu": 2**26}
NO_CLOCK = "NVML does not tell the highest clock of this GPU's multiprocessors (pip install nvidia-ml-py)"
# About 0.25 ms, several times what the host takes to hand over a sample's replays.
DELAY_CYCLES = 500_000


class CopyBandwidth(RecordModel):
    """A copy within device memory, timed in the same run: `ms` of one copy of `bytes_each`."""

    bytes_each: int
    ms: Samples

    @property
    def gb_per_s(self) -> float:
        """Bytes read plus bytes written over the median time, in 1e9 bytes a second."""
        return 2 * self.bytes_each / self.ms.p50 / 1e6


class UnitRates(RecordModel):
    """Rates of the units that limit attention, on this device and in this run.

    `matrix_ms`: one matmul of two square matrices of `matrix_size` rows in the case's dtype. The exponential
    unit's rate follows from the number of multiprocessors and the highest clock of the device; where the clock is
    null, `message` says why.
    """

    matrix_size: int
    matrix_ms: Samples
    multiprocessors: int
    clock_ghz: float | None
    message: str | None = None

    @property
    def rates(self) -> Rates | None:
        """None where the clock is not known."""
        if self.clock_ghz is None:
            return None
        return Rates(2 * self.matrix_size**3 / self.matrix_ms.p50 / 1e9, self.multiprocessors, self.clock_ghz)


def device_ms(sample: Timed[Any]) -> float:
    """The device's clock where there is one, else the host's."""
    return sample.wall_ms if sample.gpu_ms is None else sample.gpu_ms


def copy_call(device: torch.device, nbytes: int) -> Call:
    """A copy of so many bytes within the device's memory: it reads and writes them."""
    source = torch.empty(nbytes // 4, dtype=torch.int32, device=device).random_()
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def matmul_call(device: torch.device, dtype: torch.dtype, size: int) -> Call:
    """A matmul of two random square matrices of `size` rows: 2 size^3 FLOP."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out)


def exponential_call(device: torch.device, count: int) -> Call:
    """Exponentials of so many float32 numbers."""
    x = torch.randn(count, device=device)
    out = torch.empty_like(x)
    return lambda: torch.exp(x, out=out)


def copy_bandwidth(device: torch.device, count: int = 20) -> CopyBandwidth:
    """`count` copies of a tensor much larger than the L2 cache, timed one by one after three others."""
    size = _COPY_BYTES[device.type]
    if device.type == "cuda":
        size = min(size, torch.cuda.mem_get_info(device)[0] // 8)
    size -= size % 4
    return CopyBandwidth(bytes_each=size, ms=_device_samples(copy_call(device, size), device, count))


def unit_rates(dtype: torch.dtype, device: torch.device, count: int = 20) -> UnitRates | None:
    """`count` large matmuls timed one by one after three others; None but on a CUDA device."""
    if device.type != "cuda":
        return None
    call = matmul_call(device, dtype, _MATRIX_SIZE)
    with measuring_settings():
        samples = _device_samples(call, device, count)
    multiprocessors, clock_ghz = multiprocessors_and_clock(device)
    return UnitRates(
        matrix_size=_MATRIX_SIZE,
        matrix_ms=samples,
        multiprocessors=multiprocessors,
        clock_ghz=clock_ghz,
        message=NO_CLOCK if clock_ghz is None else None,
    )


def multiprocessors_and_clock(device: torch.device) -> tuple[int, float | None]:
    """How many multiprocessors a CUDA device has, and their highest clock in GHz, None where NVML does not say."""
    clock_mhz = max_sm_clock_mhz(str(device))
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count, None if clock_mhz is None else clock_mhz / 1e3


def _device_samples(call: Call, device: torch.device, count: int) -> Samples:
    """`count` calls timed one by one after three others, launched before the device's clock starts."""
    timings = (timed(call, device, delay_cycles=DELAY_CYCLES) for _ in range(count + 3))
    return Samples.of([device_ms(timing) for timing in timings][3:])

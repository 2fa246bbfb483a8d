"""Where a measurement was made: host, GPU, versions, commit, and the device's state around each case.

Nothing is queried at import, and whatever cannot be read is null: a missing driver never stops a measurement.
"""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import AwareDatetime

from .checkout import checkout, commit_time
from .heap import can_be_kept
from .nvml import Sensor
from .recorded import RecordModel
from .settings import measuring_settings, ptxas_version

T = TypeVar("T")


class Gpu(RecordModel):
    """The CUDA device measured on; `count` is how many the process sees."""

    name: str
    count: int
    memory_bytes: int | None = None
    compute_capability: str | None = None
    driver: str | None = None
    power_limit_w: float | None = None


class Environment(RecordModel):
    """What does not change during a run.

    machine_id    a digest of the host's machine id and the GPU's UUID, the same in every run there; null where the
                  host has none and no GPU is measured. A host with two GPUs has an id for each, and one without
    ptxas         the version of the assembler that triton uses ("12.8.93")
    tuned         a digest of the table of tuned launches in use; null where this GPU has none
    float32_matmul_precision, cudnn_*    the switches under which all is measured
    heap          "kept" where the C library's malloc keeps what is freed (heap.py); null where it cannot be told
                  to, and in records from before
    git_*         null for code that runs from an installed wheel; without .git the commit is LDMPERF_COMMIT's
    commit_time   when the commit was made, in UTC; null without .git
    """

    machine_id: str | None = None
    cpu: str | None = None
    logical_cores: int | None = None
    usable_cores: int | None = None
    memory_bytes: int | None = None
    os: str
    python: str
    ldmperf: str | None = None
    torch: str | None = None
    triton: str | None = None
    ptxas: str | None = None
    tuned: str | None = None
    numpy: str | None = None
    diffusers: str | None = None
    cuda: str | None = None
    cudnn: int | None = None
    torch_threads: int | None = None
    float32_matmul_precision: str | None = None
    cudnn_tf32: bool | None = None
    cudnn_benchmark: bool | None = None
    heap: Literal["kept"] | None = None
    gpu: Gpu | None = None
    git_commit: str | None = None
    git_dirty: bool | None = None
    commit_time: AwareDatetime | None = None

    @property
    def kind(self) -> tuple[tuple[str, Any], ...]:
        """Field and value of all that `differences` compares, those of the GPU beside the others."""
        fields = dict(self)
        gpu = fields.pop("gpu")
        fields |= {f"gpu.{name}": value for name, value in gpu or ()}
        return tuple((name, value) for name, value in fields.items() if name not in _NOT_COMPARED)

    def differences(self, other: Environment) -> list[str]:
        """What differs, as "field: ours, theirs": numbers from two such environments do not belong in one run.

        Compared are the GPU, the processor, versions, settings and the commit. Memory, counts of cores and devices
        and the machine's id are not: they change from one start of a cloud machine to the next.
        """
        mine, theirs = dict(self.kind), dict(other.kind)
        names = dict.fromkeys((*mine, *theirs))
        return [
            f"{name}: {mine.get(name)}, {theirs.get(name)}" for name in names if mine.get(name) != theirs.get(name)
        ]


_NOT_COMPARED = {
    *("memory_bytes", "logical_cores", "usable_cores", "gpu.memory_bytes", "gpu.count", "machine_id"),
    # `git_commit` is compared.
    "commit_time",
}


class DeviceState(RecordModel):
    """What changes during a run, read before, during and after a case. Units are in the names.

    `power_limit_w`: the one in force, the least of all that limit it. `foreign_processes`: other processes that
    compute on the GPU, in a container at least so many; null where none is seen and some may be hidden.
    """

    load_average_1min: float | None = None
    sm_clock_mhz: int | None = None
    memory_clock_mhz: int | None = None
    throttle_reasons: tuple[str, ...] | None = None
    temperature_c: int | None = None
    power_w: float | None = None
    power_limit_w: float | None = None
    foreign_processes: int | None = None


def collect_environment(device: str = "cpu") -> Environment:
    """The environment of this process measuring on `device` ("cpu", "cuda", "cuda:1").

    Raises CaseError where LDMPERF_COMMIT is needed and is no commit.
    """
    import torch

    is_cuda = torch.device(device).type == "cuda" and torch.cuda.is_available()
    commit, dirty = checkout()
    with measuring_settings():
        precision = _or_none(torch.get_float32_matmul_precision)
        tf32 = _or_none(lambda: bool(torch.backends.cudnn.allow_tf32))
        benchmark = _or_none(lambda: bool(torch.backends.cudnn.benchmark))
        ptxas = _or_none(ptxas_version)
    return Environment(
        machine_id=_machine_id(device if is_cuda else None),
        cpu=_or_none(_cpu_model),
        logical_cores=os.cpu_count(),
        usable_cores=_or_none(lambda: len(os.sched_getaffinity(0))),
        memory_bytes=_or_none(_memory_bytes),
        os=platform.platform(),
        python=platform.python_version(),
        ldmperf=_version("ldmperf"),
        # torch's own string tells the CPU build from the CUDA build; its metadata may not.
        torch=str(torch.__version__),
        triton=_version("triton"),
        ptxas=ptxas,
        tuned=_or_none(lambda: _tuned_digest(device)) if is_cuda else None,
        numpy=_version("numpy"),
        diffusers=_version("diffusers"),
        cuda=torch.version.cuda,
        cudnn=_or_none(torch.backends.cudnn.version),
        torch_threads=torch.get_num_threads(),
        float32_matmul_precision=precision,
        heap="kept" if can_be_kept() else None,
        cudnn_tf32=tf32,
        cudnn_benchmark=benchmark,
        gpu=_gpu(device) if is_cuda else None,
        git_commit=commit,
        git_dirty=dirty,
        commit_time=commit_time(commit),
    )


def device_state(device: str = "cpu") -> DeviceState:
    """The load of the host and, on CUDA, clocks, throttling, temperature, power and processes of `device` now."""
    return state_now(Sensor.of(device))


def state_now(sensor: Sensor) -> DeviceState:
    """The same of a device whose sensor is there already."""
    nvml, handle = sensor.nvml, sensor.handle
    return DeviceState(
        load_average_1min=_or_none(lambda: round(os.getloadavg()[0], 2)),
        sm_clock_mhz=_or_none(lambda: int(nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM))),
        memory_clock_mhz=_or_none(lambda: int(nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM))),
        throttle_reasons=throttle_reasons(sensor),
        temperature_c=_or_none(lambda: int(nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU))),
        power_w=_or_none(lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1e3),
        power_limit_w=_or_none(lambda: _power_limit_w(sensor)),
        foreign_processes=_or_none(sensor.foreign_processes),
    )


def throttle_reasons(sensor: Sensor) -> tuple[str, ...] | None:
    """`Sensor.throttle_reasons`, None where NVML does not tell."""
    return _or_none(sensor.throttle_reasons)


def _power_limit_w(sensor: Sensor) -> float:
    return float(sensor.nvml.nvmlDeviceGetEnforcedPowerLimit(sensor.handle) / 1e3)


def _or_none(query: Callable[[], T]) -> T | None:
    # Drivers, containers and old kernels fail in their own ways; each means only that this figure is not known.
    try:
        return query()
    except Exception:
        return None


def _version(package: str) -> str | None:
    return _or_none(lambda: metadata.version(package))


# Where systemd and D-Bus keep what tells one installation from another.
_MACHINE_FILES = ("/etc/machine-id", "/var/lib/dbus/machine-id")


def _machine_id(device: str | None) -> str | None:
    """16 hexadecimal digits that tell this host and CUDA device from others; neither can be read from them."""
    import torch

    texts = (_or_none(Path(name).read_text) for name in _MACHINE_FILES)
    # A disk image that has not been booted says "uninitialized".
    hosts = (text.strip() for text in texts if text is not None)
    host = next((text for text in hosts if text not in ("", "uninitialized")), None)
    gpu = None if device is None else _or_none(lambda: str(torch.cuda.get_device_properties(device).uuid))
    if host is None and gpu is None:
        return None
    return hashlib.sha256(f"ldmperf machine {host} {gpu}".encode()).hexdigest()[:16]


def _cpu_model() -> str | None:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.processor() or None


def _memory_bytes() -> int:
    """What this process may use: the host's memory, or its control group's if that is less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _or_none(lambda: int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return total if limit is None else min(total, limit)


def _tuned_digest(device: str) -> str | None:
    """The first 16 digits of the SHA-256 of the tuned table that the kernels read."""
    import torch

    from ldmperf.kernels import Chip, tuned_table

    path = tuned_table(Chip(torch.cuda.get_device_properties(device).name, 1))
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path.exists() else None


def _gpu(device: str) -> Gpu | None:
    import torch

    properties = _or_none(lambda: torch.cuda.get_device_properties(device))
    if properties is None:
        return None
    sensor = Sensor.of(device)
    return Gpu(
        name=properties.name,
        count=torch.cuda.device_count(),
        memory_bytes=properties.total_memory,
        compute_capability=f"{properties.major}.{properties.minor}",
        driver=_or_none(lambda: str(sensor.nvml.nvmlSystemGetDriverVersion())),
        power_limit_w=_or_none(lambda: _power_limit_w(sensor)),
    )


def max_sm_clock_mhz(device: str) -> int | None:
    """The highest clock that the multiprocessors of a CUDA device may take, as NVML says; None if it does not.

    CUDA 13 has taken it out of the device's properties.
    """
    sensor = Sensor.of(device)
    nvml = sensor.nvml
    return _or_none(lambda: int(nvml.nvmlDeviceGetMaxClockInfo(sensor.handle, nvml.NVML_CLOCK_SM)))

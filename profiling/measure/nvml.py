"""What NVML tells of one GPU while it is measured: throttling, other processes, the energy counter.

What NVML does not support raises its own exception. Names and meanings: NVIDIA's NVML API reference.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from .turn import TURNS

ON_A_CPU = "NVML counts a GPU's energy; this case ran on a CPU"
# Reasons for lower clocks that are no throttling: nothing to do, and clocks that somebody asked for.
UNTHROTTLED = frozenset({"GpuIdle", "ApplicationsClocksSetting", "UserDefinedClocks"})
# Linux numbers the first namespace of processes so (PROC_PID_INIT_INO); it has all processes of the machine.
_ALL_PROCESSES = "pid:[4026531836]"
# The older prefix has reasons that the newer one lacks, and the other way round.
_REASON_PREFIXES = ("nvmlClocksThrottleReason", "nvmlClocksEventReason")


@dataclass(frozen=True)
class Sensor:
    """NVML and its handle of a device; `missing` says why there is no handle. `nvml` alone may still be there."""

    nvml: Any = None
    handle: Any = None
    missing: str | None = None

    @classmethod
    def of(cls, device: str) -> Sensor:
        """The sensor of a torch device, told by UUID: torch's index counts visible devices only."""
        import torch

        if not device.startswith("cuda"):
            return cls(missing=ON_A_CPU)
        try:
            import pynvml
        except ImportError:
            return cls(missing="NVML cannot be asked: pip install nvidia-ml-py")
        try:
            pynvml.nvmlInit()
            uuid = torch.cuda.get_device_properties(device).uuid
        except Exception as error:
            return cls(missing=f"NVML does not start ({_line(error)})")
        try:
            return cls(pynvml, pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}"))
        except Exception as error:
            return cls(pynvml, missing=f"NVML does not know the GPU, or it is a MIG slice ({_line(error)})")

    def throttle_reasons(self) -> tuple[str, ...]:
        """Names of the reasons for lower clocks that hold now ("SwPowerCap", ...); an idle GPU has one, too."""
        try:
            # The other function is to go in CUDA 14; drivers before 535 have only that.
            active = self.nvml.nvmlDeviceGetCurrentClocksEventReasons(self.handle)
        except Exception:
            active = self.nvml.nvmlDeviceGetCurrentClocksThrottleReasons(self.handle)
        bits = {
            name.removeprefix(prefix): getattr(self.nvml, name)
            for prefix in _REASON_PREFIXES
            for name in dir(self.nvml)
            if name.startswith(prefix)
        }
        return tuple(sorted(name for name, bit in bits.items() if name not in ("All", "None") and active & bit))

    def foreign_processes(self) -> int | None:
        """How many other processes compute on the GPU (`other_processes`)."""
        listed = {process.pid for process in self.nvml.nvmlDeviceGetComputeRunningProcesses(self.handle)}
        return other_processes(listed, os.getpid(), sees_all_processes(), TURNS.waiting)

    def millijoules(self) -> int:
        """The GPU's energy since its driver was loaded."""
        return int(self.nvml.nvmlDeviceGetTotalEnergyConsumption(self.handle))

    def why_no_energy(self) -> str | None:
        """Why the counter cannot tell what this process's work takes; None where it can."""
        if self.missing is not None:
            return self.missing
        try:
            if self.nvml.nvmlDeviceGetMigMode(self.handle)[0]:
                return "the GPU is divided (MIG), and NVML's counter is of all its slices"
        except Exception:
            # GPUs that cannot be divided do not support the question.
            pass
        try:
            self.millijoules()
        except Exception as error:
            return f"NVML has no energy counter of this GPU ({_line(error)})"
        return None


# Of what runs on no GPU.
NO_SENSOR = Sensor(missing=ON_A_CPU)


def sees_all_processes() -> bool:
    """Whether process ids here are the machine's own: not in a container with a namespace of its own."""
    try:
        return os.readlink("/proc/self/ns/pid") == _ALL_PROCESSES
    except OSError:
        return False


def other_processes(
    listed: Collection[int], own: int, sees_all: bool, waiting: Collection[int] = ()
) -> int | None:
    """How many processes of NVML's list are not this one, `own`; None where the list cannot tell.

    Processes that are `waiting` for this one's turn to end do not count.

    In a container the driver lists either ids of the host, this process under one that it does not know, or only
    the container's own processes (NVIDIA's open kernel modules leave out those of other namespaces). So one of the
    list counts as this process, as many as wait as those, and the rest are certainly others; that there is no
    other tells nothing. Nor does an empty list on the machine itself: it may be kept from this user.
    """
    distinct = set(listed).difference(waiting if sees_all else ())
    if sees_all and own in distinct:
        return len(distinct) - 1
    others = len(distinct) if sees_all else len(distinct) - 1 - len(waiting)
    return others if others > 0 else None


def _line(error: Exception) -> str:
    """The first line of what it says, and its type where it says nothing."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)

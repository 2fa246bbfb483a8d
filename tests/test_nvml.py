"""What NVML tells of a GPU, and every reason why it does not."""

from __future__ import annotations

import os
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch

from ldmperf.profiling.measure import nvml
from ldmperf.profiling.measure.nvml import NO_SENSOR, Sensor, other_processes


def refusing(text: str) -> Callable[..., Any]:
    def refuse(*arguments: object) -> Any:
        raise RuntimeError(text)

    return refuse


def sensor(**functions: object) -> Sensor:
    """Of an NVML that has these functions and values, and no other."""
    return Sensor(types.SimpleNamespace(**functions), "handle")


BITS = {
    "nvmlClocksEventReasonNone": 0,
    "nvmlClocksEventReasonAll": 0xFFF,
    "nvmlClocksEventReasonGpuIdle": 1,
    "nvmlClocksEventReasonSwPowerCap": 4,
    "nvmlClocksThrottleReasonGpuIdle": 1,
    "nvmlClocksThrottleReasonHwSlowdown": 8,
    "nvmlClocksThrottleReasonAll": 0xFFF,
}


@pytest.mark.parametrize("name", ["Event", "Throttle"])
def test_throttle_reasons_have_the_names_of_both_generations(name: str) -> None:
    function = f"nvmlDeviceGetCurrentClocks{name}Reasons"
    found = [sensor(**BITS, **{function: lambda handle, bits=bits: bits}) for bits in (0, 1, 4 | 8 | 2048)]
    assert [one.throttle_reasons() for one in found] == [(), ("GpuIdle",), ("HwSlowdown", "SwPowerCap")]


def test_a_driver_without_the_newer_function_is_asked_by_the_older() -> None:
    both = {
        "nvmlDeviceGetCurrentClocksEventReasons": refusing("Function Not Found"),
        "nvmlDeviceGetCurrentClocksThrottleReasons": lambda handle: 8,
    }
    assert sensor(**BITS, **both).throttle_reasons() == ("HwSlowdown",)


OWN = 17


@pytest.mark.parametrize(
    ("listed", "sees_all", "others"),
    [
        # On the machine itself the list is of all processes.
        ([OWN], True, 0),
        ([OWN, 5, 6], True, 2),
        # This process may not have begun to compute.
        ([5], True, 1),
        ([], True, None),
        # In a container: its own processes alone, or all of the host under the host's ids.
        ([OWN], False, None),
        ([OWN, 18], False, 1),
        ([40_001], False, None),
        ([40_001, 40_002, 40_003], False, 2),
        ([], False, None),
        # A driver that looks for a host's id among the container's lists a process once for each of its clients.
        ([OWN, OWN, OWN], False, None),
    ],
)
def test_others_are_counted_as_far_as_the_list_can_tell(
    listed: list[int], sees_all: bool, others: int | None
) -> None:
    assert other_processes(listed, OWN, sees_all) == others


@pytest.mark.parametrize(
    ("listed", "sees_all", "others"),
    [
        ([OWN, 18, 19], True, 0),
        ([OWN, 5, 18], True, 1),
        ([18], True, None),
        # In a container, where they may have other ids.
        ([40_001, 40_002, 40_003], False, None),
        ([40_001, 40_002, 40_003, 40_004], False, 1),
    ],
)
def test_sides_of_a_comparison_that_wait_are_not_others(
    listed: list[int], sees_all: bool, others: int | None
) -> None:
    assert other_processes(listed, OWN, sees_all, {18, 19}) == others


def test_the_list_is_nvmls_and_this_process_is_not_foreign(monkeypatch: pytest.MonkeyPatch) -> None:
    pids = [os.getpid(), 1, 1]
    found = sensor(
        nvmlDeviceGetComputeRunningProcesses=lambda handle: [types.SimpleNamespace(pid=pid) for pid in pids]
    )
    monkeypatch.setattr(nvml, "sees_all_processes", lambda: True)
    assert found.foreign_processes() == 1
    monkeypatch.setattr(nvml.TURNS, "_waiting", frozenset({1}))
    assert found.foreign_processes() == 0


def test_a_namespace_is_told_by_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    for link, sees_all in (("pid:[4026531836]", True), ("pid:[4026532345]", False)):
        monkeypatch.setattr(os, "readlink", lambda path, link=link: link)
        assert nvml.sees_all_processes() is sees_all

    def missing(path: str) -> str:
        raise FileNotFoundError(path)

    monkeypatch.setattr(os, "readlink", missing)
    assert nvml.sees_all_processes() is False


@pytest.mark.parametrize(
    ("functions", "said"),
    [
        ({}, "NVML has no energy counter of this GPU ("),
        ({"nvmlDeviceGetTotalEnergyConsumption": refusing("Not Supported")}, "of this GPU (Not Supported)"),
        ({"nvmlDeviceGetTotalEnergyConsumption": lambda handle: 7}, None),
        (
            {
                "nvmlDeviceGetTotalEnergyConsumption": lambda handle: 7,
                "nvmlDeviceGetMigMode": refusing("Not Supported"),
            },
            None,
        ),
        (
            {
                "nvmlDeviceGetTotalEnergyConsumption": lambda handle: 7,
                "nvmlDeviceGetMigMode": lambda handle: [0, 1],
            },
            None,
        ),
        (
            {
                "nvmlDeviceGetTotalEnergyConsumption": lambda handle: 7,
                "nvmlDeviceGetMigMode": lambda handle: [1, 1],
            },
            "the GPU is divided (MIG), and NVML's counter is of all its slices",
        ),
    ],
)
def test_there_is_a_counter_or_a_reason(functions: dict[str, object], said: str | None) -> None:
    reason = sensor(**functions).why_no_energy()
    assert (reason is None) == (said is None)
    assert said is None or said in (reason or "")
    assert "\n" not in (reason or "")


def a_module(**functions: object) -> types.ModuleType:
    module = types.ModuleType("pynvml")
    for name, value in ({"nvmlInit": lambda: None} | functions).items():
        setattr(module, name, value)
    return module


def test_a_device_without_a_sensor_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Sensor.of("cpu") == NO_SENSOR
    assert NO_SENSOR.why_no_energy() == "NVML counts a GPU's energy; this case ran on a CPU"
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(uuid=f"of {device}")
    )
    known = {"GPU-of cuda:1": "handle"}
    for module, device, said in (
        (None, "cuda", "pip install nvidia-ml-py"),
        (a_module(nvmlInit=refusing("Driver Not Loaded\nmore")), "cuda", "does not start (Driver Not Loaded)"),
        (a_module(nvmlDeviceGetHandleByUUID=known.__getitem__), "cuda:0", "MIG slice ('GPU-of cuda:0')"),
        (a_module(nvmlDeviceGetHandleByUUID=known.__getitem__), "cuda:1", None),
    ):
        monkeypatch.setitem(sys.modules, "pynvml", module)
        found = Sensor.of(device)
        assert (found.missing is None) == (said is None)
        assert said is None or said in (found.missing or "")
        assert found.handle == (None if said else "handle")

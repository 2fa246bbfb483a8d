"""The environment: what is read is right, and what cannot be read is null."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from ldmperf.profiling import environment
from ldmperf.profiling.environment import DeviceState, Environment, collect_environment, device_state

ROOT = Path(__file__).resolve().parent.parent


def git(*arguments: str) -> str:
    return subprocess.run(
        ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True
    ).stdout.strip()


def test_it_says_what_others_say() -> None:
    found = collect_environment("cpu")
    assert found.torch == torch.__version__
    assert found.python == platform.python_version()
    assert found.logical_cores == os.cpu_count()
    assert found.torch_threads == torch.get_num_threads()
    assert found.gpu is None
    if shutil.which("lscpu"):
        names = subprocess.run(["lscpu"], capture_output=True, text=True, check=True).stdout
        assert found.cpu is None or found.cpu in names


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")
def test_commit_and_dirty_flag_are_gits() -> None:
    found = collect_environment("cpu")
    assert found.git_commit == git("rev-parse", "HEAD")
    assert found.git_dirty == bool(git("status", "--porcelain", "--untracked-files=no"))


def test_code_that_git_does_not_track_has_no_commit(tmp_path: Path) -> None:
    # As a wheel in a .venv inside some checkout: a git repository is around it, but the code is not of it.
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    identity = ["-c", "user.name=nobody", "-c", "user.email=nobody@example.org"]
    subprocess.run(
        ["git", "-C", str(tmp_path), *identity, "commit", "-q", "--allow-empty", "-m", "theirs"], check=True
    )
    package = tmp_path / "site-packages" / "profiling"
    shutil.copytree(ROOT / "profiling", package)
    code = "from profiling.environment import collect_environment as c; e = c(); print(e.git_commit, e.git_dirty)"
    answer = subprocess.run(
        [sys.executable, "-c", code], cwd=package.parent, capture_output=True, text=True, check=True
    )
    assert answer.stdout.split() == ["None", "None"]


def test_without_git_there_is_no_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    found = collect_environment("cpu")
    assert (found.git_commit, found.git_dirty) == (None, None)


def test_differences_name_the_fields() -> None:
    here = Environment(os="Linux", python="3.12", torch="2.13.0", git_commit="a")
    there = here.model_copy(update={"torch": "2.12.0", "git_commit": "b"})
    assert here.differences(here) == []
    assert here.differences(there) == ["torch: 2.13.0, 2.12.0", "git_commit: a, b"]


def fake_nvml(**functions: object) -> types.ModuleType:
    """A pynvml whose functions are these; any other raises, as on a driver that lacks it."""
    module = types.ModuleType("pynvml")
    values = {
        "NVML_CLOCK_SM": 1,
        "NVML_CLOCK_MEM": 2,
        "NVML_TEMPERATURE_GPU": 0,
        "nvmlClocksThrottleReasonNone": 0,
        "nvmlClocksThrottleReasonAll": 7,
        "nvmlClocksThrottleReasonGpuIdle": 1,
        "nvmlClocksThrottleReasonSwPowerCap": 4,
        "nvmlInit": lambda: None,
    }
    for name, value in (values | functions).items():
        setattr(module, name, value)
    return module


@pytest.fixture
def _a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = types.SimpleNamespace(uuid="1234", name="H200", major=9, minor=0, total_memory=150_000)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.mark.usefixtures("_a_gpu")
def test_the_gpus_state_is_nvmls(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    nvml = fake_nvml(
        nvmlDeviceGetHandleByUUID=lambda uuid: asked.append(uuid) or "handle",
        nvmlDeviceGetClockInfo=lambda handle, kind: {1: 1980, 2: 3201}[kind],
        nvmlDeviceGetCurrentClocksThrottleReasons=lambda handle: 4,
        nvmlDeviceGetTemperature=lambda handle, kind: 41,
        nvmlDeviceGetPowerUsage=lambda handle: 123_456,
        nvmlDeviceGetEnforcedPowerLimit=lambda handle: 700_000,
        nvmlSystemGetDriverVersion=lambda: "570.1",
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    state = device_state("cuda:1")
    assert state.model_copy(update={"load_average_1min": None}) == DeviceState(
        sm_clock_mhz=1980,
        memory_clock_mhz=3201,
        throttle_reasons=("SwPowerCap",),
        temperature_c=41,
        power_w=123.456,
    )
    # By UUID: torch's index 1 need not be NVML's.
    assert asked == ["GPU-1234"]
    gpu = collect_environment("cuda:1").gpu
    assert gpu is not None
    assert (gpu.name, gpu.count, gpu.driver, gpu.power_limit_w) == ("H200", 2, "570.1", 700.0)
    assert (gpu.memory_bytes, gpu.compute_capability) == (150_000, "9.0")


@pytest.mark.usefixtures("_a_gpu")
def test_a_driver_that_answers_nothing_gives_nulls(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> object:
        raise RuntimeError("NVML: Not Supported")

    everything = fake_nvml(nvmlDeviceGetHandleByUUID=lambda uuid: "handle")
    # The last is a pynvml that is not installed.
    for module in (everything, fake_nvml(nvmlInit=refuse), None):
        monkeypatch.setitem(sys.modules, "pynvml", module)
        state = device_state("cuda").model_copy(update={"load_average_1min": None})
        assert state == DeviceState()
        gpu = collect_environment("cuda").gpu
        assert gpu is not None
        assert gpu.name == "H200"
        assert (gpu.driver, gpu.power_limit_w) == (None, None)


def test_importing_it_queries_nothing() -> None:
    code = (
        "import sys, ldmperf.profiling.environment as e; "
        "assert not {'torch', 'pynvml', 'altair', 'diffusers'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert environment.__doc__

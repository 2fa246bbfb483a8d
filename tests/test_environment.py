"""The environment: what is read is right, and what cannot be read is null."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import types
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from ldmperf.kernels import _launch
from ldmperf.profiling.measure import environment, settings
from ldmperf.profiling.measure.environment import DeviceState, Environment, Gpu, collect_environment, device_state
from ldmperf.profiling.measure.heap import can_be_kept
from ldmperf.profiling.measure.nvml import sees_all_processes
from ldmperf.profiling.measure.settings import measuring_settings
from ldmperf.profiling.options import CaseError

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


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")
def test_the_commits_time_is_gits() -> None:
    found = collect_environment("cpu").commit_time
    assert found is not None
    assert found.timestamp() == int(git("show", "-s", "--format=%ct", "HEAD"))
    assert found.utcoffset() == timedelta(0)


def test_a_machine_has_one_id_that_says_nothing_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, other = tmp_path / "machine-id", tmp_path / "dbus"
    monkeypatch.setattr(environment, "_MACHINE_FILES", (str(file), str(other)))
    assert collect_environment("cpu").machine_id is None
    for unknown in ("", "uninitialized\n"):
        file.write_text(unknown)
        assert collect_environment("cpu").machine_id is None
    secret = "0123456789abcdef0123456789abcdef"
    other.write_text(secret + "\n")
    found = collect_environment("cpu").machine_id
    assert found == collect_environment("cpu").machine_id
    assert found is not None
    assert re.fullmatch("[0-9a-f]{16}", found)
    assert found not in secret
    file.write_text("fedcba9876543210fedcba9876543210")
    assert collect_environment("cpu").machine_id not in (None, found)


@pytest.mark.usefixtures("_a_gpu")
def test_the_gpu_is_part_of_the_machines_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "_MACHINE_FILES", (str(tmp_path / "machine-id"),))
    # In a container without an id of its own the GPU's is enough.
    alone = collect_environment("cuda").machine_id
    (tmp_path / "machine-id").write_text("0123456789abcdef0123456789abcdef")
    ids = [collect_environment(device).machine_id for device in ("cuda", "cpu")]
    assert len({alone, *ids, None}) == 4


def test_the_switches_are_those_of_measuring_and_stay_as_they_were() -> None:
    """So that a run, its records and `ldmperf env` say the same, wherever they ask."""

    def switches() -> tuple[object, ...]:
        cudnn = torch.backends.cudnn
        return torch.get_float32_matmul_precision(), cudnn.allow_tf32, cudnn.benchmark

    before = switches()
    torch.set_float32_matmul_precision("medium")
    try:
        outside = collect_environment("cpu")
        with measuring_settings():
            assert collect_environment("cpu") == outside
        assert switches() == ("medium", *before[1:])
    finally:
        torch.set_float32_matmul_precision(str(before[0]))
    assert outside.heap == ("kept" if can_be_kept() else None)
    assert (outside.float32_matmul_precision, outside.cudnn_tf32, outside.cudnn_benchmark) == (
        "highest",
        False,
        True,
    )


def test_code_that_git_does_not_track_has_no_commit(tmp_path: Path) -> None:
    # As a wheel in a .venv inside some checkout: a git repository is around it, but the code is not of it.
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    identity = ["-c", "user.name=nobody", "-c", "user.email=nobody@example.org"]
    subprocess.run(
        ["git", "-C", str(tmp_path), *identity, "commit", "-q", "--allow-empty", "-m", "theirs"], check=True
    )
    package = tmp_path / "site-packages" / "profiling"
    shutil.copytree(ROOT / "profiling", package)
    code = (
        "from profiling.measure.environment import collect_environment as c; print(c().git_commit, c().git_dirty)"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code], cwd=package.parent, capture_output=True, text=True, check=True
    )
    assert answer.stdout.split() == ["None", "None"]


def test_without_git_there_is_no_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.delenv("LDMPERF_COMMIT", raising=False)
    found = collect_environment("cpu")
    assert (found.git_commit, found.git_dirty) == (None, None)


def test_without_git_the_commit_is_the_one_that_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "7d35813A1b2c3d4e5f60718293a4b5c6d7e8f901"
    monkeypatch.setenv("LDMPERF_COMMIT", commit)
    if (ROOT / ".git").exists():
        assert collect_environment("cpu").git_commit == git("rev-parse", "HEAD")
    monkeypatch.setenv("PATH", "/nonexistent")
    found = collect_environment("cpu")
    assert (found.git_commit, found.git_dirty) == (commit.lower(), None)
    for wrong in ("main", "7d3581", "g" * 40, "7" * 41):
        monkeypatch.setenv("LDMPERF_COMMIT", wrong)
        with pytest.raises(CaseError, match="git rev-parse HEAD") as raised:
            collect_environment("cpu")
        assert "\n" not in str(raised.value)
    monkeypatch.setenv("LDMPERF_COMMIT", "")
    assert collect_environment("cpu").git_commit is None


def test_differences_name_the_fields() -> None:
    here = Environment(os="Linux", python="3.12", torch="2.13.0", git_commit="a")
    there = here.model_copy(update={"torch": "2.12.0", "git_commit": "b"})
    assert here.differences(here) == []
    assert here.differences(there) == ["torch: 2.13.0, 2.12.0", "git_commit: a, b"]


def test_memory_and_counts_are_no_differences_and_the_gpu_the_assembler_and_the_tuned_table_are() -> None:
    gpu = Gpu(name="NVIDIA H200", count=1, memory_bytes=150_110_011_392, driver="570.1", power_limit_w=700.0)
    here = Environment(
        os="Linux", python="3.12", memory_bytes=2**37, logical_cores=16, usable_cores=16, ptxas="12.8.93", gpu=gpu
    )
    restarted = here.model_copy(
        update={
            "memory_bytes": 2**37 - 4096,
            "logical_cores": 32,
            "usable_cores": 8,
            "gpu": gpu.model_copy(update={"memory_bytes": 150_110_011_391, "count": 8}),
        }
    )
    assert here.differences(restarted) == []
    other = gpu.model_copy(update={"name": "NVIDIA H100", "driver": "570.2"})
    elsewhere = here.model_copy(update={"gpu": other, "ptxas": "13.0.88", "tuned": "0123456789abcdef"})
    assert here.differences(elsewhere) == [
        "ptxas: 12.8.93, 13.0.88",
        "tuned: None, 0123456789abcdef",
        "gpu.name: NVIDIA H200, NVIDIA H100",
        "gpu.driver: 570.1, 570.2",
    ]
    assert "gpu.name: NVIDIA H200, None" in here.differences(here.model_copy(update={"gpu": None}))


def a_ptxas(path: Path, version: str) -> str:
    path.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {version[:4]}, V{version}'\n")
    path.chmod(0o755)
    return str(path)


def test_the_assembler_is_the_one_that_triton_uses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_PTXAS_PATH", raising=False)
    own = collect_environment("cpu").ptxas
    assert own is not None
    assert re.fullmatch(r"\d+\.\d+\.\d+", own)
    monkeypatch.setenv("TRITON_PTXAS_PATH", a_ptxas(tmp_path / "ptxas", "13.0.88"))
    assert collect_environment("cpu").ptxas == "13.0.88"
    monkeypatch.setattr(settings, "_tritons_ptxas", lambda: "/nonexistent")
    assert collect_environment("cpu").ptxas is None


def test_a_compiler_of_torchs_cannot_switch_the_assembler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What inductor does before its first compilation, where torch has a ptxas of its own."""
    triton = pytest.importorskip("triton")
    tasks = pytest.importorskip("torch._inductor.runtime.compile_tasks")
    here = tmp_path / "torch"
    # torch 2.11 looks two folders above the file, later ones one.
    for folder in (here, here / "_inductor"):
        (folder / "bin").mkdir(parents=True, exist_ok=True)
        a_ptxas(folder / "bin" / "ptxas", "13.0.88")
    monkeypatch.setattr(tasks, "__file__", str(here / "_inductor" / "runtime" / "compile_tasks.py"))
    # Set and deleted: what inductor sets is then undone too.
    monkeypatch.setenv("TRITON_PTXAS_PATH", "")
    monkeypatch.delenv("TRITON_PTXAS_PATH")
    own = triton.knobs.nvidia.ptxas.path
    tasks._set_triton_ptxas_path.cache_clear()
    with measuring_settings():
        tasks._set_triton_ptxas_path()
        assert triton.knobs.nvidia.ptxas.path == own
    assert "TRITON_PTXAS_PATH" not in os.environ
    # Unless it is pinned it is switched: without this the test above would show nothing.
    tasks._set_triton_ptxas_path.cache_clear()
    tasks._set_triton_ptxas_path()
    assert triton.knobs.nvidia.ptxas.path != own
    monkeypatch.setenv("TRITON_PTXAS_PATH", mine := a_ptxas(tmp_path / "mine", "12.9.1"))
    with settings.pinned_ptxas():
        assert triton.knobs.nvidia.ptxas.path == mine
    assert os.environ["TRITON_PTXAS_PATH"] == mine


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
        nvmlDeviceGetComputeRunningProcesses=lambda handle: [types.SimpleNamespace(pid=n) for n in (1, 2, 3)],
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
        power_limit_w=700.0,
        # In a container one of the three is this process; on the machine itself none is.
        foreign_processes=3 if sees_all_processes() else 2,
    )
    # By UUID: torch's index 1 need not be NVML's.
    assert asked == ["GPU-1234"]
    gpu = collect_environment("cuda:1").gpu
    assert gpu is not None
    assert (gpu.name, gpu.count, gpu.driver, gpu.power_limit_w) == ("H200", 2, "570.1", 700.0)
    assert (gpu.memory_bytes, gpu.compute_capability) == (150_000, "9.0")


@pytest.mark.usefixtures("_a_gpu")
def test_the_tuned_table_in_use_is_told_by_its_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_launch, "TUNED_FOLDER", tmp_path)
    assert collect_environment("cuda").tuned is None
    (tmp_path / "h100.json").write_text("{}")
    assert collect_environment("cuda").tuned is None
    (tmp_path / "h200.json").write_text("{}")
    assert collect_environment("cuda").tuned == hashlib.sha256(b"{}").hexdigest()[:16]
    assert collect_environment("cpu").tuned is None


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
        "import sys, ldmperf.profiling.measure.environment as e; "
        "assert not {'torch', 'pynvml', 'altair', 'diffusers'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert environment.__doc__

"""Compiling ahead: keys are those of a run, on a stand-in for the GPU's driver; processes, sets, the command."""

from __future__ import annotations

import hashlib
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import triton
from host_time import NoKernel, StandInDriver, jit_functions

from ldmperf.kernels import OPERATORS, Chip, Launch, _triton, layer_norm, planned_for, residual_add
from ldmperf.kernels._launch import NO_GPU
from ldmperf.kernels._recipes import ByLayout
from ldmperf.profiling import cli
from ldmperf.profiling.ahead import launch_sets, stubs, tested_launches
from ldmperf.profiling.ahead import work as planned_work
from ldmperf.profiling.ahead.meta_runs import ACCELERATED, NoGraphs, our_backends, run_parts
from ldmperf.profiling.ahead.precompile import compile_work
from ldmperf.profiling.ahead.work import kernel_of, plan
from ldmperf.profiling.commands import compile_command as ahead
from ldmperf.profiling.kernel_bench.selection import first_of_each_key, jobs
from ldmperf.profiling.machines import MACHINES
from ldmperf.profiling.measure.outcomes import Unsupported
from ldmperf.profiling.peer import SCHEDULER_CONFIG, diffusers_unet
from ldmperf.profiling.static.forked import Lost, map_forked
from ldmperf.profiling.step.calls import FAMILY_HEAD_DIMS
from ldmperf.profiling.trajectory.backend import Inputs
from ldmperf.profiling.trajectory.case import Case
from ldmperf.profiling.trajectory.network import make_network
from ldmperf.profiling.trajectory.unet_problem import UNetProblem
from ldmperf.samplers import NoiseSchedule, make_plan

ROOT = Path(__file__).resolve().parents[1]
SM_90 = MACHINES["sm_90"]

pytestmark = pytest.mark.usefixtures("_one_thread")


class StandIn(StandInDriver):
    """A driver with one GPU of compute capability 9.0 that loads nothing and launches nothing."""

    def __init__(self) -> None:
        self.launches = 0
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": 227 * 1024},
            load_binary=lambda *_: (1, 2, 0, 0, 1024),
            unload_module=lambda *_: None,
        )

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        def launch(*_: Any) -> None:
            self.launches += 1

        return launch


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    """triton on the stand-in, with nothing compiled in this process; our operators take tensors on the CPU."""
    stand_in = StandIn()
    monkeypatch.setattr(triton.runtime.driver, "_active", stand_in)
    monkeypatch.setattr(_triton, "DEVICES", ("cuda", "cpu"))
    for kernel in jit_functions():
        monkeypatch.setattr(kernel, "device_caches", defaultdict(kernel.create_binder))
    # What is kept by layout was decided without the stand-in, and later with it.
    ByLayout.forget()
    yield stand_in
    ByLayout.forget()
    triton.compiler.compiler.max_shared_mem.cache_clear()


def of_cache(source: Any, target: Any, options: Any) -> str:
    """The key that triton.compile looks up."""
    from triton._C.libtriton import get_cache_invalidating_env_vars
    from triton.runtime.cache import get_cache_key

    backend = triton.compiler.make_backend(target)
    parsed = backend.parse_options(dict(options, **source.parse_options()))
    key = get_cache_key(source, backend, parsed, get_cache_invalidating_env_vars())
    return hashlib.sha256(key.encode()).hexdigest()


@pytest.fixture
def looked_up(driver: StandIn, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """{key: kernel} of what launches look up in triton's cache; nothing is compiled."""
    found: dict[str, str] = {}

    def compile_nothing(src: Any, target: Any = None, options: Any = None, **_: Any) -> Any:
        found[of_cache(src, target, options)] = src.name
        return NoKernel(options)

    monkeypatch.setattr(triton.compiler, "compile", compile_nothing)
    return found


class Replays(NoGraphs):
    """The same, but a replay does the step again."""

    def warm_up(self, work: Callable[[], None], device: torch.device) -> None:
        work()

    def capture(
        self, work: Callable[[], None], device: torch.device, *, shares: bool = True
    ) -> Callable[[], None]:
        return work


def cases(sampler: str = "ddim", **changes: Any) -> list[Case]:
    return [
        Case(
            unet="39M",
            sampler=sampler,
            steps=3,
            dtype="bfloat16",
            device="cpu",
            latent_height=16,
            latent_width=16,
            backend=backend,
            **changes,
        )
        for backend in our_backends()
    ]


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_what_a_profile_launches_is_compiled_ahead_and_nothing_else(
    sampler: str, looked_up: dict[str, str]
) -> None:
    """Trajectories of every backend of ours, with real tensors at real addresses, against the plan without any."""
    case, *_ = given = cases(sampler)
    unet = make_network(case)
    schedule = NoiseSchedule.from_diffusers(SCHEDULER_CONFIG)
    problem = UNetProblem(case, unet, make_plan(sampler, schedule, case.steps), SCHEDULER_CONFIG)
    context = torch.randn(2, 77, unet.config.context_dim).bfloat16()
    inputs = [Inputs(torch.randn(1, 4, 16, 16), context, None, (0,))]
    if problem.plan.stochastic:
        inputs.append(replace(inputs[0], step_noise=lambda index: torch.randn(1, 4, 16, 16)))
    for one in given:
        backend = our_backends()[one.backend]
        if hasattr(backend, "graphs"):
            backend = replace(backend, graphs=Replays())
        if backend.float8 is not None:
            # The size is too small for it: on a GPU and ahead it launches nothing.
            with pytest.raises(Unsupported, match="networks of 320 channels"):
                backend.build(problem)
            backend = replace(backend, float8=None)
        trajectory = backend.build(problem)
        for value in inputs:
            trajectory(value)
    planned = {k.digest: k.name for k in plan(run_parts(given), SM_90, chips=[NO_GPU]).launches}
    assert len(looked_up) > 40
    assert {key: name for key, name in looked_up.items() if key not in planned} == {}
    assert {key: name for key, name in planned.items() if key not in looked_up} == {}


def test_a_chip_without_dependent_launches_has_none_to_compile() -> None:
    case = cases()[0].model_copy(update={"backend": "graph+pdl"})
    older = MACHINES["sm_80"]
    assert plan(run_parts([case]), older, chips=[Chip("NVIDIA A100", 108, "sm_80")]).launches == ()
    planned = plan(run_parts([case]), SM_90, chips=[NO_GPU]).launches
    assert planned
    assert all(kernel.options["launch_pdl"] for kernel in planned)


@pytest.mark.parametrize(("arch", "levels"), [("sm_90", {640, 1280}), ("sm_80", set())])
def test_float8_is_compiled_ahead_where_the_chip_has_it(arch: str, levels: set[int]) -> None:
    case = Case(unet="866M", steps=1, dtype="bfloat16", device="cuda", backend="graph+fp8")
    (part,) = run_parts([case])
    with planned_for(Chip("a chip", 100, arch)):
        found = [launch for launch, _ in part()]
    assert bool(found) == bool(levels)
    float8 = [launch for launch in found if launch.arguments.get("scale_ptr") is not None]
    assert {launch.arguments["columns"] for launch in float8 if launch.operator == "layer_norm"} == levels
    gates = {launch.arguments["columns"] for launch in float8 if launch.operator == "geglu"}
    assert gates == {4 * channels for channels in levels}


def test_what_diffusers_network_launches_of_ours_is_compiled_ahead(looked_up: dict[str, str]) -> None:
    """Its linear layers left out: "auto" merges some of them with their gates, and "triton", as here, all."""
    from ldmperf.model.dropin import accelerate

    case = cases("ddim")[0].model_copy(update={"backend": ACCELERATED[0]})
    unet = diffusers_unet(make_network(case))
    accelerate(unet, backend="triton")
    context = torch.randn(2, 77, unet.config.cross_attention_dim).bfloat16()
    unet(torch.randn(2, 4, 16, 16).bfloat16(), torch.tensor(500), encoder_hidden_states=context)
    planned = {k.digest: k.name for k in plan(run_parts([case]), SM_90, chips=[NO_GPU]).launches}

    def others(kernels: dict[str, str]) -> dict[str, str]:
        return {key: name for key, name in kernels.items() if "linear" not in name and "geglu" not in name}

    assert len(others(looked_up)) > 20
    assert others(planned) == others(looked_up)
    assert any("linear" in name for name in planned.values())


def test_a_slice_that_is_not_aligned_is_another_kernel_here_and_there(looked_up: dict[str, str]) -> None:
    def call(device: str, offset: int) -> dict[str, Any]:
        flat = torch.zeros(200, device=device).bfloat16()
        x = torch.zeros(8, 64, device=device).bfloat16()
        weight, bias = torch.ones(2, 64, device=device).bfloat16()
        return {"x": x, "weight": weight, "bias": bias, "x_bias": flat[offset : offset + 64]}

    planned = set()
    for offset in (0, 8, 3):
        layer_norm(**call("cpu", offset), backend="triton")
        (launch,) = OPERATORS["layer_norm"].plan(OPERATORS["layer_norm"].bind(**call("meta", offset)))[1]
        planned.add(kernel_of(launch, SM_90).digest)
    assert len(planned) == 2
    assert planned == set(looked_up)


def test_settings_of_triton_are_in_the_key_as_at_run_time(
    looked_up: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.zeros(2, 16, 4, 4)
    digests = set()
    for debug in (False, True):
        monkeypatch.setattr(triton.knobs.runtime, "debug", debug)
        residual_add(x, x, backend="triton")
        digests.add(kernel_of(an_addition(), SM_90).digest)
    assert len(digests) == 2
    assert digests == set(looked_up)


def an_addition(**changes: Any) -> Launch:
    x = torch.zeros(2, 16, 4, 4, device="meta")
    (launch,) = OPERATORS["residual_add"].plan(OPERATORS["residual_add"].bind(x, x))[1]
    return replace(launch, **changes)


def parts_of(*launches: tuple[Launch, bool]) -> list[planned_work.Part]:
    return [lambda: iter(launches)]


@pytest.fixture
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("TRITON_CACHE_DIR", str(folder))
    return folder


def test_a_launch_finds_what_was_compiled_ahead(
    own_cache: Path, driver: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With triton's own compiler and cache."""
    work = plan(parts_of((an_addition(), False)), SM_90, chips=[NO_GPU])
    assert not own_cache.exists()
    report = compile_work(work, processes=1)
    assert (report.count("compiled"), report.failures, report.left) == (1, [], 0)
    hits: list[bool] = []
    monkeypatch.setattr(
        triton.knobs.compilation, "listener", lambda *, cache_hit, **_: hits.append(cache_hit), raising=False
    )
    x = torch.zeros(2, 16, 4, 4)
    residual_add(x, x, backend="triton")
    assert (hits, driver.launches) == ([True], 1)
    again = plan(parts_of((an_addition(), False)), SM_90, chips=[NO_GPU])
    assert (again.missing, [kernel.there for kernel in again.launches]) == (0, [True])
    assert compile_work(again, processes=1).count("there") == 1


def test_kernels_come_once_and_what_is_launched_is_no_candidate() -> None:
    work = plan(
        [*parts_of((an_addition(), True), (an_addition(num_warps=8), True)), *parts_of((an_addition(), False))],
        SM_90,
        chips=[NO_GPU],
    )
    assert sorted((kernel.options["num_warps"], kernel.candidate) for kernel in work.launches) == [
        (an_addition().num_warps, False),
        (8, True),
    ]
    assert not torch.cuda.is_initialized()


def test_a_candidate_that_cannot_be_launched_is_no_failure(own_cache: Path) -> None:
    broken = an_addition()
    broken = replace(broken, arguments={**broken.arguments, "BLOCK_HW": 3})
    work = plan(parts_of((broken, True)), SM_90, chips=[NO_GPU])
    report = compile_work(work, processes=1)
    assert (report.count("failed"), report.failures) == (1, [])
    assert list(report.useless) == [work.launches[0].digest]
    assert any("1 candidate cannot be launched" in line for line in ahead.told(report))
    work = plan(parts_of((broken, False)), SM_90, chips=[NO_GPU])
    (failure,) = compile_work(work, processes=1).failures
    assert failure.name.startswith("residual_add_kernel[")
    assert "BLOCK_HW=3" in failure.name
    # Compiled, and too large for a program of a smaller chip.
    small = replace(SM_90, shared_per_block=-1)
    (failure,) = compile_work(plan(parts_of((an_addition(), False)), small, chips=[NO_GPU]), processes=1).failures
    assert (failure.status, "of shared memory" in failure.message) == ("unfit", True)


def test_nothing_more_is_begun_after_the_time_given(own_cache: Path) -> None:
    work = plan(parts_of((an_addition(), False), (an_addition(num_warps=8), False)), SM_90, chips=[NO_GPU])
    report = compile_work(work, processes=1, seconds=0.0)
    assert (len(report.done), report.left) == (1, 1)


def test_forked_processes_work_in_order_and_lose_one_item_at_most() -> None:
    def work(item: int) -> tuple[int, int]:
        if item == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        if item == 5:
            raise ValueError("five\nand more")
        return item * item, os.getpid()

    found = dict(map_forked(work, range(9), 3))
    assert sorted(found) == list(range(9))
    assert found[3] == Lost("its process ended with code -9")
    assert found[5] == Lost("ValueError: five")
    results = [value for item, value in found.items() if item not in (3, 5)]
    assert [value[0] for value in results if not isinstance(value, Lost)] == [
        item * item for item in found if item not in (3, 5)
    ]
    pids = {value[1] for value in results if not isinstance(value, Lost)}
    assert os.getpid() not in pids
    # One more than there are processes: that of the one that died.
    assert len(pids) <= 4
    assert [item for item, _ in map_forked(lambda item: item, "abc", 1)] == ["a", "b", "c"]
    assert list(map_forked(work, [], 3)) == []


def test_closing_ends_the_processes() -> None:
    def work(item: int) -> int:
        if item:
            time.sleep(600)
        return os.getpid()

    results = map_forked(work, range(4), 4)
    _, pid = next(results)
    results.close()
    assert isinstance(pid, int)
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children")
    assert not children.exists() or str(pid) not in children.read_text().split()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_the_sets_hold_what_the_tests_on_a_gpu_launch() -> None:
    family = runpy.run_path(str(ROOT / "tests/gpu/test_1_family.py"), run_name="family")
    unet = runpy.run_path(str(ROOT / "tests/gpu/test_3_unet.py"), run_name="unet")
    assert family["HEAD_DIMS"] == FAMILY_HEAD_DIMS
    assert unet["TINY"] == tested_launches.TESTED_TINY
    assert unet["SAMPLERS"] == tested_launches.TESTED_SAMPLERS
    assert unet["IDEAS"] == tested_launches.TESTED_IDEAS
    pool = runpy.run_path(str(ROOT / "tests/gpu/test_4_graph_pool.py"), run_name="pool")
    assert pool["TINY"] == tested_launches.TESTED_TINY
    assert (*pool["SHAPES"], pool["SMALL"]) == tested_launches.TESTED_GRAPHS
    dependent = runpy.run_path(str(ROOT / "tests/gpu/test_5_dependent.py"), run_name="dependent")
    assert dependent["TINY"] == tested_launches.TESTED_TINY
    check = "".join(path.read_text() for path in sorted((ROOT / "bench").glob("*check*.py")))
    assert re.findall(r'^HEAD_DIMS = "([\d,]+)"', check, re.MULTILINE) == [
        ",".join(map(str, launch_sets.CHECKED_HEAD_DIMS))
    ]


def test_candidates_are_those_that_the_tuner_tries() -> None:
    work = plan(launch_sets.parts_of("tune:geglu:39M:2"), SM_90, chips=[NO_GPU])
    expected = set()
    for _, job in first_of_each_key(jobs(("geglu",), ("39M",), (2,), "bfloat16")):
        call = job.call.bound("meta")
        for config in [None, *OPERATORS["geglu"].candidates(call)]:
            for launch in OPERATORS["geglu"].plan(call, config=config)[1]:
                expected.add(kernel_of(launch, SM_90).digest)
    assert {kernel.digest for kernel in work.launches} == expected
    assert 0 < sum(not kernel.candidate for kernel in work.launches) < len(expected)


def test_launches_are_those_of_the_chip_that_they_are_planned_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of every chip of the architecture that has a tuned table, and of none of another's."""
    from ldmperf.kernels import _launch

    config = '{"block_hw": 64, "block_c": 16, "num_warps": 8}'
    key = "batch=2 channels=16 pixels=16 float32 contiguous"
    for name, arch in (("NVIDIA H200", "sm_90"), ("NVIDIA A100", "sm_80")):
        path = tmp_path / f"{_launch.Chip(name, 1).file_name}.json"
        chip = f'{{"name": "{name}", "multiprocessors": 132, "arch": "{arch}"}}'
        kernels = f'{{"residual_add": {{"{key}": {config}}}}}'
        path.write_text(f'{{"schema_version": 1, "gpu": "{name}", "chip": {chip}, "kernels": {kernels}}}')
    monkeypatch.setattr(_launch, "TUNED_FOLDER", tmp_path)
    monkeypatch.setattr(planned_work, "chip_here", lambda: None)
    assert [chip.name for chip in planned_work.chips_of(SM_90)] == ["H200 SXM", "NVIDIA H200"]

    def part() -> Iterator[tuple[Launch, bool]]:
        yield an_addition(), False

    work = plan([part], SM_90)
    assert sorted(kernel.options["num_warps"] for kernel in work.launches) == [an_addition().num_warps, 8]
    here = _launch.Chip("NVIDIA H200", 132)
    monkeypatch.setattr(planned_work, "chip_here", lambda: here)
    assert planned_work.chips_of(SM_90) == (here,)


DRIVER = """
#include <string.h>
int cuInit(unsigned flags) { return %d; }
int cuDeviceGetCount(int *count) { *count = 1; return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = 7; return 0; }
int cuDeviceGetName(char *name, int length, int device) {
    strncpy(name, "NVIDIA H200", length);
    return device != 7;
}
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    *value = attribute == 16 ? 132 : attribute == 75 ? 9 : 0;
    return device != 7;
}
"""


def test_the_gpu_that_is_here_is_asked_by_another_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On stand-ins for the driver's library: one with a GPU, one that fails."""
    if shutil.which("gcc") is None:
        pytest.skip("no C compiler")
    for code in (0, 100):
        folder = tmp_path / str(code)
        folder.mkdir()
        (folder / "driver.c").write_text(DRIVER % code)
        command = ["gcc", "-shared", "-fPIC", "-o", str(folder / "libcuda.so.1"), str(folder / "driver.c")]
        subprocess.run(command, check=True)
        monkeypatch.setenv("LD_LIBRARY_PATH", str(folder))
        planned_work.chip_here.cache_clear()
        expected = Chip("NVIDIA H200", 132, "sm_90") if code == 0 else None
        assert planned_work.chip_here() == expected
    planned_work.chip_here.cache_clear()


def test_stubs_are_named_as_triton_names_them(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.backends.nvidia import driver
    from triton.runtime.build import platform_key

    _, signature, constants, _ = planned_work.bind(an_addition(), SM_90)
    if not hasattr(driver, "make_launcher"):
        assert stubs.launcher_stub(an_addition().kernel, signature, constants) is None
        monkeypatch.setattr(driver, "make_launcher", lambda *given: f"int {len(given[1])};", raising=False)
    stub = stubs.launcher_stub(an_addition().kernel, signature, constants)
    assert stub is not None
    assert stub.source == driver.make_launcher(constants, signature, None)
    assert stub.digest == hashlib.sha256((stub.source + platform_key()).encode()).hexdigest()
    assert stubs.reason_against("hip") is not None


def test_a_stub_is_compiled_once(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the C compiler of this machine; that it cannot be loaded does not matter."""
    from triton.backends.nvidia import driver
    from triton.runtime.build import platform_key

    for name, value in (("library_dirs", lambda: []), ("include_dirs", []), ("libraries", [])):
        monkeypatch.setattr(driver, name, value)
    source = "int answer(void) { return 42; }"
    digest = hashlib.sha256((source + platform_key()).encode()).hexdigest()
    stub = stubs.Stub(stubs.LAUNCHER, digest, source)
    assert not stubs.is_there(stub)
    assert not own_cache.exists()
    for _ in range(2):
        stubs.build(stub)
        assert [path.parent.name for path in own_cache.glob("*/*.so")] != []
    if triton.__version__ < "3.8":
        assert stubs.is_there(stub)
    with pytest.raises(subprocess.CalledProcessError):
        stubs.build(stubs.Stub(stubs.LAUNCHER, "0" * 64, "no C"))


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exited:
            cli.main(["compile", *arguments])
        captured = capsys.readouterr()
        assert isinstance(exited.value.code, int)
        return exited.value.code, captured.out, captured.err

    return run


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--for", "ladders"], "smoke, ladder, family, drop-in, kernels, tests, tune:"),
        (["--for", "ladder:866M"], "smoke, ladder"),
        (["--for", "tune"], "tune:"),
        (["--for", "tune:gelu"], "geglu"),
        (["--for", "tune:geglu:1M"], "39M"),
        (["--for", "tune:geglu:39M:0"], "from 1"),
        (["--for", ","], "--for"),
        (["--for", "smoke", "--arch", "sm_75"], "sm_80, sm_90, gfx942"),
        (["--for", "smoke", "--jobs", "0"], "--jobs"),
        ([], "--for"),
    ],
)
def test_a_wrong_call_is_one_line_and_exit_code_2(run: Run, arguments: Sequence[str], said: str) -> None:
    code, out, err = run(*arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("ldmperf: ")
    assert said in err


def test_the_command_counts_and_compiles(run: Run, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = plan(parts_of((an_addition(), False)), SM_90, chips=[NO_GPU])
    monkeypatch.setattr(launch_sets, "work_for", lambda names, arch, **_: work)
    code, out, _ = run("--arch", "sm_90", "--for", "smoke", "--plan")
    assert (code, own_cache.exists()) == (0, False)
    assert out.startswith("1 kernel for sm_90")
    assert "1 to compile" in out
    code, out, _ = run("--arch", "sm_90", "--for", "smoke")
    assert code == 0
    assert "1 kernel compiled, 0 there before; " in out
    assert str(own_cache) in out
    broken = replace(work.launches[0], digest="0" * 64)
    monkeypatch.setattr(launch_sets, "work_for", lambda names, arch, **_: replace(work, launches=(broken,)))
    code, out, _ = run("--arch", "sm_90", "--for", "smoke")
    assert code == 1
    assert "failed: residual_add_kernel[" in out
    assert "key" in out


def test_an_interrupt_ends_it_and_keeps_what_was_compiled(tmp_path: Path) -> None:
    # A shell starts what it runs in the background with SIGINT ignored, and so this suite.
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from ldmperf.profiling.cli import main; main()"
    )
    command = [
        sys.executable,
        "-c",
        code,
        "compile",
        "--arch",
        "sm_90",
        "--for",
        "tune:geglu:39M:2",
        "--jobs",
        "1",
    ]
    folder = tmp_path / "cache"
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"TRITON_CACHE_DIR": str(folder), "PYTHONUNBUFFERED": "1"},
        start_new_session=True,
    )
    assert process.stdout is not None
    assert "kernels for sm_90" in process.stdout.readline()
    while not list(folder.glob("*/*.json")):
        assert process.poll() is None
        time.sleep(0.05)
    # As from a terminal: to every process.
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.splitlines()[-1] == "ldmperf: stopped; what was compiled is kept; go on with the same command"
    assert "Traceback" not in err
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


def test_threads_of_this_process_are_as_before() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    inside: list[int] = []

    def part() -> Iterator[tuple[Launch, bool]]:
        # Raised in a process of its own, which the plan reports.
        if torch.get_num_threads() != 1:
            raise AssertionError("several threads")
        yield from ()

    try:
        work = plan([part], SM_90, chips=[NO_GPU])
        inside.append(torch.get_num_threads())
        compile_work(work, processes=1, told=lambda done: None)
        inside.append(torch.get_num_threads())
    finally:
        torch.set_num_threads(before)
    assert inside == [2, 2]

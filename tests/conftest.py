"""Fixtures that several test files share."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Generator, Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest

from ldmperf.profiling import Case, Record, cli
from ldmperf.profiling.measure.environment import DeviceState, Environment
from ldmperf.profiling.measure.recorded import Correctness, Samples
from ldmperf.profiling.trajectory.records import Harness, Phases

_COMMIT = "7d35813a1b2c3d4e5f60718293a4b5c6d7e8f901"


def plausible_record(case: Case | None = None, **changes: Any) -> Record:
    """A record such as a real run writes, with times that follow from the case; `changes` replace its fields.

    A status other than ok takes the times away and gives a message, unless `changes` has one.
    """
    case = case or Case(unet="39M", steps=3)
    gflop = {"39M": 53.0, "83M": 99.7, "145M": 159.9}.get(case.unet, 804.3)
    seconds_per_gflop = 0.004 if case.backend == "torch" else 0.005
    trajectory_ms = 1e3 * gflop * case.model_batch * case.steps * seconds_per_gflop + 40.0
    ok = changes.get("status", "ok") == "ok"
    fields: dict[str, Any] = {
        "case_key": case.key,
        "case": case,
        "status": "ok",
        "message": None if ok else "OutOfMemoryError: tried to allocate 20.00 GiB",
        "correctness": Correctness(
            error_before=2.1e-6, error_after=2.1e-6, tolerance=1e-4, reference="diffusers float32"
        ),
        "wall_ms": Samples.of([trajectory_ms * scale for scale in (1.0, 1.02, 0.99)]) if ok else None,
        "gpu_ms": None,
        "phases": Phases(weights_ms=900.0, build_ms=30.0, first_call_ms=trajectory_ms * 1.3),
        "parameters": 38_800_580,
        "gflop_per_forward": gflop,
        "evaluations": case.steps,
        "device_before": DeviceState(load_average_1min=0.2),
        "device_after": DeviceState(load_average_1min=1.9),
        "environment": Environment(
            cpu="AMD EPYC",
            logical_cores=2,
            usable_cores=2,
            memory_bytes=25_274_793_984,
            os="Linux-6.18-x86_64",
            python="3.11.7",
            ldmperf="0.1.0",
            torch="2.13.0+cpu",
            ptxas="12.8.93",
            git_commit=_COMMIT,
            git_dirty=False,
        ),
        "harness": Harness(min_count=3, min_seconds=0.0, warmup_count=0, interleaved=("torch", "diffusers")),
        "started_at": datetime(2026, 11, 23, 12, 0, tzinfo=UTC),
    }
    return Record(**(fields | changes))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int | None:
    """Of `-n auto`: one more than cores, as some tests wait for processes that they started.

    No further process where there is a GPU, whose memory and time are one test's.
    """
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return (cores or 1) + 1


def pytest_sessionstart() -> None:
    # A worker of pytest-xdist sets it, and whoever runs the tests may: how wide a table is, each test says itself.
    os.environ.pop("COLUMNS", None)


# Files of some minutes each: begun first, so that no other process waits for them at the end.
LONGEST = ("test_interpreter.py", "test_static_kernels.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Imports and cases stay: nothing of them is garbage."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


@pytest.fixture(autouse=True, scope="module")
def _quick_collections() -> None:
    """Garbage is looked for among what a file's tests make, not in all that was there before."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def make_ceilings() -> Callable[..., Any]:
    """Makes ceilings that nobody measured, of a device: so high that floors are far below every time.

    `changes` replace fields.
    """
    pytest.importorskip("torch")
    from ldmperf.profiling.measure.ceilings import Ceiling, Ceilings
    from ldmperf.profiling.options import DTYPES

    at = datetime(2026, 11, 23, 12, 0, tzinfo=UTC)

    def make(device: Any, **changes: Any) -> Ceilings:
        moved, flop, exponentials = (Ceiling(per_s=rate, how="given", at=at) for rate in (1e15, 1e18, 1e15))
        fields = {"bytes": moved, "flop": dict.fromkeys(DTYPES, flop), "exponentials": exponentials, "last": at}
        return Ceilings(device=device, **(fields | changes))

    return make


@pytest.fixture(autouse=True, scope="session")
def _kept_ceilings(make_ceilings: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test measures this machine, its processes neither: ceilings are kept in the cache folder of the tests."""
    import torch

    from ldmperf.profiling.measure.ceilings import CeilingDevice
    from ldmperf.profiling.measure.environment import collect_environment

    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        here = [CeilingDevice.of(collect_environment("cpu"))]
        here = [here[0].model_copy(update={"threads": count}) for count in range(1, 1 + (os.cpu_count() or 1))]
        if torch.cuda.is_available():
            here.append(CeilingDevice.of(collect_environment("cuda")))
        (folder / "ldmperf" / "ceilings").mkdir(parents=True)
        for device in here:
            path = folder / "ldmperf" / "ceilings" / f"{device.key}.json"
            path.write_text(make_ceilings(device).model_dump_json())
        yield


@pytest.fixture
def _one_thread() -> Iterator[None]:
    """One torch thread: on a busy machine the threads of a tiny network wait for each other most of the time."""
    torch = pytest.importorskip("torch")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder written by diffusers' own save_pretrained: a small random network, quick at 64x64 latents."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny-unet"
    diffusers.UNet2DConditionModel(
        sample_size=64,
        block_out_channels=(32, 32, 64),
        down_block_types=("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=32,
        attention_head_dim=4,
        norm_num_groups=8,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of SDXL's kind: added embeddings, two blocks a transformer, no attention at full resolution."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny-sdxl-unet"
    diffusers.UNet2DConditionModel(
        sample_size=64,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        transformer_layers_per_block=(1, 2),
        cross_attention_dim=32,
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=32 + 6 * 8,
        norm_num_groups=8,
    ).save_pretrained(folder)
    return folder


class RunAgain:
    """`Graphs` without a GPU: what was captured runs again where it would be replayed."""

    captured = 0

    def check(self, device: Any) -> None:
        pass

    def turn(self, device: Any) -> nullcontext[None]:
        return nullcontext()

    def settle(self) -> None:
        pass

    def warm_up(self, work: Callable[[], None], device: Any) -> None:
        work()

    def capture(self, work: Callable[[], None], device: Any, *, shares: bool = True) -> Callable[[], None]:
        self.captured += 1
        return work

    def memory(self, device: Any) -> int:
        return 0

    def timed(self, work: Callable[[], None], device: Any) -> Callable[[], float | None]:
        work()
        return lambda: None


@pytest.fixture(scope="session")
def run_again() -> RunAgain:
    """A stand-in for CUDA graphs: GraphedSampler(denoise, graphs=run_again)."""
    return RunAgain()


@dataclass(frozen=True)
class Outcome:
    """The exit code of a command and what it printed."""

    code: int
    out: str
    err: str


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """The command `ldmperf` in this process: run("report", path). `workers` measure for `profile`."""

    def run(*arguments: str | Path, workers: Any = None) -> Outcome:
        with pytest.raises(SystemExit) as exited:
            cli.main([str(argument) for argument in arguments], workers=workers)
        captured = capsys.readouterr()
        assert isinstance(exited.value.code, int)
        return Outcome(exited.value.code, captured.out, captured.err)

    return run


@pytest.fixture
def make_record() -> Callable[..., Record]:
    """The function `plausible_record`: make_record(case, status="oom", ...)."""
    return plausible_record


def plausible_kernel(rows: int = 6, **changes: Any) -> Any:
    """A record of GEGLU [rows, 16] such as `ldmperf kernels` writes on a CPU; `changes` replace its fields."""
    from ldmperf.profiling.kernel_bench.kernel_records import KernelRecord, record_key
    from ldmperf.profiling.step.call import OperatorCall, TensorSpec

    x = TensorSpec(name="x", shape=(rows, 16), stride=(16, 1), dtype="float32")
    out = TensorSpec(name="result 0", shape=(rows, 8), stride=(8, 1), dtype="float32")
    case = OperatorCall(operator="geglu", dtype="float32", tensors=(x,), results=(out,))
    named = {"device": "cpu", "peer": "eager", "mode": "eager"} | changes
    fields: dict[str, Any] = {
        "run_id": "kernels",
        "case_key": record_key(case, named["device"], named["peer"], named["mode"]),
        "size": "39M",
        "batch": 2,
        "case": case,
        "status": "ok",
        "correctness": Correctness(error_before=0.0, error_after=0.0, tolerance=1e-4, reference="float64"),
        "ms": Samples.of([0.125]),
        "clock": "host",
        "calls_per_sample": 1,
        "input_sets": 1,
        "l2": "warm",
        "environment": Environment(os="Linux", python="3.12", cpu="AMD EPYC", triton="3.7.1", git_commit=_COMMIT),
        "started_at": datetime(2026, 11, 27, 1, tzinfo=UTC),
    }
    return KernelRecord(**(fields | named))


def plausible_inspection(tile: int = 64, **changes: Any) -> Any:
    """A record of one compiled launch such as `ldmperf inspect --out` writes; `changes` replace its fields."""
    from ldmperf.profiling.static.inspection_records import InspectionRecord, launch_key

    fields: dict[str, Any] = {
        "run_id": "inspect",
        "arch": "sm_90",
        "kernel": "geglu_kernel",
        "size": "866M",
        "batch": 2,
        "dtype": "bfloat16",
        "constants": (f"BLOCK={tile}",),
        "num_warps": 4,
        "status": "ok",
        "registers": 32,
        "spills": 0,
        "shared_bytes": 0,
        "environment": Environment(os="Linux", python="3.12", triton="3.7.1", git_commit=_COMMIT),
        "started_at": datetime(2026, 11, 27, 1, tzinfo=UTC),
    } | changes
    key = launch_key(InspectionRecord.model_construct(**fields))
    return InspectionRecord(**({"case_key": key} | fields))


def plausible_quality(network: str = "w8", steps: int = 3, **changes: Any) -> Any:
    """A record of quality such as a closed world's bench writes; `changes` replace its fields and its case's."""
    from ldmperf.profiling.quality import Estimate, QualityCase, QualityRecord, stitched_label

    def estimate(value: float) -> Any:
        return Estimate(value=value, replicates=tuple(value * (1 + 0.001 * n) for n in range(-10, 11)))

    kind = changes.get("kind", "diffusion")
    takes = changes.pop("takes", () if kind == "real" else ((network, steps),))
    of_case: dict[str, Any] = {
        "world": "scenes-8x8-v1",
        "kind": kind,
        "network": stitched_label(takes) if kind == "stitched" else network,
        "training_steps": 0 if kind == "real" else 20_000,
        "steps": steps,
        "guidance_scale": 1.0 if kind == "real" else 2.0,
        "samples": 2048,
    }
    of_case |= {name: changes.pop(name) for name in list(changes) if name in QualityCase.model_fields}
    case = QualityCase(**of_case)
    ok = changes.get("status", "ok") == "ok"
    fields: dict[str, Any] = {
        "run_id": "quality",
        "case_key": case.key,
        "case": case,
        "message": None if ok else "the network's weights are not finite",
        "tuned": kind != "real",
        "takes": takes,
        "parameters": 10_000,
        "gflop_per_image": 0.01 * steps,
        "training_gflop": 1e5,
        "environment": Environment(os="Linux", python="3.12", torch="2.13.0+cpu", git_commit=_COMMIT),
        "started_at": datetime(2026, 11, 28, 1, tzinfo=UTC),
    }
    if ok:
        fields |= {"frechet": estimate(5.0), "kid": estimate(0.02), "sliced_wasserstein": estimate(0.3)}
        fields |= {"alignment": estimate(0.8), "factors": {"colour": 0.9, "shape": 0.7}, "all_right": 0.6}
    return QualityRecord(**(fields | changes))


@pytest.fixture
def make_quality() -> Callable[..., Any]:
    """The function `plausible_quality`: make_quality("w8", 3, frechet=Estimate(...), sampler="ddpm", ...)."""
    return plausible_quality


@pytest.fixture
def make_kernel() -> Callable[..., Any]:
    """The function `plausible_kernel`: make_kernel(rows, peer="triton", ...)."""
    return plausible_kernel


@pytest.fixture
def make_inspection() -> Callable[..., Any]:
    """The function `plausible_inspection`: make_inspection(tile, registers=64, ...)."""
    return plausible_inspection


@pytest.fixture
def _fakes_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """`sweep_fakes` can be imported, in the processes of a sweep too."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


@pytest.fixture
def children() -> Callable[[], list[int]]:
    """Tells the processes of this one's fork server that are alive: those that measure."""

    def alive() -> list[int]:
        server = forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]
        found = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):
                _, _, after = path.read_text().rpartition(")")
                state, parent = after.split()[:2]
                if int(parent) == server and state != "Z":
                    found.append(int(path.parent.name))
        return found

    return alive

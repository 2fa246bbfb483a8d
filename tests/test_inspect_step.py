"""`ldmperf inspect SIZE|CHECKPOINT`: what it counts, whose rates it takes, measured times beside floors."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from ldmperf.profiling import Case, Record, load_records
from ldmperf.profiling.figures.step_times import times_by_name
from ldmperf.profiling.machines import BYTES_PER_S, EXPONENTIALS_PER_S, FLOP_PER_S
from ldmperf.profiling.measure.environment import Environment, Gpu, collect_environment
from ldmperf.profiling.measure.recorded import KernelTime
from ldmperf.profiling.step.class_times import CLASSES_NAME, ClassTime, ClassTimes
from ldmperf.profiling.step.classes import CLASSES
from ldmperf.profiling.trajectory.record_parts import Floor, Trace
from ldmperf.profiling.trajectory.records import RECORDS_NAME

SMALL = ("--latent", "16x8", "--tokens", "7")
ALL = ["convolution", "linear", "self-attention", "cross-attention", "norm", "elementwise", "sampler"]
H200 = Environment(os="Linux", python="3.11", torch="2.13", gpu=Gpu(name="NVIDIA H200", count=1))
ON_GPU = Case(unet="39M", steps=4, dtype="bfloat16", device="cuda", backend="graph")
FLOOR = Floor(
    step_ms=0.4,
    least_step_ms=0.1,
    nbytes=10,
    flops=10,
    exponentials=1,
    bytes_per_s=4e12,
    flop_per_s=7e14,
    exponentials_per_s=3e12,
)

Run = Callable[..., Any]


def told(run: Run, *arguments: str | Path) -> Any:
    found = run("inspect", *arguments, "--json")
    assert found.code == 0, found.err
    return json.loads(found.out)


def test_the_ceilings_are_those_that_are_kept(run: Run) -> None:
    found = told(run, "39M", *SMALL, "--device", "cpu")
    # The tests' own (conftest).
    rates = found["rates"]
    assert (rates["bytes_per_s"], rates["flop_per_s"], rates["exponentials_per_s"]) == (1e15, 1e18, 1e15)
    assert (rates["prediction"], found["dtype"], found["measured_by"]) == (False, "float32", None)
    assert [one["class"] for one in found["classes"]] == ALL
    for field in ("launches", "flops", "nbytes", "exponentials", "floor_ms"):
        assert sum(one[field] for one in found["classes"]) == pytest.approx(found["step"][field])
    assert all(one["floor_ms"] > 0 and one["measured_ms"] is None for one in found["classes"])


def test_a_chip_that_is_not_here_is_a_prediction(run: Run) -> None:
    found = told(run, "39M", "--arch", "sm_90")
    assert found["rates"] == {
        "of": "H200 SXM, what it reaches in practice",
        "prediction": True,
        "bytes_per_s": BYTES_PER_S,
        "flop_per_s": FLOP_PER_S,
        "exponentials_per_s": EXPONENTIALS_PER_S,
    }
    assert found["dtype"] == "bfloat16"
    # Two samples, 8 heads; five transformers at 4096, 1024 and 256 tokens each, one at 64; 77 tokens of text.
    scores = sum(count * n * (n + 77) for count, n in ((5, 4096), (5, 1024), (5, 256), (1, 64)))
    assert found["step"]["exponentials"] == 16 * scores
    printed = run("inspect", "39M", "--arch", "sm_90").out
    assert "PREDICTION, not measured" in printed
    assert "measured ms" not in printed
    assert "PREDICTION" not in run("inspect", "39M", *SMALL, "--device", "cpu").out


def test_options_change_the_step(run: Run) -> None:
    one = told(run, "39M", *SMALL, "--arch", "sm_80", "--guidance", "1")
    two = told(run, "39M", *SMALL, "--arch", "sm_80", "--guidance", "1", "--batch", "2")
    sr = told(run, "39M", *SMALL, "--arch", "sm_80", "--task", "sr")
    apart = told(run, "39M", *SMALL, "--arch", "sm_80", "--guidance", "1", "--separate")
    assert two["step"]["flops"] == 2 * one["step"]["flops"]
    # Four more channels into 64, by a 3x3 convolution.
    assert sr["step"]["flops"] - one["step"]["flops"] == 2 * 9 * 4 * 64 * 16 * 8
    assert apart["step"]["flops"] == one["step"]["flops"]
    launches = [sum(kind["launches"] for kind in found["classes"]) for found in (apart, one)]
    assert launches[0] > launches[1]
    assert (one["merged"], apart["merged"]) == (True, False)


def test_a_checkpoint_by_its_path(run: Run, tiny_checkpoint: Path) -> None:
    found = told(run, tiny_checkpoint, *SMALL, "--device", "cpu", "--dtype", "bfloat16")
    assert found["unet"] == tiny_checkpoint.name
    assert 0 < found["step"]["flops"] < 1e9
    assert found["dtype"] == "bfloat16"


def class_times(case: Case, environment: Environment, **changes: Any) -> ClassTimes:
    classes = {name: ClassTime(ms=2.0, launches=3.0) for name in CLASSES}
    fields = {
        "case_key": case.key,
        "unet": case.unet,
        "backend": "torch",
        "clock": "host",
        "steps": 2,
        "step_ms": 15.0,
        "classes": classes,
        "other": ClassTime(ms=1.0, launches=0.0),
        "environment": environment,
    }
    return ClassTimes(**(fields | changes))


@pytest.fixture
def traced(tmp_path: Path, make_record: Callable[..., Record]) -> Path:
    """A folder as `ldmperf trace` writes it, of this machine."""
    case = Case(unet="39M", steps=2, latent_height=16, latent_width=8, context_tokens=7, guidance_scale=1.0)
    here = collect_environment("cpu")
    (tmp_path / CLASSES_NAME).write_text(class_times(case, here).model_dump_json())
    (tmp_path / RECORDS_NAME).write_text(make_record(case, environment=here).model_dump_json() + "\n")
    return tmp_path


def test_measured_times_of_a_trace_stand_beside_the_floors(run: Run, traced: Path) -> None:
    found = told(run, "39M", "--trace", traced)
    assert (found["latent_height"], found["latent_width"], found["context_tokens"]) == (16, 8, 7)
    assert (found["guidance_scale"], found["dtype"], found["merged"]) == (1.0, "float32", False)
    for one in found["classes"]:
        assert one["measured_ms"] == 2.0
        assert one["percent_of_floor"] == pytest.approx(100 * one["floor_ms"] / 2.0)
    assert found["step"]["measured_ms"] == 15.0
    assert (found["other_measured_ms"], found["attention_measured_ms"]) == (1.0, None)
    printed = run("inspect", "39M", "--trace", traced).out
    for part in ("measured ms", "% of floor", "2 steps of torch, eager", "Of no class: 1.000 ms"):
        assert part in printed
    assert "the host's clock, the profiler's own work included" in " ".join(printed.split())
    # The folder's record is of the timed run.
    ((timed,), _) = load_records(traced)
    assert found["timed_ms_per_step"] == timed.ms_per_step
    share = 100 * found["step"]["floor_ms"] / (timed.ms_per_step or 0)
    assert f"a step, {share:.0f} % of floor" in printed
    (traced / RECORDS_NAME).unlink()
    assert told(run, "39M", "--trace", traced)["timed_ms_per_step"] is None
    assert "Timed on" not in run("inspect", "39M", "--trace", traced).out


def test_a_trace_of_something_else_is_refused(run: Run, traced: Path) -> None:
    for arguments, part in (
        (("83M",), "is of 39M, not of 83M"),
        (("39M", "--batch", "2"), "has batch 1, not 2"),
        (("39M", "--latent", "16"), "latent width 8, not 16"),
        (("39M", "--arch", "sm_90"), "measured on a CPU"),
    ):
        found = run("inspect", *arguments, "--trace", traced)
        assert (found.code, found.out) == (2, "")
        assert part in found.err
    case = Case(unet="39M", steps=2)
    elsewhere = collect_environment("cpu").model_copy(update={"cpu": "Another"})
    (traced / CLASSES_NAME).write_text(class_times(case, elsewhere).model_dump_json())
    found = run("inspect", "39M", "--trace", traced / CLASSES_NAME)
    assert found.code == 2
    assert "measured on Another" in found.err
    (traced / CLASSES_NAME).write_text("{")
    assert run("inspect", "39M", "--trace", traced).code == 2


# Kernels of cuDNN, of ours and of torch, and one that nobody knows.
KERNELS = (
    KernelTime(name="sm90_xmma_fprop_implicit_gemm", launches=52.0, ms=0.2),
    KernelTime(name="nvjet_tst_128x256", launches=100.0, ms=0.15),
    KernelTime(name="norm_linear_kernel", launches=48.0, ms=0.05),
    KernelTime(name="attention_kernel", launches=16.0, ms=0.4),
    KernelTime(name="short_attention_kernel", launches=16.0, ms=0.1),
    KernelTime(name="group_norm_kernel", launches=61.0, ms=0.05),
    KernelTime(name="layer_norm_kernel", launches=3.0, ms=0.01),
    KernelTime(name="residual_add_kernel", launches=3.0, ms=0.02),
    KernelTime(name="Memcpy DtoD", launches=1.0, ms=0.01),
    KernelTime(name="sampler_update_kernel", launches=1.0, ms=0.005),
    KernelTime(name="unheard_of", launches=1.0, ms=0.003),
)


def test_kernels_by_their_names() -> None:
    found = times_by_name(KERNELS)
    assert found.ms == pytest.approx(
        {"convolution": 0.2, "linear": 0.2, "norm": 0.06, "elementwise": 0.03, "sampler": 0.005}
    )
    assert (found.attention_ms, found.other_ms) == (pytest.approx(0.5), pytest.approx(0.003))
    assert found.step_ms == pytest.approx(sum(kernel.ms for kernel in KERNELS))


@pytest.fixture
def recorded(tmp_path: Path, make_record: Callable[..., Record]) -> Callable[..., Path]:
    """A file of records of a GPU, one with each of these backends, traced."""

    def write(*backends: str, **changes: Any) -> Path:
        path = tmp_path / "gpu.jsonl"
        trace = Trace(launches=300, busy_ms=3.0, step=KERNELS)
        records = [
            make_record(
                ON_GPU.model_copy(update={"backend": name}), environment=H200, **({"trace": trace} | changes)
            )
            for name in backends
        ]
        path.write_text("".join(record.model_dump_json() + "\n" for record in records))
        return path

    return write


def test_a_records_trace_and_its_own_ceilings(run: Run, recorded: Callable[..., Path]) -> None:
    path = recorded("diffusers", "graph", floor=FLOOR)
    found = told(run, "39M", "--records", path)
    assert "graph" in found["measured_by"]
    assert (found["merged"], found["rates"]["flop_per_s"], found["rates"]["prediction"]) == (True, 7e14, False)
    ms = {one["class"]: one["measured_ms"] for one in found["classes"]}
    assert (ms["convolution"], ms["linear"]) == (pytest.approx(0.2), pytest.approx(0.2))
    assert ms["self-attention"] is ms["cross-attention"] is None
    assert found["attention_measured_ms"] == pytest.approx(0.5)
    assert "do not tell them apart" in run("inspect", "39M", "--records", path).out
    # diffusers merges nothing.
    assert told(run, "39M", "--records", recorded("diffusers", floor=FLOOR))["merged"] is False


@pytest.mark.parametrize("order", [1, -1])
def test_of_several_traces_of_a_case_the_latest_counts(
    run: Run, recorded: Callable[..., Path], tmp_path: Path, order: int
) -> None:
    lines = []
    for hour, ms in enumerate((1.0, 3.0, 2.0)):
        trace = Trace(launches=300, busy_ms=ms, step=(KernelTime(name="group_norm_kernel", launches=1.0, ms=ms),))
        started_at = datetime(2026, 11, 26, hour, tzinfo=UTC)
        lines.append(recorded("graph", floor=FLOOR, trace=trace, started_at=started_at).read_text())
    path = tmp_path / "several.jsonl"
    path.write_text("".join(lines[::order]))
    assert told(run, "39M", "--records", path)["step"]["measured_ms"] == pytest.approx(2.0)


def test_the_trace_of_a_pipeline_is_not_taken_for_a_steps(run: Run, recorded: Callable[..., Path]) -> None:
    """It has the work of a text encoder and of a decoder too."""
    path = recorded("graph", "sample-graph", floor=FLOOR)
    step, pipeline = path.read_text().splitlines()
    case = ON_GPU.model_copy(update={"task": "pipeline", "backend": "sample-graph"})
    values = json.loads(pipeline) | {"case": case.model_dump(mode="json"), "case_key": case.key}
    path.write_text(json.dumps(values) + "\n")
    refused = run("inspect", "39M", "--records", path)
    assert refused.code == 2
    assert "no record of 39M with a traced step" in refused.err
    path.write_text(f"{json.dumps(values)}\n{step}\n")
    assert "graph" in told(run, "39M", "--records", path)["measured_by"]


def test_a_records_machine_is_not_taken_for_this_one(run: Run, recorded: Callable[..., Path]) -> None:
    path = recorded("graph")
    refused = run("inspect", "39M", "--records", path)
    assert refused.code == 2
    assert "NVIDIA H200" in refused.err
    assert "--arch" in refused.err
    found = told(run, "39M", "--records", path, "--arch", "sm_90")
    assert found["rates"]["prediction"] is True
    assert found["step"]["percent_of_floor"] > 0


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["39M", "--channels", "4"], "--channels is of an operator"),
        (["39M", "--size", "866M"], "--size is of an operator"),
        (["39M", "--sass"], "--sass is of an operator"),
        (["geglu", "--latent", "16"], "--latent is of a step"),
        (["./not-here", "--trace", "a"], "./not-here is no size (39M ... 5B) and no path here"),
        (["geglu", "--separate"], "--separate is of a step"),
        (["39M", "--arch", "sm_10"], "choose from sm_80"),
        (["39M", "--arch", "gfx942"], "no units of gfx942"),
        (["39M", "--latent", "0"], "--latent"),
        (["39M", "--tokens", "x"], "--tokens"),
        (["SD1.5", "--task", "pipeline"], "--task pipeline: a step is one of the UNet"),
        (["39M", "--guidance", "nan"], "--guidance"),
        (["39M", "--dtype", "int8"], "--dtype"),
        (["39M", "--device", "tpu"], "--device"),
        (["39M", "--trace", "/nowhere"], "/nowhere"),
        (["39M", "--records", "/nowhere"], "/nowhere"),
        (["39M", "--trace", "a", "--records", "b"], "give one of them"),
        (["/tmp"], "--unet"),
        (["no-such-thing"], "unknown kernel 'no-such-thing'"),
        (["~nobody-has-this-name/x"], "unknown kernel"),
    ],
)
def test_a_wrong_call_is_one_line(run: Run, arguments: list[str], part: str) -> None:
    found = run("inspect", *arguments)
    assert (found.code, found.out) == (2, "")
    assert part in found.err
    assert len(found.err.strip().splitlines()) == 1

"""`ldmperf trace`: its folder, what it says of each figure, and one line for a wrong call."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ldmperf.profiling import Record, load_records
from ldmperf.profiling.measure.environment import DeviceState
from ldmperf.profiling.measure.recorded import KernelTime
from ldmperf.profiling.report.trace_tables import TraceReport
from ldmperf.profiling.step.class_times import ClassTime, read_class_times
from ldmperf.profiling.step.classes import CLASSES
from ldmperf.profiling.trajectory.case import Case
from ldmperf.profiling.trajectory.record_parts import Trace
from ldmperf.profiling.trajectory.timeline import AttributedStep, TopKernel

pytestmark = pytest.mark.usefixtures("_one_thread")
Run = Callable[..., Any]


@pytest.mark.parametrize("backend", ["torch", "diffusers"])
def test_a_trace_is_a_folder_of_four_files(tiny_checkpoint: Path, tmp_path: Path, run: Run, backend: str) -> None:
    options = ("--latent", "8", "--steps", "2", "--backend", backend, "--top", "3", "--device", "cpu")
    done = run("trace", "--unet", tiny_checkpoint, *options, "--out", tmp_path)
    assert done.code == 0, done.err
    (folder,) = tmp_path.iterdir()
    assert folder.name.endswith("-trace")
    assert {path.name for path in folder.iterdir()} == {
        *("trace.json", "classes.json", "trace.md", "records.jsonl", ".lock")
    }
    chrome = json.loads((folder / "trace.json").read_text())
    whole = [event for event in chrome["traceEvents"] if event["ph"] == "X"]
    assert all({"ts", "dur", "name", "pid", "tid"} <= event.keys() and event["dur"] >= 0 for event in whole)
    assert {"trajectory", "step 0", "step 1", "down.0.resnets.0", "convolution"} <= {e["name"] for e in whole}
    # In order, as Perfetto reads it: names of threads, then events by time.
    kinds = [event["ph"] == "M" for event in chrome["traceEvents"]]
    assert kinds == sorted(kinds, reverse=True)
    assert sum(kinds) > 0
    stamps = [event["ts"] for event in chrome["traceEvents"] if event["ph"] != "M"]
    assert stamps == sorted(stamps)
    assert str(tiny_checkpoint.parent) not in (folder / "trace.json").read_text()

    times = read_class_times(folder)
    assert (times.clock, times.steps, times.backend) == ("host", 2, backend)
    assert set(times.classes) == set(CLASSES)
    assert all(of.launches > 0 and of.ms > 0 for of in times.classes.values())
    spans = [event["dur"] for event in whole if event["name"].startswith("step ")]
    assert times.step_ms == pytest.approx(sum(spans) / len(spans) / 1e3)
    ((record,), aside) = load_records(folder)
    assert aside == 0
    assert record.case_key == times.case_key == chrome["ldmperf"]["case"]
    assert record.status == "ok"
    assert record.case.unet == "tiny-unet"
    assert record.floor is not None
    assert record.percent_of_floor is not None

    assert f"Timed on {backend}, eager, without the profiler" in done.out
    assert f"Attributed on {backend}, eager, one trajectory of 2 steps under torch's profiler" in done.out
    assert "hold the profiler's own work" in done.out
    # The headings, three operators and the rest.
    listed = done.out.partition("take longest in a step")[2].strip().partition("\n\n")[0].splitlines()
    assert len(listed) == 1 + 3 + 1
    assert f"{folder / 'trace.json'}: open it in" in done.out
    table = (folder / "trace.md").read_text()
    assert "| convolution |" in table
    shares = [float(share) for share in re.findall(r"([\d.]+)% \|$", table, re.MULTILINE)]
    classes, kernels = shares[: len(CLASSES) + 1], shares[len(CLASSES) + 2 :]
    assert shares[len(CLASSES) + 1] == 100.0
    # Rounded to a tenth each.
    assert sum(classes) == pytest.approx(100.0, abs=0.5)
    assert sum(kernels) == pytest.approx(100.0, abs=0.5)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--steps", "2,4"], "--steps: a trace is of one case: give one value, not 2"),
        (["--steps", "2", "--steps", "4"], "not 2"),
        (["--steps", ","], "not 0"),
        (["--steps", "0"], "from 1 to 1000"),
        (["--task", "pipeline", "--size", "SD1.5"], "--task pipeline: a trace is of the UNet's steps"),
        (["--task", "pipeline", "--size", "SD1.5", "--backend", "sample"], "give t2i or sr"),
        (["--size", "39M,83M"], "not 2"),
        (["--size", "7M"], "39M, 83M, 145M"),
        (["--size", "39M", "--unet", "."], "leave one out"),
        (["--unet", "/no/where"], "/no/where"),
        (
            ["--backend", "diffusers-compile"],
            "which no range can hold; choose from diffusers, diffusers-accelerated, torch, triton",
        ),
        (["--backend", "tensorrt"], "graph"),
        (["--device", "cuda:99"], "choose cpu"),
        (["--top", "0"], "of at least 1"),
        (["--latent", "0"], "--latent"),
        (["--unet", "x\x1b[31m"], r"x\x1b[31m"),
    ],
)
def test_a_wrong_call_is_told_in_one_line(run: Run, tmp_path: Path, arguments: list[str], said: str) -> None:
    done = run("trace", *arguments, "--out", tmp_path / "runs")
    assert done.code == 2
    assert done.out == ""
    assert len(done.err.splitlines()) == 1
    assert said in done.err
    assert not (tmp_path / "runs").exists()


def test_a_case_without_a_time_has_no_trace(run: Run, tmp_path: Path, tiny_checkpoint: Path) -> None:
    options = ("--backend", "graph", "--device", "cpu", "--latent", "8", "--steps", "1")
    done = run("trace", "--unet", tiny_checkpoint, *options, "--out", tmp_path)
    assert done.code == 1
    assert done.err.splitlines()[-1].startswith("ldmperf: no trace: tiny-unet on graph ended as unsupported (CUDA")
    (folder,) = tmp_path.iterdir()
    assert not (folder / "trace.json").exists()


def test_a_file_in_the_way_is_told(run: Run, tmp_path: Path, tiny_checkpoint: Path) -> None:
    (tmp_path / "runs").write_text("")
    done = run("trace", "--unet", tiny_checkpoint, "--out", tmp_path / "runs")
    assert done.code == 1
    assert "choose another folder with --out" in done.err


def test_on_a_gpu_the_graph_is_timed_and_its_eager_twin_attributed(make_record: Callable[..., Record]) -> None:
    """By a record and times made by hand: which figure is of which run."""
    case = Case(unet="39M", backend="graph", device="cuda", dtype="bfloat16", steps=50)
    kernel = KernelTime(name="fprop", launches=1.0, ms=1.0)
    trace = Trace(evaluations=8, launches=10, launches_per_step=1, busy_ms=9.0, step_busy_ms=1.25, step=(kernel,))
    record = make_record(case, trace=trace)
    classes = dict.fromkeys(CLASSES, ClassTime(ms=0.2, launches=2.0))
    top = (TopKernel("fprop", "convolution", 3.0, 1.0), TopKernel("gemm<\x1b[2J>", "linear", 2.5, 0.3))
    times = AttributedStep("device", 8, 1.5, classes, ClassTime(ms=0.1, launches=1.0), top)
    report = TraceReport(record, "triton+hoist+merge", times, 1)
    conditions, timed, attributed = report.lines
    assert "50 steps" in conditions
    assert "7d35813" in conditions
    assert timed.startswith("Timed on graph, each step a replay of the captured graph, without the profiler: ")
    assert timed.endswith("the device is busy for 1.250 ms of a step.")
    assert attributed.startswith("Attributed on triton+hoist+merge, eager, one trajectory of 8 steps under")
    assert "the kernels of a step take 1.500 ms by the device's clock" in attributed
    assert "Times of kernels hold none of the profiler's own work" in attributed
    rows = report.classes_grid().rows
    assert rows[-2:] == (("other", "1", "0.1000", "6.7%"), ("step", "15", "1.500", "100.0%"))
    assert report.kernels_grid().rows == (
        ("fprop", "convolution", "3", "1.000", "66.7%"),
        ("the rest", "-", "2.5", "0.5000", "33.3%"),
    )
    assert "\x1b" not in TraceReport(record, "graph", times, 2).markdown()
    throttled = record.model_copy(update={"device_during": DeviceState(throttle_reasons=("SwPowerCap",))})
    assert "1 of 1 case marked throttled: SwPowerCap" in TraceReport(throttled, "graph", times, 1).lines[3]

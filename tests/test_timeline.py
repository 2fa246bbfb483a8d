"""A Chrome trace read back, on events made by hand: which work belongs to which range, and what a step takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ldmperf.profiling.measure.environment import Environment
from ldmperf.profiling.measure.folders import RunError
from ldmperf.profiling.step.class_times import CLASSES_NAME, ClassTime, ClassTimes, read_class_times
from ldmperf.profiling.step.classes import CLASSES, class_of, is_operator, operator_name
from ldmperf.profiling.trajectory.timeline import (
    AttributedStep,
    shared,
    step_times,
    without_shells,
    work_on_device,
    work_on_host,
)

Event = dict[str, Any]


def event(name: str, category: str, ts: float, dur: float, tid: int = 1, **arguments: object) -> Event:
    return {
        "ph": "X",
        "cat": category,
        "name": name,
        "pid": 7,
        "tid": tid,
        "ts": ts,
        "dur": dur,
        "args": arguments,
    }


def named(name: str, ts: float, dur: float) -> Event:
    return event(name, "user_annotation", ts, dur)


# Two steps as a CUDA trace has them: the host launches long before the device runs.
CUDA = [
    {"ph": "M", "name": "process_name", "pid": 7, "tid": 0, "args": {"name": "python"}},
    named("trajectory", 0, 100),
    named("condition", 1, 5),
    named("linear", 2, 2),
    event("cudaLaunchKernel", "cuda_runtime", 3, 0.5, correlation=1),
    named("step 0", 10, 40),
    named("down.0", 11, 20),
    named("down.0.resnets.0", 11, 10),
    named("group_norm_silu", 12, 3),
    event("ldmperf::group_norm_silu", "cpu_op", 12, 3, **{"External id": 50}),
    event("cuLaunchKernelEx", "cuda_driver", 13, 0.5, correlation=2),
    named("convolution", 15, 3),
    event("cudaLaunchKernel", "cuda_runtime", 16, 0.0, correlation=3),
    event("cudaMemcpyAsync", "cuda_runtime", 19, 0.5, correlation=4),
    named("sampler", 35, 10),
    named("aten::add", 36, 2),
    event("cudaLaunchKernel", "cuda_runtime", 37, 0.5, correlation=5),
    named("step 1", 50, 45),
    named("cross-attention", 55, 3),
    event("aten::scaled_dot_product_attention", "cpu_op", 55, 3, **{"External id": 51}),
    # Of this kernel the profiler lost the launch, and of the one after it everything.
    event("flash", "kernel", 300, 60, 9, correlation=6, **{"External id": 51}),
    event("lost", "kernel", 370, 5, 9, correlation=99),
    event("gemm", "kernel", 200, 30, 9, correlation=1),
    event("group_norm_kernel", "kernel", 230, 11, 9, correlation=2, **{"External id": 51}),
    event("fprop", "kernel", 241, 20, 9, correlation=3),
    event("Memcpy DtoD", "gpu_memcpy", 261, 2, 9, correlation=4),
    event("add", "kernel", 263, 4, 9, correlation=5),
    event("step 0", "gpu_user_annotation", 230, 37, 9),
    # Another thread's ranges are not those of this one's launches.
    event("linear", "user_annotation", 0, 100, 2),
]


def test_a_kernel_is_in_the_ranges_that_were_open_at_its_launch() -> None:
    places = {work.name: work.places for work in work_on_device(CUDA[1:])}
    block = ("trajectory", "step 0", "down.0", "down.0.resnets.0")
    assert places == {
        "gemm": ("trajectory", "condition", "linear"),
        "group_norm_kernel": (*block, "group_norm_silu"),
        "fprop": (*block, "convolution"),
        "Memcpy DtoD": block,
        "add": ("trajectory", "step 0", "sampler", "aten::add"),
        "flash": ("trajectory", "step 1", "cross-attention"),
        "lost": (),
    }


def test_a_step_of_the_device_is_the_sum_of_its_kernels_by_class() -> None:
    times = step_times(CUDA, "device")
    assert times.steps == 2
    taken = {kind: (of.launches, of.ms) for kind, of in times.classes.items() if of.launches}
    # Over two steps each is half; microseconds to milliseconds.
    assert taken == {
        "convolution": (0.5, 0.010),
        "cross-attention": (0.5, 0.030),
        "norm": (0.5, 0.0055),
        "sampler": (0.5, 0.002),
    }
    # The copy that no operator launched, and the kernel whose launch was lost. The matmul is in no step.
    assert times.other == ClassTime(ms=0.0035, launches=1.0)
    assert times.step_ms == pytest.approx(0.051)
    assert list(times.classes) == list(CLASSES)
    assert [(k.name, k.operator_class) for k in times.kernels] == [
        ("flash", "cross-attention"),
        ("fprop", "convolution"),
        ("group_norm_kernel", "norm"),
        ("lost", "other"),
        ("add", "sampler"),
        ("Memcpy DtoD", "other"),
    ]


CPU = [
    named("trajectory", 0, 100),
    named("step 0", 10, 50),
    named("conv_in", 11, 20),
    event("aten::t", "cpu_op", 11, 1),
    named("convolution", 12, 18),
    event("aten::conv2d", "cpu_op", 13, 16),
    event("aten::mkldnn_convolution", "cpu_op", 14, 14),
    named("sampler", 40, 10),
    named("sampler_update", 41, 8),
    event("ldmperf::sampler_update", "cpu_op", 42, 6),
    event("aten::mul", "cpu_op", 43, 1),
    event("aten::mul", "cpu_op", 45, 2),
]


def test_an_operator_on_a_cpu_counts_without_those_inside_it() -> None:
    us = {(work.name, work.us, work.launches) for work in work_on_host(CPU)}
    assert us == {
        ("aten::t", 1, 0),
        ("aten::conv2d", 2, 1),
        ("aten::mkldnn_convolution", 14, 0),
        ("ldmperf::sampler_update", 3, 1),
        ("aten::mul", 1, 0),
        ("aten::mul", 2, 0),
    }
    times = step_times(CPU, "host")
    assert times.step_ms == pytest.approx(0.05)
    assert times.classes["convolution"] == ClassTime(ms=0.016, launches=1.0)
    assert times.classes["sampler"] == ClassTime(ms=0.006, launches=1.0)
    # The rest of the 50: the view, and what no operator of torch was.
    assert times.other.ms == pytest.approx(0.028)
    assert [(k.name, k.launches) for k in times.kernels][:2] == [("aten::mkldnn_convolution", 1), ("aten::mul", 2)]


def test_what_the_dispatch_mode_adds_is_left_out() -> None:
    kept = [
        named("step 0", 0, 100),
        event("aten::view", "cpu_op", 7, 1),
        named("linear", 22, 6),
        event("aten::linear", "cpu_op", 23, 4),
        event("aten::addmm", "cpu_op", 24, 2),
    ]
    added = [
        event("aten::view", "cpu_op", 5, 5),
        event("PythonDispatchMode", "cpu_op", 6, 3),
        event("aten::linear", "cpu_op", 20, 10),
        event("PythonDispatchMode", "cpu_op", 21, 8),
        # The start of a range is an operator that torch gives no event.
        event("PythonDispatchMode", "cpu_op", 1, 2),
    ]
    assert without_shells([*added, *kept]) == kept
    assert step_times(kept, "host").classes["linear"] == ClassTime(ms=0.004, launches=1)


@st.composite
def _steps(draw: st.DrawFn) -> list[Event]:
    """Steps with operators of random lengths and nested operators, some outside any operator's range."""
    events: list[Event] = [named("trajectory", 0, 10_000)]
    at = 1
    for step in range(draw(st.integers(1, 3))):
        start = at
        for _ in range(draw(st.integers(0, 6))):
            length = draw(st.integers(3, 30))
            if draw(st.booleans()):
                events.append(named(draw(st.sampled_from(["linear", "convolution", "aten::add"])), at, length))
            events.append(event("aten::outer", "cpu_op", at, length - 1))
            inner = draw(st.integers(0, length - 2))
            events.append(event("aten::inner", "cpu_op", at + 1, inner))
            at += length + draw(st.integers(0, 3))
        events.append(event("aten::last", "cpu_op", at, 1))
        at += 2
        events.append(named(f"step {step}", start, at - start))
    return events


@given(_steps(), st.randoms(use_true_random=False))
def test_the_classes_of_a_step_add_up_whatever_the_order_of_events(events: list[Event], random: Any) -> None:
    times = step_times(events, "host")
    steps = [one["dur"] for one in events if one["name"].startswith("step")]
    assert times.step_ms == pytest.approx(sum(steps) / len(steps) / 1e3)
    assert sum(of.ms for of in times.classes.values()) + times.other.ms == pytest.approx(times.step_ms)
    outermost = sum(one["dur"] for one in events if one["name"] in ("aten::outer", "aten::last"))
    assert sum(kernel.ms for kernel in times.kernels) == pytest.approx(outermost / len(steps) / 1e3)
    mixed = list(events)
    random.shuffle(mixed)
    again = step_times(mixed, "host")
    assert again.step_ms == times.step_ms
    for kind, of in times.classes.items():
        assert (again.classes[kind].launches, again.classes[kind].ms) == (of.launches, pytest.approx(of.ms))


def test_without_a_step_or_its_kernels_there_is_nothing_to_attribute() -> None:
    for events, clock in (([], "host"), (CPU, "device"), (CUDA[-10:], "device")):
        with pytest.raises(RunError, match="nothing to attribute"):
            step_times(events, clock)  # type: ignore[arg-type]


def test_a_trace_to_share_names_no_host_and_no_path() -> None:
    # Names last, an event before what began earlier, and an inner range before the outer one it begins with.
    outer, inner, later = (
        {"ph": "X", "ts": ts, "dur": dur, "name": name}
        for ts, dur, name in ((1, 9, "a"), (1, 2, "b"), (4, 1, "c"))
    )
    names = {"ph": "M", "ts": 0, "name": "process_name"}
    events = [later, inner, outer, names]
    exported = {"schemaVersion": 1, "traceEvents": events, "host_name": "vm", "traceName": "/home/me/trace.json"}
    assert shared(exported, {"case": "x"}) == {
        "schemaVersion": 1,
        "traceEvents": [names, outer, inner, later],
        "ldmperf": {"case": "x"},
    }


@pytest.mark.parametrize(
    ("torch_name", "name", "kind"),
    [
        ("aten::addmm_", "linear", "linear"),
        ("aten::conv2d", "convolution", "convolution"),
        ("aten::native_layer_norm", "layer_norm", "norm"),
        ("aten::silu", "aten::silu", "norm"),
        ("aten::cat", "aten::cat", "elementwise"),
        ("self-attention", "self-attention", "self-attention"),
        ("geglu", "geglu", "elementwise"),
    ],
)
def test_operators_have_a_name_and_a_class(torch_name: str, name: str, kind: str) -> None:
    assert operator_name(torch_name) == name
    assert is_operator(name)
    assert class_of(name) == kind
    assert class_of(name, in_network=False) == "sampler"


def test_blocks_are_no_operators() -> None:
    assert not any(map(is_operator, ("trajectory", "step 3", "conv_in", "down.0", "sampler", "condition", "mid")))


def _class_times(times: AttributedStep) -> ClassTimes:
    return ClassTimes(
        case_key="unet=39M",
        unet="39M",
        backend="torch",
        clock=times.clock,
        steps=times.steps,
        step_ms=times.step_ms,
        classes=dict(times.classes),
        other=times.other,
        environment=Environment(os="Linux", python="3.11", ldmperf="0.1", torch="2", logical_cores=2),
    )


def test_classes_json_reads_as_it_was_written(tmp_path: Path) -> None:
    written = _class_times(step_times(CUDA, "device"))
    file = tmp_path / CLASSES_NAME
    file.write_text(written.model_dump_json())
    assert read_class_times(tmp_path) == read_class_times(file) == written
    assert json.loads(file.read_text())["classes"]["norm"] == {"ms": 0.0055, "launches": 0.5}


@pytest.mark.parametrize("change", [{"step_ms": 3.0}, {"classes": {}}, {"steps": 0}, None])
def test_classes_json_that_does_not_add_up_is_refused_in_one_line(tmp_path: Path, change: dict[str, Any]) -> None:
    file = tmp_path / CLASSES_NAME
    if change is not None:
        file.write_text(json.dumps(_class_times(step_times(CPU, "host")).model_dump(mode="json") | change))
    with pytest.raises(RunError, match="cannot be read") as refused:
        read_class_times(tmp_path if change is not None else file)
    assert "\n" not in str(refused.value)

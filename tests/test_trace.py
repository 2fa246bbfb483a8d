"""What is read off a device's events, on events made by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ldmperf.profiling.measure.recorded import KernelTime
from ldmperf.profiling.step.groups import by_group, group_of
from ldmperf.profiling.trajectory.trace import DeviceEvent, busy_us, mean_step, steps_of, trace_of, traced


def test_overlapping_events_are_counted_once() -> None:
    events = [
        DeviceEvent("a", 0.0, 10.0),
        DeviceEvent("b", 5.0, 12.0),
        DeviceEvent("inside", 6.0, 7.0),
        DeviceEvent("c", 20.0, 21.5),
    ]
    assert busy_us(events) == 13.5
    trace = trace_of(reversed(events), 1)
    assert trace is not None
    assert (trace.launches, trace.busy_ms) == (4, 0.0135)


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 20)), min_size=1, max_size=30))
def test_busy_time_is_the_length_of_the_union(spans: list[tuple[int, int]]) -> None:
    events = sorted(DeviceEvent("", float(start), float(start + length)) for start, length in spans)
    covered = {tick for start, length in spans for tick in range(start, start + length)}
    assert busy_us(sorted(events, key=lambda event: event.start)) == len(covered)


def launches_per_step(names: list[str], evaluations: int) -> int | None:
    steps = steps_of(names, evaluations)
    assert len({len(step) for step in steps}) <= 1
    return len(steps[0]) if steps else None


def test_a_step_is_from_a_mark_to_the_next() -> None:
    step = ["conv", "norm", "conv", "linear", "norm", "update"]
    names = ["setup", "conv", "copy"] + step * 5 + ["clone"]
    # "update" and "linear" run once an evaluation; "conv" and "norm" do more often.
    assert launches_per_step(names, 5) == 6
    # A multistep solver's first step is shorter, its last one longer.
    uneven = ["setup", *step[:-1], *step * 4, "more", "update"]
    assert launches_per_step(uneven, 5) == 6
    assert launches_per_step(["setup", *step], 1) is None
    assert launches_per_step(["a", "a", "b"], 5) is None
    assert launches_per_step([], 3) is None


@given(st.data())
def test_any_step_with_a_mark_of_its_own_is_counted(data: st.DataObject) -> None:
    kinds = st.sampled_from(["a", "b", "c"])
    step = [*data.draw(st.lists(kinds, max_size=20)), "mark"]
    before, after = data.draw(st.lists(kinds, max_size=9)), data.draw(st.lists(kinds, max_size=9))
    evaluations = data.draw(st.integers(3, 6))
    names = [*before, *step * evaluations, *after]
    counts = {name: names.count(name) for name in "abc"}
    if evaluations not in counts.values():
        assert launches_per_step(names, evaluations) == len(step)


def test_there_is_no_trace_without_events_or_without_a_gpu() -> None:
    assert trace_of([], 3) is None
    assert traced(lambda: pytest.fail("nothing is run"), torch.device("cpu"), 3) is None


def test_the_mean_step_is_of_whole_steps_alone() -> None:
    """Two whole steps of 3 launches between three marks; the longest kernel first, its name cut."""
    long = "gemm" * 100
    names = ["setup", "mark", long, "add", "mark", long, "add", "mark", "tail"]
    # The last mark begins a step that is not whole: what it takes is not in the mean.
    ends = [9.0, 1.0, 10.0, 2.0, 1.0, 20.0, 2.0, 7.0, 5.0]
    events = [
        DeviceEvent(name, 100.0 * i, 100.0 * i + length)
        for i, (name, length) in enumerate(zip(names, ends, strict=True))
    ]
    trace = trace_of(events, 3)
    assert trace is not None
    assert trace.launches_per_step == 3
    assert trace.evaluations == 3
    # Of the two whole steps: 1 + 10 + 2 and 1 + 20 + 2 microseconds.
    assert trace.step_busy_ms == pytest.approx(0.018)
    assert trace.step == (
        KernelTime(name=long[:200], launches=1.0, ms=0.015),
        KernelTime(name="add", launches=1.0, ms=0.002),
        KernelTime(name="mark", launches=1.0, ms=0.001),
    )
    untold = trace_of(events, 7)
    assert untold is not None
    assert untold.step == mean_step([]) == ()


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("attention_kernel", "attention"),
        ("short_attention_kernel", "attention"),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<96, 128, 64, 4, false>>", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x128", "attention"),
        ("fmha_cutlassF_bf16_aligned_64x64_rf_sm80(PyTorchMemEffAttention::AttentionKernel)", "attention"),
        ("group_norm_statistics_kernel", "group norm"),
        ("void at::native::(anonymous namespace)::RowwiseMomentsCUDAKernel<c10::BFloat16>", "group norm"),
        ("triton_red_fused_native_group_norm_silu_3", "group norm"),
        ("layer_norm_kernel", "layer norm"),
        ("void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<float>", "layer norm"),
        ("norm_linear_kernel", "linear"),
        ("linear_kernel", "linear"),
        ("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_bias_TNT", "linear"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1", "linear"),
        ("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_128x64_64x6_tn_align8>", "linear"),
        ("sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize256x128x64", "convolution"),
        ("void cutlass__5x_cudnn::Kernel<cutlass_tensorop_bf16_s16816fprop_optimized_bf16_128x64>", "convolution"),
        ("void cudnn::ops::nchwToNhwcKernel<__nv_bfloat16, __nv_bfloat16, float, false, true>", "copies"),
        ("Memcpy DtoD (Device -> Device)", "copies"),
        ("void at::native::(anonymous namespace)::CatArrayBatchedCopy_vectorized<...>", "copies"),
        ("void at::native::(anonymous namespace)::indexSelectSmallIndex<c10::BFloat16, long, unsigned>", "copies"),
        ("geglu_kernel", "GEGLU"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::GeluCUDAKernelImpl>", "GEGLU"),
        ("void at::native::elementwise_kernel<128, 4, CUDAFunctor_add<float>>", "elementwise and residual"),
        ("residual_add_kernel", "elementwise and residual"),
        ("conv3x3_kernel", "convolution"),
        ("transformer_front_kernel", "linear"),
        ("transformer_tail_kernel", "linear"),
        ("conv3x3_reduce_kernel", "convolution"),
        ("triton_poi_fused_add_7", "elementwise and residual"),
        ("triton_poi_fused_convolution_5", "elementwise and residual"),
        ("triton_poi_fused__to_copy_add_3", "elementwise and residual"),
        ("triton_poi_fused__scaled_dot_product_flash_attention_clone_1", "elementwise and residual"),
        ("triton_poi_fused_gelu_mul_2", "GEGLU"),
        ("triton_per_fused_add_native_layer_norm_4", "layer norm"),
        ("triton_tem_fused_addmm_7", "linear"),
        ("triton_tem_fused_convolution_9", "convolution"),
        ("sampler_update_kernel", "sampler"),
        ("something_new", "other"),
    ],
)  # fmt: skip
def test_names_of_kernels_tell_their_group(name: str, group: str) -> None:
    assert group_of(name) == group


def test_groups_add_up_and_come_in_the_order_of_the_inventory() -> None:
    step = [
        KernelTime(name="something_new", launches=1.0, ms=0.5),
        KernelTime(name="linear_kernel", launches=2.0, ms=1.0),
        KernelTime(name="nvjet_tst", launches=3.0, ms=2.0),
        KernelTime(name="fprop", launches=1.0, ms=4.0),
    ]
    assert list(by_group(step).items()) == [
        ("convolution", (1.0, 4.0)),
        ("linear", (5.0, 3.0)),
        ("other", (1.0, 0.5)),
    ]

"""The operator calls of a step as values: found in the UNet's run, with strides, counts and bytes."""

from __future__ import annotations

import pytest
import torch

from ldmperf.kernels import OPERATORS, layer_norm
from ldmperf.profiling.step.call import OperatorCall, TensorSpec
from ldmperf.profiling.step.calls import attention_calls, family_calls, sampler_call, vae_calls
from ldmperf.profiling.step.recording import calls_of_ours

CALLS = family_calls("39M", 2, "float32", latent=(16, 16))


def test_the_calls_of_a_step_are_those_of_the_network() -> None:
    calls = {name: sum(c.count for c in CALLS if c.operator == name) for name in OPERATORS}
    # Two norms in each of 22 ResBlocks, one in each of 16 transformers, one at the end.
    assert calls["group_norm_silu"] == 61
    assert calls["layer_norm"] == 3 * 16
    assert calls["geglu"] == 16
    # Blocks without a shortcut, and the three sums that are enlarged: a product in place adds all others.
    assert calls["residual_add"] == 8 + 3
    # On itself and on the text in each of 16 transformers.
    assert calls["attention"] == 2 * 16


def test_calls_are_distinct_and_named() -> None:
    assert len({call.key for call in CALLS}) == len({call.label + call.operator for call in CALLS}) == len(CALLS)
    # A front takes statistics, which images of so few pixels do not have.
    assert {call.operator for call in CALLS} == set(OPERATORS) - {"transformer_front"}
    fronts = [call for call in family_calls("39M", 2, "float32") if call.operator == "transformer_front"]
    assert len({call.label for call in fronts}) == len(fronts) > 0
    assert any("+skip" in call.label for call in CALLS)
    assert any("size=" in call.label for call in CALLS)


@pytest.mark.parametrize("call", CALLS, ids=lambda call: f"{call.operator} {call.label}")
def test_a_call_can_be_called_and_planned(call: OperatorCall) -> None:
    operator = OPERATORS[call.operator]
    arguments = call.arguments("cpu", torch.Generator().manual_seed(0))
    for spec in call.tensors:
        made = arguments[spec.name]
        assert (tuple(made.shape), made.stride(), made.dtype) == (spec.shape, spec.stride, spec.torch_dtype)
        assert not made.is_floating_point() or spec.access == "row" or made.count_nonzero()
    result = operator.call(**arguments, backend="torch")
    results = result if isinstance(result, tuple) else () if result is None else (result,)
    # The layout that the recording on "meta" says is the one on a device.
    assert [(tuple(r.shape), r.stride()) for r in results] == [(r.shape, r.stride) for r in call.results]
    assert call.launches
    assert OperatorCall.model_validate_json(call.model_dump_json()) == call


def test_a_part_of_an_operator_is_recorded_as_the_operator() -> None:
    x, vector = torch.empty(2, 8, device="meta"), torch.empty(8, device="meta")
    (call,) = calls_of_ours(lambda: layer_norm(x, vector, vector, residual=x, backend="torch"))
    assert (call.name, call.operator) == ("ldmperf::add_layer_norm", "layer_norm")
    assert set(call.given) == {"x", "residual", "weight", "bias", "eps", "x_bias"}
    assert [launch.operator for launch in call.launches] == ["layer_norm"]


def test_slices_of_one_memory_stay_slices() -> None:
    of_itself, of_text = attention_calls(12, 64, 2, "float32")
    made = of_itself.arguments("cpu", torch.Generator().manual_seed(0))
    packed = torch.cat([made[name].flatten(2) for name in "qkv"], dim=2)
    q, k, v = (made[name] for name in "qkv")
    assert q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr() == v.untyped_storage().data_ptr()
    assert torch.equal(packed.flatten(), q.as_strided((packed.numel(),), (1,), 0))
    assert (k.storage_offset(), v.storage_offset()) == (8 * 12, 2 * 8 * 12)
    made = of_text.arguments("cpu")
    q, k, v = (made[name] for name in "qkv")
    assert q.is_contiguous()
    assert (k.stride(), v.storage_offset()) == ((77 * 2 * 96, 2 * 96, 12, 1), 96)
    assert k.untyped_storage().data_ptr() == v.untyped_storage().data_ptr() != q.untyped_storage().data_ptr()
    # Each element counts once, though it is in one memory with others.
    assert of_itself.bytes_moved == 4 * 4 * 2 * 64 * 96
    assert of_text.bytes_moved == 4 * (2 * 2 * 64 * 96 + 2 * 2 * 77 * 96)


def test_one_memory_holds_the_slice_that_reaches_furthest() -> None:
    def slice_at(name: str, offset: int) -> TensorSpec:
        return TensorSpec(name=name, shape=(3, 2), stride=(8, 1), dtype="float32", memory="all", offset=offset)

    call = OperatorCall(operator="attention", dtype="float32", tensors=(slice_at("k", 4), slice_at("q", 0)))
    made = call.arguments("cpu")
    assert made["k"].untyped_storage().nbytes() == 4 * (4 + 2 * 8 + 2)
    assert made["q"].untyped_storage().data_ptr() == made["k"].untyped_storage().data_ptr()
    alone = call.model_copy(update={"tensors": (slice_at("k", 0),)})
    assert alone.key != call.model_copy(update={"tensors": (slice_at("k", 4),)}).key


def test_the_same_tensor_twice_is_no_slice() -> None:
    assert {tensor.memory for call in vae_calls() for tensor in call.tensors} == {None}


def test_attention_by_its_sizes_is_that_of_the_network() -> None:
    found = [call.model_copy(update={"count": 1}) for call in CALLS if call.operator == "attention"]
    # 39M at 16 x 16 latents: 8 heads, width 64 at the first level.
    assert tuple(found[:2]) == attention_calls(8, 256, 2, "float32")


def test_attention_tells_what_it_computes() -> None:
    of_itself, of_text = attention_calls(40, 1024, 16)
    assert of_itself.attention == (16, 8, 1024, 1024, 40)
    assert of_itself.flops == 4 * 16 * 8 * 1024 * 1024 * 40
    assert of_itself.exponentials == 16 * 8 * 1024 * 1024
    assert (of_text.exponentials, of_text.label) == (16 * 8 * 1024 * 77, "16x1024x8x40 over 77")
    assert of_itself.label == "16x1024x8x40"
    merged = ("conv3x3", "transformer_front", "transformer_tail")
    others = [call for call in CALLS if call.operator not in ("attention", "linear", *merged)]
    assert {call.flops for call in others} == {call.exponentials for call in others} == {None}


def test_a_product_tells_what_it_computes() -> None:
    gated = next(call for call in CALLS if call.operator == "linear" and "geglu" in call.label)
    x, weight = (tensor.shape for tensor in gated.tensors[:2])
    assert gated.flops == 2 * x[0] * x[1] * x[2] * weight[0]
    assert gated.label == f"{x[0]}x{x[1]}x{x[2]} to {weight[0] // 2} +norm_weight +x_bias activation=geglu"
    assert gated.exponentials is None


def test_the_same_seed_gives_the_same_arguments_and_another_does_not() -> None:
    first, same, other = (
        CALLS[0].arguments("cpu", torch.Generator().manual_seed(seed))["x"] for seed in (1, 1, 2)
    )
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_bytes_are_of_each_argument_once_and_each_result_once() -> None:
    call = next(c for c in vae_calls() if c.tensors[0].shape == (1, 512, 64, 64))
    assert call.bytes_moved == 2 * (2 * 512 * 64 * 64 + 2 * 512)
    # Guided, one image: two halves of bfloat16 output and input, a register read and written.
    assert sampler_call("ddim", 2, "bfloat16").bytes_moved == 4 * 64 * 64 * (2 * 2 + 2 * 2 + 2 * 4)


def test_an_expanded_dimension_counts_once_and_reads_one_memory() -> None:
    spec = TensorSpec(name="x_bias", shape=(3, 5), stride=(0, 1), dtype="float32")
    assert spec.nbytes == 5 * 4
    made = OperatorCall(operator="layer_norm", dtype="float32", tensors=(spec,)).arguments("cpu")["x_bias"]
    assert torch.equal(made[0], made[2])


def test_integers_stay_below_their_bound() -> None:
    spec = TensorSpec(name="step", shape=(1000,), stride=(1,), dtype="int64", below=7)
    made = OperatorCall(operator="sampler_update", dtype="float32", tensors=(spec,)).arguments("cpu")["step"]
    assert set(made.tolist()) == set(range(7))


def test_a_batch_of_one_is_without_guidance() -> None:
    assert "guidance_scale" not in {tensor.name for tensor in sampler_call("ddim", 1, "float32").tensors}
    guided = sampler_call("euler_a", 16, "float32")
    assert guided.tensors[0].shape == (1, 8, 4, 64, 64)
    assert "seeds" in {tensor.name for tensor in guided.tensors}

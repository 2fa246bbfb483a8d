"""Attention with the kernel on inputs of every form that diffusers' processors take; the oracle is theirs."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    FusedAttnProcessor2_0,
    XFormersAttnProcessor,
)
from dropin_checks import relative_rms
from dropin_models import randomized
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st

from ldmperf.model.dropin.stand_ins import Attention as StandIn
from ldmperf.model.dropin.stand_ins import give_back, processor_reason, take_over

pytestmark = pytest.mark.usefixtures("_one_thread")
quick = settings(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))

LAYOUTS = ("plain", "channels_last", "sliced", "expanded", "transposed")
FLOOR = {torch.float64: 1e-13, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@dataclass
class Call:
    """An attention module of float64, the class of its processor, and the arguments of one call."""

    attention: Any
    processor: type
    arguments: dict[str, Any]


def laid_out(shape: tuple[int, ...], layout: str, generator: torch.Generator) -> torch.Tensor:
    """Random float64 of the shape; what the storage holds around it is NaN."""

    def random(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    if layout == "channels_last" and len(shape) == 4:
        return random(*shape).contiguous(memory_format=torch.channels_last)
    if layout == "sliced":
        # Of 4-D inputs the batch alone: diffusers' own processors view the two spatial dimensions as one.
        around = (shape[0] * 2, *shape[1:]) if len(shape) == 4 else (shape[0] * 2, shape[1] + 3, 2 * shape[2])
        storage = torch.full(around, torch.nan, dtype=torch.float64)
        window = storage[::2] if len(shape) == 4 else storage[::2, 2:-1, : shape[2]]
        return window.copy_(random(*shape))
    if layout == "expanded":
        return random(1, *shape[1:]).expand(*shape)
    if layout == "transposed" and len(shape) == 3:
        return random(shape[0], shape[2], shape[1]).transpose(1, 2)
    return random(*shape)


@st.composite
def calls(draw: st.DrawFn) -> Call:
    heads, dim_head = draw(st.integers(1, 3)), draw(st.sampled_from([3, 4, 8]))
    is_4d = draw(st.booleans())
    spatial = is_4d and draw(st.booleans())
    # A spatial norm has 32 groups.
    query_dim = 32 if spatial else draw(st.sampled_from([8, 12, 24]))
    cross = draw(st.sampled_from([None, 6, 8]))
    processor = draw(st.sampled_from([AttnProcessor2_0, AttnProcessor2_0, AttnProcessor, FusedAttnProcessor2_0]))
    seed = draw(st.integers(0, 2**16))
    torch.manual_seed(seed)
    attention = Attention(
        query_dim,
        cross_attention_dim=cross,
        heads=heads,
        dim_head=dim_head,
        bias=draw(st.booleans()),
        out_bias=draw(st.booleans()),
        upcast_attention=draw(st.booleans()),
        upcast_softmax=draw(st.booleans()),
        cross_attention_norm=draw(st.sampled_from([None, "layer_norm", "group_norm"])) if cross else None,
        cross_attention_norm_num_groups=2,
        qk_norm=draw(st.sampled_from([None, None, "layer_norm", "fp32_layer_norm", "rms_norm", "l2"])),
        norm_num_groups=draw(st.sampled_from([None, 2, 4])),
        spatial_norm_dim=5 if spatial else None,
        scale_qk=draw(st.booleans()),
        eps=draw(st.sampled_from([1e-5, 1e-2])),
        rescale_output_factor=draw(st.sampled_from([1.0, 1.4])),
        residual_connection=draw(st.booleans()),
        dropout=draw(st.sampled_from([0.0, 0.5])),
    )
    randomized(attention, torch.float64, seed)
    if processor is FusedAttnProcessor2_0:
        attention.fuse_projections()
    attention.set_processor(processor())

    generator = torch.Generator().manual_seed(seed)
    batch, height, width = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(1, 4))
    queries = height * width
    shape = (batch, query_dim, height, width) if is_4d else (batch, queries, query_dim)
    # A processor with fused projections tells self-attention by the absence of the encoder's states.
    attends_across = cross is not None or (processor is not FusedAttnProcessor2_0 and draw(st.booleans()))
    keys = draw(st.integers(1, 9)) if attends_across else queries
    arguments: dict[str, Any] = {"hidden_states": laid_out(shape, draw(st.sampled_from(LAYOUTS)), generator)}
    if attends_across:
        width_across = query_dim if cross is None else cross
        layout = draw(st.sampled_from(LAYOUTS))
        arguments["encoder_hidden_states"] = laid_out((batch, keys, width_across), layout, generator)
    # AttnProcessor would add a mask [B, Nk] to scores [B * heads, Nq, Nk]: a matter of chance.
    flat = [] if processor is AttnProcessor else ["2-D", "bool"]
    masks = [None, None, None, "bias", "heads", "queries", "heads and queries", *flat]
    mask = draw(st.sampled_from(masks))
    if mask is not None:
        rows = batch * heads if mask.startswith("heads") else batch
        columns = (keys,) if mask == "2-D" else (queries if mask.endswith("queries") else 1, keys)
        kept = torch.rand(rows, *columns, generator=generator) < 0.7
        kept[..., 0] = True
        bias = (1 - kept.double()) * -10000.0 + torch.randn(kept.shape, generator=generator, dtype=torch.float64)
        arguments["attention_mask"] = kept if mask == "bool" else bias
    if spatial:
        arguments["temb"] = torch.randn(batch, 5, 2, 3, generator=generator, dtype=torch.float64)
    return Call(attention, processor, arguments)


def cast(call: Call, dtype: torch.dtype) -> Call:
    """The same call with floats of the dtype, in the same strides."""
    attention = torch.nn.Module.to(copy.deepcopy(call.attention), dtype)
    arguments = {
        name: value.to(dtype) if value.is_floating_point() else value for name, value in call.arguments.items()
    }
    return Call(attention, call.processor, arguments)


def run(call: Call, *, ours: bool) -> torch.Tensor:
    before = {name: value.clone() for name, value in call.arguments.items()}
    if ours:
        take_over(call.attention, StandIn, "torch")
    try:
        with torch.no_grad():
            result: torch.Tensor = call.attention(**call.arguments)
    finally:
        if ours:
            give_back(call.attention)
    for name, value in call.arguments.items():
        assert torch.equal(value, before[name]), f"{name} was written to"
    return result


def theirs(call: Call) -> torch.Tensor:
    """diffusers' result; an input that diffusers refuses is no example."""
    try:
        return run(call, ours=False)
    except (RuntimeError, ValueError):
        return reject()


@settings(quick, max_examples=300)
@given(calls())
def test_any_call_as_diffusers(call):
    expected = theirs(call)
    result = run(call, ours=True)
    assert result.shape == expected.shape
    assert result.dtype == expected.dtype
    assert relative_rms(result, expected) < (1e-6 if is_float32(call) else 1e-12)


@settings(quick, max_examples=100)
@given(calls(), st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
def test_any_call_in_other_dtypes(call, dtype):
    call = cast(call, dtype)
    own, exact = theirs(call), theirs(cast(call, torch.float64))
    result = run(call, ours=True)
    assert result.dtype == own.dtype
    assert relative_rms(result, exact) <= max(FLOOR[dtype], 2 * relative_rms(own, exact))


@settings(quick, max_examples=60)
@given(calls())
def test_gradients_as_diffusers(call):
    theirs(call)
    call.attention.train()
    for module in call.attention.modules():
        # Random zeros would differ.
        module.p = 0.0

    def gradients() -> tuple[torch.Tensor | None, ...]:
        floats = {name: value for name, value in call.arguments.items() if value.is_floating_point()}
        leaves = {name: value.detach().clone().requires_grad_() for name, value in floats.items()}
        result = call.attention(**call.arguments | leaves)
        parameters = list(call.attention.parameters())
        return torch.autograd.grad(result.square().sum(), [*leaves.values(), *parameters], allow_unused=True)

    wanted = gradients()
    take_over(call.attention, StandIn, "torch")
    largest = max(float(gradient.norm()) for gradient in wanted if gradient is not None)
    for ours, expected in zip(gradients(), wanted, strict=True):
        assert (ours is None) == (expected is None)
        if ours is not None:
            # Relative to the largest: a bias of keys moves no softmax, and its gradient is rounding.
            assert float((ours - expected).norm()) < (1e-5 if is_float32(call) else 1e-11) * largest


def is_float32(call: Call) -> bool:
    """Whether diffusers' own attention is float32, from float64 too."""
    upcasts = call.attention.upcast_attention or call.attention.upcast_softmax
    return call.processor is AttnProcessor and upcasts


def attention(**options: Any) -> Any:
    torch.manual_seed(0)
    return randomized(Attention(16, heads=2, dim_head=8, **options), torch.float32)


@pytest.mark.parametrize("ours", [True, False])
def test_unknown_keywords_are_dropped_with_a_warning(ours, caplog):
    module = attention()
    x = torch.randn(2, 5, 16)
    expected = module(x)
    if ours:
        take_over(module, StandIn, "torch")
    with caplog.at_level("WARNING"):
        torch.testing.assert_close(module(x, ip_adapter_masks=None), expected)
        assert not caplog.records
        torch.testing.assert_close(module(x, scale=0.5, region=3), expected)
    assert "scale" in caplog.text
    assert "region" in caplog.text


def test_other_processors_run_as_they_are():
    module = attention()
    x = torch.randn(2, 5, 16)
    take_over(module, StandIn, "torch")

    def double(attn: Any, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return 2 * hidden_states

    class Subclass(AttnProcessor2_0):
        def __call__(self, attn: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            return 3 * hidden_states

    module.set_processor(double)
    assert torch.equal(module(x), 2 * x)
    module.set_processor(Subclass())
    assert torch.equal(module(x), 3 * x)


def test_the_processor_of_xformers_scales_as_the_module_says():
    """It runs on a GPU alone; AttnProcessor is the same formula."""
    module = attention(scale_qk=False)
    x = torch.randn(2, 5, 16)
    module.set_processor(AttnProcessor())
    expected = module(x)
    module.set_processor(XFormersAttnProcessor())
    take_over(module, StandIn, "torch")
    torch.testing.assert_close(module(x), expected)
    assert processor_reason(module.processor) is None
    reason = processor_reason(XFormersAttnProcessor(attention_op=object))
    assert reason == "its processor asks for an operator of xformers by name"


@pytest.mark.parametrize("across", [False, True])
def test_under_autocast(across):
    module = attention(cross_attention_dim=16 if across else None)
    x = torch.randn(2, 5, 16)
    states = torch.randn(2, 7, 16) if across else None
    exact = module(x, states).detach()
    with torch.autocast("cpu", torch.bfloat16):
        expected = module(x, states).detach()
        take_over(module, StandIn, "torch")
        result = module(x, states).detach()
    assert result.dtype == expected.dtype
    assert relative_rms(result, exact) <= 1.5 * relative_rms(expected, exact)


def test_dropout_in_training():
    """The output's dropout acts, attention's own does not: as in diffusers, from the same random numbers."""
    module = attention(dropout=0.5).train()
    x = torch.randn(2, 5, 16)
    torch.manual_seed(3)
    expected = module(x)
    take_over(module, StandIn, "torch")
    torch.manual_seed(3)
    torch.testing.assert_close(module(x), expected)


def test_an_infinite_bias_and_a_mask_of_nothing():
    """A row that attends to nothing is diffusers' affair: NaN there is NaN here."""
    module = attention()
    x = torch.randn(2, 4, 16)
    bias = torch.zeros(2, 1, 4)
    bias[0, :, 1:] = -torch.inf
    bias[1] = -torch.inf
    expected = module(x, attention_mask=bias)
    take_over(module, StandIn, "torch")
    torch.testing.assert_close(module(x, attention_mask=bias), expected, equal_nan=True)

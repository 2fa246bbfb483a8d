"""The roofline of a step: counts by hand and by diffusers' network, and what must hold of floors."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from ldmperf.model import AUTO, FAMILY, SEPARATE, Choices, UNet, UNetConfig
from ldmperf.profiling.machines import BYTES_PER_S, EXPONENTIALS_PER_S, FLOP_PER_S, MACHINES
from ldmperf.profiling.peer import diffusers_unet
from ldmperf.profiling.step.classes import CLASSES
from ldmperf.profiling.step.roofline import (
    Roof,
    StepShape,
    by_class,
    least_ms,
    published_roof,
    step_parts,
    sums_of,
)

# One level: a block going down, two going up with skips, a transformer after each.
TINY = UNetConfig(
    block_channels=(32,),
    num_heads=(4,),
    attention=(True,),
    layers_per_block=1,
    has_middle=False,
    context_dim=16,
    norm_groups=8,
)
SHAPE = StepShape(height=16, width=8, tokens=7)
ROOF = Roof(1e12, 1e14, 1e12)
PIXELS, SAMPLES = 16 * 8, 2
# Input and output channels of the 3x3 convolutions.
CONVOLUTIONS = [(4, 32), (32, 32), (32, 32), (64, 32), (32, 32), (64, 32), (32, 32), (32, 4)]

rates = st.floats(1e3, 1e18)
roofs = st.builds(Roof, rates, rates, rates)


def of(shape: StepShape = SHAPE, config: UNetConfig = TINY, choices: Choices = SEPARATE) -> dict[str, Any]:
    return dict(by_class(step_parts(config, shape, choices), ROOF))


def test_convolutions_counted_by_hand() -> None:
    found = of()["convolution"]
    assert found.flops == sum(2 * 9 * a * b * PIXELS * SAMPLES for a, b in CONVOLUTIONS)
    # Input, output and weight in 16 bits; the last one's bias is a pass of its own over its output.
    moved = sum(a * PIXELS * SAMPLES + b * PIXELS * SAMPLES + 9 * a * b for a, b in CONVOLUTIONS)
    assert found.nbytes == 2 * (moved + 2 * 4 * PIXELS * SAMPLES + 4)
    assert found.launches == len(CONVOLUTIONS) + 1


@pytest.mark.parametrize(("name", "keys"), [("self-attention", PIXELS), ("cross-attention", 7)])
def test_attention_counted_by_hand(name: str, keys: int) -> None:
    found = of()[name]
    blocks, width, heads = 3, 32, 4
    assert found.launches == blocks
    assert found.flops == blocks * 4 * SAMPLES * PIXELS * keys * width
    assert found.exponentials == blocks * SAMPLES * heads * PIXELS * keys
    # Queries and results, keys and values.
    assert found.nbytes == blocks * 2 * SAMPLES * width * (2 * PIXELS + 2 * keys)


def test_self_and_cross_attention_of_as_many_tokens_are_told_apart() -> None:
    found = of(dataclasses.replace(SHAPE, tokens=PIXELS))
    assert found["self-attention"].flops == found["cross-attention"].flops > 0


def test_flops_are_those_of_diffusers_network_less_what_is_computed_once() -> None:
    pytest.importorskip("diffusers")
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        unet = diffusers_unet(UNet(TINY, backend="torch"))
        unet(torch.empty(SAMPLES, 4, 16, 8), torch.empty(SAMPLES), torch.empty(SAMPLES, 7, 16))
    # The time embedding's two matmuls and the projection in each block; keys and values of the text.
    once = 2 * SAMPLES * (32 * 128 + 128 * 128 + 3 * 128 * 32) + 3 * 2 * 2 * SAMPLES * 7 * 16 * 32
    assert sums_of(step_parts(TINY, SHAPE), ROOF).flops == counter.get_total_flops() - once


@pytest.mark.parametrize(("size", "gflop"), [("39M", 53.0), ("866M", 804.3)])
def test_a_step_of_the_family_is_nearly_a_forward_of_the_paper(size: str, gflop: float) -> None:
    found = sums_of(step_parts(FAMILY[size], StepShape()), ROOF)
    assert 0.98 * gflop < found.flops / 2e9 < gflop


@pytest.mark.parametrize("choices", [AUTO._replace(convolutions="torch", tails="torch"), SEPARATE])
def test_twice_the_images_are_twice_the_work(choices: Choices) -> None:
    one = of(choices=choices)
    two = of(dataclasses.replace(SHAPE, batch=2), choices=choices)
    assert list(one) == [name for name in CLASSES if name in one] == list(two)
    for name, sums in one.items():
        assert (two[name].flops, two[name].exponentials) == (2 * sums.flops, 2 * sums.exponentials)
        # Weights are read once.
        assert sums.nbytes < two[name].nbytes <= 2 * sums.nbytes
        assert two[name].launches == sums.launches


def test_guidance_is_a_second_sample_in_the_network_alone() -> None:
    guided, plain = of(), of(dataclasses.replace(SHAPE, is_guided=False, batch=2))
    for name in guided.keys() - {"sampler"}:
        assert guided[name] == plain[name]
    assert guided["sampler"].nbytes < plain["sampler"].nbytes


def test_merging_changes_no_flops_and_moves_less() -> None:
    merged, apart = (sums_of(step_parts(TINY, SHAPE, choices), ROOF) for choices in (AUTO, SEPARATE))
    assert merged.flops == apart.flops
    assert merged.nbytes < apart.nbytes


def test_float32_moves_twice_the_bytes_of_activations() -> None:
    half, single = of(), of(dataclasses.replace(SHAPE, dtype="float32"))
    for name in ("convolution", "linear", "self-attention", "cross-attention"):
        assert single[name].nbytes == 2 * half[name].nbytes
        assert single[name].flops == half[name].flops


def test_a_network_that_reads_more_than_it_returns_concatenates_at_each_step() -> None:
    found, usual = of(config=dataclasses.replace(TINY, in_channels=8)), of()
    assert found["convolution"].flops - usual["convolution"].flops == 2 * 9 * 4 * 32 * PIXELS * SAMPLES
    assert found["sampler"].launches == usual["sampler"].launches + 1
    with pytest.raises(NotImplementedError, match="returns more"):
        step_parts(dataclasses.replace(TINY, out_channels=8), SHAPE)


def test_of_what_sdxls_networks_take_beside_the_text_a_step_reads_a_shift_for_each_sample() -> None:
    found, usual = of(config=dataclasses.replace(TINY, added_dim=96, added_time_dim=8)), of()
    # Of three blocks, in 16 bits; elsewhere the samples share one.
    assert found["norm"].nbytes - usual["norm"].nbytes == 2 * 3 * 32 * (SAMPLES - 1)
    assert {name: (sums.flops, sums.launches) for name, sums in found.items()} == {
        name: (sums.flops, sums.launches) for name, sums in usual.items()
    }


def test_an_attention_that_reads_the_context_instead_of_itself_is_cross_attention() -> None:
    only, usual = of(config=dataclasses.replace(TINY, only_cross_attention=True, num_class_embeds=10)), of()
    assert "self-attention" not in only
    for field in ("launches", "flops", "nbytes"):
        assert getattr(only["cross-attention"], field) == 2 * getattr(usual["cross-attention"], field)
    # Its keys and values are projected once a trajectory: of three linear layers one is left in a step.
    assert usual["linear"].launches == only["linear"].launches
    assert usual["linear"].flops - only["linear"].flops == 3 * 2 * SAMPLES * PIXELS * 32 * 2 * 32


@settings(max_examples=60, deadline=None)
@given(roof=roofs)
def test_floors_are_positive_and_add_up_over_classes(roof: Roof) -> None:
    parts = step_parts(TINY, SHAPE)
    classes, whole = by_class(parts, roof), sums_of(parts, roof)
    assert all(sums.floor_ms > 0 and sums.bound is not None for sums in classes.values())
    for name in ("launches", "nbytes", "flops", "exponentials"):
        assert sum(getattr(sums, name) for sums in classes.values()) == getattr(whole, name)
    assert sum(sums.floor_ms for sums in classes.values()) == pytest.approx(whole.floor_ms)
    # No resource alone takes longer, and the parts of all three together take no less.
    alone = (
        1e3 * whole.nbytes / roof.bytes_per_s,
        1e3 * whole.flops / roof.flop_per_s,
        1e3 * whole.exponentials / roof.exponentials_per_s,
    )
    assert max(alone) <= whole.floor_ms * (1 + 1e-9)
    assert whole.floor_ms <= sum(alone) * (1 + 1e-9)
    assert 0 < least_ms(parts, roof.flop_per_s) < alone[1]


@settings(max_examples=30, deadline=None)
@given(roof=roofs, times=st.floats(1.01, 1e3))
def test_a_machine_that_is_faster_in_all_has_lower_floors(roof: Roof, times: float) -> None:
    parts = step_parts(TINY, SHAPE)
    faster = Roof(*(times * rate for rate in dataclasses.astuple(roof)))
    assert sums_of(parts, faster).floor_ms == pytest.approx(sums_of(parts, roof).floor_ms / times)
    for field in ("bytes_per_s", "flop_per_s", "exponentials_per_s"):
        one = dataclasses.replace(roof, **{field: times * getattr(roof, field)})
        assert sums_of(parts, one).floor_ms <= sums_of(parts, roof).floor_ms


def test_the_resource_that_bounds_is_the_slowest() -> None:
    slow: dict[str, Roof] = {
        "bytes": Roof(1.0, 1e18, 1e18),
        "FLOP": Roof(1e18, 1.0, 1e18),
        "exponentials": Roof(1e18, 1e18, 1.0),
    }
    for resource, roof in slow.items():
        assert by_class(step_parts(TINY, SHAPE), roof)["self-attention"].bound == resource
    assert by_class(step_parts(TINY, SHAPE), slow["FLOP"])["norm"].bound == "bytes"


def test_the_least_time_takes_3x3_convolutions_at_a_quarter() -> None:
    parts = step_parts(TINY, SHAPE)
    sums = by_class(parts, ROOF)
    others = sum(of.flops for name, of in sums.items() if name != "convolution")
    assert least_ms(parts, 1e9) == pytest.approx((sums["convolution"].flops / 4 + others) / 1e6)
    # A 1x1 convolution is a matmul: nothing is saved there.
    stored = step_parts(dataclasses.replace(TINY, conv_projection=True), SHAPE)
    assert least_ms(stored, 1e9) == pytest.approx(least_ms(parts, 1e9))


def test_published_rates_are_those_of_the_chips() -> None:
    assert published_roof(MACHINES["sm_90"], "bfloat16") == Roof(BYTES_PER_S, FLOP_PER_S, EXPONENTIALS_PER_S)
    # NVIDIA's data sheets: 312 and 19.5 TFLOP/s of an A100, 67 of an H200 in float32.
    a100 = published_roof(MACHINES["sm_80"], "float16")
    assert a100.flop_per_s == pytest.approx(312e12, rel=0.01)
    assert a100.bytes_per_s == pytest.approx(2.039e12)
    assert published_roof(MACHINES["sm_80"], "float32").flop_per_s == pytest.approx(19.5e12, rel=0.01)
    assert published_roof(MACHINES["sm_90"], "float32").flop_per_s == pytest.approx(67e12, rel=0.01)
    with pytest.raises(ValueError, match="gfx942"):
        published_roof(MACHINES["gfx942"], "bfloat16")

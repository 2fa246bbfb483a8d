"""Counted costs against the figures of the paper's family, counted apart with diffusers' network."""

from __future__ import annotations

import dataclasses

import pytest

from ldmperf.model import FAMILY, RELEASED, UNetConfig
from ldmperf.profiling.step.flops import count_gflop, count_parameters

# params_exact and gflop as in profiling/paper.json, counted apart with diffusers' network.
FACTS = {"39M": (38_800_580, 53.0), "866M": (865_910_724, 804.3), "5B": (4_900_198_660, 4195.1)}


@pytest.mark.parametrize("size", FACTS)
def test_counts_are_those_of_the_family(size: str) -> None:
    parameters, gflop = FACTS[size]
    assert count_parameters(FAMILY[size]) == parameters
    assert round(count_gflop(FAMILY[size]), 1) == gflop


def test_released_networks_have_the_parameters_of_their_checkpoints() -> None:
    """As the headers of the published safetensors files count them."""
    found = {name: count_parameters(config) for name, config in RELEASED.items()}
    assert found == {"SD1.5": 859_520_964, "SDXL": 2_567_463_684}


TINY = UNetConfig(block_channels=(32, 64), num_heads=(2, 4), attention=(True, False), context_dim=32)


def test_a_convolution_of_more_inputs_costs_as_much_more() -> None:
    wide = dataclasses.replace(TINY, in_channels=8)
    # 4 more input channels of a 3x3 convolution to 32 channels at 16x16 pixels.
    assert count_gflop(wide, 16, 16, 7) - count_gflop(TINY, 16, 16, 7) == pytest.approx(
        2 * 9 * 4 * 32 * 16 * 16 / 1e9
    )


def test_attention_is_counted() -> None:
    # Twice the pixels cost twice, but for self-attention (fourfold) and what the context costs (the same).
    small, tall = count_gflop(TINY, 16, 16, 1), count_gflop(TINY, 32, 16, 1)
    assert tall > 2.1 * small

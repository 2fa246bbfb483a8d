"""The first seconds on a GPU: the operators at calls of 866M and 39M, one step of each, and its replays."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from ldmperf.kernels import OPERATORS
from ldmperf.model import FAMILY
from ldmperf.profiling.kernel_bench.inputs import CallInputs, tolerance_of
from ldmperf.profiling.step.calls import family_calls
from ldmperf.samplers import initial_noise, make_plan

pytestmark = pytest.mark.gpu
SIZES = ("866M", "39M")


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("operator", OPERATORS)
@torch.no_grad()
def test_an_operator_at_two_calls_of_a_step(operator: str, size: str, kit: SimpleNamespace) -> None:
    """The step's first and last of it against float64; what is written was NaN before."""
    cases = [case for case in family_calls(size, 2, "bfloat16") if case.operator == operator]
    if not cases:
        pytest.skip(f"no {operator} in a step of {size}")
    for case in (cases[0], cases[-1]):
        inputs = CallInputs(case, 1, torch.device(kit.device), seed=0)
        exact = inputs.reference()
        inputs.restore()
        result = OPERATORS[operator].call(**inputs.sets[0], backend=kit.operators)
        assert inputs.error(result, exact) <= tolerance_of(case), case.label


@pytest.mark.parametrize("size", SIZES)
def test_a_step_errs_no_more_than_on_torchs_operators(size: str, kit: SimpleNamespace) -> None:
    kit.check_a_forward(size, torch.bfloat16)


@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_captured_steps_have_the_bits_of_the_eager_loop(size: str, kit: SimpleNamespace) -> None:
    unet = kit.network(FAMILY[size], torch.bfloat16)
    plan = make_plan("dpmpp_2m", kit.schedule, 3)
    noise = initial_noise([5], (4, 64, 64), device=kit.device)
    _, context = kit.given(FAMILY[size], 2, 64)
    conditioning = unet.condition([step.timestep for step in plan.steps], context)
    expected = kit.eager(unet, conditioning, plan, noise, guidance_scale=7.5)
    sampler = kit.graphed(unet)
    for _ in range(2):
        assert torch.equal(sampler(conditioning, plan, noise, guidance_scale=7.5), expected)

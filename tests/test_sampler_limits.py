"""Numbers too large for the sampler, arguments that a plan does not use, the line a warning names, copies."""

import contextlib
import copy
import math
import pickle
import re
import reprlib
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ldmperf.kernels import philox_normal
from ldmperf.samplers import SAMPLERS, GraphedSampler, NoiseSchedule, initial_noise, make_plan, sample

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SHAPE = (2, 3, 5)
NOISE = initial_noise([3, 4], SHAPE)
PLAN = make_plan("ddim", NoiseSchedule.from_diffusers(SD), 3)

# Around the limits of integers, float32 and float64, and far above them.
HUGE = [10**400, 10**5000, 2**63, 2**100, 10**38, 1e19, 1e30, 3e38, 1e39, 1e154, 1e155, 1.7e308, math.inf]
LARGE = st.sampled_from(HUGE) | st.integers(2**63, 2**1100) | st.floats(min_value=1e15)
NUMBERS = (LARGE | st.sampled_from([5e-324, 1e-39, 0.0, math.nan])).flatmap(lambda n: st.sampled_from([n, -n]))


def network(x, step):
    return torch.tanh(x * torch.linspace(0.8, 1.2, x.shape[0])[:, None, None, None])


def outcome(call):
    """The result, or a refusal in one line."""
    try:
        return call()
    except ValueError as refusal:
        told = refusal
    assert "\n" not in str(told)
    assert len(str(told)) < 300
    return told


def runs(run_again, plan, noise, **options):
    """The outcomes of both loops."""
    sampler = GraphedSampler(lambda x, _, step: network(x, step), graphs=run_again)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [
            outcome(lambda: sample(network, plan, noise, **options)),
            outcome(lambda: sampler((), plan, noise, **options)),
        ]


@given(NUMBERS, st.sampled_from([torch.float32, torch.float64]), st.booleans(), st.data())
@settings(max_examples=60, deadline=None)
def test_a_weight_is_refused_or_gives_finite_latents(run_again, number, dtype, in_a_list, data):
    plan = make_plan(data.draw(st.sampled_from(list(SAMPLERS))), NoiseSchedule.from_diffusers(SD), 4)
    scale = [*[7.5] * (len(plan.steps) - 1), number] if in_a_list else number
    # The root of the largest number, exactly: float32 has 128 binary exponents, float64 1024.
    accepted = abs(number) < 2 ** (64 if dtype == torch.float32 else 512)
    for result in runs(run_again, plan, NOISE.to(dtype), guidance_scale=scale, seeds=[1, 2]):
        assert isinstance(result, torch.Tensor) == accepted
        assert not accepted or result.isfinite().all()


@pytest.mark.parametrize(
    "number", [10**400, -(10**400), 1e39, 3e38, np.float64(1e39), np.longdouble(10) ** 4000], ids=reprlib.repr
)
def test_a_weight_that_float32_cannot_multiply_is_refused(number, run_again):
    for scale in (number, [number] * 3):
        for refusal in runs(run_again, PLAN, NOISE, guidance_scale=scale):
            assert re.match(r"guidance_scale must be .*; the largest in torch.float32 is 1.8e\+19", str(refusal))


@given(st.sampled_from(list(SAMPLERS)), st.integers(1, 6), st.data())
@settings(max_examples=200, deadline=None)
def test_an_option_is_refused_or_gives_finite_latents(name, num_steps, data):
    options = {}
    for option, default in make_plan(name, NoiseSchedule.from_diffusers(SD), 4).options.items():
        if data.draw(st.booleans()):
            kind = type(default)
            if kind in (int, float, type(None)):
                options[option] = data.draw(NUMBERS)
            elif kind is tuple:
                options[option] = [data.draw(NUMBERS)]
            elif kind is bool:
                options[option] = data.draw(st.booleans())
            elif option == "final_sigmas_type":
                options[option] = "sigma_min"
    plan = outcome(lambda: make_plan(name, NoiseSchedule.from_diffusers(SD), num_steps, **options))
    if not isinstance(plan, ValueError):
        assert sample(network, plan, NOISE, seeds=[1, 2]).isfinite().all()


@pytest.mark.parametrize("name", ["euler", "heun", "dpmpp_2m", "unipc"])
def test_a_noise_level_that_float32_cannot_multiply_is_refused(name):
    with pytest.raises(ValueError, match="no finite coefficients"):
        make_plan(name, NoiseSchedule.from_diffusers(SD), 3, use_karras_sigmas=True, sigma_max=3e38)


@given(
    NUMBERS, st.sampled_from(["beta_start", "beta_end", "num_train_timesteps", "trained_betas", "steps_offset"])
)
@settings(max_examples=60, deadline=None)
def test_a_number_of_a_config_is_refused_or_gives_a_finite_schedule(number, key):
    config = {**SD, key: [0.1, number] if key == "trained_betas" else number}
    schedule = outcome(lambda: NoiseSchedule.from_diffusers(config))
    if not isinstance(schedule, ValueError):
        assert np.isfinite(schedule.alphas_cumprod).all()
        outcome(lambda: make_plan("ddim", schedule, 2))


def test_other_numbers_that_are_too_large():
    for number in (10**400, 10**5000):
        with pytest.raises(ValueError, match="alphas_cumprod must be a vector"):
            NoiseSchedule([0.9, number])
        with pytest.raises(ValueError, match="shape must be"):
            initial_noise([1], (number,))
        with pytest.raises(ValueError, match="num_steps must be an integer from 1 to 1000"):
            make_plan("ddim", PLAN.schedule, number)
        assert torch.equal(
            philox_normal(torch.tensor([1]), SHAPE, number),
            philox_normal(torch.tensor([1]), SHAPE, number % 2**32),
        )
        assert torch.equal(initial_noise([number], SHAPE), initial_noise([number % 2**64], SHAPE))
    with pytest.raises(ValueError, match="shape must be"):
        initial_noise([1], (2**40, 2**40))


@pytest.mark.parametrize(
    "seeds", [[1], [1, 2, 3], [], 7, [1.5, 2.0], "12", torch.zeros(2), torch.zeros(2, 1).long()]
)
@pytest.mark.parametrize("name", ["ddim", "ddpm"])
@pytest.mark.parametrize("injects", [False, True])
def test_seeds_are_checked_whether_the_plan_uses_them_or_not(name, injects, seeds, run_again):
    plan = make_plan(name, PLAN.schedule, 3)
    source = {"step_noise": lambda k: torch.zeros_like(NOISE)} if injects else {}
    for refusal in runs(run_again, plan, NOISE, seeds=seeds, **source):
        assert str(refusal).startswith("seeds must be")
    for result in runs(run_again, plan, NOISE, seeds=torch.tensor([1, 2]), **source):
        assert isinstance(result, torch.Tensor)


def test_seeds_that_a_plan_does_not_use_change_nothing(run_again):
    for seeds in (None, [1, 2], torch.tensor([3, 4])):
        for result in runs(run_again, PLAN, NOISE, seeds=seeds, guidance_scale=2.0):
            assert torch.equal(result, sample(network, PLAN, NOISE, guidance_scale=2.0))


@pytest.mark.parametrize("mode", [contextlib.nullcontext, torch.no_grad, torch.inference_mode])
def test_the_warning_of_a_weight_below_one_names_the_callers_line(mode, run_again):
    sampler = GraphedSampler(lambda x, _, step: network(x, step), graphs=run_again)
    calls = [
        lambda: sample(network, PLAN, NOISE, guidance_scale=0.5),
        lambda: sampler((), PLAN, NOISE, guidance_scale=0.5),
    ]
    for call in calls:
        for caller in (call, torch.no_grad()(call)):
            with mode(), pytest.warns(UserWarning, match="the prompt is weaker") as caught:
                caller()
            assert [(w.filename, w.lineno) for w in caught] == [(__file__, call.__code__.co_firstlineno)]


def test_a_graphed_sampler_refuses_copies(run_again):
    sampler = GraphedSampler(lambda x, _, step: network(x, step), graphs=run_again)
    expected = sampler((), PLAN, NOISE)
    for make in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match=r"make another with GraphedSampler\(denoise\)") as refusal:
            make(sampler)
        assert "\n" not in str(refusal.value)
    assert torch.equal(sampler((), PLAN, NOISE), expected)

"""Plans that begin later against diffusers' schedulers after `set_begin_index`, in float64; each step's level.

pndm, ddim and ddpm have no begin index there: a pipeline passes their timesteps from the middle on.
"""

import contextlib
import importlib
import warnings

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ldmperf.samplers import DIFFUSERS_CLASSES, NoiseSchedule, make_plan, plan_from_config, sample, sampler_of

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SHAPE = (2, 3, 4)
NOISE = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
CLEAN = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
STEP_NOISE = torch.randn((60, *SHAPE), generator=torch.Generator().manual_seed(2), dtype=torch.float64)


class Float64Torch:
    """The torch module, except that float32 is float64."""

    float32 = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


@contextlib.contextmanager
def in_float64(scheduler):
    """Widens a scheduler whose timesteps are set: from the same float32 levels it computes in float64."""
    module = importlib.import_module(type(scheduler).__module__)
    for name in ("sigmas", "alphas_cumprod", "final_alpha_cumprod"):
        if hasattr(scheduler, name):
            setattr(scheduler, name, getattr(scheduler, name).double())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "torch", Float64Torch())
        torch.set_default_dtype(torch.float64)
        try:
            yield patch, module
        finally:
            torch.set_default_dtype(torch.float32)


def network(x, timestep):
    return 0.8 * torch.tanh(x) + 0.2 * torch.sin(x + 0.003 * timestep)


def scheduler_of(name, **config):
    if name in ("ddim", "ddpm"):
        config.setdefault("clip_sample", False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(diffusers, DIFFUSERS_CLASSES[name])(**SD, **config)


def run_diffusers(scheduler, num_steps, begin, **options):
    """(timesteps, the noised start, latents) of an img2img pipeline's loop."""
    scheduler.set_timesteps(num_steps)
    timesteps = scheduler.timesteps[begin:]
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(begin)
    clock = {"step": 0}
    with in_float64(scheduler) as (patch, module):
        if hasattr(module, "randn_tensor"):
            patch.setattr(module, "randn_tensor", lambda *_, **__: STEP_NOISE[clock["step"]])
        start = x = scheduler.add_noise(CLEAN, NOISE, timesteps[:1].repeat(len(CLEAN)))
        for clock["step"], timestep in enumerate(timesteps):
            output = network(scheduler.scale_model_input(x, timestep), float(timestep))
            x = scheduler.step(output, timestep, x, **options).prev_sample
    return timesteps.double().numpy(), start, x


def compare(name, num_steps, begin, *, eta=None, tolerance=1e-9, **config):
    scheduler = scheduler_of(name, **config)
    saved = {**scheduler.config, "_class_name": DIFFUSERS_CLASSES[name]}
    options = {} if eta is None else {"eta": eta}
    plan = make_plan(name, NoiseSchedule.from_diffusers(saved), num_steps, begin=begin, **options)
    timesteps, start, expected = run_diffusers(scheduler, num_steps, begin, **options)
    assert torch.isfinite(expected).all()
    np.testing.assert_array_equal(plan.timesteps, timesteps)
    assert plan.begin == begin
    assert [step.index for step in plan.steps] == list(range(len(timesteps)))
    first = plan.steps[0]
    ours = first.alpha * CLEAN + first.sigma * NOISE
    torch.testing.assert_close(ours, start, rtol=1e-9, atol=1e-9)
    if begin == 0:
        # The plan would scale pure noise.
        ours = ours / plan.init_noise_sigma
    latents = sample(lambda x, step: network(x, step.timestep), plan, ours, step_noise=lambda k: STEP_NOISE[k])
    error = float((latents - expected).norm() / expected.norm())
    assert error <= tolerance, f"{name} {num_steps} from {begin} {config}: {error:.1e}"


VARIANTS = [
    *((name, {}) for name in DIFFUSERS_CLASSES if name not in ("pndm", "dpmpp_2s")),
    ("pndm", {"skip_prk_steps": True}),
    ("pndm", {"skip_prk_steps": True, "steps_offset": 1, "prediction_type": "v_prediction"}),
    ("pndm", {}),
    ("ddim", {"eta": 0.7, "prediction_type": "v_prediction"}),
    ("dpmpp_2m", {"solver_order": 3, "use_karras_sigmas": True}),
    ("dpmpp_2m", {"algorithm_type": "sde-dpmsolver++", "solver_type": "heun", "prediction_type": "sample"}),
    ("dpmpp_2s", {"lower_order_final": True}),
    ("dpmpp_2s", {"solver_order": 3, "lower_order_final": True, "use_exponential_sigmas": True}),
    ("dpmpp_2s", {"algorithm_type": "sde-dpmsolver++", "lower_order_final": True}),
    ("unipc", {"solver_order": 3, "disable_corrector": [0, 3]}),
    ("unipc", {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}),
    ("euler", {"use_karras_sigmas": True, "final_sigmas_type": "sigma_min"}),
    ("heun", {"use_exponential_sigmas": True, "prediction_type": "v_prediction"}),
]


@pytest.mark.parametrize(("name", "config"), VARIANTS, ids=lambda value: value if isinstance(value, str) else "")
@pytest.mark.parametrize("num_steps", [1, 2, 4, 7])
def test_every_beginning(name, config, num_steps):
    if name == "pndm" and not config.get("skip_prk_steps") and num_steps < 4:
        pytest.skip("diffusers cannot run fewer than four steps with Runge-Kutta")
    scheduler = scheduler_of(name, **{key: value for key, value in config.items() if key != "eta"})
    scheduler.set_timesteps(num_steps)
    for begin in range(0, len(scheduler.timesteps), scheduler.order):
        compare(name, num_steps, begin, **config)


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_any_options_and_beginning(data):
    name = data.draw(st.sampled_from(sorted(DIFFUSERS_CLASSES)))
    predictions = ["epsilon", "v_prediction"] + (["sample"] if name not in ("pndm", "euler_a") else [])
    config = {"prediction_type": data.draw(st.sampled_from(predictions))}
    if name not in ("lcm", "dpmpp_2s"):
        config["timestep_spacing"] = data.draw(st.sampled_from(["leading", "linspace", "trailing"]))
    if name == "pndm":
        config["skip_prk_steps"] = True
    if name.startswith("dpmpp"):
        config["algorithm_type"] = data.draw(st.sampled_from(["dpmsolver++", "sde-dpmsolver++"]))
        config["lower_order_final"] = True
    if name in ("dpmpp_2m", "dpmpp_2s", "unipc"):
        config["solver_order"] = data.draw(st.integers(1, 3))
    if name in ("dpmpp_2m", "dpmpp_2s", "unipc", "euler", "heun"):
        ramp = data.draw(st.sampled_from([None, "use_karras_sigmas", "use_exponential_sigmas"]))
        config |= {} if ramp is None else {ramp: True}
    num_steps = data.draw(st.integers(1, 20))
    scheduler = scheduler_of(name, **config)
    scheduler.set_timesteps(num_steps)
    begin = scheduler.order * data.draw(st.integers(0, (len(scheduler.timesteps) - 1) // scheduler.order))
    # Trailing may give a timestep of -1, which is refused.
    assume(float(scheduler.timesteps.min()) >= 0.0)
    compare(name, num_steps, begin, tolerance=1e-8, **config)


@pytest.mark.parametrize("name", DIFFUSERS_CLASSES)
def test_alpha_and_sigma_are_those_of_add_noise_at_every_step(name):
    config = {"skip_prk_steps": True} if name == "pndm" else {}
    scheduler = scheduler_of(name, **config)
    plan = plan_from_config({**scheduler.config, "_class_name": DIFFUSERS_CLASSES[name]}, 6)
    scheduler.set_timesteps(6)
    for index, step in enumerate(plan.steps):
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(index)
        expected = scheduler.add_noise(CLEAN, NOISE, scheduler.timesteps[index : index + 1].repeat(len(CLEAN)))
        torch.testing.assert_close(step.alpha * CLEAN + step.sigma * NOISE, expected, rtol=1e-5, atol=1e-5)


def test_a_beginning_that_leaves_nothing_or_half_a_step_is_refused():
    schedule = NoiseSchedule.from_diffusers(SD)
    for begin in (4, 5, 10**9):
        with pytest.raises(ValueError, match=f"begin={begin} leaves no evaluation"):
            make_plan("ddim", schedule, 4, begin=begin)
    for begin in (-1, 1.0, True, None, "1"):
        with pytest.raises(ValueError, match="begin must be a number of evaluations"):
            make_plan("ddim", schedule, 4, begin=begin)
    with pytest.raises(ValueError, match="begin at an even evaluation, not 3"):
        make_plan("heun", schedule, 4, begin=3)
    assert make_plan("ddim", schedule, 4, begin=np.int64(3)).begin == 3


def test_the_sampler_of_a_config():
    assert {sampler_of({"_class_name": name}) for name in DIFFUSERS_CLASSES.values()} == set(DIFFUSERS_CLASSES)
    for config in ({}, {"_class_name": "DEISMultistepScheduler"}, {"_class_name": 3}, None):
        with pytest.raises(ValueError, match="_class_name"):
            sampler_of(config)
    config = {**SD, "_class_name": "DDIMScheduler", "set_alpha_to_one": False}
    assert plan_from_config(config, 3, eta=0.5).options["eta"] == 0.5
    assert plan_from_config(config, 3, begin=1).name == "ddim"
    assert len(plan_from_config(config, 3, begin=1).steps) == 2
    assert plan_from_config(config, 3, sampler="euler").name == "euler"

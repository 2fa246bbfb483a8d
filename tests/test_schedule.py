"""`NoiseSchedule` against diffusers' own levels, and what a scheduler_config.json may and may not say."""

import dataclasses
import importlib
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ldmperf.samplers import DIFFUSERS_CLASSES, NoiseSchedule, make_plan
from ldmperf.samplers.spacing import LINSPACE, ramp_sigmas, sigmas_to_timesteps

diffusers = pytest.importorskip("diffusers")


@given(
    beta_schedule=st.sampled_from(["linear", "scaled_linear", "squaredcos_cap_v2"]),
    beta_start=st.floats(1e-5, 1e-3),
    beta_end=st.floats(5e-3, 0.03),
    num_train_timesteps=st.integers(10, 1200),
    rescale=st.booleans(),
    trained=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_levels_equal_diffusers(beta_schedule, beta_start, beta_end, num_train_timesteps, rescale, trained):
    config = {
        "beta_schedule": beta_schedule,
        "beta_start": beta_start,
        "beta_end": beta_end,
        "num_train_timesteps": num_train_timesteps,
        "rescale_betas_zero_snr": rescale,
        "trained_betas": np.linspace(beta_start, beta_end, num_train_timesteps).tolist() if trained else None,
    }
    schedule = NoiseSchedule.from_diffusers(config)
    ddim = diffusers.DDIMScheduler(**config)
    assert schedule.alphas_cumprod.dtype == np.float64
    np.testing.assert_array_equal(schedule.alphas_cumprod, ddim.alphas_cumprod.double().numpy())
    assert schedule.zero_terminal_snr == rescale
    assert schedule.num_train_timesteps == num_train_timesteps
    multistep = diffusers.DPMSolverMultistepScheduler(**config)
    np.testing.assert_array_equal(schedule.sigmas, multistep.sigmas.double().numpy())


@pytest.mark.parametrize(
    "name",
    ["DDIM", "DDPM", "PNDM", "LCM", "HeunDiscrete", "EulerDiscrete", "DPMSolverMultistep", "UniPCMultistep"],
)
def test_absent_keys_take_the_defaults_of_their_class(name):
    oracle = getattr(diffusers, f"{name}Scheduler")()
    schedule = NoiseSchedule.from_diffusers({"_class_name": f"{name}Scheduler"})
    np.testing.assert_array_equal(schedule.alphas_cumprod, oracle.alphas_cumprod.double().numpy())


def test_every_key_of_every_class_is_known():
    """A config that any of the classes saves is read, and so are its values by the sampler of that class."""
    for name, class_name in DIFFUSERS_CLASSES.items():
        config = dict(getattr(diffusers, class_name)().config)
        config.pop("clip_sample", None)
        plan = make_plan(name, NoiseSchedule.from_diffusers(config), 5)
        for option, value in plan.options.items():
            if option in config and config[option] is not None:
                expected = tuple(config[option]) if isinstance(config[option], list) else config[option]
                assert (tuple(value) if isinstance(value, list) else value) == expected, (name, option)
            else:
                assert option in ("eta", "strength", "sigma_min", "sigma_max"), (name, option)


def test_defaults_of_make_plan_are_those_of_the_class():
    bare = NoiseSchedule(diffusers.DDIMScheduler().alphas_cumprod.double().numpy())
    for name, class_name in (
        ("dpmpp_2m", "DPMSolverMultistepScheduler"),
        ("pndm", "PNDMScheduler"),
        ("lcm", "LCMScheduler"),
    ):
        config = getattr(diffusers, class_name)().config
        options = make_plan(name, bare, 5).options
        assert {key: config[key] for key in options if key in config} == {
            key: value for key, value in options.items() if key in config
        }


def test_options_of_the_config_are_kept_and_private_keys_are_not():
    schedule = NoiseSchedule.from_diffusers(
        {
            "_class_name": "X",
            "_diffusers_version": "0",
            "_use_default_values": ["a"],
            "steps_offset": 1,
            "sigma_min": None,
        }
    )
    assert dict(schedule.options) == {"steps_offset": 1}


@pytest.mark.parametrize("value", [False, None])
@pytest.mark.parametrize("key", ["clip_sample", "thresholding", "use_flow_sigmas", "use_lu_lambdas", "solver_p"])
def test_what_is_switched_off_is_accepted(key, value):
    NoiseSchedule.from_diffusers({key: value})


@pytest.mark.parametrize(
    "config",
    [
        {"clip_sample": True},
        {"thresholding": True},
        {"use_flow_sigmas": True},
        {"use_dynamic_shifting": True},
        {"use_lu_lambdas": True},
        {"solver_p": {}} | {"solver_p": "ddim"},
        {"variance_type": "learned"},
        {"variance_type": "learned_range"},
        {"prediction_type": "flow_prediction"},
        {"beta_schedule": "sigmoid"},
        {"shift": 3.0},
        {"beta_begin": 1e-4},
    ],
    ids=lambda config: next(iter(config)),
)
def test_refusals_name_the_key_in_one_line(config):
    with pytest.raises(ValueError, match=next(iter(config))) as error:
        NoiseSchedule.from_diffusers(config)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "levels", [[0.5], [0.5, 0.6], [0.5, 0.5], [1.1, 0.5], [0.9, -0.1], [0.9, math.nan], [[0.9, 0.5], [0.8, 0.4]]]
)
def test_levels_that_make_no_schedule_are_refused(levels):
    with pytest.raises(ValueError, match="alphas_cumprod"):
        NoiseSchedule(np.array(levels))


def test_a_schedule_cannot_be_changed():
    levels = np.linspace(0.99, 0.1, 10)
    schedule = NoiseSchedule(levels)
    levels[0] = 0.5
    assert schedule.alphas_cumprod[0] == 0.99
    with pytest.raises(ValueError, match="read-only"):
        schedule.alphas_cumprod[0] = 0.5
    with pytest.raises(TypeError):
        schedule.options["steps_offset"] = 1


def test_spacings_equal_diffusers_at_every_number_of_steps():
    """DDIM's integer points and the DPM family's, for 1000 and for 997 training timesteps."""
    for spacing, train_steps in itertools.product(("leading", "linspace", "trailing"), (1000, 997)):
        shared = {"timestep_spacing": spacing, "num_train_timesteps": train_steps}
        ddim = diffusers.DDIMScheduler(**shared)
        unipc = diffusers.UniPCMultistepScheduler(**shared)
        schedule = NoiseSchedule.from_diffusers(shared)
        spaced = dataclasses.replace(LINSPACE, timestep_spacing=spacing)
        for num_steps in range(1, 61):
            for scheduler, drop_last in ((ddim, False), (unipc, True)):
                scheduler.set_timesteps(num_steps)
                ours = spaced.timesteps(schedule, num_steps, drop_last=drop_last)
                # Some counts yield one point too many there, at timestep -1.
                np.testing.assert_array_equal(ours, scheduler.timesteps.double().numpy()[:num_steps])


def test_trailing_never_visits_a_timestep_below_zero():
    schedule = NoiseSchedule.from_diffusers({})
    for num_steps in range(1, 1001):
        timesteps = dataclasses.replace(LINSPACE, timestep_spacing="trailing").timesteps(schedule, num_steps)
        assert len(timesteps) == num_steps
        assert timesteps[-1] >= 0


@given(st.floats(0.01, 0.5), st.floats(5.0, 200.0), st.integers(1, 60))
@settings(max_examples=50, deadline=None)
def test_karras_and_exponential_ramps_equal_diffusers(bottom, top, num_steps):
    euler = diffusers.EulerDiscreteScheduler(sigma_min=bottom, sigma_max=top)
    for ramp in ("karras", "exponential"):
        oracle = getattr(euler, f"_convert_to_{ramp}")(np.array([top, bottom]), num_steps)
        np.testing.assert_array_equal(ramp_sigmas(ramp, top, bottom, num_steps), oracle)


def test_beta_ramp_inverts_the_beta_distribution():
    mpmath = pytest.importorskip("mpmath")
    levels = ramp_sigmas("beta", 1.0, 0.0, 41)
    assert levels[0] == 1.0
    assert levels[-1] == 0.0
    probabilities = [float(mpmath.betainc(0.6, 0.6, 0, x, regularized=True)) for x in levels]
    np.testing.assert_allclose(probabilities, np.linspace(1, 0, 41), atol=1e-13)


@given(st.lists(st.floats(1e-4, 300.0), min_size=1, max_size=20))
@settings(max_examples=50, deadline=None)
def test_sigmas_to_timesteps_equals_diffusers(sigmas):
    schedule = NoiseSchedule.from_diffusers({})
    module = importlib.import_module("diffusers.schedulers.scheduling_euler_discrete")
    log_table = np.log(schedule.sigmas.astype(np.float32))
    oracle = module.EulerDiscreteScheduler()
    expected = [float(oracle._sigma_to_t(np.float64(sigma), log_table)) for sigma in sigmas]
    np.testing.assert_array_equal(sigmas_to_timesteps(np.array(sigmas), schedule), expected)


def test_level_outside_the_schedule_names_what_to_change():
    schedule = NoiseSchedule.from_diffusers({})
    assert schedule.level(999) == pytest.approx(float(torch.prod(1 - torch.linspace(1e-4, 0.02, 1000))), rel=1e-4)
    for timestep in (-1, 1000):
        with pytest.raises(ValueError, match="steps_offset"):
            schedule.level(timestep)

"""Every combination of sampler, spacing, steps, options and training steps: a finite plan, or one line."""

import functools
import inspect
import math
import warnings

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from ldmperf.samplers import DIFFUSERS_CLASSES, SAMPLERS, NoiseSchedule, make_plan

diffusers = pytest.importorskip("diffusers")

CLASSES = {name: getattr(diffusers, class_name) for name, class_name in DIFFUSERS_CLASSES.items()}
OPTIONS = {
    "timestep_spacing": ["linspace", "leading", "trailing"],
    "steps_offset": [0, 1, -1, 2, 5],
    "set_alpha_to_one": [True, False],
    "skip_prk_steps": [True, False],
    "variance_type": ["fixed_small", "fixed_small_log", "fixed_large"],
    "solver_order": [1, 2, 3],
    "algorithm_type": ["dpmsolver++", "sde-dpmsolver++", "dpmsolver", "sde-dpmsolver"],
    "solver_type": ["midpoint", "heun", "bh1", "bh2"],
    "lower_order_final": [True, False],
    "euler_at_final": [True, False],
    "final_sigmas_type": ["zero", "sigma_min"],
    "sigma_min": [None, 0.1, 1e-8, 0.0],
    "sigma_max": [None, 80.0, 5.0, 1e300],
    "lambda_min_clipped": [-math.inf, -5.1, -1.0, 2.0],
    "predict_x0": [True, False],
    "disable_corrector": [[], [0], [0, 1]],
    "interpolation_type": ["linear", "log_linear"],
    "timestep_type": ["discrete", "continuous"],
    "original_inference_steps": [50, 20, 1],
    "timestep_scaling": [10.0, 0.01, 0.0],
    "eta": [0.0, 0.4, 1.0],
}
RAMPS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
BETAS = [(0.00085, 0.012), (0.0001, 0.02), (1e-6, 1e-5), (0.01, 0.9)]


@st.composite
def combinations(draw):
    """(sampler, number of steps, config of the noise, options that this sampler takes)."""
    name = draw(st.sampled_from(list(SAMPLERS)))
    train_steps = draw(st.sampled_from([2, 3, 4, 5, 7, 10, 20, 50, 100, 997, 1000, 4000]) | st.integers(1, 60))
    most = min(train_steps, 60)
    few = st.sampled_from([1, 2, 3, 4, most, max(most - 1, 1), most // 2 + 1]) | st.integers(1, most)
    beta_start, beta_end = draw(st.sampled_from(BETAS))
    config = {
        "num_train_timesteps": train_steps,
        "beta_schedule": draw(st.sampled_from(["linear", "scaled_linear", "squaredcos_cap_v2"])),
        "beta_start": beta_start,
        "beta_end": beta_end,
        "rescale_betas_zero_snr": draw(st.booleans()),
        "prediction_type": draw(st.sampled_from(["epsilon", "sample", "v_prediction"])),
    }
    taken = make_plan(name, NoiseSchedule.from_diffusers({}), 4).options
    options = draw(
        st.fixed_dictionaries(
            {},
            optional={key: st.sampled_from(values) for key, values in OPTIONS.items() if key in taken},
        )
    )
    if "use_beta_sigmas" in taken and draw(st.booleans()):
        options[draw(st.sampled_from(RAMPS))] = True
    return name, min(draw(few), train_steps), config, options


def theirs(name, num_steps, config, options):
    """The timesteps of diffusers' class, or None where it has no such option, refuses it or is not finite."""
    given_ = {**config, **{key: value for key, value in options.items() if key != "eta"}}
    taken = inspect.signature(CLASSES[name].__init__).parameters
    if not given_.pop("rescale_betas_zero_snr") and "rescale_betas_zero_snr" in taken:
        given_["rescale_betas_zero_snr"] = False
    elif config["rescale_betas_zero_snr"]:
        given_["rescale_betas_zero_snr"] = True
    # scipy, which it takes the beta distribution from, is not installed here.
    if not given_.keys() <= taken.keys() or options.get("use_beta_sigmas"):
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            scheduler = CLASSES[name](**given_)
            scheduler.set_timesteps(num_steps)
    except (ValueError, NotImplementedError, IndexError, RuntimeError):
        return None
    timesteps = scheduler.timesteps.double().numpy()
    return timesteps if np.isfinite(timesteps).all() else None


SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def case(name, num_steps, options=None, train_steps=1000, **config):
    noise = {"rescale_betas_zero_snr": False, "prediction_type": "epsilon", **SD, **config}
    return name, num_steps, {"num_train_timesteps": train_steps, **noise}, options or {}


ZERO_SNR = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
FOUND = [
    # Two steps at one level: a division by zero.
    case("dpmpp_2m", 20, {"solver_order": 3}, train_steps=20),
    case("dpmpp_2s", 5, train_steps=5),
    case("unipc", 7, train_steps=7),
    case("unipc", 5, {"final_sigmas_type": "sigma_min", "disable_corrector": [0]}, train_steps=5),
    # A root of -1e-17.
    case("ddim", 4, {"eta": 1.0, "timestep_spacing": "linspace"}, train_steps=20, **ZERO_SNR),
    case("ddim", 6, {"eta": 1.0, "timestep_spacing": "trailing"}, train_steps=7, **ZERO_SNR),
    # An evaluation at sigma = 0.
    case("euler", 2, {"use_beta_sigmas": True, "sigma_min": 0.0}),
    case("dpmpp_2m", 3, {"use_beta_sigmas": True, "sigma_min": 0.0}),
    case("heun", 5, {"use_beta_sigmas": True, "sigma_min": 0.0}, prediction_type="sample"),
    # Timesteps of 1000 and -1 in a network of 1000.
    case("euler", 1000, {"timestep_spacing": "leading", "steps_offset": 1}),
    case("heun", 500, {"timestep_spacing": "leading", "steps_offset": 2}),
    case("euler_a", 1, {"timestep_spacing": "leading", "steps_offset": 5}, train_steps=5),
    case("dpmpp_2m", 1, {"timestep_spacing": "leading", "steps_offset": 1}, train_steps=2),
    case("dpmpp_2m", 4, {"timestep_spacing": "trailing", "lambda_min_clipped": -5.1}, train_steps=5,
         beta_schedule="squaredcos_cap_v2", **ZERO_SNR),
    # The level that stands for zero SNR lies below the one before it.
    case("unipc", 53, {"use_karras_sigmas": True, "sigma_max": 1e6}, train_steps=100, beta_schedule="linear",
         beta_start=0.01, beta_end=0.9, **ZERO_SNR),
    # Beyond float32.
    case("dpmpp_2m", 4, {"use_karras_sigmas": True, "sigma_max": 1e300}),
    case("lcm", 4, {"timestep_scaling": math.inf}),
    case("ddim", 1, train_steps=1),
]  # fmt: skip


def with_found(test):
    return functools.reduce(lambda found, one: example(one, False)(found), FOUND, test)


@with_found
@given(combinations(), st.booleans())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_a_plan_is_finite_or_refused_in_one_line(combination, through_config):
    name, num_steps, config, options = combination
    by_hand = {key: value for key, value in options.items() if key == "eta" or not through_config}
    of_config = {key: value for key, value in options.items() if key not in by_hand}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            plan = make_plan(name, NoiseSchedule.from_diffusers({**config, **of_config}), num_steps, **by_hand)
    except ValueError as refusal:
        message = str(refusal)
        assert "\n" not in message
        assert any(word in message for word in ("choose", "set ", "must", "use ", "check")), message
        return
    numbers = [*plan.table.flat, *plan.input_scales, *plan.timesteps, plan.init_noise_sigma]
    assert np.isfinite(np.array(numbers, dtype=np.float32)).all()
    # The one exception: 0.25 ln sigma, in place of a timestep.
    continuous = options.get("timestep_type") == "continuous" and config["prediction_type"] == "v_prediction"
    if not continuous:
        assert 0 <= plan.timesteps.min() <= plan.timesteps.max() <= config["num_train_timesteps"] - 1
    expected = theirs(*combination)
    if expected is not None:
        if not continuous:
            # Where diffusers' "trailing" has one point too many it is a timestep of -1.
            expected = expected[expected >= 0]
        # Some of theirs are logarithms in float32.
        np.testing.assert_allclose(plan.timesteps, expected[: len(plan.steps)], rtol=1e-6, atol=1e-6)


def test_the_property_sees_plans_and_refusals():
    """Most of the combinations that diffusers accepts are plans here: the property is not true of nothing."""
    found = {"plan": 0, "refused": 0}
    for name, num_steps, config, options in FOUND:
        try:
            make_plan(name, NoiseSchedule.from_diffusers(config), num_steps, **options)
            found["plan"] += 1
        except ValueError:
            found["refused"] += 1
    assert found == {"plan": 4, "refused": 14}


def test_continuous_timesteps_are_a_quarter_of_the_logarithm_of_sigma():
    schedule = NoiseSchedule.from_diffusers({**SD, "prediction_type": "v_prediction"})
    plan = make_plan("euler", schedule, 5, timestep_type="continuous")
    # c_in = 1 / sqrt(sigma^2 + 1)
    np.testing.assert_allclose(plan.timesteps, 0.25 * np.log(np.sqrt(plan.input_scales**-2 - 1)))
    np.testing.assert_allclose(plan.timesteps[-2:], [-0.0909, -0.8837], atol=1e-4)


def test_ddim_of_eta_1_keeps_no_direction_at_zero_snr():
    """From pure noise a step of eta 1 is x_0 and fresh noise: diffusers' formula with the root of zero."""
    schedule = NoiseSchedule.from_diffusers({**SD, **ZERO_SNR})
    for num_steps in range(1, 60):
        plan = make_plan("ddim", schedule, num_steps, eta=1.0, timestep_spacing="trailing")
        level = schedule.level(max(999 - 1000 // num_steps, 0)) if num_steps > 1 else 1.0
        x, output, noise = plan.steps[0].U[0]
        np.testing.assert_allclose([output, noise], [-math.sqrt(level), math.sqrt(1 - level)], atol=1e-12)
        assert abs(x) < 1e-7

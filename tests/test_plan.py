"""`make_plan`: options, refusals by name, and properties that every plan has."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ldmperf.samplers import SAMPLERS, NoiseSchedule, make_plan, sample
from ldmperf.samplers.schedule import SAMPLER_OPTIONS
from ldmperf.samplers.step import Tableau

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SCHEDULE = NoiseSchedule.from_diffusers(SD)
ZERO_SNR = {**SD, "rescale_betas_zero_snr": True}


def of(**config):
    return NoiseSchedule.from_diffusers({**SD, **config})


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("ddim", {"clip_sample": True}, "clip_sample"),
        ("ddpm", {"thresholding": True}, "thresholding"),
        ("dpmpp_2m", {"guidance_rescale": 0.7}, "guidance_rescale"),
        ("unipc", {"solver_p": "ddim"}, "solver_p"),
        ("dpmpp_2m", {"use_lu_lambdas": True}, "use_lu_lambdas"),
        ("dpmpp_2m", {"use_flow_sigmas": True}, "use_flow_sigmas"),
        ("ddim", {"etaa": 1.0}, "etaa"),
        ("euler_a", {"use_karras_sigmas": True}, "use_karras_sigmas"),
        ("heun", {"final_sigmas_type": "zero"}, "takes no option 'final_sigmas_type'"),
        ("unipc", {"lambda_min_clipped": -5.1}, "takes no option 'lambda_min_clipped'"),
        ("dpmpp_2s", {"timestep_spacing": "linspace"}, "takes no option 'timestep_spacing'"),
        ("lcm", {"steps_offset": 0}, "it takes original_inference_steps, strength, timestep_scaling"),
        ("ddim", {"eta": 1.5}, "eta"),
        ("ddim", {"eta": "1"}, "eta"),
        ("ddim", {"set_alpha_to_one": 1}, "set_alpha_to_one"),
        ("ddim", {"timestep_spacing": "cosine"}, "timestep_spacing"),
        ("ddpm", {"variance_type": "learned_range"}, "variance_type"),
        ("ddpm", {"variance_type": "fixed_large_log"}, "variance_type"),
        ("dpmpp_2m", {"solver_order": 4}, "solver_order"),
        ("dpmpp_2m", {"solver_order": True}, "solver_order"),
        ("dpmpp_2m", {"algorithm_type": "dpmsolver+++"}, "algorithm_type"),
        ("dpmpp_2m", {"algorithm_type": "dpmsolver"}, "final_sigmas_type"),
        (
            "dpmpp_2m",
            {"algorithm_type": "sde-dpmsolver", "final_sigmas_type": "sigma_min", "solver_order": 3},
            "solver_order",
        ),
        ("dpmpp_2m", {"solver_type": "bh2"}, "solver_type"),
        ("dpmpp_2m", {"use_karras_sigmas": True, "use_beta_sigmas": True}, "use_karras_sigmas"),
        ("dpmpp_2m", {"final_sigmas_type": "one"}, "final_sigmas_type"),
        ("dpmpp_2m", {"lambda_min_clipped": 100.0}, "lambda_min_clipped"),
        ("dpmpp_2s", {"algorithm_type": "sde-dpmsolver"}, "algorithm_type"),
        ("unipc", {"solver_order": 4}, "solver_order"),
        ("unipc", {"lower_order_final": False}, "lower_order_final"),
        ("unipc", {"predict_x0": False}, "predict_x0"),
        ("euler", {"timestep_type": "other"}, "timestep_type"),
        ("euler", {"interpolation_type": "cubic"}, "interpolation_type"),
        ("lcm", {"original_inference_steps": 4}, "original_inference_steps"),
        ("lcm", {"original_inference_steps": 1001}, "original_inference_steps"),
    ],
)  # fmt: skip
def test_refusals_name_the_option_in_one_line(name, options, message):
    with pytest.raises(ValueError, match=message) as error:
        make_plan(name, SCHEDULE, 8, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("ddim", {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr.*epsilon"),
        ("ddpm", {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr.*epsilon"),
        ("lcm", {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr.*epsilon"),
        ("heun", {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}, "rescale_betas_zero_snr"),
        ("pndm", {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}, "rescale_betas_zero_snr"),
        (
            "dpmpp_2s",
            {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
            "rescale_betas_zero_snr",
        ),
        ("pndm", {"prediction_type": "sample"}, "prediction_type"),
    ],
)
def test_schedules_that_a_sampler_cannot_run_are_refused(name, config, message):
    with pytest.raises(ValueError, match=message) as error:
        make_plan(name, of(**config), 8)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("num_steps", [0, -1, 1001, 2.0, True, "4"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_num_steps_out_of_range(name, num_steps):
    with pytest.raises(ValueError, match="num_steps"):
        make_plan(name, SCHEDULE, num_steps)


def test_an_offset_that_leaves_the_schedule():
    with pytest.raises(ValueError, match="steps_offset"):
        make_plan("ddim", SCHEDULE, 1000, steps_offset=1)


def test_pndm_needs_four_steps_for_runge_kutta():
    with pytest.raises(ValueError, match="skip_prk_steps"):
        make_plan("pndm", SCHEDULE, 3)
    assert len(make_plan("pndm", SCHEDULE, 3, skip_prk_steps=True).steps) == 4


def test_unknown_sampler_lists_the_known():
    with pytest.raises(ValueError, match=r"dpmpp_3m.*ddim.*unipc"):
        make_plan("dpmpp_3m", SCHEDULE, 8)


@pytest.mark.parametrize("option", ["clip_sample", "thresholding", "guidance_rescale"])
def test_refused_options_may_be_off(option):
    plan = make_plan("ddim", SCHEDULE, 4, **{option: False})
    np.testing.assert_array_equal(plan.table, make_plan("ddim", SCHEDULE, 4).table)


def test_explicit_options_go_before_the_config_and_that_before_the_default():
    schedule = of(timestep_spacing="trailing", steps_offset=1, solver_order=3, skip_prk_steps=True)
    assert make_plan("ddim", SCHEDULE, 4).options["timestep_spacing"] == "leading"
    plan = make_plan("ddim", schedule, 4)
    assert plan.options["timestep_spacing"] == "trailing"
    assert "skip_prk_steps" not in plan.options
    assert make_plan("ddim", schedule, 4, timestep_spacing="linspace").options["timestep_spacing"] == "linspace"
    assert make_plan("dpmpp_2m", schedule, 4).options["solver_order"] == 3
    with pytest.raises(TypeError):
        plan.options["eta"] = 1.0


def test_options_given_by_hand_equal_options_of_the_config():
    options = {"solver_order": 3, "use_karras_sigmas": True, "final_sigmas_type": "sigma_min", "steps_offset": 1}
    np.testing.assert_array_equal(
        make_plan("dpmpp_2m", SCHEDULE, 9, **options).table, make_plan("dpmpp_2m", of(**options), 9).table
    )


@pytest.mark.parametrize(
    ("name", "config", "option", "value"),
    [
        ("dpmpp_2m", {"solver_type": "bh2"}, "solver_type", "midpoint"),
        ("dpmpp_2s", {"solver_type": "logrho", "algorithm_type": "deis"}, "algorithm_type", "dpmsolver++"),
        ("unipc", {"solver_type": "heun"}, "solver_type", "bh2"),
    ],
)
def test_words_of_another_class_are_translated_as_diffusers_does(name, config, option, value):
    assert make_plan(name, of(**config), 5).options[option] == value


def test_a_config_may_hold_every_option_of_a_sampler_but_those_of_a_call():
    taken = {option for name in SAMPLERS for option in make_plan(name, SCHEDULE, 4).options}
    assert taken == SAMPLER_OPTIONS | {"eta", "strength"}


CASES = st.sampled_from(
    [
        *(((name, {})) for name in SAMPLERS),
        ("ddim", {"eta": 1.0}),
        ("dpmpp_2m", {"solver_order": 3}),
        ("dpmpp_2m", {"algorithm_type": "sde-dpmsolver++", "solver_type": "heun"}),
        ("dpmpp_2m", {"use_karras_sigmas": True, "final_sigmas_type": "sigma_min", "solver_type": "heun"}),
        ("dpmpp_2m", {"use_exponential_sigmas": True, "final_sigmas_type": "sigma_min", "solver_order": 3}),
        ("dpmpp_2s", {"solver_order": 3, "solver_type": "heun"}),
        ("unipc", {"solver_order": 3, "solver_type": "bh1"}),
        ("unipc", {"use_karras_sigmas": True, "final_sigmas_type": "sigma_min", "lower_order_final": False}),
        ("pndm", {"skip_prk_steps": True}),
        ("euler", {"use_beta_sigmas": True}),
    ]
)


@given(CASES, st.integers(1, 50))
@settings(max_examples=150, deadline=None)
def test_every_plan_is_finite_and_consistent(case, num_steps):
    name, options = case
    if name == "pndm" and not options:
        num_steps = max(num_steps, 4)
    plan = make_plan(name, SCHEDULE, num_steps, **options)
    k, r = len(plan.steps), plan.num_registers
    assert plan.table.shape == (k, r, r + 2)
    assert plan.table.dtype == np.float64
    assert np.isfinite(plan.table).all()
    assert [step.index for step in plan.steps] == list(range(k))
    assert all(type(step.timestep) is float and type(step.c_in) is float for step in plan.steps)
    assert ((plan.timesteps >= 0) & (plan.timesteps <= 999)).all()
    assert plan.stochastic == bool(np.any(plan.table[:, :, -1]))
    assert plan.next_input_scales.tolist() == [*(step.c_in for step in plan.steps[1:]), 1.0]
    expected = {"heun": 2 * num_steps - 1, "pndm": num_steps + (9 if not options else min(num_steps - 1, 1))}
    assert k == expected.get(name, num_steps)
    # Every register but the first is read by some step: the others were left out.
    assert all(np.any(plan.table[:, :, register]) for register in range(1, r))


@given(st.integers(1, 40), st.sampled_from([name for name in SAMPLERS if name != "pndm"]))
@settings(max_examples=60, deadline=None)
def test_the_prediction_type_does_not_change_the_trajectory(num_steps, name):
    """One network of x_0, asked for eps, for v and for x_0, in the convention of its schedule."""
    table = SCHEDULE.sigmas
    noise = torch.randn((1, 1, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    injected = torch.randn((50, 1, 1, 4, 4), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    results = []
    for prediction_type in ("sample", "epsilon", "v_prediction"):
        plan = make_plan(name, of(prediction_type=prediction_type), num_steps)

        def network(x, step, prediction_type=prediction_type):
            ratio = float(np.interp(step.timestep, np.arange(1000), table))
            alpha = (1 + ratio**2) ** -0.5
            sigma = ratio * alpha
            x0 = torch.tanh(alpha * x) * 0.7
            eps = (x - alpha * x0) / sigma
            return {"sample": x0, "epsilon": eps, "v_prediction": alpha * eps - sigma * x0}[prediction_type]

        results.append(sample(network, plan, noise, step_noise=lambda k: injected[k]))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=0, atol=2e-5)


def test_unipc_bh1_reaches_sigma_zero():
    """diffusers is NaN there (B(h) = h is infinite); a first-order last step does not depend on B."""
    bh1, bh2 = (make_plan("unipc", SCHEDULE, 5, solver_order=1, solver_type=t, disable_corrector=[0, 1, 2, 3, 4])
                for t in ("bh1", "bh2"))  # fmt: skip
    np.testing.assert_allclose(bh1.table, bh2.table, rtol=1e-14)


def test_first_orders_agree():
    """DDIM, DPM-Solver++ 1, UniP 1 and Euler are one method in different variables."""
    noise = torch.randn((1, 1, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shared = {"timestep_spacing": "trailing"}
    plans = [
        make_plan("ddim", SCHEDULE, 10, **shared),
        make_plan("dpmpp_2m", SCHEDULE, 10, solver_order=1, **shared),
        make_plan("unipc", SCHEDULE, 10, solver_order=1, disable_corrector=list(range(10)), **shared),
        make_plan("euler", SCHEDULE, 10, **shared),
    ]
    results = []
    for plan in plans:
        # Euler holds x / alpha: the same start is noise / alpha.
        start = noise if plan.init_noise_sigma == 1.0 else noise / plan.steps[0].c_in / plan.init_noise_sigma
        results.append(sample(lambda x, step: torch.tanh(x), plan, start))
    for first, second in itertools.pairwise(results):
        torch.testing.assert_close(first, second, rtol=0, atol=1e-5)


def test_a_plan_cannot_be_changed():
    plan = make_plan("ddim", SCHEDULE, 4)
    with pytest.raises(AttributeError):
        plan.name = "other"
    with pytest.raises(ValueError, match="read-only"):
        plan.table[0, 0, 0] = 0.0


def test_registers_that_x_never_reads_are_left_out_and_others_kept():
    """x reads a in the second step, a reads b in the first: both live. Nobody but d itself reads d."""
    tableau = Tableau("x", "d", "a", "b")
    x, d, a, b, output, _ = tableau.unit_vectors()
    tableau.step(2.0, (1.0, 0.0), x=x + output, d=d + x, a=a + 3.0 * b)
    tableau.step(1.0, (1.0, 0.0), c_in=0.5, x=x + 2.0 * a, b=output)
    first, second = tableau.finish()
    np.testing.assert_array_equal(first.U, [[1, 0, 0, 1, 0], [0, 1, 3, 0, 0], [0, 0, 1, 0, 0]])
    np.testing.assert_array_equal(second.U, [[1, 2, 0, 0, 0], [0, 1, 0, 0, 0], [0, 0, 0, 1, 0]])
    assert (second.index, second.timestep, second.c_in) == (1, 1.0, 0.5)


def test_a_step_without_finite_coefficients_is_refused():
    tableau = Tableau("x")
    x, *_ = tableau.unit_vectors()
    for arguments in ({"x": np.full_like(x, np.inf)}, {"x": x, "c_in": np.nan}):
        with pytest.raises(ValueError, match="no finite coefficients"):
            tableau.step(5.0, (1.0, 0.0), **arguments)
    with pytest.raises(KeyError, match="y"):
        tableau.step(5.0, (1.0, 0.0), y=x)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("euler", {"use_karras_sigmas": True, "sigma_min": -1.0}, "sigma_min > 0"),
        (
            "dpmpp_2m",
            {"use_karras_sigmas": True, "sigma_min": 20.0, "sigma_max": 0.1},
            "sigma_max down to sigma_min",
        ),
        ("euler", {"timestep_spacing": "leading", "steps_offset": 5000}, "steps_offset"),
        ("dpmpp_2m", {"timestep_spacing": "leading", "steps_offset": 5000}, "steps_offset"),
        ("unipc", {"disable_corrector": ["a"]}, "disable_corrector"),
    ],
)
def test_options_out_of_range_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        make_plan(name, NoiseSchedule.from_diffusers({}), 5, **options)


@pytest.mark.parametrize(
    "config",
    [
        {"beta_start": "x"},
        {"num_train_timesteps": "1000"},
        {"trained_betas": "no"},
        {"rescale_betas_zero_snr": "false"},
    ],
)
def test_config_values_of_a_wrong_type_are_refused_by_name(config):
    with pytest.raises(ValueError, match=next(iter(config))):
        NoiseSchedule.from_diffusers(config)

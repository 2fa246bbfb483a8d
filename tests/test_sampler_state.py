"""Global state of torch and numpy changes no plan and no image; a run overwrites nothing that a caller holds."""

import contextlib

import numpy as np
import pytest
import torch

from ldmperf.kernels import philox_normal, seed_tensor
from ldmperf.samplers import SAMPLERS, GraphedSampler, NoiseSchedule, initial_noise, make_plan, sample

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
CONFIGS = [
    SD,
    {"beta_schedule": "linear", "num_train_timesteps": 50, "trained_betas": None},
    {"beta_schedule": "squaredcos_cap_v2", "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
    {"trained_betas": [0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07]},
]
OPTIONS = [{}, {"use_karras_sigmas": True}, {"use_beta_sigmas": True}, {"interpolation_type": "log_linear"}]
SHAPE = (4, 3, 5)


def network(x, step):
    return torch.tanh(x)


def runs(run_again):
    """The tensors that a user gets: noise, results of both loops, the latents of a callback."""
    made = [
        initial_noise([1, 2**63], SHAPE),
        initial_noise(torch.tensor([1, 2], device="cpu"), SHAPE, dtype=torch.bfloat16),
    ]
    schedule = NoiseSchedule.from_diffusers(SD)
    sampler = GraphedSampler(lambda x, _, step: torch.tanh(x), graphs=run_again)
    for name in ("ddpm", "unipc"):
        plan = make_plan(name, schedule, 4)
        for noise in (made[0], made[0].double()):
            options = {"seeds": [1, 2], "guidance_scale": 2.0, "callback": lambda step, x: made.append(x)}
            made.append(sample(network, plan, noise, input_dtype=torch.bfloat16, **options))
            made.append(sampler((), plan, noise, **options))
    return made


def numbers():
    """Every plan and schedule and the noise of a step, as bytes; refusals as their text."""
    found = [philox_normal(seed_tensor([3], "cpu"), SHAPE, 5, 1).numpy().tobytes()]
    for config in CONFIGS:
        schedule = NoiseSchedule.from_diffusers(config)
        found += [schedule.alphas_cumprod.tobytes(), schedule.sigmas.tobytes()]
        for name in SAMPLERS:
            for options in OPTIONS:
                try:
                    plan = make_plan(name, schedule, 5, **options)
                except ValueError as refusal:
                    found.append(str(refusal))
                    continue
                arrays = (plan.table, plan.input_scales, plan.timesteps, np.array(plan.init_noise_sigma))
                found += [array.tobytes() for array in arrays]
    return found


@contextlib.contextmanager
def setting(change, value, back):
    change(value)
    try:
        yield
    finally:
        change(back)


STATES = {
    "default device": lambda: setting(torch.set_default_device, "meta", None),
    "device context": lambda: torch.device("meta"),
    "default dtype float64": lambda: setting(torch.set_default_dtype, torch.float64, torch.float32),
    "default dtype bfloat16": lambda: setting(torch.set_default_dtype, torch.bfloat16, torch.float32),
    "inference mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "deterministic": lambda: setting(torch.use_deterministic_algorithms, True, False),
    "matmul precision": lambda: setting(torch.set_float32_matmul_precision, "medium", "highest"),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "threads": lambda: setting(torch.set_num_threads, 3, torch.get_num_threads()),
    "seed": lambda: setting(torch.manual_seed, 3, 0),
    "numpy raises": lambda: np.errstate(all="raise"),
}


@pytest.fixture(scope="module")
def expected(run_again):
    return numbers(), runs(run_again)


@pytest.mark.parametrize("state", STATES)
def test_global_state_changes_no_plan_and_no_image(state, expected, run_again):
    with STATES[state]():
        planned, made = numbers(), runs(run_again)
    assert planned == expected[0]
    assert len(made) == len(expected[1])
    for value, other in zip(made, expected[1], strict=True):
        assert value.dtype == other.dtype
        assert value.device.type == "cpu"
        assert torch.equal(value, other)
        # Made in inference mode it can be used in autograd, and written to, outside it.
        weight = torch.ones((), requires_grad=True)
        (weight * value.float()).sum().backward()
        assert weight.grad.isfinite()
        value.zero_()


def test_the_callers_modes_reach_denoise_and_are_his_again():
    plan = make_plan("ddim", NoiseSchedule.from_diffusers(SD), 2)
    seen = []

    def denoise(x, step):
        seen.append((torch.is_inference_mode_enabled(), torch.is_grad_enabled()))
        return x

    noise = initial_noise([1], SHAPE)
    sample(denoise, plan, noise)
    with torch.inference_mode():
        sample(denoise, plan, noise)
        assert torch.is_inference_mode_enabled()
    assert seen == [(False, False)] * 2 + [(True, False)] * 2
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()


class Held:
    """Tensors and arrays that a caller keeps, with their values when he last looked."""

    def __init__(self):
        self.values = []

    def keep(self, value):
        self.values.append((value, value.clone() if isinstance(value, torch.Tensor) else value.copy()))
        return value

    def assert_unchanged(self):
        for value, before in self.values:
            assert np.array_equal(np.asarray(value), np.asarray(before))


@pytest.mark.parametrize(("channels_last", "guidance_scale"), [(False, None), (True, 4.0)])
@pytest.mark.parametrize("name", SAMPLERS)
def test_nothing_that_a_caller_holds_is_overwritten(name, channels_last, guidance_scale, run_again):
    """Noise, conditioning, step noise, seeds, guidance, outputs, callbacks' latents and earlier results."""
    held = Held()
    plan = make_plan(name, NoiseSchedule.from_diffusers(SD), 5)
    noise = initial_noise([1, 2], SHAPE)
    noise = held.keep(noise.to(memory_format=torch.channels_last) if channels_last else noise)
    injected = [held.keep(torch.full_like(noise, 0.1 * k)) for k in range(len(plan.steps))]
    seeds = held.keep(torch.tensor([5, 6]))
    scales = None if guidance_scale is None else held.keep(torch.full((len(plan.steps),), guidance_scale))
    conditioning = held.keep(torch.tensor(0.25))

    def denoise(x, condition, step):
        return held.keep(torch.tanh(x + condition))

    sampler = GraphedSampler(denoise, graphs=run_again)
    options = {"guidance_scale": scales, "callback": lambda step, x: held.keep(x)}
    for _ in range(2):
        for source in ({"seeds": seeds}, {"step_noise": lambda k: injected[k]}):
            held.keep(sample(lambda x, step: denoise(x, conditioning, step), plan, noise, **options, **source))
            held.keep(sampler(conditioning, plan, noise, **options, **source))
    held.keep(sampler(torch.tensor(0.5), plan, torch.zeros_like(noise), seeds=[7, 8], guidance_scale=scales))
    held.assert_unchanged()


def test_a_network_may_return_the_noise_or_what_it_closes_over(run_again):
    """The update reads the output: it is no buffer of ours."""
    held = Held()
    plan = make_plan("dpmpp_2m", NoiseSchedule.from_diffusers(SD), 3)
    noise = held.keep(initial_noise([1, 2], SHAPE))
    sample(lambda x, step: noise, plan, noise)
    GraphedSampler(lambda x, kept, step: noise, graphs=run_again)((noise,), plan, noise)
    held.assert_unchanged()


def test_what_a_plan_was_made_of_may_change_after():
    config = {"trained_betas": np.linspace(0.01, 0.02, 20), "disable_corrector": [0], "solver_order": 3}
    schedule = NoiseSchedule.from_diffusers(config)
    disabled = [0, 1]
    plan = make_plan("unipc", schedule, 5, disable_corrector=disabled)
    table, inherited = plan.table.copy(), make_plan("unipc", schedule, 5).table
    config["trained_betas"][:] = 0.5
    config["disable_corrector"].append(2)
    disabled.append(3)
    assert plan.options["disable_corrector"] == (0, 1)
    assert schedule.options["disable_corrector"] == (0,)
    np.testing.assert_array_equal(make_plan("unipc", schedule, 5).table, inherited)
    np.testing.assert_array_equal(plan.table, table)


def test_no_array_of_a_plan_can_be_written():
    plan = make_plan("pndm", NoiseSchedule.from_diffusers(SD), 5)
    for array in (plan.table, plan.steps[2].U, plan.schedule.alphas_cumprod, plan.schedule.sigmas):
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 0.0
    # These are the caller's own.
    plan.timesteps[:] = 0.0
    plan.input_scales[:] = 0.0
    assert plan.timesteps[0] == plan.steps[0].timestep > 0
    assert (plan.input_scales == 1.0).all()


def test_a_conditioning_may_have_no_tensors(run_again):
    plan = make_plan("ddim", NoiseSchedule.from_diffusers(SD), 3)
    sampler = GraphedSampler(lambda x, _, step: torch.tanh(x), graphs=run_again)
    for seed in (1, 2):
        noise = initial_noise([seed], SHAPE)
        for empty in (None, (), {}):
            assert torch.equal(sampler(empty, plan, noise), sample(network, plan, noise))

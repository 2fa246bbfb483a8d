"""Every plan against diffusers' scheduler of the same name: timesteps, input scales and final latents.

The oracle runs as a pipeline runs it, on a nonlinear denoiser and float64 latents, twice:
- with the scheduler's coefficients widened to float64 (`in_float64`): its formulas to 1e-9, so nothing hides
  behind rounding;
- as it is. There diffusers rounds every coefficient to float32, which costs up to 2e-6. DDPM, LCM and Heun
  subtract such numbers, and DPM multistep and Euler keep the latents in float32: 1e-5. Configurations marked
  ill_conditioned amplify that rounding further, by sigma_max / sigma_min: only the first comparison holds.
"""

import contextlib
import importlib
import itertools
import warnings

import numpy as np
import pytest
import torch

from ldmperf.samplers import DIFFUSERS_CLASSES, NoiseSchedule, make_plan, sample

diffusers = pytest.importorskip("diffusers")

TOLERANCE = 2e-6
FLOAT32_TOLERANCE = 1e-5
FLOAT64_TOLERANCE = 1e-9
IN_FLOAT32 = ("dpmpp_2m", "euler", "euler_a", "ddpm", "lcm", "heun")
SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
CLIPS = ("ddim", "ddpm")

SHAPE = (2, 3, 4, 5)
NOISE = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).double()
STEP_NOISE = torch.randn((120, *SHAPE), generator=torch.Generator().manual_seed(1)).double()


def network(x: torch.Tensor, timestep: float) -> torch.Tensor:
    """Smooth, nonlinear in x, different at every timestep and for every image of the batch."""
    image = torch.arange(x.shape[0], dtype=torch.float64).reshape(-1, 1, 1, 1)
    return 0.8 * torch.tanh(x + 0.1 * image) + 0.2 * torch.sin(x + 0.003 * timestep + image)


def scheduler_of(name, **config):
    cls = getattr(diffusers, DIFFUSERS_CLASSES[name])
    if name in CLIPS:
        config.setdefault("clip_sample", False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return cls(**config)


class Float64Torch:
    """The torch module, except that float32 is float64."""

    float32 = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


@contextlib.contextmanager
def in_float64(scheduler, monkeypatch):
    """Widen a scheduler whose levels are set: from the same float32 levels it computes in float64."""
    for name in ("sigmas", "alphas_cumprod", "final_alpha_cumprod"):
        if hasattr(scheduler, name):
            setattr(scheduler, name, getattr(scheduler, name).double())
    monkeypatch.setattr(module_of(scheduler), "torch", Float64Torch())
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def module_of(scheduler):
    return importlib.import_module(type(scheduler).__module__)


def run_diffusers(scheduler, num_steps, monkeypatch, guidance_scale=1.0, widen=False, **step_options):
    """(timesteps, input scales, latents) of the loop in diffusers' pipelines."""
    clock = {"step": 0}
    scheduler.set_timesteps(num_steps)
    if hasattr(scheduler, "set_begin_index"):
        # Otherwise a first timestep that occurs twice makes diffusers begin at the second.
        scheduler.set_begin_index(0)
    copies = 1 if guidance_scale == 1.0 else 2
    scales = []
    with monkeypatch.context() as patch, contextlib.ExitStack() as stack:
        if hasattr(module_of(scheduler), "randn_tensor"):
            patch.setattr(module_of(scheduler), "randn_tensor", lambda *_, **__: STEP_NOISE[clock["step"]])
        if widen:
            stack.enter_context(in_float64(scheduler, patch))
        x = NOISE * scheduler.init_noise_sigma
        for clock["step"], timestep in enumerate(scheduler.timesteps):
            model_input = scheduler.scale_model_input(torch.cat([x] * copies), timestep)
            scales.append(float(scheduler.scale_model_input(torch.ones(1, dtype=torch.float64), timestep)))
            output = network(model_input, float(timestep))
            if copies == 2:
                uncond, cond = output.chunk(2)
                output = uncond + guidance_scale * (cond - uncond)
            x = scheduler.step(output, timestep, x, **step_options).prev_sample
    return scheduler.timesteps.double().numpy(), np.array(scales), x


def run_ours(plan, guidance_scale=1.0):
    return sample(
        lambda x, step: network(x, step.timestep),
        plan,
        NOISE,
        guidance_scale=guidance_scale,
        step_noise=lambda k: STEP_NOISE[k],
    )


def relative_error(value, expected):
    return float((value - expected).norm() / expected.norm())


def check(name, num_steps, monkeypatch, **arguments):
    """One configuration, given to us as the config that diffusers itself would save."""
    of_config = {key: arguments.pop(key) for key in tuple(arguments) if key not in CHECK_ARGUMENTS}
    saved = {**scheduler_of(name, **of_config).config, "_class_name": DIFFUSERS_CLASSES[name]}
    compare(name, num_steps, monkeypatch, lambda: scheduler_of(name, **of_config), saved, **arguments)


CHECK_ARGUMENTS = ("guidance_scale", "ill_conditioned", "eta")


def compare(
    name, num_steps, monkeypatch, make_scheduler, config, *, guidance_scale=1.0, ill_conditioned=False, eta=None
):
    """Our plan from `config` against the scheduler, in float64 and as it is."""
    scheduler = make_scheduler()
    schedule = NoiseSchedule.from_diffusers(config)
    ours = {} if eta is None else {"eta": eta}
    plan = make_plan(name, schedule, num_steps, **ours)
    latents = run_ours(plan, guidance_scale)
    what = f"{name} num_steps={num_steps} guidance_scale={guidance_scale} eta={eta} {config}"

    timesteps, scales, expected = run_diffusers(
        scheduler, num_steps, monkeypatch, guidance_scale, widen=True, **ours
    )
    assert torch.isfinite(expected).all(), f"diffusers itself is not finite: {what}"
    np.testing.assert_array_equal(plan.timesteps, timesteps, err_msg=what)
    np.testing.assert_allclose(plan.input_scales, scales, rtol=1e-12, err_msg=what)
    np.testing.assert_allclose(plan.init_noise_sigma, float(scheduler.init_noise_sigma), rtol=1e-12, err_msg=what)
    error = relative_error(latents, expected)
    record(f"{name} float64", error)
    assert error <= FLOAT64_TOLERANCE, f"{what}: relative error {error:.2e} in float64"

    scheduler = make_scheduler()
    _, _, expected = run_diffusers(scheduler, num_steps, monkeypatch, guidance_scale, **ours)
    error = relative_error(latents, expected)
    record(f"{name} ill-conditioned" if ill_conditioned else name, error)
    limit = FLOAT32_TOLERANCE if name in IN_FLOAT32 else TOLERANCE
    assert error <= limit or ill_conditioned, f"{what}: relative error {error:.2e}"


WORST: dict[str, float] = {}


def record(key, error):
    WORST[key] = max(WORST.get(key, 0.0), error)


@pytest.fixture(scope="module", autouse=True)
def worst_errors():
    """The worst error of every sampler, at the end of a run with -s."""
    yield
    print("\n" + "\n".join(f"{key:28} {error:.1e}" for key, error in sorted(WORST.items())))


PREDICTIONS = ("epsilon", "sample", "v_prediction")
SPACINGS = ("leading", "linspace", "trailing")


def few_heun_steps(name, num_steps, prediction_type):
    """The second slope divides by sigma_min what a step of the length of sigma_max has rounded."""
    return name == "heun" and num_steps == 2 and prediction_type == "sample"


def predictions_of(name):
    """diffusers' PNDM and ancestral Euler have no "sample" prediction."""
    return [p for p in PREDICTIONS if p != "sample" or name not in ("pndm", "euler_a")]


@pytest.mark.parametrize("name", DIFFUSERS_CLASSES)
@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 7, 14, 15, 50])
def test_steps_and_predictions(name, num_steps, monkeypatch):
    extra = {"skip_prk_steps": True} if name == "pndm" and num_steps < 4 else {}
    for prediction_type in predictions_of(name):
        check(
            name,
            num_steps,
            monkeypatch,
            prediction_type=prediction_type,
            ill_conditioned=few_heun_steps(name, num_steps, prediction_type),
            **SD_BETAS,
            **extra,
        )


@pytest.mark.parametrize("name", [name for name in DIFFUSERS_CLASSES if name not in ("dpmpp_2s", "lcm")])
def test_spacings_and_offsets(name, monkeypatch):
    for spacing, offset, num_steps in itertools.product(SPACINGS, (0, 1), (6, 13)):
        check(name, num_steps, monkeypatch, timestep_spacing=spacing, steps_offset=offset, **SD_BETAS)


@pytest.mark.parametrize("name", DIFFUSERS_CLASSES)
def test_beta_schedules(name, monkeypatch):
    betas = np.linspace(1e-3, 1.5e-2, 500) ** 1.1
    for config in (
        {},
        {"beta_schedule": "linear", "beta_start": 2e-4, "beta_end": 0.015, "num_train_timesteps": 777},
        {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"},
        {"trained_betas": betas.tolist(), "num_train_timesteps": 500},
    ):
        # The cosine schedule begins at sigma_max = 2e4, where float32 steps are rounded to 1e-3.
        ill_conditioned = config.get("beta_schedule") == "squaredcos_cap_v2" and name in ("euler", "heun")
        check(name, 12, monkeypatch, ill_conditioned=ill_conditioned, **config)


@pytest.mark.parametrize("name", DIFFUSERS_CLASSES)
@pytest.mark.filterwarnings("ignore:guidance_scale=0")
@pytest.mark.parametrize("guidance_scale", [0.0, 3.0, 7.5])
def test_guidance(name, guidance_scale, monkeypatch):
    for prediction_type in predictions_of(name):
        check(name, 11, monkeypatch, guidance_scale=guidance_scale, prediction_type=prediction_type, **SD_BETAS)


@pytest.mark.parametrize("name", ["ddim", "ddpm", "dpmpp_2m", "unipc", "euler", "euler_a", "lcm"])
def test_zero_terminal_snr(name, monkeypatch):
    extra = {} if name == "lcm" else {"timestep_spacing": "trailing"}
    for num_steps in (1, 2, 10, 25):
        check(
            name,
            num_steps,
            monkeypatch,
            ill_conditioned=name in ("euler", "euler_a"),
            rescale_betas_zero_snr=True,
            prediction_type="v_prediction",
            **SD_BETAS,
            **extra,
        )


RAMPS = ("use_karras_sigmas", "use_exponential_sigmas")


@pytest.mark.parametrize("name", ["dpmpp_2m", "dpmpp_2s", "unipc", "euler", "heun"])
@pytest.mark.parametrize("ramp", RAMPS)
def test_ramps(name, ramp, monkeypatch):
    for num_steps, prediction_type in itertools.product((1, 2, 5, 16, 50), PREDICTIONS):
        check(
            name,
            num_steps,
            monkeypatch,
            prediction_type=prediction_type,
            ill_conditioned=few_heun_steps(name, num_steps, prediction_type),
            **{ramp: True},
            **SD_BETAS,
        )
    cosine = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction", ramp: True}
    check(name, 9, monkeypatch, ill_conditioned=name in ("euler", "heun"), **cosine)


@pytest.mark.parametrize("name", ["dpmpp_2m", "dpmpp_2s", "unipc", "euler"])
def test_beta_ramp(name, monkeypatch):
    """diffusers takes the quantile from scipy, which is not installed here: mpmath stands in."""
    mpmath = pytest.importorskip("mpmath")

    class Beta:
        @staticmethod
        def ppf(probability, a, b):
            if probability in (0.0, 1.0):
                return float(probability)
            residual = lambda x: mpmath.betainc(a, b, 0, x, regularized=True) - probability  # noqa: E731
            return float(mpmath.findroot(residual, (0.0, 1.0), solver="anderson", tol=1e-25))

    class Scipy:
        class stats:  # noqa: N801
            beta = Beta

    module = importlib.import_module(getattr(diffusers, DIFFUSERS_CLASSES[name]).__module__)
    monkeypatch.setattr(module, "scipy", Scipy, raising=False)
    monkeypatch.setattr(module, "is_scipy_available", lambda: True)
    for num_steps in (2, 9):
        check(name, num_steps, monkeypatch, use_beta_sigmas=True, **SD_BETAS)


def test_ddim_eta_and_final_alpha(monkeypatch):
    for eta, to_one, spacing in itertools.product((0.0, 0.4, 1.0), (True, False), SPACINGS):
        for num_steps in (1, 10):
            check(
                "ddim",
                num_steps,
                monkeypatch,
                eta=eta,
                set_alpha_to_one=to_one,
                timestep_spacing=spacing,
                **SD_BETAS,
            )


def test_ddpm_variances(monkeypatch):
    for variance_type, num_steps, offset in itertools.product(
        ("fixed_small", "fixed_small_log", "fixed_large"), (1, 8, 20), (0, 1)
    ):
        check("ddpm", num_steps, monkeypatch, variance_type=variance_type, steps_offset=offset, **SD_BETAS)


DPM_TYPES = ("dpmsolver++", "sde-dpmsolver++", "dpmsolver", "sde-dpmsolver")


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("algorithm_type", DPM_TYPES)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_dpm_multistep(order, algorithm_type, monkeypatch):
    if (order, algorithm_type) == (3, "sde-dpmsolver"):
        pytest.skip("diffusers has no third order of sde-dpmsolver; refused, see test_plan.py")
    finals = ("zero", "sigma_min") if algorithm_type.endswith("++") else ("sigma_min",)
    for solver_type, final, lower, num_steps in itertools.product(
        ("midpoint", "heun"), finals, (True, False), (3, 14, 15)
    ):
        check(
            "dpmpp_2m",
            num_steps,
            monkeypatch,
            solver_order=order,
            algorithm_type=algorithm_type,
            solver_type=solver_type,
            final_sigmas_type=final,
            lower_order_final=lower,
            **SD_BETAS,
        )
    check("dpmpp_2m", 18, monkeypatch, solver_order=order, algorithm_type=algorithm_type, euler_at_final=True,
          final_sigmas_type="sigma_min", timestep_spacing="trailing", **SD_BETAS)  # fmt: skip


def test_dpm_lambda_min_clipped(monkeypatch):
    for name, lambda_min in itertools.product(("dpmpp_2m", "dpmpp_2s"), (-5.1, -2.0)):
        check(name, 10, monkeypatch, beta_schedule="squaredcos_cap_v2", lambda_min_clipped=lambda_min)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("algorithm_type", ["dpmsolver++", "sde-dpmsolver++", "dpmsolver"])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_dpm_singlestep(order, algorithm_type, monkeypatch):
    finals = ("zero", "sigma_min") if algorithm_type.endswith("++") else ("sigma_min",)
    for solver_type, final, lower, num_steps in itertools.product(
        ("midpoint", "heun"), finals, (True, False), (1, 2, 3, 4, 5, 12, 20)
    ):
        check(
            "dpmpp_2s",
            num_steps,
            monkeypatch,
            # Its D2 has a weight that does not vanish with h, on second differences of float32 coefficients.
            ill_conditioned=(order, algorithm_type) == (3, "sde-dpmsolver++"),
            solver_order=order,
            algorithm_type=algorithm_type,
            solver_type=solver_type,
            final_sigmas_type=final,
            lower_order_final=lower,
            **SD_BETAS,
        )


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("solver_type", ["bh1", "bh2"])
def test_unipc(order, solver_type, monkeypatch):
    for final, lower, disabled, num_steps in itertools.product(
        ("zero", "sigma_min"), (True, False), ([], [0, 2]), (3, 8, 16)
    ):
        if final == "zero" and (not lower or solver_type == "bh1"):
            # diffusers is NaN there; ours is refused or, at bh1, is the limit: see test_plan.py.
            continue
        for predict_x0 in (True, False) if final == "sigma_min" else (True,):
            check(
                "unipc",
                num_steps,
                monkeypatch,
                solver_order=order,
                solver_type=solver_type,
                final_sigmas_type=final,
                lower_order_final=lower,
                disable_corrector=disabled,
                predict_x0=predict_x0,
                **SD_BETAS,
            )


@pytest.mark.parametrize("ramp", RAMPS)
def test_final_sigma_of_a_ramp(ramp, monkeypatch):
    """ "sigma_min" is the ramp's last level in UniPC, the schedule's first in the others."""
    config = {ramp: True, "final_sigmas_type": "sigma_min", **SD_BETAS}
    check("unipc", 8, monkeypatch, sigma_min=0.06, sigma_max=11.0, **config)
    check("dpmpp_2m", 8, monkeypatch, **config)
    check("euler", 8, monkeypatch, sigma_min=0.06, sigma_max=11.0, **config)


def test_euler_options(monkeypatch):
    for final, interpolation, ramp, spacing in itertools.product(
        ("zero", "sigma_min"), ("linear", "log_linear"), ({}, {"use_karras_sigmas": True}), SPACINGS
    ):
        check(
            "euler",
            10,
            monkeypatch,
            final_sigmas_type=final,
            interpolation_type=interpolation,
            timestep_spacing=spacing,
            **ramp,
            **SD_BETAS,
        )
    check("euler", 10, monkeypatch, use_karras_sigmas=True, sigma_min=0.05, sigma_max=9.0, **SD_BETAS)


def test_lcm_options(monkeypatch):
    for num_steps, original, scaling in itertools.product((1, 2, 4, 8), (50, 20), (10.0, 0.01)):
        check("lcm", num_steps, monkeypatch, original_inference_steps=original, timestep_scaling=scaling)


def test_pndm_options(monkeypatch):
    for skip, to_one, spacing, num_steps in itertools.product(
        (True, False), (True, False), SPACINGS, (1, 2, 3, 4, 5, 10)
    ):
        if skip or num_steps > 3:
            check(
                "pndm",
                num_steps,
                monkeypatch,
                skip_prk_steps=skip,
                set_alpha_to_one=to_one,
                timestep_spacing=spacing,
                **SD_BETAS,
            )


SD15 = {
    "_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0", "beta_end": 0.012,
    "beta_schedule": "scaled_linear", "beta_start": 0.00085, "num_train_timesteps": 1000,
    "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1, "trained_betas": None,
    "clip_sample": False,
}  # fmt: skip
SD21 = {
    "_class_name": "DDIMScheduler", "_diffusers_version": "0.8.0", "beta_end": 0.012,
    "beta_schedule": "scaled_linear", "beta_start": 0.00085, "clip_sample": False, "num_train_timesteps": 1000,
    "prediction_type": "v_prediction", "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1,
    "trained_betas": None,
}  # fmt: skip
SD_TURBO = {
    "_class_name": "EulerDiscreteScheduler", "_diffusers_version": "0.24.0.dev0", "beta_end": 0.012,
    "beta_schedule": "scaled_linear", "beta_start": 0.00085, "clip_sample": False,
    "interpolation_type": "linear",
    "num_train_timesteps": 1000, "prediction_type": "epsilon", "sample_max_value": 1.0, "set_alpha_to_one": False,
    "skip_prk_steps": True, "steps_offset": 1, "timestep_spacing": "trailing", "timestep_type": "discrete",
    "trained_betas": None, "use_karras_sigmas": False,
}  # fmt: skip
UNIPC = {
    "_class_name": "UniPCMultistepScheduler", "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "beta_start": 0.00085, "disable_corrector": [0], "lower_order_final": True, "num_train_timesteps": 1000,
    "predict_x0": True, "prediction_type": "epsilon", "sample_max_value": 1.0, "solver_order": 3, "solver_p": None,
    "solver_type": "bh2", "thresholding": False, "dynamic_thresholding_ratio": 0.995, "trained_betas": None,
    "clip_sample": False,
}  # fmt: skip
SDXL = {**SD_TURBO, "_diffusers_version": "0.19.0.dev0", "timestep_spacing": "leading"}
SDXL_TURBO = {**SD_TURBO, "_class_name": "EulerAncestralDiscreteScheduler"}
LCM_DREAMSHAPER = {
    "_class_name": "LCMScheduler", "_diffusers_version": "0.22.0.dev0", "beta_end": 0.012,
    "beta_schedule": "scaled_linear", "beta_start": 0.00085, "clip_sample": False, "clip_sample_range": 1.0,
    "dynamic_thresholding_ratio": 0.995, "num_train_timesteps": 1000, "original_inference_steps": 50,
    "prediction_type": "epsilon", "rescale_betas_zero_snr": False, "sample_max_value": 1.0,
    "set_alpha_to_one": True, "steps_offset": 0, "thresholding": False, "timestep_scaling": 10.0,
    "timestep_spacing": "leading", "trained_betas": None,
}  # fmt: skip
CONFIGS = {
    "SD1.5": SD15, "SD2.1": SD21, "sd-turbo": SD_TURBO, "SDXL": SDXL, "SDXL-turbo": SDXL_TURBO,
    "LCM": LCM_DREAMSHAPER, "unipc": UNIPC,
}  # fmt: skip


@pytest.mark.parametrize("name", DIFFUSERS_CLASSES)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_scheduler_configs(name, config, monkeypatch):
    """A model's scheduler_config.json read by every sampler, as `from_config` lets another class read it."""
    cls = getattr(diffusers, DIFFUSERS_CLASSES[name])
    for num_steps in (1, 4, 25):
        if name != "pndm" or num_steps >= 4 or config.get("skip_prk_steps"):
            compare(name, num_steps, monkeypatch, lambda: cls.from_config(config), config, guidance_scale=5.0)


@pytest.mark.parametrize("name", DIFFUSERS_CLASSES)
@pytest.mark.parametrize("source", DIFFUSERS_CLASSES)
def test_the_config_of_a_scheduler_in_memory(name, source, monkeypatch):
    """`Euler.from_config(pipe.scheduler.config)`: what was only a default of the first class is not inherited."""
    cls = getattr(diffusers, DIFFUSERS_CLASSES[name])
    config = scheduler_of(source, **SD_BETAS).config
    # Without a word about clipping there is none here.
    clip = {"clip_sample": False} if name in CLIPS else {}
    compare(name, 6, monkeypatch, lambda: cls.from_config(config, **clip), config)

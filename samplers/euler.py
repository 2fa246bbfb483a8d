"""Euler's method on the probability-flow ODE in sigma = sigma_t / alpha_t, plain and ancestral.

The register holds x / alpha = x_0 + sigma eps, so the network sees c_in x with c_in = 1 / sqrt(sigma^2 + 1), and
dx / dsigma = (x - x_0) / sigma. Karras et al., arXiv 2206.00364, equation 1 and algorithm 2 (no churn).
"""

import math

import numpy as np
import torch

from .schedule import FloatArray, NoiseSchedule
from .spacing import FINAL_SIGMAS, choose_ramp, euler_levels, init_noise_sigma, spaced_timesteps
from .step import Tableau, choose, predict


def euler(
    schedule: NoiseSchedule,
    num_steps: int,
    *,
    use_karras_sigmas: bool = False,
    use_exponential_sigmas: bool = False,
    use_beta_sigmas: bool = False,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    final_sigmas_type: str = "zero",
    interpolation_type: str = "linear",
    timestep_type: str = "discrete",
    timestep_spacing: str = "linspace",
    steps_offset: int = 0,
) -> Tableau:
    """Options and defaults of diffusers' EulerDiscreteScheduler.

    timestep_type "continuous" tells a v_prediction network log(sigma) / 4 and changes nothing otherwise.
    """
    choose("final_sigmas_type", final_sigmas_type, FINAL_SIGMAS)
    choose("interpolation_type", interpolation_type, ("linear", "log_linear"))
    choose("timestep_type", timestep_type, ("discrete", "continuous"))
    ramp = choose_ramp(
        use_karras_sigmas=use_karras_sigmas,
        use_exponential_sigmas=use_exponential_sigmas,
        use_beta_sigmas=use_beta_sigmas,
    )
    timesteps = _timesteps(schedule, num_steps, timestep_spacing, steps_offset)
    log_levels = _log_linear_levels(schedule, num_steps)
    if interpolation_type == "log_linear":
        sigma_max = float(log_levels[0]) if sigma_max is None else sigma_max
        sigma_min = float(log_levels[-1]) if sigma_min is None else sigma_min
    timesteps, sigmas = euler_levels(schedule, timesteps, ramp, sigma_min=sigma_min, sigma_max=sigma_max)
    sigmas = np.append(sigmas, schedule.sigmas[0] if final_sigmas_type == "sigma_min" else 0.0)
    if interpolation_type == "log_linear" and ramp is None:
        # These end at the cleanest training level: final_sigmas_type plays no part.
        sigmas = log_levels
    if timestep_type == "continuous" and schedule.prediction_type == "v_prediction":
        timesteps = 0.25 * np.log(sigmas[:num_steps])
    tableau = Tableau("x", init_noise_sigma=init_noise_sigma(sigmas, timestep_spacing))
    x, output, _ = tableau.unit_vectors()
    for index, timestep in enumerate(timesteps):
        sigma, sigma_next = sigmas[index], sigmas[index + 1]
        c_in, derivative = derivative_at(schedule, x, output, sigma)
        tableau.step(timestep, c_in=c_in, x=x + (sigma_next - sigma) * derivative)
    return tableau


def euler_a(
    schedule: NoiseSchedule,
    num_steps: int,
    *,
    timestep_spacing: str = "linspace",
    steps_offset: int = 0,
) -> Tableau:
    """Ancestral: step down to sigma_down, then add noise of sigma_up, sigma_down^2 + sigma_up^2 = sigma_next^2.

    Options and defaults of diffusers' EulerAncestralDiscreteScheduler, which has no "sample" prediction; here it
    works as everywhere else. Source: k-diffusion's ancestral step, the posterior of DDPM at the noise level sigma.
    """
    timesteps, sigmas = euler_levels(schedule, _timesteps(schedule, num_steps, timestep_spacing, steps_offset))
    tableau = Tableau("x", init_noise_sigma=init_noise_sigma(sigmas, timestep_spacing))
    x, output, noise = tableau.unit_vectors()
    for timestep, sigma, sigma_next in zip(timesteps, sigmas, np.append(sigmas[1:], 0.0), strict=True):
        c_in, derivative = derivative_at(schedule, x, output, sigma)
        sigma_up = sigma_next * math.sqrt(max(1.0 - (sigma_next / sigma) ** 2, 0.0))
        sigma_down = sigma_next * sigma_next / sigma
        tableau.step(timestep, c_in=c_in, x=x + (sigma_down - sigma) * derivative + sigma_up * noise)
    return tableau


def derivative_at(
    schedule: NoiseSchedule, x: FloatArray, output: FloatArray, sigma: float
) -> tuple[float, FloatArray]:
    """(c_in, dx / dsigma) where the network has seen c_in x at noise level sigma."""
    c_in = 1.0 / math.hypot(sigma, 1.0)
    x0, _ = predict(schedule.prediction_type, c_in * x, output, c_in, c_in * sigma)
    return c_in, (x - x0) / sigma


def _timesteps(schedule: NoiseSchedule, num_steps: int, spacing: str, steps_offset: int) -> FloatArray:
    return spaced_timesteps(
        schedule.num_train_timesteps, num_steps, spacing, steps_offset=steps_offset, integer=False
    )


def _log_linear_levels(schedule: NoiseSchedule, num_steps: int) -> FloatArray:
    """[num_steps + 1] levels, geometric over the training range; float32 arithmetic, as in diffusers."""
    cleanest, *_, noisiest = np.log(schedule.sigmas.astype(np.float32)).tolist()
    levels: FloatArray = (
        torch.linspace(noisiest, cleanest, num_steps + 1, dtype=torch.float32, device="cpu").exp().double().numpy()
    )
    return levels

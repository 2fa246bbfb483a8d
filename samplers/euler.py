"""Euler's method on the probability-flow ODE in sigma = sigma_t / alpha_t, plain and ancestral.

The register holds x / alpha = x_0 + sigma eps, so the network sees c_in x with c_in = 1 / sqrt(sigma^2 + 1).
Karras et al., arXiv 2206.00364, equation 1 and algorithm 2 (no churn); k-diffusion's ancestral step:

    d      = dx / dsigma = (x - x_0) / sigma
    x_next = x + (sigma_next - sigma) d
    x_next = x + (sigma_down - sigma) d + sigma_up z      ancestral, with sigma_down = sigma_next^2 / sigma
                                                          and sigma_down^2 + sigma_up^2 = sigma_next^2
"""

import itertools
import math
from dataclasses import replace

import numpy as np
import torch

from .schedule import FloatArray, NoiseSchedule
from .spacing import LINSPACE, RAMPED_TO_FINAL, Spacing
from .step import Tableau, choose, predict


def derivative_at(
    schedule: NoiseSchedule, x: FloatArray, output: FloatArray, sigma: float
) -> tuple[float, FloatArray]:
    """(c_in, dx / dsigma) where the network has seen c_in x at noise level sigma."""
    c_in = 1.0 / math.hypot(sigma, 1.0)
    x0, _ = predict(schedule.prediction_type, c_in * x, output, c_in, c_in * sigma)
    return c_in, (x - x0) / sigma


def euler(
    schedule: NoiseSchedule,
    num_steps: int,
    begin: int = 0,
    *,
    interpolation_type: str = "linear",
    timestep_type: str = "discrete",
    spacing: Spacing = RAMPED_TO_FINAL,
) -> Tableau:
    """Options and defaults of diffusers' EulerDiscreteScheduler.

    timestep_type "continuous" tells a v_prediction network log(sigma) / 4 and changes nothing otherwise.
    """
    choose("interpolation_type", interpolation_type, ("linear", "log_linear"))
    choose("timestep_type", timestep_type, ("discrete", "continuous"))
    if interpolation_type == "log_linear":
        levels = _log_linear_levels(schedule, num_steps)
        top = float(levels[0]) if spacing.sigma_max is None else spacing.sigma_max
        bottom = float(levels[-1]) if spacing.sigma_min is None else spacing.sigma_min
        spacing = replace(spacing, sigma_max=top, sigma_min=bottom)
    timesteps, sigmas = spacing.euler_levels(schedule, num_steps)
    if interpolation_type == "log_linear" and spacing.ramp is None:
        # These end at the cleanest training level: final_sigmas_type plays no part.
        sigmas = levels
    if timestep_type == "continuous" and schedule.prediction_type == "v_prediction":
        timesteps = 0.25 * np.log(sigmas[:num_steps])
    tableau = Tableau("x", init_noise_sigma=spacing.init_noise_sigma(sigmas))
    x, output, _ = tableau.unit_vectors()
    moves = zip(timesteps, sigmas[:-1], sigmas[1:], strict=True)
    for timestep, sigma, sigma_next in itertools.islice(moves, begin, None):
        c_in, derivative = derivative_at(schedule, x, output, sigma)
        tableau.step(timestep, (1.0, sigma), c_in=c_in, x=x + (sigma_next - sigma) * derivative)
    return tableau


def euler_a(schedule: NoiseSchedule, num_steps: int, begin: int = 0, *, spacing: Spacing = LINSPACE) -> Tableau:
    """Ancestral: the posterior of DDPM at the noise level sigma.

    Options and defaults of diffusers' EulerAncestralDiscreteScheduler, which has no "sample" prediction; here it
    works as everywhere else.
    """
    timesteps, sigmas = spacing.euler_levels(schedule, num_steps)
    tableau = Tableau("x", init_noise_sigma=spacing.init_noise_sigma(sigmas))
    x, output, noise = tableau.unit_vectors()
    moves = zip(timesteps, sigmas[:-1], sigmas[1:], strict=True)
    for timestep, sigma, sigma_next in itertools.islice(moves, begin, None):
        c_in, derivative = derivative_at(schedule, x, output, sigma)
        sigma_up = sigma_next * math.sqrt(max(1.0 - (sigma_next / sigma) ** 2, 0.0))
        sigma_down = sigma_next * sigma_next / sigma
        tableau.step(timestep, (1.0, sigma), c_in=c_in, x=x + (sigma_down - sigma) * derivative + sigma_up * noise)
    return tableau


def _log_linear_levels(schedule: NoiseSchedule, num_steps: int) -> FloatArray:
    """[num_steps + 1] levels, geometric over the training range; float32 arithmetic, as in diffusers."""
    cleanest, *_, noisiest = np.log(schedule.sigmas.astype(np.float32)).tolist()
    levels: FloatArray = (
        torch.linspace(noisiest, cleanest, num_steps + 1, dtype=torch.float32, device="cpu").exp().double().numpy()
    )
    return levels

"""Multistep consistency sampling of a latent consistency model.

Luo et al., arXiv 2310.04378, equation 9 and algorithm 3; Song et al., arXiv 2303.01469, algorithm 1:

    f      = c_skip x + c_out x_0
    c_skip = sigma_data^2 / (s^2 + sigma_data^2),  c_out = s / sqrt(s^2 + sigma_data^2),  s = timestep_scaling t
    x_next = alpha_next f + sigma_next z; after the last step f
"""

import math

import numpy as np

from .schedule import NoiseSchedule, alpha_sigma
from .step import Tableau, predict
from .values import shown

# The standard deviation that the boundary condition's scalings assume of the data.
SIGMA_DATA = 0.5


def lcm(
    schedule: NoiseSchedule,
    num_steps: int,
    begin: int = 0,
    *,
    original_inference_steps: int = 50,
    timestep_scaling: float = 10.0,
) -> Tableau:
    """Options and defaults of diffusers' LCMScheduler; the timesteps are a subset of the distillation's own.

    Every step but the last noises the denoised sample again. Raises ValueError for more steps than
    original_inference_steps.
    """
    train_steps = schedule.num_train_timesteps
    if not num_steps <= original_inference_steps <= train_steps:
        raise ValueError(
            f"original_inference_steps={shown(original_inference_steps)} must lie between num_steps {num_steps} "
            f"and {train_steps} training timesteps"
        )
    schedule.refuse_zero_snr_epsilon("lcm")
    distilled = np.arange(original_inference_steps, 0, -1) * (train_steps // original_inference_steps) - 1
    chosen = np.linspace(0, original_inference_steps, num_steps, endpoint=False).astype(int)
    timesteps = distilled[chosen]
    tableau = Tableau("x")
    x, output, noise = tableau.unit_vectors()
    for index in range(begin, num_steps):
        timestep = timesteps[index]
        level = alpha_sigma(schedule.level(timestep))
        x0, _ = predict(schedule.prediction_type, x, output, *level)
        scaled = timestep * timestep_scaling
        c_skip = SIGMA_DATA**2 / (scaled**2 + SIGMA_DATA**2)
        c_out = scaled / math.hypot(scaled, SIGMA_DATA)
        denoised = c_out * x0 + c_skip * x
        if index + 1 < num_steps:
            alpha_next, sigma_next = alpha_sigma(schedule.level(timesteps[index + 1]))
            denoised = alpha_next * denoised + sigma_next * noise
        tableau.step(timestep, level, x=denoised)
    return tableau

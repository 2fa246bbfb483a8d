"""DDPM ancestral sampling.

Ho, Jain and Abbeel, arXiv 2006.11239, equations 6 and 7, with level = alpha^2:

    mean     = sqrt(level_next) beta / (1 - level) x_0 + sqrt(1 - beta) (1 - level_next) / (1 - level) x
    variance = (1 - level_next) / (1 - level) beta, or beta itself ("fixed_large"); beta = 1 - level / level_next
    x_next   = mean + sqrt(variance) z
"""

import math

import numpy as np

from .schedule import NoiseSchedule, alpha_sigma
from .spacing import LEADING, Spacing
from .step import Tableau, choose, predict

# The smallest variance of fixed_small, so that its logarithm exists.
MIN_VARIANCE = 1e-20


def ddpm(
    schedule: NoiseSchedule,
    num_steps: int,
    begin: int = 0,
    *,
    variance_type: str = "fixed_small",
    spacing: Spacing = LEADING,
) -> Tableau:
    """Options and defaults of diffusers' DDPMScheduler; noise at every timestep above 0.

    Refuses variance types that need a learned variance, and fixed_large_log, which is NaN in diffusers.
    """
    choose("variance_type", variance_type, ("fixed_small", "fixed_small_log", "fixed_large"))
    schedule.refuse_zero_snr_epsilon("ddpm")
    timesteps = spacing.timesteps(schedule, num_steps).astype(int)[begin:]
    tableau = Tableau("x")
    x, output, noise = tableau.unit_vectors()
    for timestep, following in zip(timesteps, np.append(timesteps[1:], -1), strict=True):
        level = schedule.level(timestep)
        level_next = schedule.level(following) if following >= 0 else 1.0
        beta = 1 - level / level_next
        x0, _ = predict(schedule.prediction_type, x, output, *alpha_sigma(level))
        mean = (
            math.sqrt(level_next) * beta / (1 - level) * x0
            + math.sqrt(1 - beta) * (1 - level_next) / (1 - level) * x
        )
        small = max((1 - level_next) / (1 - level) * beta, MIN_VARIANCE)
        variance = beta if variance_type == "fixed_large" else small
        tableau.step(timestep, alpha_sigma(level), x=mean + (math.sqrt(variance) * noise if timestep > 0 else 0.0))
    return tableau

"""Heun's second-order method in sigma. Karras et al., arXiv 2206.00364, algorithm 1."""

import numpy as np

from .euler import derivative_at
from .schedule import NoiseSchedule
from .spacing import choose_ramp, euler_levels, init_noise_sigma, spaced_timesteps
from .step import Tableau


def heun(
    schedule: NoiseSchedule,
    num_steps: int,
    *,
    use_karras_sigmas: bool = False,
    use_exponential_sigmas: bool = False,
    use_beta_sigmas: bool = False,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    timestep_spacing: str = "linspace",
    steps_offset: int = 0,
) -> Tableau:
    """2 num_steps - 1 model evaluations: the last step goes to sigma = 0 and is Euler's.

    Options and defaults of diffusers' HeunDiscreteScheduler.
    """
    schedule.refuse_zero_snr("heun")
    timesteps, sigmas = euler_levels(
        schedule,
        spaced_timesteps(
            schedule.num_train_timesteps,
            num_steps,
            timestep_spacing,
            steps_offset=steps_offset,
            integer=False,
        ),
        choose_ramp(
            use_karras_sigmas=use_karras_sigmas,
            use_exponential_sigmas=use_exponential_sigmas,
            use_beta_sigmas=use_beta_sigmas,
        ),
        sigma_min=sigma_min,
        sigma_max=sigma_max,
    )
    tableau = Tableau(
        "x", "start", "first_derivative", init_noise_sigma=init_noise_sigma(sigmas, timestep_spacing)
    )
    x, start, first_derivative, output, _ = tableau.unit_vectors()
    for index, sigma_next in enumerate(np.append(sigmas[1:], 0.0)):
        sigma = sigmas[index]
        c_in, derivative = derivative_at(schedule, x, output, sigma)
        euler = x + (sigma_next - sigma) * derivative
        tableau.step(timesteps[index], c_in=c_in, x=euler, start=x, first_derivative=derivative)
        if sigma_next > 0.0:
            c_in, derivative = derivative_at(schedule, x, output, sigma_next)
            mean = 0.5 * (first_derivative + derivative)
            tableau.step(timesteps[index + 1], c_in=c_in, x=start + (sigma_next - sigma) * mean)
    return tableau

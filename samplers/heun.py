"""Heun's second-order method in sigma.

Karras et al., arXiv 2206.00364, algorithm 1, with d = dx / dsigma:

    x_euler = x + (sigma_next - sigma) d(x, sigma)
    x_next  = x + (sigma_next - sigma) (d(x, sigma) + d(x_euler, sigma_next)) / 2
"""

from .euler import derivative_at
from .schedule import NoiseSchedule
from .spacing import RAMPED, Spacing
from .step import Tableau


def heun(schedule: NoiseSchedule, num_steps: int, begin: int = 0, *, spacing: Spacing = RAMPED) -> Tableau:
    """2 num_steps - 1 model evaluations: the last step goes to sigma = 0 and is Euler's.

    Options and defaults of diffusers' HeunDiscreteScheduler. Refuses to begin between a step's two evaluations.
    """
    if begin % 2 == 1:
        raise ValueError(f"heun evaluates the network twice per step: begin at an even evaluation, not {begin}")
    schedule.refuse_zero_snr("heun")
    timesteps, sigmas = spacing.euler_levels(schedule, num_steps)
    tableau = Tableau("x", "start", "d_start", init_noise_sigma=spacing.init_noise_sigma(sigmas))
    x, start, d_start, output, _ = tableau.unit_vectors()
    for index in range(begin // 2, num_steps):
        sigma, sigma_next = sigmas[index], sigmas[index + 1]
        c_in, d = derivative_at(schedule, x, output, sigma)
        euler = x + (sigma_next - sigma) * d
        tableau.step(timesteps[index], (1.0, sigma), c_in=c_in, x=euler, start=x, d_start=d)
        if sigma_next > 0.0:
            c_in, d = derivative_at(schedule, x, output, sigma_next)
            corrected = start + (sigma_next - sigma) * 0.5 * (d_start + d)
            tableau.step(timesteps[index + 1], (1.0, sigma_next), c_in=c_in, x=corrected)
    return tableau

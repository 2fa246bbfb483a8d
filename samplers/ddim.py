"""DDIM. Song, Meng and Ermon, arXiv 2010.02502, equations 12 and 16."""

import math

from .schedule import NoiseSchedule, alpha_sigma
from .spacing import spaced_timesteps
from .step import Tableau, predict
from .values import shown


def ddim(
    schedule: NoiseSchedule,
    num_steps: int,
    *,
    eta: float = 0.0,
    set_alpha_to_one: bool = True,
    timestep_spacing: str = "leading",
    steps_offset: int = 0,
) -> Tableau:
    """eta 0 is deterministic, 1 has the variance of DDPM. Options and defaults of diffusers' DDIMScheduler.

    Each step goes T // num_steps timesteps down, whatever the spacing, as there. Refuses zero terminal SNR with
    epsilon prediction, which is NaN in diffusers.
    """
    if not 0.0 <= eta <= 1.0:
        raise ValueError(f"eta={shown(eta)} is not supported; choose a number from 0 to 1")
    schedule.refuse_zero_snr_epsilon("ddim")
    train_steps = schedule.num_train_timesteps
    final = 1.0 if set_alpha_to_one else schedule.level(0)
    timesteps = spaced_timesteps(train_steps, num_steps, timestep_spacing, steps_offset=steps_offset)
    tableau = Tableau("x")
    x, output, noise = tableau.unit_vectors()
    for timestep in timesteps.astype(int):
        previous = timestep - train_steps // num_steps
        level = schedule.level(timestep)
        level_next = schedule.level(previous) if previous >= 0 else final
        alpha_next, _ = alpha_sigma(level_next)
        x0, eps = predict(schedule.prediction_type, x, output, *alpha_sigma(level))
        std = eta * math.sqrt((1 - level_next) / (1 - level) * (1 - level / level_next))
        # At eta 1 and zero SNR the difference is 0, or just below it by rounding.
        direction = math.sqrt(max(1 - level_next - std**2, 0.0))
        tableau.step(timestep, x=alpha_next * x0 + direction * eps + std * noise)
    return tableau

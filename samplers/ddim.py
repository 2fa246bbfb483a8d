"""DDIM: eta 0 is deterministic, eta 1 has the variance of DDPM.

Song, Meng and Ermon, arXiv 2010.02502, equations 12 and 16:

    x_next = alpha_next x_0 + sqrt(sigma_next^2 - std^2) eps + std z
    std    = eta sqrt(sigma_next^2 / sigma^2 (1 - alpha^2 / alpha_next^2))
"""

import math

from .schedule import NoiseSchedule, alpha_sigma
from .spacing import LEADING, Spacing
from .step import Tableau, predict
from .values import shown


def ddim(
    schedule: NoiseSchedule,
    num_steps: int,
    begin: int = 0,
    *,
    eta: float = 0.0,
    set_alpha_to_one: bool = True,
    spacing: Spacing = LEADING,
) -> Tableau:
    """Options and defaults of diffusers' DDIMScheduler. Each step goes T // num_steps timesteps down, as there.

    Refuses zero terminal SNR with epsilon prediction, which is NaN in diffusers.
    """
    if not 0.0 <= eta <= 1.0:
        raise ValueError(f"eta={shown(eta)} is not supported; choose a number from 0 to 1")
    schedule.refuse_zero_snr_epsilon("ddim")
    stride = schedule.num_train_timesteps // num_steps
    final = 1.0 if set_alpha_to_one else schedule.level(0)
    tableau = Tableau("x")
    x, output, noise = tableau.unit_vectors()
    for timestep in spacing.timesteps(schedule, num_steps).astype(int)[begin:]:
        level = schedule.level(timestep)
        level_next = schedule.level(timestep - stride) if timestep >= stride else final
        alpha_next, _ = alpha_sigma(level_next)
        x0, eps = predict(schedule.prediction_type, x, output, *alpha_sigma(level))
        std = eta * math.sqrt((1 - level_next) / (1 - level) * (1 - level / level_next))
        # At eta 1 and zero SNR the difference is 0, or just below 0 by rounding.
        direction = math.sqrt(max(1 - level_next - std**2, 0.0))
        tableau.step(timestep, alpha_sigma(level), x=alpha_next * x0 + direction * eps + std * noise)
    return tableau

"""Pseudo numerical methods: Runge-Kutta or a doubled first step, then linear multistep.

Liu et al., arXiv 2202.09778, equations 9, 12 and 13 and algorithm 2, with level = alpha^2:

    x_next = alpha_next / alpha x - (level_next - level) / (level sigma_next + alpha sigma alpha_next) eps     (9)
    eps    = (55 e_0 - 59 e_1 + 37 e_2 - 9 e_3) / 24, of the last four outputs e, the newest first            (12)
    eps    = (k_1 + 2 k_2 + 2 k_3 + k_4) / 6, of outputs k at the start, twice the middle, and the end         (13)

As in diffusers, the network's raw outputs are combined first and turned into a prediction of the noise after.
"""

import itertools

import numpy as np

from .schedule import FloatArray, NoiseSchedule, alpha_sigma
from .spacing import LEADING, Spacing
from .step import Tableau, choose, predict

# Adams-Bashforth of orders 1 to 4, the newest output first.
_ADAMS_BASHFORTH = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)
_RUNGE_KUTTA_STEPS = 3


def pndm(
    schedule: NoiseSchedule,
    num_steps: int,
    begin: int = 0,
    *,
    skip_prk_steps: bool = False,
    set_alpha_to_one: bool = False,
    spacing: Spacing = LEADING,
) -> Tableau:
    """Options and defaults of diffusers' PNDMScheduler (Stable Diffusion's default, with skip_prk_steps).

    num_steps + 9 model evaluations; with skip_prk_steps num_steps + 1, or 1 of 1. Refuses "sample" prediction, as
    there, and fewer than four steps with Runge-Kutta, which diffusers cannot run. A plan that begins later counts
    its evaluations from there, as diffusers does: the second corrects the first, whatever its timestep is.
    """
    choose("prediction_type", schedule.prediction_type, ("epsilon", "v_prediction"))
    schedule.refuse_zero_snr("pndm")
    if not skip_prk_steps and num_steps <= _RUNGE_KUTTA_STEPS:
        raise ValueError(
            f"pndm with skip_prk_steps=False needs at least 4 steps, not {num_steps}; set skip_prk_steps"
        )
    timesteps = spacing.timesteps(schedule, num_steps).astype(int)
    stride = schedule.num_train_timesteps // num_steps
    half = stride // 2
    final = 1.0 if set_alpha_to_one else schedule.level(0)
    tableau = Tableau("x", "start", "slope", "e1", "e2", "e3")
    x, start, slope, e1, e2, e3, output, _ = tableau.unit_vectors()

    def move(sample: FloatArray, combined: FloatArray, timestep: int, target: int) -> FloatArray:
        """Equation 9: from `timestep` to `target` along the combined output."""
        level, level_next = schedule.level(timestep), schedule.level(target) if target >= 0 else final
        (alpha, sigma), (alpha_next, sigma_next) = alpha_sigma(level), alpha_sigma(level_next)
        _, eps = predict(schedule.prediction_type, sample, combined, alpha, sigma)
        denominator = level * sigma_next + alpha * sigma * alpha_next
        return alpha_next / alpha * sample - (level_next - level) / denominator * eps

    if skip_prk_steps:
        # The second timestep twice: its first evaluation corrects the first step, its second goes on.
        stages, visited = 0, [*timesteps[:1], *np.repeat(timesteps[1:2], 2), *timesteps[2:]]
    else:
        pairs = itertools.pairwise(timesteps[: _RUNGE_KUTTA_STEPS + 1])
        blocks = [(this, below + half, below + half, below) for this, below in pairs]
        stages, visited = 4 * _RUNGE_KUTTA_STEPS, [*itertools.chain(*blocks), *timesteps[_RUNGE_KUTTA_STEPS:]]
    for count, timestep in enumerate(visited[begin:]):
        level = alpha_sigma(schedule.level(timestep))
        if count < stages:
            origin, stage = visited[count // 4 * 4], count % 4
            target = timestep - (0 if stage % 2 else half)
            if stage == 0:
                x_next = move(x, output, origin, target)
                tableau.step(timestep, level, x=x_next, start=x, slope=output / 6, e1=output, e2=e1, e3=e2)
            elif stage == 3:
                tableau.step(timestep, level, x=move(start, slope + output / 6, origin, target))
            else:
                tableau.step(timestep, level, x=move(start, output, origin, target), slope=slope + output / 3)
        elif count == 1:
            x_next = move(start, 0.5 * (output + e1), timestep + stride, timestep)
            tableau.step(timestep, level, x=x_next)
        else:
            known = _RUNGE_KUTTA_STEPS if stages else max(count - 1, 0)
            history = (output, e1, e2, e3)
            weights = _ADAMS_BASHFORTH[min(known, 3)]
            combined = np.sum([weight * e for weight, e in zip(weights, history, strict=False)], axis=0)
            x_next = move(x, combined, timestep, timestep - stride)
            # Only the second evaluation without Runge-Kutta reads `start`.
            tableau.step(timestep, level, x=x_next, start=x, e1=output, e2=e1, e3=e2)
    return tableau

"""UniPC: a multistep predictor, and a corrector that reuses the network's output of the next step.

Zhao et al., arXiv 2302.04867, algorithms 5 to 8 (the B(h) version), equations 3, 5 and 9:

    x_t = sigma_t / sigma_s x_s - alpha_t (e^-h - 1) m_0 - alpha_t B(h) sum_k a_k D_k / r_k
    D_k = m_k - m_0,  r_k = (lambda_k - lambda_s) / h,  h = lambda_t - lambda_s

m_0 is the prediction of x_0 at s. UniP sums over predictions before s, UniC over the prediction at t (r = 1) as
well. For predictions of eps, alpha and sigma change places and h stands for -h.
"""

import math
from collections.abc import Sequence

import numpy as np

from .dpm_solver import phi
from .schedule import FloatArray, NoiseSchedule
from .spacing import RAMPED_TO_FINAL, NoiseLevel, Spacing
from .step import Tableau, choose, predict


class _Move:
    """From the last but one of `levels` to the last, with what is known at the earlier ones; newest first."""

    def __init__(self, levels: Sequence[NoiseLevel], predict_x0: bool, solver_type: str) -> None:
        *earlier, origin, target = levels
        self.h = target.lambda_ - origin.lambda_
        self.z = -self.h if predict_x0 else self.h
        self.scale = target.alpha if predict_x0 else target.sigma
        self.decay = target.sigma / origin.sigma if predict_x0 else target.alpha / origin.alpha
        self.b_h = self.z if solver_type == "bh1" else math.expm1(self.z)
        self.gaps = [level.lambda_ - origin.lambda_ for level in reversed(earlier)]

    def __call__(
        self, sample: FloatArray, predictions: Sequence[FloatArray], at_target: FloatArray | None = None
    ) -> FloatArray:
        """x_t of UniP, algorithm 6, or with the prediction at t of UniC, algorithm 5; a single a_k is 1/2."""
        newest, *older = predictions
        first = self.decay * sample - self.scale * math.expm1(self.z) * newest
        # D_k / r_k with r_k = gap / h, without dividing by an h of zero.
        slopes = [(m - newest) * (self.h / gap) for m, gap in zip(older, self.gaps, strict=True)]
        if at_target is not None:
            slopes.append(at_target - newest)
        elif not slopes or self.h == 0.0:
            return first
        weights = np.array([0.5]) if len(slopes) == 1 else self._weights(len(slopes))
        return first - self.scale * self.b_h * np.tensordot(weights, slopes, 1)

    def _weights(self, count: int) -> FloatArray:
        """The a_k: R_p(h) a is equal to the moments phi_p(h) / B(h), equation 5."""
        ratios = np.array([*(gap / self.h for gap in self.gaps), 1.0][:count])
        moments = [math.factorial(k + 1) * self.z * phi(k + 2, self.z) / self.b_h for k in range(count)]
        return np.linalg.solve(np.stack([ratios**k for k in range(count)]), np.array(moments))


def unipc(
    schedule: NoiseSchedule,
    num_steps: int,
    begin: int = 0,
    *,
    solver_order: int = 2,
    solver_type: str = "bh2",
    predict_x0: bool = True,
    disable_corrector: Sequence[int] = (),
    lower_order_final: bool = True,
    spacing: Spacing = RAMPED_TO_FINAL,
) -> Tableau:
    """Options and defaults of diffusers' UniPCMultistepScheduler; disable_corrector lists steps not to correct.

    Refuses what cannot end at sigma = 0: predict_x0 False, or a last step of order above 1.
    """
    choose("solver_order", solver_order, (1, 2, 3))
    choose("solver_type", solver_type, ("bh1", "bh2"))
    if spacing.final_sigmas_type == "zero" and not predict_x0:
        raise ValueError(
            "predict_x0=False does not reach final_sigmas_type 'zero', where lambda is infinite; "
            "set final_sigmas_type to 'sigma_min'"
        )
    timesteps, levels = spacing.solver_levels(schedule, num_steps, final_of_ramp=True)
    memory = [f"m{age}" for age in range(1, solver_order + 1)]
    tableau = Tableau("x", "start", *memory)
    x, start, *memories, output, _ = tableau.unit_vectors()
    order = 1
    for index in range(begin, len(timesteps)):
        level = levels[index].alpha, levels[index].sigma
        x0, eps = predict(schedule.prediction_type, x, output, *level)
        prediction = x0 if predict_x0 else eps
        corrected = x
        if index > begin and index - 1 not in disable_corrector:
            unic = _Move(levels[max(index - order, 0) : index + 1], predict_x0, solver_type)
            corrected = unic(start, memories[:order], prediction)
        order = min(solver_order, index - begin + 1)
        if lower_order_final:
            order = min(order, num_steps - index)
        if order > 1 and math.isinf(levels[index + 1].lambda_):
            raise ValueError(
                "lower_order_final=False does not reach final_sigmas_type 'zero', where lambda is infinite; "
                "set final_sigmas_type to 'sigma_min'"
            )
        known = [prediction, *memories]
        unip = _Move(levels[max(index - order + 1, 0) : index + 2], predict_x0, solver_type)
        x_next = unip(corrected, known[:order])
        kept = dict(zip(memory, known, strict=False))
        tableau.step(timesteps[index], level, c_in=1.0, x=x_next, start=corrected, **kept)
    return tableau

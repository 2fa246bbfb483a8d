"""UniPC: a multistep predictor, and a corrector that reuses the network's output of the next step.

Zhao et al., arXiv 2302.04867, algorithms 5 to 8 (the B(h) version), equations 3, 5 and 9.
"""

import math
from collections.abc import Sequence

import numpy as np

from .dpm_solver import NoiseLevel, phi
from .schedule import FloatArray, NoiseSchedule
from .spacing import choose_ramp, solver_levels, spaced_timesteps
from .step import Tableau, choose, predict


def unipc(
    schedule: NoiseSchedule,
    num_steps: int,
    *,
    solver_order: int = 2,
    solver_type: str = "bh2",
    predict_x0: bool = True,
    disable_corrector: Sequence[int] = (),
    lower_order_final: bool = True,
    use_karras_sigmas: bool = False,
    use_exponential_sigmas: bool = False,
    use_beta_sigmas: bool = False,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    final_sigmas_type: str = "zero",
    timestep_spacing: str = "linspace",
    steps_offset: int = 0,
) -> Tableau:
    """Options and defaults of diffusers' UniPCMultistepScheduler; disable_corrector lists steps not to correct.

    Refuses what cannot end at sigma = 0: predict_x0 False, or a last step of order above 1.
    """
    choose("solver_order", solver_order, (1, 2, 3))
    choose("solver_type", solver_type, ("bh1", "bh2"))
    if final_sigmas_type == "zero" and not predict_x0:
        raise ValueError(
            "predict_x0=False does not reach final_sigmas_type 'zero', where lambda is infinite; "
            "set final_sigmas_type to 'sigma_min'"
        )
    timesteps, ratios = solver_levels(
        schedule,
        spaced_timesteps(
            schedule.num_train_timesteps,
            num_steps,
            timestep_spacing,
            steps_offset=steps_offset,
            drop_last=True,
        ),
        choose_ramp(
            use_karras_sigmas=use_karras_sigmas,
            use_exponential_sigmas=use_exponential_sigmas,
            use_beta_sigmas=use_beta_sigmas,
        ),
        final_sigmas_type,
        round_karras=True,
        final_of_ramp=True,
        sigma_min=sigma_min,
        sigma_max=sigma_max,
    )
    levels = [NoiseLevel.of(ratio) for ratio in ratios]
    memory = [f"m{age}" for age in range(1, solver_order + 1)]
    tableau = Tableau("x", "start", *memory)
    x, start, *memories, output, _ = tableau.unit_vectors()
    order = 1
    for index, timestep in enumerate(timesteps):
        x0, eps = predict(schedule.prediction_type, x, output, levels[index].alpha, levels[index].sigma)
        prediction = x0 if predict_x0 else eps
        corrected = x
        if index > 0 and index - 1 not in disable_corrector:
            move = _Move(levels[max(index - order, 0) : index + 1], predict_x0, solver_type)
            corrected = move.correct(start, memories[:order], prediction)
        order = min(solver_order, index + 1)
        if lower_order_final:
            order = min(order, num_steps - index)
        if order > 1 and math.isinf(levels[index + 1].lambda_):
            raise ValueError(
                "lower_order_final=False does not reach final_sigmas_type 'zero', where lambda is infinite; "
                "set final_sigmas_type to 'sigma_min'"
            )
        known = [prediction, *memories]
        move = _Move(levels[max(index - order + 1, 0) : index + 2], predict_x0, solver_type)
        x_next = move.predict(corrected, known[:order])
        memories_next = dict(zip(memory, known, strict=False))
        tableau.step(timestep, c_in=1.0, x=x_next, start=corrected, **memories_next)
    return tableau


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

    def predict(self, sample: FloatArray, predictions: Sequence[FloatArray]) -> FloatArray:
        """UniP, algorithm 6, of the order of the number of predictions; order 2 has the weight 1/2."""
        first, slopes = self._start(sample, predictions)
        if not slopes or self.h == 0.0:
            return first
        if len(slopes) == 1:
            weights = np.array([0.5])
        else:
            matrix, moments = self._system()
            weights = np.linalg.solve(matrix[:-1, :-1], moments[:-1])
        return first - self.scale * self.b_h * np.tensordot(weights, slopes, 1)

    def correct(
        self, sample: FloatArray, predictions: Sequence[FloatArray], new_prediction: FloatArray
    ) -> FloatArray:
        """UniC, algorithm 5: the same step with the prediction at its end. Order 1 has the weight 1/2."""
        first, slopes = self._start(sample, predictions)
        slopes.append(new_prediction - predictions[0])
        weights = np.array([0.5]) if len(slopes) == 1 else np.linalg.solve(*self._system())
        return first - self.scale * self.b_h * np.tensordot(weights, slopes, 1)

    def _start(self, sample: FloatArray, predictions: Sequence[FloatArray]) -> tuple[FloatArray, list[FloatArray]]:
        """The first-order step, and (D_m / r_m) for every earlier prediction."""
        newest, *older = predictions
        first = self.decay * sample - self.scale * math.expm1(self.z) * newest
        # D_m / r_m with r_m = gap / h, without dividing by an h of zero.
        return first, [(m - newest) * (self.h / gap) for m, gap in zip(older, self.gaps, strict=True)]

    def _system(self) -> tuple[FloatArray, FloatArray]:
        """R_p(h) and the moments phi_p(h) / B(h) of equation 5."""
        ratios = np.array([*(gap / self.h for gap in self.gaps), 1.0])
        powers = range(ratios.size)
        moments = [math.factorial(k + 1) * self.z * phi(k + 2, self.z) / self.b_h for k in powers]
        return np.stack([ratios**k for k in powers]), np.array(moments)

"""DPM-Solver and DPM-Solver++, multistep (`dpmpp_2m`) and singlestep (`dpmpp_2s`), as ODE and as SDE.

A step goes from s to t; lambda = log(alpha / sigma), h = lambda_t - lambda_s. D_0 is the prediction, of the noise
in DPM-Solver and of the sample in DPM-Solver++. D_1 is h times the derivative of the prediction in lambda, D_2 is
h^2 times the second derivative, both by finite differences.

    x_t = a x_s + c z (phi_1(z) D_0 + phi_2(z) D_1 + phi_3(z) D_2)      phi_1(z) = (e^z - 1) / z, see `phi`
    DPM-Solver:   a = alpha_t / alpha_s,  c = -sigma_t,  z = h          SDE: 2 c, and noise
    DPM-Solver++: a = sigma_t / sigma_s,  c = -alpha_t,  z = -h         SDE: a e^-h, 2 z, and noise

Lu et al., arXiv 2206.00927 (algorithms 1 and 2, appendix B) and 2211.01095 (equations 9 and 12, algorithms 1 and
2, appendix D for the SDE).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from .schedule import FloatArray, NoiseSchedule
from .spacing import CLIPPED, CLIPPED_LINSPACE, NoiseLevel, Spacing
from .step import Tableau, choose, predict

# With fewer steps than this, lower_order_final lowers the order of the last ones.
FEW_STEPS = 15


@dataclass(frozen=True)
class _Weights:
    """x_t = sample x_s + first D_0 + second D_1 + third D_2 + noise z.

    slope  the weight of D_1 in a second-order step: `second`, or half of `first` (solver_type "midpoint")
    """

    sample: float
    first: float
    slope: float
    second: float
    third: float
    noise: float


@dataclass(frozen=True)
class Algorithm:
    """The options that choose the equation (algorithm_type) and the expansion of its prediction."""

    takes: ClassVar[tuple[str, ...]] = ("solver_order", "algorithm_type", "solver_type")
    solver_order: int = 2
    algorithm_type: str = "dpmsolver++"
    solver_type: str = "midpoint"

    def check(self, final_sigmas_type: str, algorithm_types: tuple[str, ...]) -> None:
        """ValueError for an unknown option, and for a final noise level that the algorithm does not reach."""
        choose("solver_order", self.solver_order, (1, 2, 3))
        choose("algorithm_type", self.algorithm_type, algorithm_types)
        choose("solver_type", self.solver_type, ("midpoint", "heun"))
        if not self.algorithm_type.endswith("++") and final_sigmas_type == "zero":
            raise ValueError(
                f"algorithm_type={self.algorithm_type!r} does not reach final_sigmas_type 'zero', where lambda "
                "is infinite; set final_sigmas_type to 'sigma_min'"
            )

    def weights(self, start: NoiseLevel, end: NoiseLevel) -> _Weights:
        """The weights of a step from s = `start` to t = `end`."""
        h = end.lambda_ - start.lambda_
        is_sde = self.algorithm_type.startswith("sde-")
        if self.algorithm_type.endswith("++"):
            z, c = (-2.0 * h if is_sde else -h), -end.alpha
            a = end.sigma / start.sigma * (math.exp(-h) if is_sde else 1.0)
            noise = end.sigma * math.sqrt(max(-math.expm1(-2.0 * h), 0.0)) if is_sde else 0.0
        else:
            z, c = h, -end.sigma * (2.0 if is_sde else 1.0)
            a = end.alpha / start.alpha
            noise = end.sigma * math.sqrt(max(math.expm1(2.0 * h), 0.0)) if is_sde else 0.0
        if math.isinf(z):
            return _Weights(a, -c, 0.0, 0.0, 0.0, noise)
        first, second = c * math.expm1(z), c * z * phi(2, z)
        slope = 0.5 * first if self.solver_type == "midpoint" else second
        # z phi_3(z) = phi_2(z) - 1/2, for the SDE as well. diffusers has +1/2 there, which is kept for parity: it
        # costs the multistep solver an order, and the singlestep one with solver_type "heun" its convergence.
        third = c * (phi(2, z) + (0.5 if is_sde else -0.5))
        return _Weights(a, first, slope, second, third, noise)

    def prediction(
        self, schedule: NoiseSchedule, x: FloatArray, output: FloatArray, level: NoiseLevel
    ) -> FloatArray:
        """D_0: x_0 for the ++ solvers, eps for the others."""
        x0, eps = predict(schedule.prediction_type, x, output, level.alpha, level.sigma)
        return x0 if self.algorithm_type.endswith("++") else eps


SECOND_ORDER = Algorithm()


def dpmpp_2m(
    schedule: NoiseSchedule,
    num_steps: int,
    begin: int = 0,
    *,
    algorithm: Algorithm = SECOND_ORDER,
    lower_order_final: bool = True,
    euler_at_final: bool = False,
    spacing: Spacing = CLIPPED,
) -> Tableau:
    """Options and defaults of diffusers' DPMSolverMultistepScheduler."""
    to_zero, solver_order = spacing.final_sigmas_type == "zero", algorithm.solver_order
    algorithm.check(spacing.final_sigmas_type, ("dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++"))
    if algorithm.algorithm_type == "sde-dpmsolver" and solver_order == 3:
        raise ValueError("algorithm_type='sde-dpmsolver' has no third order; choose solver_order 1 or 2")
    timesteps, levels = spacing.solver_levels(
        schedule, num_steps, round_karras=schedule.beta_schedule != "squaredcos_cap_v2"
    )
    count = len(timesteps)
    lowers = lower_order_final and count < FEW_STEPS
    tableau = Tableau("x", "previous", "before_previous")
    x, m1, m2, output, noise = tableau.unit_vectors()
    for index in range(begin, count):
        start, end = levels[index], levels[index + 1]
        m0 = algorithm.prediction(schedule, x, output, start)
        order = min(solver_order, index - begin + 1)
        if index == count - 1 and (euler_at_final or lowers or to_zero):
            order = 1
        elif index == count - 2 and lowers:
            order = min(order, 2)
        weights = algorithm.weights(start, end)
        h = end.lambda_ - start.lambda_
        new = weights.sample * x + weights.first * m0 + weights.noise * noise
        if order > 1:
            h0 = start.lambda_ - levels[index - 1].lambda_
            slope = h / h0 * (m0 - m1)
        if order == 2:
            new = new + weights.slope * slope
        if order == 3:
            h1 = levels[index - 1].lambda_ - levels[index - 2].lambda_
            # Half of Taylor's second-order term, as in the authors' code and diffusers; so the order stays 2.
            bend = slope - h / h1 * (m1 - m2)
            new = new + weights.second * (slope + h0 / (h0 + h1) * bend) + weights.third * h / (h0 + h1) * bend
        tableau.step(timesteps[index], (start.alpha, start.sigma), x=new, previous=m0, before_previous=m1)
    return tableau


def dpmpp_2s(
    schedule: NoiseSchedule,
    num_steps: int,
    begin: int = 0,
    *,
    algorithm: Algorithm = SECOND_ORDER,
    lower_order_final: bool = False,
    spacing: Spacing = CLIPPED_LINSPACE,
) -> Tableau:
    """Options and defaults of diffusers' DPMSolverSinglestepScheduler; num_steps counts model evaluations.

    As there, lower_order_final is on where final_sigmas_type is zero and where num_steps fills no whole block.
    """
    to_zero, solver_order = spacing.final_sigmas_type == "zero", algorithm.solver_order
    algorithm.check(spacing.final_sigmas_type, ("dpmsolver", "dpmsolver++", "sde-dpmsolver++"))
    schedule.refuse_zero_snr("dpmpp_2s")
    timesteps, levels = spacing.solver_levels(schedule, num_steps)
    lowers = lower_order_final or to_zero or num_steps % solver_order != 0
    tableau = Tableau("x", "start", "previous", "before_previous")
    x, block_start, m1, m2, output, noise = tableau.unit_vectors()
    orders = _singlestep_orders(num_steps, solver_order, lowers=lowers, to_zero=to_zero)
    for index in range(begin, len(orders)):
        # A plan that begins inside a block has fewer evaluations to go back to.
        order = min(orders[index], index - begin + 1)
        m0 = algorithm.prediction(schedule, x, output, levels[index])
        # A step of order p starts again from the block's first sample, p - 1 evaluations ago.
        start, end = levels[index - order + 1], levels[index + 1]
        weights = algorithm.weights(start, end)
        h = end.lambda_ - start.lambda_
        origin = x if order == 1 else block_start
        base = (m0, m1, m2)[order - 1]
        new = weights.sample * origin + weights.first * base + weights.noise * noise
        if order == 2:
            new = new + weights.slope * (h / (levels[index].lambda_ - start.lambda_) * (m0 - base))
        if order == 3:
            r0 = (levels[index].lambda_ - start.lambda_) / h
            r1 = (levels[index - 1].lambda_ - start.lambda_) / h
            far, near = (m0 - base) / r0, (m1 - base) / r1
            if algorithm.solver_type == "midpoint":
                new = new + weights.second * far
            else:
                slope, bend = (r0 * near - r1 * far) / (r0 - r1), 2.0 * (far - near) / (r0 - r1)
                new = new + weights.second * slope + weights.third * bend
        level = levels[index].alpha, levels[index].sigma
        tableau.step(timesteps[index], level, x=new, start=origin, previous=m0, before_previous=m1)
    return tableau


def phi(order: int, z: float) -> float:
    """sum_n z^n / (n + order)!: phi_1(z) = (e^z - 1) / z, phi_k+1(z) = (phi_k(z) - 1 / k!) / z."""
    if abs(z) < 1.0:
        # The recursion cancels near zero; twenty terms are exact in float64.
        return math.fsum(z**n / math.factorial(n + order) for n in range(20))
    value = math.expm1(z) / z
    for k in range(1, order):
        value = (value - 1.0 / math.factorial(k)) / z
    return value


def _singlestep_orders(num_steps: int, solver_order: int, *, lowers: bool, to_zero: bool) -> list[int]:
    """The order of every evaluation: whole blocks 1, ..., p, then a shorter one."""
    blocks, rest = divmod(num_steps, solver_order)
    if lowers and rest == 0 and solver_order > 1:
        # The last block is split, so that the last step has order 1.
        blocks, tail = blocks - 1, [*range(1, solver_order), 1]
    else:
        tail = list(range(1, rest + 1))
    orders = list(range(1, solver_order + 1)) * blocks + tail
    return [*orders[:-1], 1] if to_zero else orders

"""DPM-Solver and DPM-Solver++, multistep (`dpmpp_2m`) and singlestep (`dpmpp_2s`), as ODE and as SDE.

With lambda = log(alpha / sigma), h = lambda_t - lambda_s, both integrate the network's part of the equation
exactly in lambda and replace the prediction by its Taylor polynomial D0 + D1 + D2 (DPM-Solver: predicted noise,
DPM-Solver++: predicted sample). Lu et al., arXiv 2206.00927 (algorithms 1 and 2) and 2211.01095 (equation 12,
algorithms 1 and 2, appendix D for the SDE).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from .schedule import FloatArray, NoiseSchedule
from .spacing import choose_ramp, solver_levels, spaced_timesteps
from .step import Tableau, choose, predict

SOLVER_TYPES = ("midpoint", "heun")
# With fewer steps than this, lower_order_final lowers the order of the last ones.
FEW_STEPS = 15


@dataclass(frozen=True)
class NoiseLevel:
    """alpha, sigma and lambda = log(alpha / sigma) of a ratio sigma_t / alpha_t."""

    alpha: float
    sigma: float
    lambda_: float

    @classmethod
    def of(cls, ratio: float) -> NoiseLevel:
        alpha = 1.0 / math.hypot(ratio, 1.0)
        return cls(alpha, ratio * alpha, -math.log(ratio) if ratio > 0.0 else math.inf)


def dpmpp_2m(
    schedule: NoiseSchedule,
    num_steps: int,
    *,
    solver_order: int = 2,
    algorithm_type: str = "dpmsolver++",
    solver_type: str = "midpoint",
    lower_order_final: bool = True,
    euler_at_final: bool = False,
    use_karras_sigmas: bool = False,
    use_exponential_sigmas: bool = False,
    use_beta_sigmas: bool = False,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    final_sigmas_type: str = "zero",
    lambda_min_clipped: float = -math.inf,
    timestep_spacing: str = "linspace",
    steps_offset: int = 0,
) -> Tableau:
    """Options and defaults of diffusers' DPMSolverMultistepScheduler."""
    _check_options(
        solver_order, algorithm_type, solver_type, final_sigmas_type,
        ("dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++"),
    )  # fmt: skip
    if algorithm_type == "sde-dpmsolver" and solver_order == 3:
        raise ValueError("algorithm_type='sde-dpmsolver' has no third order; choose solver_order 1 or 2")
    timesteps, ratios = solver_levels(
        schedule,
        spaced_timesteps(
            schedule.num_train_timesteps,
            num_steps,
            timestep_spacing,
            steps_offset=steps_offset,
            drop_last=True,
            last_timestep=schedule.num_train_timesteps - _clipped(schedule, lambda_min_clipped),
        ),
        choose_ramp(
            use_karras_sigmas=use_karras_sigmas,
            use_exponential_sigmas=use_exponential_sigmas,
            use_beta_sigmas=use_beta_sigmas,
        ),
        final_sigmas_type,
        round_karras=schedule.beta_schedule != "squaredcos_cap_v2",
        sigma_min=sigma_min,
        sigma_max=sigma_max,
    )
    levels = [NoiseLevel.of(ratio) for ratio in ratios]
    count = len(timesteps)
    lowers = lower_order_final and count < FEW_STEPS
    tableau = Tableau("x", "previous", "before_previous") if solver_order == 3 else Tableau("x", "previous")
    x, m1, m2, *_ = tableau.unit_vectors()
    output, noise = tableau.unit_vectors()[-2:]
    for index, timestep in enumerate(timesteps):
        start, end = levels[index], levels[index + 1]
        m0 = _prediction(schedule, algorithm_type, x, output, start)
        order = min(solver_order, index + 1)
        if index == count - 1 and (euler_at_final or lowers or final_sigmas_type == "zero"):
            order = 1
        elif index == count - 2 and lowers:
            order = min(order, 2)
        weights = _Weights.of(algorithm_type, start, end)
        h = end.lambda_ - start.lambda_
        new = weights.sample * x + weights.first * m0 + weights.noise * noise
        if order > 1:
            h0 = start.lambda_ - levels[index - 1].lambda_
            slope = h / h0 * (m0 - m1)
        if order == 2:
            new = new + (weights.midpoint if solver_type == "midpoint" else weights.second) * slope
        if order == 3:
            h1 = levels[index - 1].lambda_ - levels[index - 2].lambda_
            # Half of Taylor's second-order term, as in the authors' code and diffusers: the order stays 2.
            bend = slope - h / h1 * (m1 - m2)
            new = new + weights.second * (slope + h0 / (h0 + h1) * bend) + weights.third * h / (h0 + h1) * bend
        older = {"before_previous": m1} if solver_order == 3 else {}
        tableau.step(timestep, c_in=1.0, x=new, previous=m0, **older)
    return tableau


def dpmpp_2s(
    schedule: NoiseSchedule,
    num_steps: int,
    *,
    solver_order: int = 2,
    algorithm_type: str = "dpmsolver++",
    solver_type: str = "midpoint",
    lower_order_final: bool = False,
    use_karras_sigmas: bool = False,
    use_exponential_sigmas: bool = False,
    use_beta_sigmas: bool = False,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    final_sigmas_type: str = "zero",
    lambda_min_clipped: float = -math.inf,
) -> Tableau:
    """Options and defaults of diffusers' DPMSolverSinglestepScheduler; num_steps counts model evaluations.

    As there, lower_order_final is on where it must be: final_sigmas_type zero, or steps that fill no whole block.
    """
    _check_options(
        solver_order, algorithm_type, solver_type, final_sigmas_type,
        ("dpmsolver", "dpmsolver++", "sde-dpmsolver++"),
    )  # fmt: skip
    schedule.refuse_zero_snr("dpmpp_2s")
    timesteps, ratios = solver_levels(
        schedule,
        spaced_timesteps(
            schedule.num_train_timesteps,
            num_steps,
            "linspace",
            drop_last=True,
            last_timestep=schedule.num_train_timesteps - _clipped(schedule, lambda_min_clipped),
        ),
        choose_ramp(
            use_karras_sigmas=use_karras_sigmas,
            use_exponential_sigmas=use_exponential_sigmas,
            use_beta_sigmas=use_beta_sigmas,
        ),
        final_sigmas_type,
        round_karras=True,
        sigma_min=sigma_min,
        sigma_max=sigma_max,
    )
    levels = [NoiseLevel.of(ratio) for ratio in ratios]
    to_zero = final_sigmas_type == "zero"
    lowers = lower_order_final or to_zero or num_steps % solver_order != 0
    tableau = Tableau("x", "start", "previous", "before_previous")
    x, block_start, m1, m2, output, noise = tableau.unit_vectors()
    for index, order in enumerate(_singlestep_orders(num_steps, solver_order, lowers=lowers, to_zero=to_zero)):
        m0 = _prediction(schedule, algorithm_type, x, output, levels[index])
        # A step of order p starts again from the block's first sample, p - 1 evaluations ago.
        start, end = levels[index - order + 1], levels[index + 1]
        weights = _Weights.of(algorithm_type, start, end)
        h = end.lambda_ - start.lambda_
        origin = x if order == 1 else block_start
        base = (m0, m1, m2)[order - 1]
        new = weights.sample * origin + weights.first * base + weights.noise * noise
        if order == 2:
            slope = h / (levels[index].lambda_ - start.lambda_) * (m0 - base)
            new = new + (weights.midpoint if solver_type == "midpoint" else weights.second) * slope
        if order == 3:
            r0 = (levels[index].lambda_ - start.lambda_) / h
            r1 = (levels[index - 1].lambda_ - start.lambda_) / h
            far, near = (m0 - base) / r0, (m1 - base) / r1
            if solver_type == "midpoint":
                new = new + weights.second * far
            else:
                slope, bend = (r0 * near - r1 * far) / (r0 - r1), 2.0 * (far - near) / (r0 - r1)
                new = new + weights.second * slope + weights.third * bend
        tableau.step(timesteps[index], x=new, start=origin, previous=m0, before_previous=m1)
    return tableau


@dataclass(frozen=True)
class _Weights:
    """x_t = sample x_s + first D0 + (midpoint or second) D1 + third D2 + noise z."""

    sample: float
    first: float
    midpoint: float
    second: float
    third: float
    noise: float

    @classmethod
    def of(cls, algorithm_type: str, start: NoiseLevel, end: NoiseLevel) -> _Weights:
        """Lu et al., arXiv 2206.00927 appendix B (h > 0) and arXiv 2211.01095 equation 9 and appendix D (-h)."""
        h = end.lambda_ - start.lambda_
        is_sde = algorithm_type.startswith("sde-")
        if algorithm_type.endswith("++"):
            z, scale = (-2.0 * h if is_sde else -h), -end.alpha
            sample = end.sigma / start.sigma * (math.exp(-h) if is_sde else 1.0)
            noise = end.sigma * math.sqrt(max(-math.expm1(-2.0 * h), 0.0)) if is_sde else 0.0
        else:
            z, scale = h, -end.sigma * (2.0 if is_sde else 1.0)
            sample = end.alpha / start.alpha
            noise = end.sigma * math.sqrt(max(math.expm1(2.0 * h), 0.0)) if is_sde else 0.0
        if math.isinf(z):
            return cls(sample, -scale, 0.0, 0.0, 0.0, noise)
        first = scale * math.expm1(z)
        # The expansion has -1/2 for the SDE as well. diffusers has +1/2, which is kept for parity: it costs the
        # multistep solver an order, and the singlestep one with solver_type "heun" its convergence.
        third = scale * (phi(2, z) + (0.5 if is_sde else -0.5))
        return cls(sample, first, 0.5 * first, scale * z * phi(2, z), third, noise)


def phi(order: int, z: float) -> float:
    """sum_n z^n / (n + order)!: phi_1(z) = (e^z - 1) / z, phi_k+1(z) = (phi_k(z) - 1 / k!) / z."""
    if abs(z) < 1.0:
        # The recursion cancels near zero; twenty terms are exact in float64.
        return math.fsum(z**n / math.factorial(n + order) for n in range(20))
    value = math.expm1(z) / z
    for k in range(1, order):
        value = (value - 1.0 / math.factorial(k)) / z
    return value


def _prediction(
    schedule: NoiseSchedule, algorithm_type: str, x: FloatArray, output: FloatArray, level: NoiseLevel
) -> FloatArray:
    """The prediction that the algorithm integrates: x_0 for the ++ solvers, eps for the others."""
    x0, eps = predict(schedule.prediction_type, x, output, level.alpha, level.sigma)
    return x0 if algorithm_type.endswith("++") else eps


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


def _clipped(schedule: NoiseSchedule, lambda_min: float) -> int:
    """How many of the noisiest timesteps have a lambda below `lambda_min`."""
    clipped = int((-np.log(schedule.sigmas) < lambda_min).sum())
    if schedule.num_train_timesteps - clipped < 2:
        raise ValueError(f"lambda_min_clipped={lambda_min!r} leaves no timesteps; choose a smaller number")
    return clipped


def _check_options(
    solver_order: int,
    algorithm_type: str,
    solver_type: str,
    final_sigmas_type: str,
    algorithm_types: tuple[str, ...],
) -> None:
    choose("solver_order", solver_order, (1, 2, 3))
    choose("algorithm_type", algorithm_type, algorithm_types)
    choose("solver_type", solver_type, SOLVER_TYPES)
    if not algorithm_type.endswith("++") and final_sigmas_type == "zero":
        raise ValueError(
            f"algorithm_type={algorithm_type!r} does not reach final_sigmas_type 'zero', where lambda "
            "is infinite; set final_sigmas_type to 'sigma_min'"
        )

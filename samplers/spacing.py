"""`Spacing`: which timesteps a sampler visits, and which noise levels it passes through.

DDIM visits K integer timesteps; two families of diffusers' classes differ. The DPM family spaces K + 1 points and
drops the lowest; its ramps of noise levels (Karras, exponential, beta) span the whole training range. The Euler
family visits fractional timesteps; its ramps span the noise levels of those timesteps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from .schedule import FloatArray, NoiseSchedule
from .step import choose
from .values import shown

RAMPS = ("karras", "exponential", "beta")
_RAMP_OPTIONS = tuple(f"use_{ramp}_sigmas" for ramp in RAMPS)

# Karras et al., arXiv 2206.00364, equation 5; the exponent of section 3.
KARRAS_RHO = 7.0
# Lee et al., arXiv 2407.12173: both shape parameters of the beta distribution.
BETA_SHAPE = 0.6


@dataclass(frozen=True)
class Spacing:
    """The options for timesteps and noise levels, by diffusers' names.

    takes  the fields that are options of a sampler, with its defaults; the other fields keep theirs

    Raises ValueError for an unknown name, and for more than one ramp.
    """

    takes: tuple[str, ...]
    timestep_spacing: str = "linspace"
    steps_offset: int = 0
    use_karras_sigmas: bool = False
    use_exponential_sigmas: bool = False
    use_beta_sigmas: bool = False
    sigma_min: float | None = None
    sigma_max: float | None = None
    final_sigmas_type: str = "zero"
    lambda_min_clipped: float = -math.inf

    def __post_init__(self) -> None:
        choose("timestep_spacing", self.timestep_spacing, ("leading", "linspace", "trailing"))
        choose("final_sigmas_type", self.final_sigmas_type, ("zero", "sigma_min"))
        if (count := sum(getattr(self, option) for option in _RAMP_OPTIONS)) > 1:
            raise ValueError(f"set only one of {', '.join(_RAMP_OPTIONS)}; {count} are set")

    @property
    def ramp(self) -> str | None:
        """One of `RAMPS`, or None."""
        return next((ramp for ramp in RAMPS if getattr(self, f"use_{ramp}_sigmas")), None)

    def timesteps(
        self, schedule: NoiseSchedule, num_steps: int, *, drop_last: bool = False, integer: bool = True
    ) -> FloatArray:
        """[num_steps] timesteps, descending. Lin et al., arXiv 2305.08891, table 2.

        drop_last  space one more point than asked for and leave out the lowest (DPM family)
        integer    round linspace's points; otherwise they are rounded to float32 (Euler family)

        steps_offset is added to leading's points only. lambda_min_clipped leaves out the noisiest timesteps; of
        those that are left, trailing may visit fewer than num_steps.
        """
        train_steps = schedule.num_train_timesteps
        # lambda = log(alpha / sigma)
        last = train_steps - int((-np.log(schedule.sigmas) < self.lambda_min_clipped).sum())
        if last < 2:
            raise ValueError(
                f"lambda_min_clipped={self.lambda_min_clipped!r} leaves no timesteps; choose a smaller number"
            )
        points = num_steps + 1 if drop_last else num_steps
        if self.timestep_spacing == "linspace":
            timesteps = np.linspace(0, last - 1, points)
            timesteps = timesteps.round() if integer else _to_float32(timesteps)
            return timesteps[::-1][:num_steps]
        if self.timestep_spacing == "leading":
            multiples = np.arange(points, dtype=np.float64)[::-1][:num_steps]
            timesteps = multiples * (last // points) + self.steps_offset
            if timesteps[0] > train_steps - 1 or timesteps[-1] < 0:
                raise ValueError(
                    f"steps_offset={shown(self.steps_offset)} leads outside the schedule's {train_steps} "
                    "timesteps: choose a smaller steps_offset or fewer steps"
                )
            return timesteps
        # The range may yield one point too many by rounding, at a timestep of -1; diffusers keeps it.
        ends = np.arange(last, 0, -train_steps / num_steps).round()
        return ends[ends > 0] - 1

    def solver_levels(
        self, schedule: NoiseSchedule, num_steps: int, *, round_karras: bool = True, final_of_ramp: bool = False
    ) -> tuple[FloatArray, list[NoiseLevel]]:
        """([K] integer timesteps, K + 1 noise levels) of the DPM family.

        round_karras   round the timesteps of a Karras ramp (those of any other ramp are cut)
        final_of_ramp  "sigma_min" means the ramp's own last level (UniPC), not the schedule's
        """
        table = schedule.sigmas
        timesteps = self.timesteps(schedule, num_steps, drop_last=True)
        sigmas = np.interp(timesteps, np.arange(table.size), table)
        final = table[0]
        if self.ramp is not None:
            sigmas = self._ramp_sigmas(table[-1], table[0], len(timesteps))
            fractional = sigmas_to_timesteps(sigmas, schedule)
            timesteps = np.round(fractional) if self.ramp == "karras" and round_karras else np.trunc(fractional)
            final = sigmas[-1] if final_of_ramp else final
        sigmas = np.append(sigmas, final if self.final_sigmas_type == "sigma_min" else 0.0)
        return timesteps, [NoiseLevel.of(sigma) for sigma in _to_float32(sigmas)]

    def euler_levels(self, schedule: NoiseSchedule, num_steps: int) -> tuple[FloatArray, FloatArray]:
        """([K] fractional timesteps, [K + 1] sigmas) of the Euler family."""
        table = schedule.sigmas
        timesteps = self.timesteps(schedule, num_steps, integer=False)
        sigmas = np.interp(timesteps, np.arange(table.size), table)
        if self.ramp is not None:
            sigmas = self._ramp_sigmas(sigmas[0], sigmas[-1], num_steps)
            timesteps = sigmas_to_timesteps(sigmas, schedule)
        final = table[0] if self.final_sigmas_type == "sigma_min" else 0.0
        return _to_float32(timesteps), np.append(_to_float32(sigmas), final)

    def init_noise_sigma(self, sigmas: FloatArray) -> float:
        """The standard deviation at which the Euler family starts."""
        top = float(sigmas.max())
        return math.hypot(top, 1.0) if self.timestep_spacing == "leading" else top

    def _ramp_sigmas(self, top: float, bottom: float, num_steps: int) -> FloatArray:
        """The ramp's noise levels, from sigma_max, or `top`, down to sigma_min, or `bottom`."""
        assert self.ramp is not None
        top = float(top) if self.sigma_max is None else self.sigma_max
        bottom = float(bottom) if self.sigma_min is None else self.sigma_min
        return ramp_sigmas(self.ramp, top, bottom, num_steps)


# What samplers take, with their defaults, which are those of diffusers' classes.
LEADING = Spacing(("timestep_spacing", "steps_offset"), timestep_spacing="leading")
LINSPACE = Spacing(LEADING.takes)
RAMPED = Spacing((*LINSPACE.takes, *_RAMP_OPTIONS, "sigma_min", "sigma_max"))
RAMPED_TO_FINAL = Spacing((*RAMPED.takes, "final_sigmas_type"))
CLIPPED = Spacing((*RAMPED_TO_FINAL.takes, "lambda_min_clipped"))
CLIPPED_LINSPACE = Spacing(tuple(option for option in CLIPPED.takes if option not in LINSPACE.takes))


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


def ramp_sigmas(ramp: str, sigma_max: float, sigma_min: float, num_steps: int) -> FloatArray:
    """[num_steps] noise levels from sigma_max down to sigma_min.

    Sources: Karras et al., arXiv 2206.00364, equation 5; Lee et al., arXiv 2407.12173, section 4.
    """
    # Only the beta ramp takes no logarithm or root of its lower end.
    if not 0.0 <= sigma_min <= sigma_max < math.inf or (sigma_min == 0.0 and ramp != "beta"):
        raise ValueError(
            f"noise levels must run from sigma_max down to sigma_min > 0; got {sigma_max}, {sigma_min}"
        )
    unit = np.linspace(0.0, 1.0, num_steps)
    if ramp == "karras":
        top, bottom = sigma_max ** (1 / KARRAS_RHO), sigma_min ** (1 / KARRAS_RHO)
        levels: FloatArray = (top + unit * (bottom - top)) ** KARRAS_RHO
    elif ramp == "exponential":
        levels = np.exp(np.linspace(math.log(sigma_max), math.log(sigma_min), num_steps))
    else:
        quantiles = np.array([_beta_quantile(probability) for probability in 1.0 - unit])
        levels = sigma_min + quantiles * (sigma_max - sigma_min)
    return levels


def sigmas_to_timesteps(sigmas: FloatArray, schedule: NoiseSchedule) -> FloatArray:
    """[K] fractional timesteps of noise levels, linear in log sigma, clamped to the training range."""
    log_table = np.log(schedule.sigmas.astype(np.float32))
    log_sigmas = np.log(np.maximum(sigmas, 1e-10))
    # The finite level that replaces zero SNR may lie below the level before it; the search needs a sorted table.
    rising = np.minimum.accumulate(log_table[::-1])[::-1]
    low = np.clip(np.searchsorted(rising, log_sigmas, side="right") - 1, 0, log_table.size - 2)
    span = (log_table[low] - log_table[low + 1]).astype(np.float64)
    weight = np.clip((log_table[low] - log_sigmas) / span, 0.0, 1.0)
    return (1.0 - weight) * low + weight * (low + 1)


def _to_float32(values: FloatArray) -> FloatArray:
    """diffusers keeps noise levels and fractional timesteps in float32; from there on all is float64 here."""
    return values.astype(np.float32).astype(np.float64)


def _beta_quantile(probability: float) -> float:
    """Inverse of the regularized incomplete beta function I_x(a, a) at a = `BETA_SHAPE`, by bisection."""
    if probability > 0.5:
        return 1.0 - _beta_quantile(1.0 - probability)
    low, high = 0.0, 0.5
    for _ in range(100):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if _beta_probability(middle) < probability else (low, middle)
    return low


def _beta_probability(x: float) -> float:
    """I_x(a, a) for x <= 1/2, by its power series (DLMF 8.17.7)."""
    a = BETA_SHAPE
    term, total = 1.0, 0.0
    for n in range(60):
        total += term / (a + n)
        term *= (n + 1 - a) * x / (n + 1)
    return float(x**a * total * math.gamma(2 * a) / math.gamma(a) ** 2)

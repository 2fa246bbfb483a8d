"""Which timesteps a sampler visits, and which noise levels it passes through.

diffusers' classes differ in three ways, and each is a parameter here: how many points the spacing has (DDIM takes
K of them, the DPM family K + 1 and drops the last), whether timesteps are integers, and where a ramp of noise
levels (Karras, exponential, beta) starts and ends.
"""

import math
from typing import Literal

import numpy as np

from .schedule import FloatArray, NoiseSchedule
from .step import choose
from .values import shown

SPACINGS = ("leading", "linspace", "trailing")
FINAL_SIGMAS = ("zero", "sigma_min")
Ramp = Literal["karras", "exponential", "beta"]

# Karras et al., arXiv 2206.00364, equation 5; the exponent of section 3.
KARRAS_RHO = 7.0
# Lee et al., arXiv 2407.12173: both shape parameters of the beta distribution.
BETA_SHAPE = 0.6


def spaced_timesteps(
    num_train_timesteps: int,
    num_steps: int,
    spacing: str,
    *,
    steps_offset: int = 0,
    drop_last: bool = False,
    integer: bool = True,
    last_timestep: int | None = None,
) -> FloatArray:
    """[num_steps] timesteps, descending. Lin et al., arXiv 2305.08891, table 2.

    drop_last        space one more point than asked for and leave out the lowest (DPM family)
    integer          round linspace's points; otherwise they are rounded to float32 (Euler family)
    last_timestep    space only [0, last_timestep) (DPM family's lambda_min_clipped); trailing may return fewer
    steps_offset     added to leading's points only
    """
    choose("timestep_spacing", spacing, SPACINGS)
    last = num_train_timesteps if last_timestep is None else last_timestep
    points = num_steps + 1 if drop_last else num_steps
    if spacing == "linspace":
        timesteps = np.linspace(0, last - 1, points)
        timesteps = timesteps.round() if integer else _to_float32(timesteps)
        return timesteps[::-1][:num_steps]
    if spacing == "leading":
        timesteps = np.arange(points, dtype=np.float64)[::-1][:num_steps] * (last // points) + steps_offset
        if timesteps[0] > num_train_timesteps - 1 or timesteps[-1] < 0:
            raise ValueError(
                f"steps_offset={shown(steps_offset)} leads outside the schedule's {num_train_timesteps} "
                "timesteps: choose a smaller steps_offset or fewer steps"
            )
        return timesteps
    # The range may yield one point too many by rounding, at a timestep of -1; diffusers keeps it.
    ends = np.arange(last, 0, -num_train_timesteps / num_steps).round()
    return ends[ends > 0] - 1


def choose_ramp(*, use_karras_sigmas: bool, use_exponential_sigmas: bool, use_beta_sigmas: bool) -> Ramp | None:
    """The ramp that the three options name; ValueError if more than one is set."""
    flags: dict[Ramp, bool] = {
        "karras": use_karras_sigmas,
        "exponential": use_exponential_sigmas,
        "beta": use_beta_sigmas,
    }
    chosen = [ramp for ramp, is_set in flags.items() if is_set]
    if len(chosen) > 1:
        raise ValueError(
            f"set only one of {', '.join(f'use_{ramp}_sigmas' for ramp in flags)}; {len(chosen)} are set"
        )
    return chosen[0] if chosen else None


def ramp_sigmas(ramp: Ramp, sigma_max: float, sigma_min: float, num_steps: int) -> FloatArray:
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


def solver_levels(
    schedule: NoiseSchedule,
    timesteps: FloatArray,
    ramp: Ramp | None,
    final_sigmas_type: str,
    *,
    round_karras: bool,
    final_of_ramp: bool = False,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
) -> tuple[FloatArray, FloatArray]:
    """([K] integer timesteps, [K + 1] sigmas) of the DPM family; a ramp spans the whole training range.

    round_karras   round the timesteps of a Karras ramp (those of any other ramp are cut)
    final_of_ramp  "sigma_min" means the ramp's own last level (UniPC), not the schedule's
    """
    choose("final_sigmas_type", final_sigmas_type, FINAL_SIGMAS)
    table = schedule.sigmas
    sigmas = np.interp(timesteps, np.arange(table.size), table)
    final = float(table[0])
    if ramp is not None:
        top = float(table[-1]) if sigma_max is None else sigma_max
        bottom = float(table[0]) if sigma_min is None else sigma_min
        sigmas = ramp_sigmas(ramp, top, bottom, len(timesteps))
        timesteps = sigmas_to_timesteps(sigmas, schedule)
        timesteps = np.round(timesteps) if ramp == "karras" and round_karras else np.trunc(timesteps)
        final = float(sigmas[-1]) if final_of_ramp else final
    return timesteps, _to_float32(np.append(sigmas, 0.0 if final_sigmas_type == "zero" else final))


def euler_levels(
    schedule: NoiseSchedule,
    timesteps: FloatArray,
    ramp: Ramp | None = None,
    *,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
) -> tuple[FloatArray, FloatArray]:
    """([K] fractional timesteps, [K] sigmas) of the Euler family; a ramp spans the levels of `timesteps`."""
    table = schedule.sigmas
    sigmas = np.interp(timesteps, np.arange(table.size), table)
    if ramp is not None:
        top = float(sigmas[0]) if sigma_max is None else sigma_max
        bottom = float(sigmas[-1]) if sigma_min is None else sigma_min
        sigmas = ramp_sigmas(ramp, top, bottom, len(timesteps))
        timesteps = sigmas_to_timesteps(sigmas, schedule)
    return _to_float32(timesteps), _to_float32(sigmas)


def _to_float32(values: FloatArray) -> FloatArray:
    """diffusers keeps noise levels and fractional timesteps in float32; from there on all is float64 here."""
    return values.astype(np.float32).astype(np.float64)


def init_noise_sigma(sigmas: FloatArray, spacing: str) -> float:
    """The standard deviation at which the Euler family starts."""
    top = float(sigmas.max())
    return top if spacing in ("linspace", "trailing") else math.hypot(top, 1.0)


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

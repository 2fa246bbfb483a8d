"""`NoiseSchedule`: the noise at every training timestep, from betas or from a scheduler_config.json.

The schedule is variance-preserving: x_t = alpha_t x_0 + sigma_t eps with alpha_t^2 = alphas_cumprod[t] and
sigma_t^2 = 1 - alpha_t^2.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from .values import Copied, is_number, plain, shown

FloatArray = npt.NDArray[np.float64]

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
# A bound on the work that a config can ask for; published models have 1000, some 4000.
MAX_TRAIN_TIMESTEPS = 1_000_000

# In place of alphas_cumprod = 0 (zero SNR) where a sampler divides by alpha: float16's smallest subnormal.
ZERO_SNR_ALPHA_CUMPROD = 2.0**-24

# Sampler options that a config may hold; make_plan passes each sampler those that it takes.
SAMPLER_OPTIONS = frozenset(
    {
        "timestep_spacing", "steps_offset", "set_alpha_to_one", "skip_prk_steps", "variance_type",
        "solver_order", "algorithm_type", "solver_type", "lower_order_final", "euler_at_final",
        "final_sigmas_type", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas",
        "sigma_min", "sigma_max", "lambda_min_clipped", "predict_x0", "disable_corrector",
        "interpolation_type", "timestep_type", "original_inference_steps", "timestep_scaling",
    }
)  # fmt: skip

# Options that are not linear or not supported, and what to do instead. A false value is always accepted.
REFUSED_OPTIONS: Mapping[str, str] = MappingProxyType(
    {
        "clip_sample": "clipping is not linear; set clip_sample to false (latents are not clipped)",
        "thresholding": "dynamic thresholding is not linear; set thresholding to false",
        "guidance_rescale": "rescaled guidance is not linear; set guidance_rescale to 0",
        "use_lu_lambdas": "use use_exponential_sigmas: it has the same noise levels",
        "use_flow_sigmas": "flow matching is not supported; use a variance-preserving schedule",
        "use_dynamic_shifting": "flow matching is not supported; use a variance-preserving schedule",
        "shift": "flow matching is not supported; use a variance-preserving schedule",
        "shift_terminal": "flow matching is not supported; use a variance-preserving schedule",
        "sigma_data": "EDM's scaling of the network is not supported; use a variance-preserving schedule",
        "snr_shift_scale": "a shifted schedule is not supported; give its betas as trained_betas",
        "solver_p": "another scheduler as predictor is not supported; leave solver_p out",
    }
)

# Keys that have an effect only together with a refused option.
_WITHOUT_EFFECT = frozenset(
    {"clip_sample_range", "dynamic_thresholding_ratio", "sample_max_value", "flow_shift", "time_shift_type"}
)

# Prefixes of diffusers' classes that are not variance-preserving; their configs may have no key that shows it.
_NOT_VARIANCE_PRESERVING = (
    "CMStochastic", "CosineDPM", "DDPMWuerstchen", "EDM", "FlowM", "IPNDM", "KarrasVe", "ScoreSdeVe",
    "VQDiffusion",
)  # fmt: skip
_COMMON_BETAS = (0.0001, 0.02, "linear")
_CLASS_BETAS = {
    "HeunDiscreteScheduler": (0.00085, 0.012, "linear"),
    "LCMScheduler": (0.00085, 0.012, "scaled_linear"),
}


@dataclass(frozen=True, eq=False)
class NoiseSchedule(Copied):
    """The noise levels of the training timesteps 0 ... T - 1, in float64.

    alphas_cumprod    [T], strictly decreasing in (0, 1]; the last may be 0 (zero terminal SNR). An array, a tensor
                      or a list; copied
    prediction_type   what the network returns: "epsilon", "sample" (x_0) or "v_prediction"
    beta_schedule     name of the formula of the betas; dpmpp_2m rounds Karras timesteps unless it is
                      squaredcos_cap_v2
    options           sampler options of a scheduler_config.json: `make_plan`'s defaults where a sampler takes them

    Raises ValueError for levels that do not decrease or are not finite, and for an unknown prediction_type.
    """

    alphas_cumprod: FloatArray
    prediction_type: str = "epsilon"
    beta_schedule: str = "trained_betas"
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        try:
            levels = np.array(plain(self.alphas_cumprod), dtype=np.float64)
        except (TypeError, ValueError, OverflowError):
            levels = np.empty(0)
        levels.flags.writeable = False
        if levels.ndim != 1 or levels.size < 2 or not np.isfinite(levels).all():
            raise ValueError(
                "alphas_cumprod must be a vector of at least two finite numbers, one per training timestep; "
                "check num_train_timesteps and the betas"
            )
        if levels[0] > 1.0 or levels[-1] < 0.0 or (np.diff(levels) >= 0.0).any():
            raise ValueError("alphas_cumprod must decrease strictly inside [0, 1]; check the betas")
        if self.prediction_type not in PREDICTION_TYPES:
            raise ValueError(
                f"prediction_type {shown(self.prediction_type)} is not supported; "
                f"choose one of {', '.join(PREDICTION_TYPES)}"
            )
        object.__setattr__(self, "alphas_cumprod", levels)
        options = {key: plain(value) for key, value in self.options.items()}
        object.__setattr__(self, "options", MappingProxyType(options))

    @classmethod
    def from_diffusers(cls, config: Mapping[str, Any]) -> NoiseSchedule:
        """The schedule of a scheduler_config.json, a dict of any of diffusers' discrete VP schedulers.

        config is the result of json.load, or the `config` of a scheduler in memory. A scheduler in memory records
        which values are defaults of its class; as in diffusers' `from_config`, these sampler options are ignored.

        A key that is absent takes the default of the class in `_class_name`, with one exception: without
        clip_sample there is no clipping (diffusers' DDIM and DDPM classes would clip, which suits pixels).
        Sampler options are kept in `options`. The levels are rounded to float32 where diffusers rounds them.
        Torch's default device and dtype do not change them.

        Raises ValueError, naming the key, for what is not linear (clip_sample, thresholding), not supported
        (flow matching, learned variances, other prediction types or beta schedules), out of range or not known.
        """
        if not isinstance(config, Mapping):
            raise ValueError(
                "config must be a dict: json.load of a scheduler_config.json, or scheduler.config of a scheduler "
                f"in memory, not {shown(config)}"
            )
        class_name = str(config.get("_class_name"))
        if class_name.startswith(_NOT_VARIANCE_PRESERVING):
            raise ValueError(
                f"_class_name {shown(class_name)} is not supported: its noise is not variance-preserving; take a "
                "model that was trained with betas"
            )
        defaults = SAMPLER_OPTIONS.intersection(config.get("_use_default_values") or ())
        given = {
            key: plain(value)
            for key, value in config.items()
            if value is not None and not str(key).startswith("_") and key not in defaults
        }
        beta_defaults = _CLASS_BETAS.get(class_name, _COMMON_BETAS)
        num_train_timesteps = given.pop("num_train_timesteps", 1000)
        beta_start = given.pop("beta_start", beta_defaults[0])
        beta_end = given.pop("beta_end", beta_defaults[1])
        beta_schedule = given.pop("beta_schedule", beta_defaults[2])
        trained_betas = given.pop("trained_betas", None)
        zero_terminal_snr = given.pop("rescale_betas_zero_snr", False)
        prediction_type = given.pop("prediction_type", "epsilon")
        if type(num_train_timesteps) is not int or not 2 <= num_train_timesteps <= MAX_TRAIN_TIMESTEPS:
            raise ValueError(
                f"num_train_timesteps must be an integer from 2 to {MAX_TRAIN_TIMESTEPS}, not "
                f"{shown(num_train_timesteps)}"
            )
        for key, value in (("beta_start", beta_start), ("beta_end", beta_end)):
            if not _is_beta(value):
                raise ValueError(f"{key} must be a number from 0 to 1, not {shown(value)}")
        if type(zero_terminal_snr) is not bool:
            raise ValueError(f"rescale_betas_zero_snr must be true or false, not {shown(zero_terminal_snr)}")
        options = sampler_options(given)
        if trained_betas is not None:
            if not isinstance(trained_betas, tuple) or not all(map(_is_beta, trained_betas)):
                raise ValueError(
                    f"trained_betas must be a list of numbers from 0 to 1, not {shown(trained_betas)}"
                )
            if config.get("num_train_timesteps") is not None and len(trained_betas) != num_train_timesteps:
                raise ValueError(
                    f"trained_betas must be num_train_timesteps = {num_train_timesteps} numbers, not "
                    f"{len(trained_betas)}"
                )
            betas = torch.tensor(trained_betas, dtype=torch.float32, device="cpu")
        else:
            betas = _betas(beta_schedule, beta_start, beta_end, num_train_timesteps)
        if zero_terminal_snr:
            betas = _rescale_zero_terminal_snr(betas)
        alphas_cumprod = torch.cumprod(1.0 - betas, dim=0)
        return cls(alphas_cumprod.double().numpy(), prediction_type, beta_schedule, options)

    @property
    def num_train_timesteps(self) -> int:
        """T."""
        return int(self.alphas_cumprod.size)

    @property
    def zero_terminal_snr(self) -> bool:
        """Whether the last timestep is pure noise."""
        return bool(self.alphas_cumprod[-1] == 0.0)

    @functools.cached_property
    def sigmas(self) -> FloatArray:
        """[T] sigma_t / alpha_t; finite, with `ZERO_SNR_ALPHA_CUMPROD` where alphas_cumprod is zero.

        Computed in float32, as in diffusers: timesteps found by inverting them are cut to integers, so that the
        last bit counts.
        """
        levels = np.where(self.alphas_cumprod == 0.0, ZERO_SNR_ALPHA_CUMPROD, self.alphas_cumprod)
        levels32 = torch.from_numpy(levels).float()
        sigmas: FloatArray = (((1.0 - levels32) / levels32) ** 0.5).double().numpy()
        sigmas.flags.writeable = False
        return sigmas

    def level(self, timestep: int) -> float:
        """alphas_cumprod[timestep]; ValueError outside the schedule, where steps_offset can lead."""
        if not 0 <= timestep < self.num_train_timesteps:
            raise ValueError(
                f"timestep {timestep} lies outside the schedule's {self.num_train_timesteps}: "
                "choose a smaller steps_offset or fewer steps"
            )
        return float(self.alphas_cumprod[timestep])

    def refuse_zero_snr(self, sampler: str) -> None:
        """ValueError for zero terminal SNR, of a sampler that does not support it (nor does diffusers' class)."""
        if self.zero_terminal_snr:
            raise ValueError(
                f"{sampler} does not support rescale_betas_zero_snr: choose ddim, dpmpp_2m, unipc or euler, "
                "or set rescale_betas_zero_snr to false"
            )

    def refuse_zero_snr_epsilon(self, sampler: str) -> None:
        """ValueError for zero terminal SNR with a network that predicts the noise: diffusers returns NaN."""
        if self.zero_terminal_snr and self.prediction_type == "epsilon":
            raise ValueError(
                f"{sampler} does not support rescale_betas_zero_snr with prediction_type 'epsilon': pure noise "
                "says nothing about the sample; use a v_prediction model or set rescale_betas_zero_snr to false"
            )


def alpha_sigma(level: float) -> tuple[float, float]:
    """(alpha, sigma) of an alphas_cumprod: alpha^2 = level, sigma^2 = 1 - level."""
    return math.sqrt(level), math.sqrt(1.0 - level)


def sampler_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """The sampler options among config keys; ValueError, by name, for a refused or an unknown one."""
    options = {}
    for key, value in given.items():
        if key in REFUSED_OPTIONS:
            refuse_option(key, value)
        elif key == "variance_type" and value in ("learned", "learned_range"):
            raise ValueError(f"variance_type {value!r} is not supported: use a model that predicts no variance")
        elif key in SAMPLER_OPTIONS:
            options[key] = value
        elif key not in _WITHOUT_EFFECT:
            raise ValueError(f"unknown key {key!r} in the scheduler config; remove it if it has no effect")
    return options


def refuse_option(name: str, value: object) -> None:
    """ValueError for an option of `REFUSED_OPTIONS` that is set; nothing for one that is off."""
    if value:
        raise ValueError(f"{name}={shown(value)} is not supported: {REFUSED_OPTIONS[name]}")


def _is_beta(value: Any) -> bool:
    return is_number(value) and 0.0 <= value <= 1.0


def _betas(beta_schedule: str, beta_start: float, beta_end: float, num_train_timesteps: int) -> torch.Tensor:
    """[T] float32, on the CPU whatever torch's default device is."""
    linspace = functools.partial(torch.linspace, steps=num_train_timesteps, dtype=torch.float32, device="cpu")
    if beta_schedule == "linear":
        return linspace(beta_start, beta_end)
    if beta_schedule == "scaled_linear":
        # Rombach et al., arXiv 2112.10752: linear in the standard deviation.
        return linspace(beta_start**0.5, beta_end**0.5) ** 2
    if beta_schedule == "squaredcos_cap_v2":
        return torch.tensor(_cosine_betas(num_train_timesteps), dtype=torch.float32, device="cpu")
    raise ValueError(
        f"beta_schedule {shown(beta_schedule)} is not supported; "
        f"choose one of {', '.join(BETA_SCHEDULES)}, or give trained_betas"
    )


def _cosine_betas(num_train_timesteps: int) -> Sequence[float]:
    """Nichol and Dhariwal, arXiv 2102.09672, equation 17, capped at 0.999."""

    def level(time: float) -> float:
        return math.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2

    times = [index / num_train_timesteps for index in range(num_train_timesteps + 1)]
    return [min(1 - level(end) / level(start), 0.999) for start, end in itertools.pairwise(times)]


def _rescale_zero_terminal_snr(betas: torch.Tensor) -> torch.Tensor:
    """Shift and scale sqrt(alphas_cumprod) so that it ends at zero. Lin et al., arXiv 2305.08891, algorithm 1."""
    roots = torch.cumprod(1.0 - betas, dim=0).sqrt()
    first, last = roots[0].clone(), roots[-1].clone()
    levels = ((roots - last) * (first / (first - last))) ** 2
    return 1.0 - torch.cat([levels[:1], levels[1:] / levels[:-1]])

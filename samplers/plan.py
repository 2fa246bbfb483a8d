"""`SamplingPlan`, a sampler as a table, and `make_plan`, which builds one."""

from __future__ import annotations

import functools
import inspect
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import numpy as np

from .ddim import ddim
from .ddpm import ddpm
from .dpm_solver import dpmpp_2m, dpmpp_2s
from .euler import euler, euler_a
from .heun import heun
from .lcm import lcm
from .pndm import pndm
from .schedule import REFUSED_OPTIONS, FloatArray, NoiseSchedule, refuse_option
from .step import Step, Tableau
from .unipc import unipc
from .values import Copied, is_number, plain, shown

# builder(schedule, num_steps, begin, **keywords): its keyword-only parameters are the sampler's options and
# defaults. A default that has `takes`, such as a `Spacing`, stands for the options that `takes` names:
# `spacing=CLIPPED` for timestep_spacing, use_karras_sigmas, ...
Builder = Callable[..., Tableau]

SAMPLERS: Mapping[str, Builder] = MappingProxyType(
    {
        "ddim": ddim,
        "ddpm": ddpm,
        "dpmpp_2m": dpmpp_2m,
        "dpmpp_2s": dpmpp_2s,
        "unipc": unipc,
        "euler": euler,
        "euler_a": euler_a,
        "heun": heun,
        "lcm": lcm,
        "pndm": pndm,
    }
)


# Option values in configs of other classes, and the values that the sampler takes for them, as diffusers does.
_DPM_ADOPTS = {
    "solver_type": {"bh1": "midpoint", "bh2": "midpoint", "logrho": "midpoint"},
    "algorithm_type": {"deis": "dpmsolver++"},
}
_ADOPTS: Mapping[str, Mapping[str, Mapping[str, str]]] = {
    "dpmpp_2m": _DPM_ADOPTS,
    "dpmpp_2s": _DPM_ADOPTS,
    "unipc": {"solver_type": {"midpoint": "bh2", "heun": "bh2", "logrho": "bh2"}},
}


# How messages describe an option's values, by the type of its default.
_KINDS = {
    bool: "True or False",
    int: "an integer",
    float: "a number",
    str: "a name",
    tuple: "a list of integers",
    type(None): "a number or None",
}


@dataclass(frozen=True, eq=False)
class SamplingPlan(Copied):
    """A sampler's coefficients for every step, computed once on the host in float64; can be pickled.

    name              in `SAMPLERS`
    num_steps         as asked for; a method with two evaluations per step has more `steps`
    steps             one per model evaluation, in order
    init_noise_sigma  the latents start as init_noise_sigma * standard normal noise; 1 where begin > 0: they start
                      as steps[0].alpha * x_0 + steps[0].sigma * noise, which the caller makes
    schedule          the noise schedule
    options           every option of the sampler, given or default
    begin             evaluations left out at the start
    """

    name: str
    num_steps: int
    steps: tuple[Step, ...]
    init_noise_sigma: float
    schedule: NoiseSchedule
    options: Mapping[str, Any]
    begin: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "options", MappingProxyType(dict(self.options)))

    @property
    def num_registers(self) -> int:
        """R: x and what the solver remembers."""
        return int(self.steps[0].U.shape[0])

    @functools.cached_property
    def table(self) -> FloatArray:
        """[K, R, R + 2] float64: the matrices `U` of the steps."""
        table = np.stack([step.U for step in self.steps])
        table.flags.writeable = False
        return table

    @property
    def input_scales(self) -> FloatArray:
        """[K] float64: the `c_in` of the steps."""
        return np.array([step.c_in for step in self.steps])

    @property
    def next_input_scales(self) -> FloatArray:
        """[K] float64: the `c_in` of the evaluation after each step; 1 after the last."""
        return np.append(self.input_scales[1:], 1.0)

    @property
    def timesteps(self) -> FloatArray:
        """[K] float64: the timesteps of the steps."""
        return np.array([step.timestep for step in self.steps])

    @property
    def stochastic(self) -> bool:
        """Whether any step adds noise."""
        return any(step.adds_noise for step in self.steps)


def make_plan(
    name: str, schedule: NoiseSchedule, num_steps: int, *, begin: int = 0, **options: Any
) -> SamplingPlan:
    """The plan of sampler `name` for `num_steps` inference steps, counted as diffusers' `set_timesteps` does.

    begin leaves out the first evaluations, for a run that starts from a noised image. What remains has no history,
    as in diffusers after `set_begin_index(begin)`: multistep solvers begin with lower orders.

    Options have diffusers' config names. An option that is not given comes from the schedule (from its
    scheduler_config.json), else it is the default of that sampler's diffusers class. Numbers may be numpy's or
    torch's.

    Raises ValueError, in one line that names the option, for an unknown sampler or option, a value out of range,
    an option that is not linear (clip_sample, thresholding, guidance_rescale), and a combination without finite
    coefficients.
    """
    if not isinstance(name, str) or name not in SAMPLERS:
        raise ValueError(f"unknown sampler {shown(name)}; choose one of {', '.join(SAMPLERS)}")
    if not isinstance(schedule, NoiseSchedule):
        raise ValueError(
            f"schedule must be a NoiseSchedule, not {shown(schedule)}; NoiseSchedule.from_diffusers(config) makes "
            "one of a scheduler_config.json"
        )
    train_steps = schedule.num_train_timesteps
    num_steps = plain(num_steps)
    if type(num_steps) is not int or not 1 <= num_steps <= train_steps:
        raise ValueError(f"num_steps must be an integer from 1 to {train_steps}, not {shown(num_steps)}")
    begin = plain(begin)
    if type(begin) is not int or begin < 0:
        raise ValueError(f"begin must be a number of evaluations to leave out, not {shown(begin)}")
    builder = SAMPLERS[name]
    parameters = inspect.signature(builder).parameters.values()
    keywords = {keyword.name: keyword.default for keyword in parameters if keyword.kind is keyword.KEYWORD_ONLY}
    defaults = _options(keywords)
    inherited = {key: value for key, value in schedule.options.items() if key in defaults}
    given = _checked_options(name, options, defaults)
    resolved = {**defaults, **_checked_options(name, _adopt(name, inherited), defaults), **given}
    try:
        # Whatever the caller's np.seterr: Tableau.step checks every coefficient.
        with np.errstate(all="ignore"):
            tableau = builder(schedule, num_steps, begin, **_with_options(keywords, resolved))
    except (ArithmeticError, np.linalg.LinAlgError):
        raise ValueError(
            f"{name} has no finite coefficients for {num_steps} steps, two of them at one noise level or an "
            "option out of range: choose fewer steps or another timestep_spacing, or leave the options out"
        ) from None
    if not tableau.steps:
        raise ValueError(
            f"begin={shown(begin)} leaves no evaluation of {num_steps} steps of {name}; choose a smaller one"
        )
    init_noise_sigma = 1.0 if begin else tableau.init_noise_sigma
    return SamplingPlan(name, num_steps, tableau.finish(), init_noise_sigma, schedule, resolved, begin)


def _options(keywords: Mapping[str, Any]) -> dict[str, Any]:
    """The options that a builder's keywords stand for: each itself, or what its value takes."""
    options: dict[str, Any] = {}
    for name, value in keywords.items():
        options |= {key: getattr(value, key) for key in value.takes} if hasattr(value, "takes") else {name: value}
    return options


def _with_options(keywords: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """A builder's keywords with these options, the inverse of `_options`."""
    return {
        name: replace(value, **{key: options[key] for key in value.takes})
        if hasattr(value, "takes")
        else options[name]
        for name, value in keywords.items()
    }


def _adopt(name: str, inherited: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a config, with the values that sampler `name` takes for those of other classes."""
    words = _ADOPTS.get(name, {})
    return {
        key: words.get(key, {}).get(value, value) if isinstance(value, str) else value
        for key, value in inherited.items()
    }


def _checked_options(name: str, options: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The options that the builder takes; ValueError for a refused or unknown name and for a wrong type."""
    checked = {}
    for key, given in options.items():
        value = plain(given)
        if key in REFUSED_OPTIONS:
            refuse_option(key, value)
        elif key not in defaults:
            raise ValueError(f"{name} takes no option {key!r}; it takes {', '.join(sorted(defaults))}")
        elif not _same_type(value, defaults[key]):
            kind = _KINDS[type(defaults[key])]
            raise ValueError(
                f"{name}: option {key} must be {kind} like its default {defaults[key]!r}, not {shown(value)}"
            )
        else:
            checked[key] = value
    return checked


def _same_type(value: object, default: object) -> bool:
    """Whether an option's value has the type of its default; a default of None takes a number or None."""
    if default is None or isinstance(default, float):
        return (value is None and default is None) or (is_number(value) and _fits_float(value))
    if isinstance(default, tuple):
        return isinstance(value, tuple) and all(type(item) is int for item in value)
    return type(value) is type(default)


def _fits_float(value: Any) -> bool:
    """False for a NaN, and for an integer that is too large for a float."""
    return not math.isnan(value) if isinstance(value, float) else abs(value) <= sys.float_info.max

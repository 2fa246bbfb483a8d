"""Which sampler a scheduler_config.json names, and the plan it asks for."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from .plan import SamplingPlan, make_plan
from .schedule import NoiseSchedule
from .values import shown

# diffusers' class for each sampler.
DIFFUSERS_CLASSES: Mapping[str, str] = MappingProxyType(
    {
        "ddim": "DDIMScheduler",
        "ddpm": "DDPMScheduler",
        "dpmpp_2m": "DPMSolverMultistepScheduler",
        "dpmpp_2s": "DPMSolverSinglestepScheduler",
        "unipc": "UniPCMultistepScheduler",
        "euler": "EulerDiscreteScheduler",
        "euler_a": "EulerAncestralDiscreteScheduler",
        "heun": "HeunDiscreteScheduler",
        "lcm": "LCMScheduler",
        "pndm": "PNDMScheduler",
    }
)
_SAMPLERS = {class_name: name for name, class_name in DIFFUSERS_CLASSES.items()}


def sampler_of(config: Mapping[str, Any]) -> str:
    """The name, in `SAMPLERS`, of the sampler of a scheduler_config.json: that of its `_class_name`.

    Raises ValueError for a class that has no plan.
    """
    class_name = config.get("_class_name") if isinstance(config, Mapping) else None
    if not isinstance(class_name, str) or class_name not in _SAMPLERS:
        raise ValueError(
            f"_class_name {shown(class_name)} is not supported: the scheduler config must name one of "
            f"{', '.join(_SAMPLERS)}, or name the sampler yourself"
        )
    return _SAMPLERS[class_name]


def plan_from_config(
    config: Mapping[str, Any], num_steps: int, *, sampler: str | None = None, begin: int = 0, **options: Any
) -> SamplingPlan:
    """The plan of `num_steps` steps of a scheduler_config.json, with its sampler or `sampler`.

    config, begin and options are those of `NoiseSchedule.from_diffusers` and `make_plan`, as are the errors.
    """
    schedule = NoiseSchedule.from_diffusers(config)
    return make_plan(
        sampler_of(config) if sampler is None else sampler, schedule, num_steps, begin=begin, **options
    )

"""The sampler that a scheduler_config.json names, and the values that diffusers' pipelines correct in it."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from ..config import shown

SAMPLER_OF: Mapping[str, str] = MappingProxyType(
    {
        "DDIMScheduler": "ddim",
        "DDPMScheduler": "ddpm",
        "DPMSolverMultistepScheduler": "dpmpp_2m",
        "DPMSolverSinglestepScheduler": "dpmpp_2s",
        "UniPCMultistepScheduler": "unipc",
        "EulerDiscreteScheduler": "euler",
        "EulerAncestralDiscreteScheduler": "euler_a",
        "HeunDiscreteScheduler": "heun",
        "LCMScheduler": "lcm",
        "PNDMScheduler": "pndm",
    }
)


def sampler_named(config: Mapping[str, Any]) -> str:
    """The name, in `SAMPLERS`, of the scheduler's class; raises ValueError for a class that has none."""
    name = config.get("_class_name")
    if not isinstance(name, str) or name not in SAMPLER_OF:
        raise ValueError(
            f"_class_name {shown(name)} is not supported; name a sampler, or use one of {', '.join(SAMPLER_OF)}"
        )
    return SAMPLER_OF[name]


def corrected(config: Mapping[str, Any], is_xl: bool) -> dict[str, Any]:
    """The configuration as diffusers' StableDiffusionPipeline corrects it; that of XL corrects nothing.

    Files from before 2023 lack steps_offset = 1 and clip_sample = false.
    """
    return dict(config) if is_xl else {**config, "steps_offset": 1, "clip_sample": False}

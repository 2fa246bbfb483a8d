"""The texts in a PNG file of `ldmperf sample`: the settings as JSON, and as web UIs read them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .sample_settings import KEYWORD, SampleSettings

if TYPE_CHECKING:
    from ldmperf.samplers import SamplingPlan

# What the web UIs call the samplers.
_LABELS = {
    "ddim": "DDIM",
    "ddpm": "DDPM",
    "dpmpp_2m": "DPM++ 2M",
    "dpmpp_2s": "DPM++ 2S",
    "unipc": "UniPC",
    "euler": "Euler",
    "euler_a": "Euler a",
    "heun": "Heun",
    "lcm": "LCM",
    "pndm": "PLMS",
}


def texts_of(
    settings: SampleSettings, plan: SamplingPlan, made: Mapping[str, Any], seconds: Mapping[str, float]
) -> dict[str, str]:
    """The texts by keyword. `made`: the facts of the run beside its settings; `seconds` by part."""
    options = {name: _as_json(value) for name, value in plan.options.items()}
    told = {
        **settings.model_dump(),
        "plan": {"sampler": plan.name, "evaluations": len(plan.steps), "options": options},
        **made,
        "seconds": {part: round(taken, 6) for part, taken in seconds.items()},
    }
    return {"parameters": _parameters(settings, plan, made), KEYWORD: json.dumps(told, allow_nan=False)}


def _parameters(settings: SampleSettings, plan: SamplingPlan, made: Mapping[str, Any]) -> str:
    """The text form of AUTOMATIC1111's web UI; of a grid, that of its first image, as there."""
    label = _LABELS[plan.name]
    if plan.options.get("solver_order") == 3:
        label = label.replace("2", "3")
    if str(plan.options.get("algorithm_type", "")).startswith("sde"):
        label += " SDE"
    if plan.options.get("use_karras_sigmas"):
        label += " Karras"
    fields = {
        "Steps": settings.steps,
        "Sampler": label,
        "CFG scale": f"{settings.guidance_scale:g}",
        "Seed": settings.seeds[0],
        "Size": f"{settings.width}x{settings.height}",
        "Model hash": made["weights_sha256"]["unet"][:10],
        "Model": str(made["pipeline"]).replace(",", " "),
        **({"Clip skip": settings.clip_skip + 1} if settings.clip_skip else {}),
        "Version": f"ldmperf {made['version']}",
    }
    negative = f"Negative prompt: {settings.negative_prompt}\n" if settings.negative_prompt else ""
    return f"{settings.prompts[0]}\n{negative}{', '.join(f'{name}: {value}' for name, value in fields.items())}"


def _as_json(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value

"""Tiny random pipelines of text to image as folders on disk: what diffusers' `save_pretrained` writes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
from dropin_models import UNETS, make_pipeline, make_unet
from transformers.utils import logging

# Stable Diffusion 1, 2 (which predicts v), and XL.
KINDS = ("sd15", "sd21", "sdxl")
_PIPELINES = {"sd15": "text", "sd21": "img2img", "sdxl": "sdxl"}
_NARROW = {"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 4}
# Stable Diffusion's.
_SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}


def tiny_pipeline(kind: str, scheduler: Any = None) -> Any:
    """A random diffusers pipeline of text to image: "sd15", "sd21" (v-prediction) or "sdxl"."""
    pipeline = make_pipeline(_PIPELINES[kind])
    config = UNETS[kind] | _NARROW
    if kind == "sdxl":
        config |= {"cross_attention_dim": 32}
    prediction = "v_prediction" if kind == "sd21" else "epsilon"
    scheduler = scheduler or diffusers.DDIMScheduler(
        **_SCHEDULE, clip_sample=False, set_alpha_to_one=False, prediction_type=prediction
    )
    parts = dict(pipeline.components) | {"unet": make_unet(config), "scheduler": scheduler}
    if kind == "sdxl":
        return diffusers.StableDiffusionXLPipeline(**parts, add_watermarker=False)
    return diffusers.StableDiffusionPipeline(**parts, requires_safety_checker=False)


def write_pipeline(folder: Path, kind: str = "sd15", scheduler: Any = None) -> Path:
    """Writes `tiny_pipeline` into the folder, and returns the folder."""
    logging.disable_progress_bar()
    tiny_pipeline(kind, scheduler).save_pretrained(folder)
    return folder


def diffusers_pipeline(folder: Path) -> Any:
    """What diffusers loads from the folder in float32, silent."""
    logging.disable_progress_bar()
    diffusers.utils.logging.disable_progress_bar()
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def edit_json(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Calls `change` with the JSON object in the file, and writes the object back."""
    raw = json.loads(file.read_text())
    change(raw)
    file.write_text(json.dumps(raw))

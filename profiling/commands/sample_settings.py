"""What `ldmperf sample` is asked for: options as one value, which a PNG file keeps and gives back."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..options import LARGEST_SEED, CaseError, DType, real, split_values, whole
from ..terminal.visible import visible

# Of one call; a grid of more is no picture.
MOST_IMAGES = 1024
# The keyword of the settings in a PNG file; "parameters" is that of web UIs.
KEYWORD = "ldmperf"

_Whole = Annotated[int, Field(ge=1, le=2**20)]


class SampleSettings(BaseModel):
    """Everything that makes an image again, beside the folder, the device and the versions. Pixels and steps."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True, allow_inf_nan=False)

    prompts: Annotated[list[str], Field(min_length=1)]
    negative_prompt: str | None = None
    seeds: Annotated[list[Annotated[int, Field(ge=0, le=LARGEST_SEED)]], Field(min_length=1)]
    steps: _Whole = 50
    guidance_scale: Annotated[float, Field(ge=0)] | None = None
    sampler: str | None = None
    sampler_options: dict[str, bool | int | float | str | None] = {}
    height: _Whole | None = None
    width: _Whole | None = None
    clip_skip: Annotated[int, Field(ge=0, le=1024)] = 0
    dtype: DType | None = None
    batch: _Whole = 1
    tile: _Whole | None = None

    @property
    def images(self) -> list[tuple[str, int]]:
        """Prompt and seed of each image: all seeds of the first prompt, then those of the next."""
        return [(prompt, seed) for prompt in self.prompts for seed in self.seeds]


def settings_of(given: Mapping[str, Any], again: Mapping[str, Any]) -> SampleSettings:
    """The settings that were given, over those of a PNG file, over the defaults. Raises CaseError."""
    told = {"seeds": [0], **again, **{name: value for name, value in given.items() if value is not None}}
    if "sampler" in given and given["sampler"] is not None and given.get("sampler_options") is None:
        # The options of a file are those of its own sampler.
        told.pop("sampler_options", None)
    if not told.get("prompts"):
        raise CaseError("--prompt: no prompt; give one, or --again with a PNG file of ldmperf sample")
    try:
        settings = SampleSettings(**told)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_context=False, include_input=False)[0]
        option = _OPTIONS.get(str(problem["loc"][0]), str(problem["loc"][0]).replace("_", "-"))
        raise CaseError(f"--{option}: {problem['msg'][:1].lower()}{problem['msg'][1:]}") from None
    for prompt in (*settings.prompts, settings.negative_prompt or ""):
        try:
            prompt.encode()
        except UnicodeEncodeError:
            raise CaseError(
                f"--prompt: {visible(prompt)!r} is not UTF-8; write it in a terminal that is"
            ) from None
    if len(settings.images) > MOST_IMAGES:
        raise CaseError(
            f"--seed: {len(settings.images)} images are too many for one call; give at most {MOST_IMAGES}"
        )
    return settings


_OPTIONS = {"prompts": "prompt", "seeds": "seed", "sampler_options": "sampler-option"}


def seeds_of(values: Iterable[str]) -> list[int]:
    """The seeds of texts such as "7", "1,2,3" and "1-4", each once, in their order. Raises CaseError."""
    seeds: dict[int, None] = {}
    for text in split_values(values):
        ends = [whole(end) for end in text.split("-")]
        first, last = ends[0], ends[-1]
        if len(ends) > 2 or first is None or last is None or not first <= last <= LARGEST_SEED:
            raise CaseError(
                f"--seed: {text!r} is no seed; give whole numbers from 0 to {LARGEST_SEED}, as in 7, 1,2,3 or 1-4"
            )
        if last - first >= MOST_IMAGES:
            raise CaseError(f"--seed: {text!r} are too many for one call; give at most {MOST_IMAGES}")
        seeds |= dict.fromkeys(range(first, last + 1))
    if not seeds:
        raise CaseError("--seed: no seed; give one, as in 7, 1,2,3 or 1-4")
    return list(seeds)


def sampler_options_of(values: Iterable[str]) -> dict[str, Any]:
    """The options of texts such as "use_karras_sigmas=true". Raises CaseError."""
    options = {}
    for text in values:
        name, equals, value = text.partition("=")
        if not equals or re.fullmatch("[a-z_0-9]+", name) is None:
            raise CaseError(f"--sampler-option: {text!r} is none; give NAME=VALUE, as in use_karras_sigmas=true")
        try:
            options[name] = json.loads(value, parse_constant=_no_constant)
        except (ValueError, RecursionError):
            options[name] = value
    return options


def _no_constant(name: str) -> float:
    raise ValueError(name)


def guidance_of(text: str) -> float:
    """The guidance scale that a text gives, at least 0. Raises CaseError."""
    value = real(text)
    if not 0 <= value < math.inf:
        raise CaseError(f"--guidance-scale: {text!r} is not a number of at least 0")
    return value


def kept_settings(path: Path) -> dict[str, Any]:
    """What a PNG file of `ldmperf sample` says of its image. Raises CaseError for another file."""
    from ldmperf.model.pipeline import read_texts

    try:
        texts = read_texts(path)
    except FileNotFoundError:
        raise CaseError(f"--again: {path}: no such file") from None
    # Of a broken file Pillow raises more kinds than it documents.
    except Exception as error:
        raise CaseError(f"--again: {path}: no PNG file that can be read ({error})") from None
    try:
        kept = json.loads(texts[KEYWORD])
    except (KeyError, ValueError, RecursionError):
        kept = None
    if not isinstance(kept, dict):
        raise CaseError(f"--again: {path}: holds no settings; give a PNG file that ldmperf sample wrote")
    return kept

"""What the command's options say of cases, read value by value."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from ..options import (
    LARGEST_SEED,
    LONGEST_SEQUENCE,
    CaseError,
    device_elsewhere,
    device_named,
    dtype_named,
    known_name,
    latent_size,
    real,
    split_values,
    whole_number,
)
from ..paper import paper_sizes
from .case import BACKENDS, MOST_IMAGES, PIPELINE_BACKENDS, RELEASED_NAMES, TASKS, path_text


def _size(option: str, text: str) -> str:
    return known_name(option, text, (*paper_sizes(), *RELEASED_NAMES))


def _sampler(option: str, text: str) -> str:
    # The names of samplers belong to a package that loads torch.
    from ldmperf.samplers import SAMPLERS

    return known_name(option, text, SAMPLERS)


def _guidance(option: str, text: str) -> float:
    value = real(text)
    if not (math.isfinite(value) and value >= 1):
        raise CaseError(f"--{option}: {text!r} is not a number of at least 1 (1: without guidance)")
    return value


def _found(text: str) -> tuple[Path, bool]:
    """The absolute path, and whether something is there; no link is followed, as the Hugging Face cache gives its
    links the names."""
    try:
        path = Path(text).expanduser().absolute()
        if ".." in path.parts:
            # What ".." means is known to the file system alone.
            path = path.resolve() if path.name == ".." else path.parent.resolve() / path.name
        return path, path.exists()
    except (OSError, RuntimeError):
        # A name that is too long, a loop of links, the home folder of an unknown user.
        return Path(text), False


def _checkpoint(option: str, text: str) -> str:
    path, is_there = _found(text)
    if not is_there:
        raise CaseError(f"--{option}: nothing at {path}; give a diffusers folder or a .safetensors file")
    return path_text(path)


def split_paths(values: Iterable[str]) -> list[str]:
    """The paths in the values, split at commas; where several parts together are a path that exists, it is one."""
    found = []
    for value in values:
        parts = value.split(",")
        while parts:
            joined = [",".join(parts[:end]) for end in range(len(parts), 0, -1)]
            path = next((path for path in joined if path and _found(path)[1]), parts[0].strip())
            parts = parts[path.count(",") + 1 :]
            found += [path] if path else []
    return found


@dataclass(frozen=True)
class CaseOption:
    """An option that replaces a list of each sweep: that list's field, what reads one value, the option's help."""

    field: str
    read: Callable[[str, str], object]
    help: str
    split: Callable[[Iterable[str]], list[str]] = split_values


OPTIONS: Mapping[str, CaseOption] = {
    "size": CaseOption("unets", _size, "Sizes of the family: 39M ... 5B; SD1.5 and SDXL, with random weights."),
    "unet": CaseOption(
        "unets",
        _checkpoint,
        "Checkpoints: diffusers folders or .safetensors files; a path that exists is one, its commas included.",
        split_paths,
    ),
    "sampler": CaseOption("samplers", _sampler, "Samplers: ddim, ddpm, dpmpp_2m, ..."),
    "steps": CaseOption("steps", partial(whole_number, most=1000), "Sampling steps."),
    "batch": CaseOption("batches", partial(whole_number, most=MOST_IMAGES), "Images made at once."),
    "guidance": CaseOption("guidance_scales", _guidance, "Guidance scales; 1 is without."),
    "dtype": CaseOption("dtypes", lambda _, text: dtype_named(text), "float32, bfloat16, float16."),
    "device": CaseOption("devices", lambda _, text: device_named(text), "cpu, cuda, cuda:N."),
    "backend": CaseOption(
        "backends",
        partial(known_name, valid=(*BACKENDS, *PIPELINE_BACKENDS)),
        f"{', '.join(BACKENDS)}; torch and diffusers unless told. Of pipelines: {', '.join(PIPELINE_BACKENDS)}; "
        "all of them unless told.",
    ),
    "task": CaseOption(
        "tasks",
        partial(known_name, valid=TASKS),
        "t2i; sr: 8 input channels, without guidance; pipeline: from a prompt to an image, of SD1.5.",
    ),
    "latent": CaseOption(
        "latents",
        latent_size,
        "Latent sizes, height x width: 64x64 (unless told) is an image of 512x512, 128x128 of 1024x1024.",
    ),
    "tokens": CaseOption(
        "tokens", partial(whole_number, most=LONGEST_SEQUENCE), "Tokens of the text context; 77 unless told."
    ),
    "seed": CaseOption(
        "seeds",
        partial(whole_number, least=0, most=LARGEST_SEED),
        "Seeds of the noise, the context and a size's weights; 0 unless told.",
    ),
}

# The same where another machine measures.
OPTIONS_ELSEWHERE: Mapping[str, CaseOption] = {
    **OPTIONS,
    "device": replace(OPTIONS["device"], read=lambda _, text: device_elsewhere(text)),
}

# What the command's options say, by name, as typed: values may be comma separated, and none leaves the preset's.
Choices = dict[str, Sequence[str]]

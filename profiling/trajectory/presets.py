"""The cases of a profile: the presets, and what the command's options make of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..measure.timing import RepetitionRule
from ..options import (
    _DTYPE_ALIASES,
    DTYPES,
    CaseError,
    DType,
    device_named,
    known_names,
    real,
    split_values,
    whole_number,
)
from .case import BACKENDS, DEFAULT_BACKENDS, DEFAULT_GUIDANCE, MOST_IMAGES, TASKS, Case, Task, path_text

# A side, in latent pixels: an image of 32768.
LARGEST_LATENT = 4096


@dataclass(frozen=True)
class Sweep:
    """Lists of values whose product is measured; `guidance_scales` None takes each task's own."""

    unets: tuple[str, ...]
    steps: tuple[int, ...]
    dtypes: tuple[DType, ...]
    devices: tuple[str, ...]
    batches: tuple[int, ...] = (1,)
    samplers: tuple[str, ...] = ("ddim",)
    tasks: tuple[Task, ...] = ("t2i",)
    guidance_scales: tuple[float, ...] | None = None
    backends: tuple[str, ...] = DEFAULT_BACKENDS
    latents: tuple[tuple[int, int], ...] = ((64, 64),)

    def cases(self) -> Iterator[Case]:
        """The product: networks outermost, as they are dear to build; backends innermost, as they interleave."""
        for unet, task, dtype, device in itertools.product(self.unets, self.tasks, self.dtypes, self.devices):
            scales = (DEFAULT_GUIDANCE[task],) if self.guidance_scales is None else self.guidance_scales
            for (height, width), batch, scale, sampler, steps, backend in itertools.product(
                self.latents, self.batches, scales, self.samplers, self.steps, self.backends
            ):
                yield Case(
                    unet=unet,
                    task=task,
                    sampler=sampler,
                    steps=steps,
                    batch=batch,
                    guidance_scale=float(scale),
                    dtype=dtype,
                    device=device,
                    latent_height=height,
                    latent_width=width,
                    backend=backend,
                )


@dataclass(frozen=True)
class Preset:
    """A named set of sweeps, and how often each trajectory is repeated."""

    sweeps: tuple[Sweep, ...]
    rule: RepetitionRule


_FAMILY = ("39M", "83M", "145M", "223M", "318M", "430M", "558M", "704M", "866M", "2B", "5B")
# Stable Diffusion's own size, then the ends of the cost curve, then its middle: a run may be cut short anywhere.
_FAMILY_TELLING_FIRST = tuple(dict.fromkeys(("866M", "39M", "5B", "318M", "2B", *_FAMILY)))
_CPU = Sweep(unets=_FAMILY[:3], steps=(2,), dtypes=("float32",), devices=("cpu",))
_GPU = Sweep(unets=_FAMILY, steps=(50,), dtypes=("bfloat16",), devices=("cuda",), backends=("graph", "diffusers"))
PRESETS: dict[str, Preset] = {
    # Under five minutes on two cores: one step count for the cost of sizes, two more at 39M for the cost of steps.
    "cpu": Preset((_CPU, replace(_CPU, unets=("39M",), steps=(1, 3))), RepetitionRule(3, 0.0)),
    "gpu": Preset(
        (replace(_GPU, batches=(1, 8), backends=("graph", "torch", "diffusers")),),
        RepetitionRule(5, 2.0),
    ),
    # The family by size, then by steps, sampler and batch: first what tells most, then all there is.
    "family": Preset(
        (
            replace(_GPU, unets=_FAMILY_TELLING_FIRST, steps=(20,)),
            replace(_GPU, unets=("39M", "866M"), steps=(4, 50)),
            replace(_GPU, unets=("39M", "866M"), steps=(20,), samplers=("ddpm", "dpmpp_2m")),
            replace(_GPU, unets=("39M", "866M"), steps=(4,), batches=(4, 16)),
        ),
        RepetitionRule(3, 0.5),
    ),
    "family-all": Preset(
        (
            replace(
                _GPU,
                unets=_FAMILY_TELLING_FIRST,
                steps=(4, 20, 50),
                batches=(1, 4, 16),
                samplers=("ddim", "ddpm", "dpmpp_2m"),
            ),
        ),
        RepetitionRule(3, 0.5),
    ),
    # Every backend at four sizes across the family, for what each rung is worth.
    "ladder": Preset(
        (replace(_GPU, unets=("866M", "39M", "145M", "5B"), steps=(20,), backends=BACKENDS),),
        RepetitionRule(5, 2.0),
    ),
}


@dataclass(frozen=True)
class Choices:
    """What the command's options say, as typed (values may be comma separated); empty leaves the preset's."""

    size: Sequence[str] = ()
    unet: Sequence[str] = ()
    sampler: Sequence[str] = ()
    steps: Sequence[str] = ()
    batch: Sequence[str] = ()
    guidance: Sequence[str] = ()
    dtype: Sequence[str] = ()
    device: Sequence[str] = ()
    backend: Sequence[str] = ()
    task: Sequence[str] = ()
    latent: Sequence[str] = ()

    def __bool__(self) -> bool:
        return any(vars(self).values())


def select_cases(preset: str, choices: Choices) -> list[Case]:
    """The preset's cases with its lists replaced by those chosen; each case once.

    Raises CaseError for an unknown name, a number out of range, a checkpoint or device that is not there.
    """
    # The names of sizes and samplers belong to the packages that define them, and those load torch.
    from ldmperf.model import FAMILY
    from ldmperf.samplers import SAMPLERS

    for option, values in vars(choices).items():
        if values and not split_values(values):
            raise CaseError(f"--{option}: no value given; leave the option out to take the preset's")
    overrides: dict[str, object] = {
        "samplers": known_names("sampler", choices.sampler, SAMPLERS),
        "steps": tuple(whole_number("steps", text, 1000) for text in split_values(choices.steps)),
        "batches": tuple(whole_number("batch", text, MOST_IMAGES) for text in split_values(choices.batch)),
        "guidance_scales": tuple(_number("guidance", text) for text in split_values(choices.guidance)),
        "dtypes": known_names("dtype", [_DTYPE_ALIASES.get(d, d) for d in split_values(choices.dtype)], DTYPES),
        "devices": tuple(device_named(text) for text in split_values(choices.device)),
        "backends": known_names("backend", choices.backend, BACKENDS),
        "tasks": known_names("task", choices.task, TASKS),
        "latents": tuple(_latent(text) for text in split_values(choices.latent)),
        "unets": known_names("size", choices.size, FAMILY) + tuple(_checkpoint(path) for path in choices.unet),
    }
    given: dict[str, Any] = {name: values for name, values in overrides.items() if values}
    sweeps = preset_named(preset).sweeps
    # dict.fromkeys: a preset's second sweep may repeat cases of the first once its lists are replaced.
    return list(dict.fromkeys(case for sweep in sweeps for case in replace(sweep, **given).cases()))


def preset_named(name: str) -> Preset:
    """The preset of that name, or CaseError."""
    known_names("preset", [name], PRESETS)
    return PRESETS[name]


def _number(option: str, text: str) -> float:
    value = real(text)
    if not (math.isfinite(value) and value >= 1):
        raise CaseError(f"--{option}: {text!r} is not a number of at least 1 (1: without guidance)")
    return value


def _latent(text: str) -> tuple[int, int]:
    """Height and width of "64x96", or of a square "64"."""
    sides = text.split("x")
    if len(sides) > 2:
        raise CaseError(f"--latent: {text!r} is no size; give height x width in latent pixels, as in 64x96")
    height, width = (whole_number("latent", side, LARGEST_LATENT) for side in (sides[0], sides[-1]))
    return height, width


def check_devices(preset: str, cases: Iterable[Case]) -> None:
    """Raises CaseError where a device of the preset's cases is not here, before anything runs."""
    for name in dict.fromkeys(case.device for case in cases):
        try:
            device_named(name)
        except CaseError:
            raise CaseError(
                f"--preset {preset} needs a GPU and {name} is not here; on this machine name --preset cpu, "
                "or --device cpu"
            ) from None


def _checkpoint(text: str) -> str:
    """The absolute path, no link followed: of a file in the Hugging Face cache the link has the name."""
    try:
        path = Path(text).expanduser().absolute()
        if ".." in path.parts:
            # What ".." means is known to the file system alone.
            path = path.resolve() if path.name == ".." else path.parent.resolve() / path.name
        is_there = path.exists()
    except (OSError, RuntimeError):
        # A name that is too long, a loop of links, the home folder of an unknown user.
        path, is_there = Path(text), False
    if not is_there:
        raise CaseError(f"--unet: nothing at {path}; give a diffusers folder or a .safetensors file")
    return path_text(path)

"""The cases of a profile: the presets, and what the command's options make of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from ..measure.timing import RepetitionRule
from ..options import (
    LARGEST_SEED,
    LONGEST_SEQUENCE,
    CaseError,
    DType,
    best_device,
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
from .case import (
    BACKENDS,
    DEFAULT_BACKENDS,
    DEFAULT_GUIDANCE,
    MOST_IMAGES,
    PIPELINE_BACKENDS,
    PIPELINE_NAMES,
    RELEASED_NAMES,
    RUNGS,
    TASKS,
    Case,
    Task,
    path_text,
)


@dataclass(frozen=True)
class Combinations:
    """Lists of values, measured in all combinations; `guidance_scales` None takes each task's own."""

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
    tokens: tuple[int, ...] = (77,)
    seeds: tuple[int, ...] = (0,)

    def cases(self) -> Iterator[Case]:
        """Networks outermost, as they are dear to build; backends innermost, as they interleave."""
        for unet, task, dtype, device, seed in itertools.product(
            self.unets, self.tasks, self.dtypes, self.devices, self.seeds
        ):
            scales = (DEFAULT_GUIDANCE[task],) if self.guidance_scales is None else self.guidance_scales
            for (height, width), tokens, batch, scale, sampler, steps, backend in itertools.product(
                self.latents, self.tokens, self.batches, scales, self.samplers, self.steps, self.backends
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
                    context_tokens=tokens,
                    seed=seed,
                    backend=backend,
                )


@dataclass(frozen=True)
class Preset:
    """A named set of sweeps, and how often each trajectory is repeated."""

    sweeps: tuple[Combinations, ...]
    rule: RepetitionRule


_FAMILY = tuple(paper_sizes())
# Stable Diffusion's own size, then the ends of the cost curve, then its middle: a run may be cut short anywhere.
_FAMILY_TELLING_FIRST = tuple(dict.fromkeys(("866M", "39M", "5B", "318M", "2B", *_FAMILY)))
_CPU = Combinations(unets=_FAMILY[:3], steps=(2,), dtypes=("float32",), devices=("cpu",))
_GPU = Combinations(
    unets=_FAMILY, steps=(50,), dtypes=("bfloat16",), devices=("cuda",), backends=("graph", "diffusers")
)
_DROP_IN = replace(
    _GPU, steps=(20,), dtypes=("float16",), backends=("diffusers", "diffusers-accelerated", "graph")
)
PRESETS: dict[str, Preset] = {
    # Short: one step count for the cost of sizes, two more at 39M for the cost of steps.
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
    # Every rung at four sizes across the family, for what each rung is worth.
    "ladder": Preset(
        (replace(_GPU, unets=("866M", "39M", "145M", "5B"), steps=(20,), backends=RUNGS),),
        RepetitionRule(5, 2.0),
    ),
    # diffusers' own UNets before and after `ldmperf.model.dropin.accelerate`, beside our network.
    "drop-in": Preset(
        (
            replace(_DROP_IN, unets=("SD1.5",)),
            replace(_DROP_IN, unets=("SDXL",), latents=((128, 128),)),
        ),
        RepetitionRule(5, 2.0),
    ),
    # Stable Diffusion 1 from a prompt to an image: diffusers' pipeline before and after ours, then ours alone.
    "pipelines": Preset(
        (replace(_DROP_IN, unets=("SD1.5",), tasks=("pipeline",), backends=PIPELINE_BACKENDS),),
        RepetitionRule(5, 2.0),
    ),
}


# A line that ends within minutes.
_PIPELINE_ON_A_CPU = "--task pipeline --size SD1.5 --device cpu --latent 8x8 --steps 1"


def _size(option: str, text: str) -> str:
    return known_name(option, text, (*_FAMILY, *RELEASED_NAMES))


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


def select_cases(preset: str, choices: Choices, options: Mapping[str, CaseOption] = OPTIONS) -> list[Case]:
    """The cases of `chosen_sweeps`, each once."""
    # dict.fromkeys: a preset's second sweep may repeat cases of the first once its lists are replaced.
    return list(dict.fromkeys(case for sweep in chosen_sweeps(preset, choices, options) for case in sweep.cases()))


def chosen_sweeps(
    preset: str, choices: Choices, options: Mapping[str, CaseOption] = OPTIONS
) -> list[Combinations]:
    """The preset's sweeps with their lists replaced by those chosen, as the options read them.

    Raises CaseError for an unknown name, a number out of range, a checkpoint or device that is not there.
    """
    given: dict[str, Any] = {}
    for name, values in choices.items():
        option = options[name]
        if values and not split_values(values):
            raise CaseError(f"--{name}: no value given; leave the option out to take the preset's")
        if values:
            read = tuple(option.read(name, text) for text in option.split(values))
            given[option.field] = (*given.get(option.field, ()), *read)
    return [_of_its_task(replace(sweep, **given), given) for sweep in preset_named(preset).sweeps]


def _of_its_task(sweep: Combinations, given: Mapping[str, object]) -> Combinations:
    """The sweep on backends of its tasks: where none were given, on all of a pipeline's."""
    if "backends" not in given and sweep.tasks == ("pipeline",):
        sweep = replace(sweep, backends=PIPELINE_BACKENDS)
    for task, backend in itertools.product(sweep.tasks, sweep.backends):
        valid = PIPELINE_BACKENDS if task == "pipeline" else BACKENDS
        if backend not in valid:
            raise CaseError(f"--backend: {backend} does not run task {task}; choose from {', '.join(valid)}")
    others = [unet for unet in sweep.unets if unet not in PIPELINE_NAMES]
    if "pipeline" in sweep.tasks and others:
        raise CaseError(f"--task pipeline: no pipeline of {others[0]}; give --size {', '.join(PIPELINE_NAMES)}")
    return sweep


def usual_preset(choices: Choices) -> str:
    """The preset taken unless told: "gpu" where a chosen device is one, or without a choice where one is here."""
    devices = ",".join(choices.get("device", ())) or best_device()
    return "gpu" if "cuda" in devices else "cpu"


def preset_named(name: str) -> Preset:
    """The preset of that name, or CaseError."""
    return PRESETS[known_name("preset", name, PRESETS)]


def check_devices(preset: str, cases: Iterable[Case]) -> None:
    """Raises CaseError where a device of the preset's cases is not here, before anything runs.

    So for the preset pipelines on a CPU, unless a dtype of a CPU is chosen.
    """
    cases = list(cases)
    if preset == "pipelines" and any(case.device == "cpu" and case.dtype == "float16" for case in cases):
        raise CaseError(f"--preset pipelines is of a GPU; on a CPU give {_PIPELINE_ON_A_CPU} in its place")
    for name in dict.fromkeys(case.device for case in cases):
        try:
            device_named(name)
        except CaseError:
            here = _PIPELINE_ON_A_CPU if preset == "pipelines" else "--preset cpu, or --device cpu"
            raise CaseError(
                f"--preset {preset} needs a GPU and {name} is not here; on this machine name {here}"
            ) from None

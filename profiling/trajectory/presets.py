"""The cases of a profile: the presets, and what the command's options make of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..measure.timing import RepetitionRule
from ..options import CaseError, DType, best_device, device_named, known_name, split_values
from ..paper import paper_sizes
from .case import (
    BACKENDS,
    DEFAULT_BACKENDS,
    DEFAULT_GUIDANCE,
    PIPELINE_BACKENDS,
    PIPELINE_NAMES,
    RUNGS,
    Case,
    Task,
)
from .case_options import OPTIONS, CaseOption, Choices


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

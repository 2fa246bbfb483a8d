"""Is a trajectory's result right? The inputs of the check, the reference, the error and its tolerance."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ldmperf.model import UNet, UNetConfig
from ldmperf.samplers import initial_noise

from ..measure.environment import Environment
from ..measure.error import relative_rms
from ..measure.outcomes import Unsupported
from ..measure.store import write_whole
from ..measure.timing import timed
from ..options import DType
from .backend import Backend, Inputs, Problem
from .case import Case

# Relative RMS error of the final latents that passes. Right implementations differ by rounding alone: over guided
# DDIM trajectories of the 39M network by 5e-6 in float32, 4e-3 in float16, 4e-2 in bfloat16. Guidance that is 1 %
# off gives 7e-3, another prompt 1. bfloat16 thus catches only what is plainly wrong; finer faults show in float32.
TOLERANCES: dict[DType, float] = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}
# Rounding grows with the network, and is not measured beyond 39M. So in a half dtype an error also passes that is
# at most this many times the other implementation's. diffusers rounds its latents to the dtype after each step,
# ours stay float32: on a small network its error is 1.1 to 3.5 times ours, more with more steps.
ROUNDING_FACTOR = 1.5
DIFFUSERS_ROUNDING_FACTOR = 4.0
# No error above this passes, whatever the yardstick (another prompt gives 1).
LARGEST_TOLERANCE = 0.5

# Seeds of the check; timed round n takes those from (n + 1) times the batch on.
CHECK_ROUND = -1
_LOW_RESOLUTION_SEEDS = 1 << 32

# SDXL's pooled text embedding; base and refiner differ in how many numbers come with it.
_POOLED_WIDTH = 1280
_BASE_TIME_IDS, _REFINER_TIME_IDS = 6, 5


def make_inputs(problem: Problem, number: int, seed: int | None = None) -> Inputs:
    """Fresh random inputs of round `number`, the same on every device and for every backend.

    seed: the case's unless given, as for timed rounds, whose inputs a backend cannot know beforehand.
    """
    case, config = problem.case, problem.unet.config
    first = ((case.seed if seed is None else seed) + (number + 1) * case.batch) % 2**64
    seeds = tuple(range(first, first + case.batch))
    shape = (4, case.latent_height, case.latent_width)
    low_resolution = None
    if case.task == "sr":
        low_resolution = initial_noise([s + _LOW_RESOLUTION_SEEDS for s in seeds], shape, device=case.device)
    generator = torch.Generator().manual_seed(first)
    context = torch.randn(case.model_batch, case.context_tokens, config.context_dim, generator=generator)
    return Inputs(
        noise=initial_noise(seeds, shape, device=case.device),
        context=context.to(case.device, problem.unet.dtype),
        low_resolution=low_resolution,
        seeds=seeds,
        added={
            name: value.to(case.device, problem.unet.dtype)
            for name, value in added_conditions(case, config, generator).items()
        },
    )


def added_conditions(case: Case, config: UNetConfig, generator: torch.Generator) -> dict[str, Tensor]:
    """What SDXL's networks take beside the context, as its pipelines make them for an image of this size.

    A random pooled embedding, and time ids: the original size, the corner of the crop and the target size, in
    pixels; the refiner has an aesthetic score instead of the target size. Raises `Unsupported` where neither fits.
    """
    if config.added_dim is None or config.added_time_dim is None:
        return {}
    widths = {ids: config.added_dim - ids * config.added_time_dim for ids in (_BASE_TIME_IDS, _REFINER_TIME_IDS)}
    ids = next((ids for ids, width in widths.items() if width == _POOLED_WIDTH), _BASE_TIME_IDS)
    if widths[ids] < 1:
        raise Unsupported(
            f"{case.label} has an added embedding of {config.added_dim}, too narrow for {ids} numbers of "
            f"{config.added_time_dim}; only SDXL's base and refiner are measured"
        )
    size = [8.0 * case.latent_height, 8.0 * case.latent_width]
    numbers = [*size, 0.0, 0.0, *(size if ids == _BASE_TIME_IDS else [6.0])]
    return {
        "text_embeds": torch.randn(case.model_batch, widths[ids], generator=generator),
        "time_ids": torch.tensor([numbers]).repeat(case.model_batch, 1),
    }


def check_inputs(problem: Problem) -> Inputs:
    """The inputs of the check: with a stochastic sampler, the noise at its steps is the same for all too."""
    case = problem.case

    def step_noise(index: int) -> Tensor:
        generator = torch.Generator().manual_seed((case.seed + index) % 2**64)
        shape = (case.batch, 4, case.latent_height, case.latent_width)
        return torch.randn(shape, generator=generator).to(case.device)

    inputs = make_inputs(problem, CHECK_ROUND)
    return replace(inputs, step_noise=step_noise) if problem.plan.stochastic else inputs


@dataclass(frozen=True)
class Reference:
    """Final latents to compare with, the name of what made them, its time in ms (None where no run was needed)."""

    name: str
    latents: Tensor
    ms: float | None


def tolerances(
    dtype: DType,
    implementations: Mapping[str, str],
    errors: Mapping[str, float],
    references: Mapping[str, Reference],
) -> dict[str, float]:
    """The relative RMS error that passes, for each backend of a group: the dtype's own, or what rounding explains.

    By backend: `implementations`, whose code it is; `errors` of the first calls; `references` of these errors. In
    a half dtype an error also passes that is at most a factor times the other implementation's: that of its plain
    eager backend, else its least. This yardstick has to pass itself, and the float32 references of the two have to
    agree as float32 results must: then both compute the same thing, and a half dtype adds rounding alone. Two
    implementations that disagree do not excuse each other.
    """
    fixed = TOLERANCES[dtype]
    if dtype == "float32":
        return dict.fromkeys(errors, fixed)

    def tolerance(name: str, yardsticks: Collection[str]) -> float:
        others = [other for other in yardsticks if implementations[other] != implementations[name]]
        others = [other for other in others if other == implementations[other]] or others
        if not others:
            return fixed
        other = min(others, key=lambda other: errors[other])
        # Each one's reference is the other implementation's float32 result.
        if not relative_rms(references[name].latents, references[other].latents) <= TOLERANCES["float32"]:
            return fixed
        is_peer = implementations[name] == "diffusers"
        factor = DIFFUSERS_ROUNDING_FACTOR if is_peer else ROUNDING_FACTOR
        return max(fixed, min(factor * errors[other], LARGEST_TOLERANCE))

    # Neither a NaN nor more than any tolerance passes, nor says how much is rounding.
    passing = {name for name, error in errors.items() if error <= LARGEST_TOLERANCE}
    while True:
        found = {name: tolerance(name, passing) for name in errors}
        still = {name for name in passing if errors[name] <= found[name]}
        if still == passing:
            return found
        passing = still


class References:
    """Float32 references, each computed once a profile, or once for all profiles that share a folder.

    folder: where references of the family are kept, or None. code: what the result depends on beside the case, as
    text (commit, versions, device). With None (changed files) nothing is kept on disk.
    """

    def __init__(self, folder: Path | None = None, code: str | None = None) -> None:
        self._folder = folder if code is not None else None
        self._code = code
        self._known: dict[str, Reference] = {}
        self._wide: tuple[UNet, UNet] | None = None

    def get(self, problem: Problem, implementation: str, backends: Mapping[str, Backend]) -> Reference:
        """The latents of the check's inputs by another implementation than `implementation`, in float32.

        Weights and inputs are the case's, rounded to its dtype and then widened: the error is the arithmetic's.
        Without diffusers ours is compared with itself in a wider dtype: float64 for a float32 case. A reference
        that was kept has no time.
        """
        key = f"{problem.case.group_key} beside={implementation}"
        if key not in self._known:
            # A checkpoint's file may have changed.
            path = None if self._folder is None or problem.case.is_checkpoint else self._path(key)
            found = None if path is None else self._read(path, key)
            if found is None:
                found = self._compute(problem, implementation, backends, check_inputs(problem))
                if path is not None:
                    self._write(path, key, found)
            self._known[key] = found
            return found
        return replace(self._known[key], ms=None)

    def of_round(
        self, problem: Problem, implementation: str, backends: Mapping[str, Backend], inputs: Inputs
    ) -> Reference | None:
        """The reference of a timed round, whose inputs are random: computed anew, and not kept.

        None where no noise that a stochastic sampler draws is the same in another implementation or dtype.
        """
        if not problem.plan.stochastic:
            return self._compute(problem, implementation, backends, inputs)
        if implementation != "torch":
            return None
        return self._run(problem, "torch", self._wider(problem), backends, inputs)

    def release(self) -> None:
        """Frees the float32 network, which serves the references of one group.

        It may be twice as large as the measured network, and would count in its peak memory.
        """
        self._wide = None

    def _compute(
        self, problem: Problem, implementation: str, backends: Mapping[str, Backend], inputs: Inputs
    ) -> Reference:
        other = "diffusers" if implementation == "torch" else "torch"
        try:
            return self._run(problem, other, torch.float32, backends, inputs)
        except Unsupported:
            if implementation != "torch":
                raise
            return self._run(problem, "torch", self._wider(problem), backends, inputs)

    @staticmethod
    def _wider(problem: Problem) -> torch.dtype:
        """In which an implementation is compared with itself."""
        return torch.float64 if problem.unet.dtype == torch.float32 else torch.float32

    def _run(
        self, problem: Problem, name: str, dtype: torch.dtype, backends: Mapping[str, Backend], inputs: Inputs
    ) -> Reference:
        trajectory = backends[name].build(replace(problem, unet=self._widened(problem.unet, dtype)))
        wide = inputs.to(dtype)
        result = timed(lambda: trajectory(wide), torch.device(problem.case.device))
        return Reference(
            f"{name} {str(dtype).removeprefix('torch.')}", result.value.double().cpu(), result.wall_ms
        )

    def _widened(self, unet: UNet, dtype: torch.dtype) -> UNet:
        if unet.dtype == dtype:
            return unet
        if self._wide is None or self._wide[0] is not unet or self._wide[1].dtype != dtype:
            self._wide = None
            self._wide = (unet, copy.deepcopy(unet).to(dtype))
        return self._wide[1]

    def _path(self, key: str) -> Path:
        assert self._folder is not None
        digest = hashlib.sha256(f"{key} {self._code}".encode()).hexdigest()
        return self._folder / f"{digest[:32]}.safetensors"

    def _read(self, path: Path, key: str) -> Reference | None:
        try:
            with safe_open(path, framework="pt") as file:
                told = file.metadata() or {}
                if (told.get("key"), told.get("code")) != (key, self._code):
                    return None
                return Reference(told["name"], file.get_tensor("latents"), None)
        except (OSError, SafetensorError):
            # None yet, or torn: it is computed anew.
            return None

    def _write(self, path: Path, key: str, reference: Reference) -> None:
        told = {"key": key, "code": str(self._code), "name": reference.name}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, save({"latents": reference.latents.contiguous()}, metadata=told))


def code_identity(environment: Environment) -> str | None:
    """What a reference depends on beside its case, as text; None where files of the checkout have changed."""
    if environment.git_commit is None or environment.git_dirty:
        return None
    gpu = None if environment.gpu is None else environment.gpu.name
    versions = (environment.torch, environment.diffusers, environment.cudnn)
    return json.dumps((environment.git_commit, *versions, gpu, environment.cpu))

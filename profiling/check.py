"""Is a trajectory's result right? The inputs of the check, the reference, the error and its tolerance."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ldmperf.samplers import initial_noise

from .backends import Backend, Inputs, Problem, Unsupported
from .cases import DType
from .timing import timed

# Relative RMS error of the final latents that passes. Right implementations differ by rounding alone: over guided
# DDIM trajectories of the 39M network by 5e-6 in float32, 4e-3 in float16, 4e-2 in bfloat16. Guidance that is 1 %
# off gives 7e-3, another prompt 1. bfloat16 thus catches only what is plainly wrong; finer faults show in float32.
TOLERANCES: dict[DType, float] = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}

# Seeds of the check; timed round n takes those from (n + 1) times the batch on.
CHECK_ROUND = -1
_LOW_RESOLUTION_SEEDS = 1 << 32


def make_inputs(problem: Problem, number: int) -> Inputs:
    """Fresh random inputs of round `number`, the same on every device and for every backend."""
    case, config = problem.case, problem.unet.config
    first = case.seed + (number + 1) * case.batch
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
    )


def check_inputs(problem: Problem) -> Inputs:
    """The inputs of the check: with a stochastic sampler, the noise at its steps is the same for all too."""
    case = problem.case

    def step_noise(index: int) -> Tensor:
        generator = torch.Generator().manual_seed(case.seed + index)
        shape = (case.batch, 4, case.latent_height, case.latent_width)
        return torch.randn(shape, generator=generator).to(case.device)

    inputs = make_inputs(problem, CHECK_ROUND)
    return replace(inputs, step_noise=step_noise) if problem.plan.stochastic else inputs


def relative_rms(output: Tensor, reference: Tensor) -> float:
    """RMS of the difference over that of the reference, in float64 where the reference is; not finite where the
    output is not."""
    if output.shape != reference.shape:
        return math.inf
    exact = reference.double()
    return float((output.to(exact) - exact).norm() / exact.norm())


@dataclass(frozen=True)
class Reference:
    """Final latents to compare with, the name of what made them, and its time in ms unless it cost nothing."""

    name: str
    latents: Tensor
    ms: float | None


def compute_reference(problem: Problem, implementation: str, backends: Mapping[str, Backend]) -> Reference:
    """The check's trajectory by another implementation than `implementation`, in float32.

    The case's own weights and inputs, as rounded to its dtype, are taken up to float32: the error is that of the
    arithmetic. Without diffusers ours is compared with itself in a wider dtype: float64 for a float32 case.
    """
    other = "diffusers" if implementation == "torch" else "torch"
    dtype = torch.float32
    try:
        return _run(problem, other, dtype, backends)
    except Unsupported:
        if implementation != "torch":
            raise
        dtype = torch.float64 if problem.unet.dtype == torch.float32 else torch.float32
        return _run(problem, "torch", dtype, backends)


def _run(problem: Problem, name: str, dtype: torch.dtype, backends: Mapping[str, Backend]) -> Reference:
    unet = problem.unet if problem.unet.dtype == dtype else copy.deepcopy(problem.unet).to(dtype)
    trajectory = backends[name].build(replace(problem, unet=unet))
    inputs = check_inputs(problem).to(dtype)
    result = timed(lambda: trajectory(inputs), torch.device(problem.case.device))
    return Reference(f"{name} {str(dtype).removeprefix('torch.')}", result.value.double().cpu(), result.wall_ms)

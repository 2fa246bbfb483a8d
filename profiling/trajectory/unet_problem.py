"""The problem of the family: a UNet, a sampling plan, and the inputs of trajectories from noise to latents."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ldmperf.kernels import STEP_NOISE, philox_normal, seed_tensor
from ldmperf.model import UNet, UNetConfig
from ldmperf.samplers import SamplingPlan, initial_noise

from ..measure.outcomes import Unsupported
from ..step.flops import count_gflop, count_parameters
from ..step.roofline import StepPart, StepShape, step_parts
from .backend import Inputs, wider
from .case import Case

# Seeds of the check; timed round n takes those from (n + 1) times the batch on.
CHECK_ROUND = -1
_LOW_RESOLUTION_SEEDS = 1 << 32

# SDXL's pooled text embedding; base and refiner differ in how many numbers come with it.
_POOLED_WIDTH = 1280
_BASE_TIME_IDS, _REFINER_TIME_IDS = 6, 5


@dataclass(frozen=True)
class UNetProblem:
    """A trajectory of the plan on the UNet; a `Problem`."""

    case: Case
    unet: UNet
    plan: SamplingPlan
    scheduler_config: Mapping[str, object]

    @property
    def network(self) -> UNet:
        return self.unet

    @property
    def evaluations(self) -> int:
        return len(self.plan.steps)

    @property
    def is_stochastic(self) -> bool:
        return self.plan.stochastic

    @property
    def parameters(self) -> int:
        return count_parameters(self.unet.config)

    @property
    def gflop(self) -> float:
        case = self.case
        return count_gflop(self.unet.config, case.latent_height, case.latent_width, case.context_tokens)

    def step_parts(self) -> tuple[StepPart, ...]:
        """The launches of a step of ours, one by one."""
        return step_parts(self.unet.config, step_shape(self.case))

    def inputs(self, number: int, seed: int | None = None) -> Inputs:
        """Fresh random inputs of round `number`; `seed`: the case's unless given."""
        case, config = self.case, self.unet.config
        seeds = round_seeds(case, number, seed)
        shape = (4, case.latent_height, case.latent_width)
        low_resolution = None
        if case.task == "sr":
            low_resolution = initial_noise([s + _LOW_RESOLUTION_SEEDS for s in seeds], shape, device=case.device)
        generator = torch.Generator().manual_seed(seeds[0])
        context = torch.randn(case.model_batch, case.context_tokens, config.context_dim, generator=generator)
        return Inputs(
            noise=initial_noise(seeds, shape, device=case.device),
            context=context.to(case.device, self.unet.dtype),
            low_resolution=low_resolution,
            seeds=seeds,
            added={
                name: value.to(case.device, self.unet.dtype)
                for name, value in added_conditions(case, config, generator).items()
            },
        )

    def check_inputs(self) -> Inputs:
        """The inputs of the check: with a stochastic sampler, the noise at its steps is the same for all too."""
        case = self.case

        def step_noise(index: int) -> Tensor:
            generator = torch.Generator().manual_seed((case.seed + index) % 2**64)
            shape = (case.batch, 4, case.latent_height, case.latent_width)
            return torch.randn(shape, generator=generator).to(case.device)

        inputs = self.inputs(CHECK_ROUND)
        return replace(inputs, step_noise=step_noise) if self.is_stochastic else inputs

    def references(self, implementation: str, *, of_round: bool = False) -> tuple[tuple[str, torch.dtype], ...]:
        """The other implementation in float32. Without diffusers ours is compared with itself in a wider dtype.

        In a timed round each implementation draws noise of its own. Ours is known (`as_drawn`); diffusers draws
        another one in another dtype, so its rounds have no reference.
        """
        if of_round and self.is_stochastic and implementation != "torch":
            return ()
        if implementation == "torch":
            return ("diffusers", torch.float32), ("torch", wider(self.unet.dtype))
        return (("torch", torch.float32),)

    def as_drawn(self, inputs: Inputs) -> Inputs:
        """The inputs of a timed round, with the noise that our samplers draw from their seeds given."""
        if not self.is_stochastic:
            return inputs
        seeds, shape = seed_tensor(inputs.seeds, self.case.device), inputs.noise.shape[1:]
        return replace(inputs, step_noise=lambda index: philox_normal(seeds, shape, index, STEP_NOISE))

    def with_network(self, network: torch.nn.Module) -> UNetProblem:
        assert isinstance(network, UNet)
        return replace(self, unet=network)


def step_shape(case: Case) -> StepShape:
    """What the case's step depends on beside its network."""
    return StepShape(
        batch=case.batch,
        is_guided=case.guided,
        dtype=case.dtype,
        height=case.latent_height,
        width=case.latent_width,
        tokens=case.context_tokens,
    )


def round_seeds(case: Case, number: int, seed: int | None = None) -> tuple[int, ...]:
    """A seed for each image of round `number`, from that seed on, or the case's."""
    first = ((case.seed if seed is None else seed) + (number + 1) * case.batch) % 2**64
    return tuple(range(first, first + case.batch))


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

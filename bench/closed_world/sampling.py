"""Samples of the project's own loop for given prompts: the same prompts and noise for every network and cell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ldmperf.model import Conditioning, UNet
from ldmperf.samplers import SamplingPlan, Step, initial_noise, make_plan, sample

from .captions import embedded, none_embedded
from .data import Batch, Source
from .family import SCHEDULE, World
from .latents import CHANNELS
from .scenes import Scenes

Split = Literal["held-out", "test"]
_PROMPTS: dict[Split, int] = {"held-out": 54, "test": 55}
# Of each split other noise.
_NOISE: dict[Split, int] = {"held-out": 1 << 40, "test": 0}


@dataclass(frozen=True)
class Prompts:
    """Factors [n, 6] to make images of, and a seed of noise for each."""

    factors: Tensor
    seeds: Sequence[int]

    @classmethod
    def of(cls, split: Split, count: int) -> Prompts:
        """The first so many of a split."""
        first = _NOISE[split]
        return cls(torch.from_numpy(Scenes(_PROMPTS[split]).factors(0, count)), range(first, first + count))


def plan_of(sampler: str, steps: int) -> SamplingPlan:
    """A plan from the noisiest timestep on: the spacing "leading" ruins few steps."""
    return make_plan(sampler, SCHEDULE, steps, timestep_spacing="trailing")


def sampled(
    networks: Sequence[UNet],
    world: World,
    plan: SamplingPlan,
    prompts: Prompts,
    guidance: float,
    batch: int = 125,
    beside: Tensor | None = None,
) -> Tensor:
    """Latents [n, 4, h, w] in float32; `networks` has the one that takes each step.

    beside    [n, channels, h, w] that a network sees in further channels, such as latents of low resolution
    """
    device = next(networks[0].parameters()).device
    found = []
    with torch.inference_mode():
        for start in range(0, len(prompts.seeds), batch):
            place = slice(start, start + batch)
            context = embedded(prompts.factors[place])
            if guidance != 1:
                context = torch.cat([none_embedded(len(context)), context])
            conditions = {
                network: network.condition(plan.timesteps.tolist(), context.to(device))
                for network in set(networks)
            }

            seen = None if beside is None else beside[place].to(device)
            if seen is not None and guidance != 1:
                seen = torch.cat([seen, seen])

            def denoise(
                x: Tensor,
                step: Step,
                conditions: Mapping[UNet, Conditioning] = conditions,
                seen: Tensor | None = seen,
            ) -> Tensor:
                network = networks[step.index]
                if seen is not None:
                    x = torch.cat([x, seen], 1)
                return network.denoise(x, conditions[network], step.index)

            noise = initial_noise(prompts.seeds[place], (CHANNELS, world.latent, world.latent), device=device)
            made = sample(
                denoise,
                plan,
                noise,
                guidance_scale=guidance,
                seeds=prompts.seeds[place],
                backend=networks[0].choices.backend,
            )
            found.append(made.cpu())
    return torch.cat(found).contiguous()


def real_samples(world: World, split: Split, count: int, side: int | None = None) -> Batch:
    """Real scenes of the prompts of a split, of images of that side (`Source`)."""
    return Source(world, _PROMPTS[split], side).read(0, count)

"""The interface of a backend, which runs trajectories, and what it is given."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from ldmperf.model import UNet
from ldmperf.samplers import SamplingPlan

from .case import Case


@dataclass(frozen=True)
class Inputs:
    """What one trajectory starts from; the same values go to every backend of a group.

    noise [B, 4, H, W] float32, standard normal. context [B or 2B, T, Dctx] in the case's dtype, with guidance the
    unconditional half first. low_resolution [B, 4, H, W] for super-resolution, else None. seeds, one per image,
    are for the noise of stochastic samplers, unless step_noise(k) -> [B, 4, H, W] gives that of evaluation k.
    added: what SDXL's networks take beside the context, by diffusers' names: text_embeds [B or 2B, P] and time_ids
    [B or 2B, N]; empty for others.
    """

    noise: Tensor
    context: Tensor
    low_resolution: Tensor | None
    seeds: tuple[int, ...]
    step_noise: Callable[[int], Tensor] | None = None
    added: Mapping[str, Tensor] = field(default_factory=dict)

    def to(self, dtype: torch.dtype) -> Inputs:
        """The same values for a network in another dtype; the noise becomes float64 for that one."""
        state = torch.float64 if dtype == torch.float64 else torch.float32
        step_noise = self.step_noise
        return Inputs(
            self.noise.to(state),
            self.context.to(dtype),
            None if self.low_resolution is None else self.low_resolution.to(state),
            self.seeds,
            None if step_noise is None else lambda k: step_noise(k).to(state),
            {name: value.to(dtype) for name, value in self.added.items()},
        )


@dataclass(frozen=True)
class Problem:
    """What the backends of a group share; the case's own `backend` says nothing here."""

    case: Case
    unet: UNet
    plan: SamplingPlan
    scheduler_config: Mapping[str, object]


# From inputs to final latents [B, 4, H, W], all the work of a sample; runs on the problem's device. Until the next
# call the latents are the caller's, who overwrites their memory.
Trajectory = Callable[[Inputs], Tensor]


class Backend(Protocol):
    """A way to run trajectories. `implementation` names the plain eager backend of the same code: results are
    checked against those of another implementation, never against their own."""

    @property
    def implementation(self) -> str: ...

    def build(self, problem: Problem) -> Trajectory:
        """Makes the problem's trajectory callable; raises `Unsupported` where it cannot be run."""
        ...


@runtime_checkable
class Phased(Protocol):
    """A trajectory that prepares itself at its first call and can tell what that took."""

    @property
    def phases(self) -> Mapping[str, float]:
        """Milliseconds by the names of `records.Phases`."""
        ...


@runtime_checkable
class Configured(Protocol):
    """A backend with settings that its name does not tell."""

    @property
    def settings(self) -> tuple[str, ...]:
        """Each as people would write it down: a name, or name=value."""
        ...

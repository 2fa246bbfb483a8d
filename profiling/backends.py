"""What can run a trajectory: the interface of a backend, and our own eager one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ldmperf.model import UNet
from ldmperf.samplers import SamplingPlan, Step, sample

from .cases import Case


class Unsupported(Exception):
    """A case that a backend cannot run here; the text is one line that says why."""


@dataclass(frozen=True)
class Inputs:
    """What one trajectory starts from; the same values go to every backend of a group.

    noise [B, 4, H, W] float32, standard normal. context [B or 2B, T, Dctx] in the case's dtype, with guidance the
    unconditional half first. low_resolution [B, 4, H, W] for super-resolution, else None. seeds, one per image,
    are for the noise of stochastic samplers, unless step_noise(k) -> [B, 4, H, W] gives that of evaluation k.
    """

    noise: Tensor
    context: Tensor
    low_resolution: Tensor | None
    seeds: tuple[int, ...]
    step_noise: Callable[[int], Tensor] | None = None

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
        )


@dataclass(frozen=True)
class Problem:
    """What the backends of a group share; the case's own `backend` says nothing here."""

    case: Case
    unet: UNet
    plan: SamplingPlan
    scheduler_config: Mapping[str, object]


# From inputs to final latents [B, 4, H, W], all the work of a sample; runs on the problem's device.
Trajectory = Callable[[Inputs], Tensor]


class Backend(Protocol):
    """A way to run trajectories. `implementation` names the plain eager backend whose code it is: results are
    checked against another implementation's, never against its own."""

    @property
    def implementation(self) -> str: ...

    def build(self, problem: Problem) -> Trajectory:
        """Makes the problem's trajectory callable; raises `Unsupported` where it cannot be run."""
        ...


class TorchBackend:
    """Ours: hoisted conditioning, `sample`, and the reference operators in eager torch."""

    implementation = "torch"

    def build(self, problem: Problem) -> Trajectory:
        unet, plan, case = problem.unet, problem.plan, problem.case
        timesteps = [step.timestep for step in plan.steps]

        @torch.inference_mode()
        def trajectory(inputs: Inputs) -> Tensor:
            conditioning = unet.condition(timesteps, inputs.context)

            beside = inputs.low_resolution
            if beside is not None:
                beside = beside.repeat(case.model_batch // case.batch, 1, 1, 1)

            def denoise(model_input: Tensor, step: Step) -> Tensor:
                if beside is not None:
                    model_input = torch.cat([model_input, beside], dim=1)
                return unet.denoise(model_input, conditioning, step.index)

            return sample(
                denoise,
                plan,
                inputs.noise,
                guidance_scale=case.guidance_scale,
                seeds=inputs.seeds,
                step_noise=inputs.step_noise,
                backend="torch",
            )

        return trajectory


def default_backends() -> dict[str, Backend]:
    """Every backend by its name."""
    from .peers import DiffusersBackend

    return {"torch": TorchBackend(), "diffusers": DiffusersBackend()}

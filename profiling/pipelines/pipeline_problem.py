"""The problem of a pipeline: its components, and the prompts and the noise that a call starts from."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ldmperf.samplers import SamplingPlan, initial_noise

from ..step.flops import count_gflop
from ..step.roofline import StepPart, step_parts
from ..trajectory.backend import wider
from ..trajectory.case import PIPELINE_BACKENDS, Case
from ..trajectory.unet_problem import CHECK_ROUND, round_seeds, step_shape
from .components import Components, shape_of

# The plain eager backend of each code.
THEIRS, OURS = PIPELINE_BACKENDS[0], "sample"


@dataclass(frozen=True)
class PipelineInputs:
    """What a call starts from; the same values go to every backend of a group.

    prompts: one for each image, as `NumberTokenizer` reads them; the negative prompts are empty. noise
    [B, 4, H, W] float32, standard normal.
    """

    prompts: tuple[str, ...]
    noise: Tensor

    def to(self, dtype: torch.dtype) -> PipelineInputs:
        """The same values for networks in another dtype; the noise becomes float64 for these."""
        return replace(self, noise=self.noise.to(torch.float64 if dtype == torch.float64 else torch.float32))


@dataclass(frozen=True)
class PipelineProblem:
    """A pipeline's call on its components; a `Problem` whose result is images [B, 3, 8H, 8W] in [-1, 1].

    What is counted is the UNet's: GFLOP of an evaluation, and the floor of a step.
    """

    case: Case
    network: Components
    plan: SamplingPlan

    @property
    def evaluations(self) -> int:
        return len(self.plan.steps)

    @property
    def is_stochastic(self) -> bool:
        return False

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.network.parameters())

    @property
    def gflop(self) -> float:
        return unet_gflop(self.case)

    def step_parts(self) -> tuple[StepPart, ...]:
        """The launches of a step of ours, one by one."""
        return step_parts(self.network.unet.config, step_shape(self.case))

    def inputs(self, number: int, seed: int | None = None) -> PipelineInputs:
        """Fresh random inputs of round `number`; `seed`: the case's unless given."""
        case = self.case
        seeds = round_seeds(case, number, seed)
        generator = torch.Generator().manual_seed(seeds[0])
        # A sentence's worth, so that most of the context is what fills it up.
        length = min(12, case.context_tokens - 2)
        words = torch.randint(self.network.text.config.vocab_size - 2, (case.batch, length), generator=generator)
        prompts = tuple(" ".join(map(str, row)) for row in words.tolist())
        shape = (4, case.latent_height, case.latent_width)
        return PipelineInputs(prompts, initial_noise(seeds, shape, device=case.device))

    def check_inputs(self) -> PipelineInputs:
        """The inputs of the check."""
        return self.inputs(CHECK_ROUND)

    def references(self, implementation: str, *, of_round: bool = False) -> tuple[tuple[str, torch.dtype], ...]:
        """The other implementation in float32, or ours in a wider dtype where diffusers' cannot run."""
        if implementation == OURS:
            return (THEIRS, torch.float32), (OURS, wider(getattr(torch, self.case.dtype)))
        return ((OURS, torch.float32),)

    def as_drawn(self, inputs: PipelineInputs) -> PipelineInputs:
        """The same inputs: nothing is drawn in a call."""
        return inputs

    def with_network(self, network: nn.Module) -> PipelineProblem:
        assert isinstance(network, Components)
        return replace(self, network=network)


def unet_gflop(case: Case) -> float:
    """GFLOP of one evaluation of one image, two per multiply-add."""
    return count_gflop(shape_of(case).unet, case.latent_height, case.latent_width, case.context_tokens)

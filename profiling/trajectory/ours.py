"""Our own backends: the kernels or their references, eager, hoisted, or captured as a CUDA graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ldmperf.kernels import chip_of, dependent_launch_reasons, dependent_launches
from ldmperf.model import AUTO, FLOAT8_CHANNELS, SEPARATE, Choices, Conditioning, Constants, UNet
from ldmperf.samplers import Capture, CaptureError, CudaGraphs, GraphedSampler, Graphs, Step, sample

from ..measure.outcomes import Unsupported
from .backend import Inputs, Trajectory
from .check import FLOAT8_TOLERANCE
from .unet_problem import UNetProblem


@dataclass(frozen=True)
class Float8:
    """Which networks and levels multiply in float8, by their channels.

    network  of a network's first level at least: 320 of 866M. The matmuls of a smaller one take microseconds each,
             most of them launch and memory
    level    `least_channels` of `UNet.with_float8`
    """

    network: int = 320
    level: int = FLOAT8_CHANNELS

    def of(self, unet: UNet) -> UNet:
        """The network's float8 copy. Raises `Unsupported` where it has none."""
        width = unet.config.block_channels[0]
        if width < self.network:
            raise Unsupported(
                f"this backend takes networks of {self.network} channels or more at their first level, as of "
                f"866M; this one has {width}"
            )
        try:
            return unet.with_float8(least_channels=self.level)
        except ValueError as misfit:
            raise Unsupported(str(misfit)) from None


@dataclass(frozen=True)
class OurBackend:
    """Our network and `sample`, eager.

    operators: the kernels' backend. is_hoisted: whether the conditioning is computed once a trajectory, and not at
    each step. choices: what of UNet's is merged, nothing unless told. batch_invariant: UNet's option. float8: of
    which networks it takes a float8 copy.
    """

    operators: Literal["torch", "triton"]
    is_hoisted: bool = True
    choices: Choices = SEPARATE
    batch_invariant: bool = False
    float8: Float8 | None = None
    implementation = "torch"

    @property
    def tolerance(self) -> float | None:
        return None if self.float8 is None else FLOAT8_TOLERANCE

    def build(self, problem: UNetProblem) -> Trajectory:
        unet = our_unet(problem, self.operators, self.choices, self.batch_invariant, self.float8)
        plan, case = problem.plan, problem.case
        timesteps = [step.timestep for step in plan.steps]
        constants = kept_constants(unet) if self.is_hoisted else None

        @torch.inference_mode()
        def trajectory(inputs: Inputs) -> Tensor:
            conditioning = None
            if self.is_hoisted:
                conditioning = unet.condition(timesteps, inputs.context, **inputs.added, constants=constants)
            beside = low_resolution(inputs, problem)

            def denoise(model_input: Tensor, step: Step) -> Tensor:
                if beside is not None:
                    model_input = torch.cat([model_input, beside], dim=1)
                if conditioning is None:
                    return unet(model_input, step.timestep, inputs.context, **inputs.added)  # type: ignore[no-any-return]
                return unet.denoise(model_input, conditioning, step.index)

            return sample(
                denoise,
                plan,
                inputs.noise,
                guidance_scale=case.guidance_scale,
                seeds=inputs.seeds,
                step_noise=inputs.step_noise,
                input_dtype=unet.dtype,
                backend=self.operators,
            )

        return trajectory


@dataclass(frozen=True)
class GraphBackend:
    """Our kernels, hoisted, each step a replay of one captured graph.

    choices: what of UNet's is merged, what "auto" takes unless told. batch_invariant: UNet's option. dependent:
    whether launches of ours begin before those before them have ended (`ldmperf.kernels.dependent_launches`).
    float8: as of `OurBackend`.
    """

    graphs: Graphs | None = None
    operators: Literal["torch", "triton"] = "triton"
    choices: Choices = AUTO
    batch_invariant: bool = False
    dependent: bool = False
    float8: Float8 | None = None
    implementation = "torch"

    @property
    def tolerance(self) -> float | None:
        return None if self.float8 is None else FLOAT8_TOLERANCE

    def build(self, problem: UNetProblem) -> Trajectory:
        graphs = self.graphs or CudaGraphs()
        try:
            graphs.check(torch.device(problem.case.device))
        except CaptureError as reason:
            raise Unsupported(str(reason)) from None
        if self.dependent and (reasons := dependent_launch_reasons(chip_of(problem.unet.conv_in.weight.device))):
            raise Unsupported("; ".join(reasons))
        unet = our_unet(problem, self.operators, self.choices, self.batch_invariant, self.float8)
        return GraphTrajectory(problem, unet, self.operators, graphs, dependent=self.dependent)


class GraphTrajectory:
    """A trajectory of `GraphBackend`, captured at its first call.

    One capture is kept: a stochastic check, whose noise is given, needs another, which a timed run must not hold.
    """

    def __init__(
        self, problem: UNetProblem, unet: UNet, operators: str, graphs: Graphs, *, dependent: bool = False
    ) -> None:
        self._dependent = dependent
        self._problem = problem
        self._timesteps = [step.timestep for step in problem.plan.steps]
        self._unet = unet
        self._constants = kept_constants(self._unet)
        self._sampler: GraphedSampler[tuple[Conditioning, Tensor | None]] = GraphedSampler(
            self._denoise, max_captures=1, input_dtype=self._unet.dtype, backend=operators, graphs=graphs
        )

    def _denoise(self, model_input: Tensor, held: tuple[Conditioning, Tensor | None], step: Tensor) -> Tensor:
        conditioning, beside = held
        if beside is not None:
            model_input = torch.cat([model_input, beside], dim=1)
        return self._unet.denoise(model_input, conditioning, step)

    @torch.inference_mode()
    def __call__(self, inputs: Inputs) -> Tensor:
        problem = self._problem
        conditioning = self._unet.condition(
            self._timesteps, inputs.context, **inputs.added, constants=self._constants
        )
        held = conditioning, low_resolution(inputs, problem)
        with dependent_launches(self._dependent):
            return self._sampler(
                held,
                problem.plan,
                inputs.noise,
                guidance_scale=problem.case.guidance_scale,
                seeds=inputs.seeds,
                step_noise=inputs.step_noise,
            )

    @property
    def phases(self) -> Mapping[str, float]:
        return capture_phases(self._sampler.captures)


def capture_phases(captures: Sequence[Capture]) -> Mapping[str, float]:
    """What captures took, by the names of `records.Phases`; empty where nothing is captured."""
    if not captures:
        return {}
    return {
        "graph_warmup_ms": sum(capture.warm_up_ms for capture in captures),
        "capture_ms": sum(capture.capture_ms for capture in captures),
    }


def our_unet(
    problem: UNetProblem, operators: str, choices: Choices, batch_invariant: bool, float8: Float8 | None = None
) -> UNet:
    """The problem's network with its operators and what is merged on those backends; the weights are shared.

    With float8 those that it quantizes are not. Raises `Unsupported` where it cannot.
    """
    # The problem's own network has the reference operators.
    unet = problem.unet
    if operators != "torch" or batch_invariant:
        asked = choices._replace(backend=operators)._asdict()
        unet = unet.with_backend(**asked, batch_invariant=batch_invariant)
    return unet if float8 is None else float8.of(unet)


@torch.no_grad()
def kept_constants(unet: UNet) -> Constants:
    """The part of the conditioning that depends on the weights alone; made once, when a backend is built."""
    return unet.constants()


def low_resolution(inputs: Inputs, problem: UNetProblem) -> Tensor | None:
    """The latents that a super-resolution network reads beside its own, for its whole batch and in its dtype."""
    if inputs.low_resolution is None:
        return None
    case = problem.case
    copies = inputs.low_resolution.repeat(case.model_batch // case.batch, 1, 1, 1)
    return copies.to(problem.unet.dtype, memory_format=torch.channels_last)

"""The interfaces of what is measured (problem, subject) and of what runs it (backend); the family's inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, Self, runtime_checkable

import torch
from torch import Tensor

from ..step.roofline import StepPart
from .case import Case


@dataclass(frozen=True)
class Inputs:
    """What one trajectory of the family starts from; the same values go to every backend of a group.

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


def wider(dtype: torch.dtype) -> torch.dtype:
    """The dtype of a reference for results of this one: float64 for float32, float32 for a half dtype."""
    return torch.float64 if dtype == torch.float32 else torch.float32


# From a problem's inputs to its result, all the work of a sample; runs on the problem's device. The result of the
# family is the final latents [B, 4, H, W]. Until the next call its memory is the caller's, who overwrites it.
Trajectory = Callable[[Any], Tensor]


class Problem(Protocol):
    """What the backends of a group share: a network and the inputs of its trajectories.

    The case's own `backend` says nothing here. `evaluations`: of the network, in a trajectory. `is_stochastic`: a
    timed trajectory draws what the check's inputs give, so that the check is no sample. `gflop` is of one
    evaluation of one sample.
    """

    @property
    def case(self) -> Case: ...
    @property
    def network(self) -> torch.nn.Module: ...
    @property
    def evaluations(self) -> int: ...
    @property
    def is_stochastic(self) -> bool: ...
    @property
    def parameters(self) -> int: ...
    @property
    def gflop(self) -> float: ...

    def step_parts(self) -> Sequence[StepPart]:
        """What an evaluation of the whole batch computes and moves; raises where that cannot be counted."""
        ...

    def inputs(self, number: int, seed: int | None = None) -> Any:
        """Fresh random inputs of round `number`, the same on every device and for every backend.

        seed: the case's unless given, as for timed rounds, whose inputs a backend cannot know beforehand.
        """
        ...

    def check_inputs(self) -> Any:
        """The inputs of the check, the same at each call; `to(dtype)` makes them those of a wider network."""
        ...

    def references(self, implementation: str, *, of_round: bool = False) -> tuple[tuple[str, torch.dtype], ...]:
        """What results of `implementation` are compared with: backends and the dtypes they run in, best first.

        of_round: of a timed round, in which a stochastic trajectory draws for itself; empty where nobody else can
        know what it draws.
        """
        ...

    def as_drawn(self, inputs: Any) -> Any:
        """The inputs of a timed round, with what a trajectory draws given to its `references(of_round=True)`."""
        ...

    def with_network(self, network: torch.nn.Module) -> Self:
        """The same problem on another network, as on this one in a wider dtype."""
        ...


class Backend(Protocol):
    """A way to run trajectories. `implementation` names the plain eager backend of the same code: results are
    checked against those of another implementation, never against their own."""

    @property
    def implementation(self) -> str: ...

    def build(self, problem: Any) -> Trajectory:
        """Makes the trajectory of its subject's problem callable; raises `Unsupported` where it cannot be run."""
        ...


class Subject(Protocol):
    """How the cases of a task become problems, and the backends that run them."""

    @property
    def backends(self) -> Mapping[str, Backend]: ...

    def identity(self, case: Case) -> tuple[object, ...]:
        """What the case's network depends on: cases of equal identity share one."""
        ...

    def network(self, case: Case) -> torch.nn.Module:
        """The case's network, its weights made or loaded; raises `Unsupported` where there is none."""
        ...

    def problem(self, case: Case, network: Any) -> Problem:
        """The case's trajectory on its network; raises `Unsupported` for one that cannot be taken."""
        ...

    def gflop(self, case: Case) -> float | None:
        """GFLOP of one evaluation of one sample, counted without the weights; None where that cannot be."""
        ...


@runtime_checkable
class Phased(Protocol):
    """A trajectory that prepares itself at its first call and can tell what that took."""

    @property
    def phases(self) -> Mapping[str, float]:
        """Milliseconds by the names of `records.Phases`."""
        ...


@runtime_checkable
class Parted(Protocol):
    """A trajectory that can tell what the parts of its last call took, once the device has done them."""

    @property
    def parts(self) -> Mapping[str, float]:
        """Milliseconds by the names of `record_parts.Parts`."""
        ...


@runtime_checkable
class Coarse(Protocol):
    """A backend that may round more than the dtype of its case does."""

    @property
    def tolerance(self) -> float | None:
        """The relative RMS error of its results that passes, None for the dtype's own."""
        ...


@runtime_checkable
class Configured(Protocol):
    """A backend with settings that its name does not tell."""

    @property
    def settings(self) -> tuple[str, ...]:
        """Each as people would write it down: a name, or name=value."""
        ...

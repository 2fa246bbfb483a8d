"""The backends of rivals: their network eager, or under torch.compile as people recommend it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..measure.outcomes import Unsupported
from ..trajectory.backend import Backend, Trajectory
from ..trajectory.theirs import CompileMode, compiled, inductor_options
from .rival import RIVAL_BACKENDS
from .rival_problem import RivalProblem


@dataclass(frozen=True)
class RivalBackend:
    """A rival's network in channels-last memory, with the loop of its kind.

    compile_mode: torch.compile's, of the whole network as one graph for one shape, or None for eager. Both modes
    run what they compiled as CUDA graphs; their settings are those of the family's compiled peers.
    """

    compile_mode: CompileMode | None = None
    implementation = "eager"

    @property
    def settings(self) -> tuple[str, ...]:
        """What is set beside torch's defaults."""
        if self.compile_mode is None:
            return ()
        options = inductor_options(self.compile_mode)
        return ("fullgraph", *(f"{name}={value}" for name, value in options.items()))

    def build(self, problem: RivalProblem) -> Trajectory:
        case = problem.case
        if self.compile_mode is None:
            return torch.inference_mode()(problem.kind.trajectory(problem.network, case))
        if case.device == "cpu":
            raise Unsupported(f"torch.compile's {self.compile_mode} is for CUDA graphs: it needs a CUDA device")
        # Without gradients, as what inductor keeps between calls may not be of inference mode.
        return torch.no_grad()(problem.kind.trajectory(compiled(problem.network, self.compile_mode), case))


def rival_backends() -> Mapping[str, Backend]:
    """By name: eager, and compiled in the modes of the family's peers, whose graphs need a CUDA device."""
    modes: tuple[CompileMode | None, ...] = (None, "reduce-overhead", "max-autotune")
    return {name: RivalBackend(mode) for name, mode in zip(RIVAL_BACKENDS, modes, strict=True)}

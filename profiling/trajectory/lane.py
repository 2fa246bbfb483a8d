"""One backend's way through a group: what it built, measured and got wrong, until that becomes a record."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from ..measure.error import relative_rms
from ..measure.outcomes import Outcome
from ..measure.recorded import Correctness
from ..measure.timing import Timed, Times, timed
from .backend import Backend, Inputs, Phased, Trajectory
from .case import Case
from .check import TOLERANCES, Reference


def graph_memory(device: torch.device) -> int:
    """Bytes that are set aside for captured CUDA graphs and hold no tensor that torch counts as allocated."""
    return unused_in_pools(torch.cuda.memory_snapshot()) if device.type == "cuda" else 0


def unused_in_pools(segments: Iterable[Mapping[str, Any]]) -> int:
    """Of the allocator's segments, those outside the pool that all tensors share."""
    return sum(
        s["total_size"] - s["allocated_size"] for s in segments if s.get("segment_pool_id", (0, 0)) != (0, 0)
    )


@dataclass
class Lane(Outcome):
    """A backend in its group."""

    case: Case
    backend: Backend
    trajectory: Trajectory | None = None
    latents: Tensor | None = None
    phases: dict[str, float] = field(default_factory=dict)
    reference: str | None = None
    # The dtype's own until the group knows how the other implementation rounds.
    tolerance: float = field(init=False)
    error_before: float | None = None
    error_after: float | None = None
    times: Times = field(default_factory=Times)
    peak_memory_bytes: int | None = None
    graph_memory_bytes: int = 0
    warmup_count: int = 0
    # Of the check's inputs, run after or as the last of the timed trajectories.
    last_latents: Tensor | None = None
    is_recorded: bool = False

    def __post_init__(self) -> None:
        self.tolerance = TOLERANCES[self.case.dtype]

    @property
    def device(self) -> torch.device:
        return torch.device(self.case.device)

    def release(self) -> None:
        self.trajectory = self.latents = self.last_latents = None

    def run(self, inputs: Inputs) -> Timed[Tensor]:
        """One trajectory, on both clocks."""
        trajectory = self.trajectory
        assert trajectory is not None
        return timed(lambda: trajectory(inputs), self.device)

    def run_measured(self, inputs: Inputs) -> Timed[Tensor]:
        """One trajectory whose peak memory counts."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        result = self.run(inputs)
        if self.device.type == "cuda":
            # A replayed graph allocates nothing: its memory was set aside when it was captured.
            peak = torch.cuda.max_memory_allocated(self.device) + self.graph_memory_bytes
            self.peak_memory_bytes = max(peak, self.peak_memory_bytes or 0)
        return result

    @contextmanager
    def graph_memory_counted(self) -> Iterator[None]:
        """What is set aside for captured graphs meanwhile is this lane's."""
        before = graph_memory(self.device)
        yield
        self.graph_memory_bytes += max(graph_memory(self.device) - before, 0)

    def warm_up(self, inputs: Inputs) -> None:
        """One trajectory that is no sample, as what was freed has to be allocated again and captured anew."""
        self.phases["warmup_ms"] = self.phases.get("warmup_ms", 0.0) + self.run(inputs).wall_ms
        self.warmup_count += 1

    def take_phases(self) -> None:
        """What the trajectory tells of its preparation."""
        if isinstance(self.trajectory, Phased):
            self.phases.update(self.trajectory.phases)

    def check(self, latents: Tensor, reference: Reference, when: Literal["before", "after"]) -> None:
        """Compares final latents with the reference's; a wrong result ends this lane."""
        error = relative_rms(latents, reference.latents)
        self.reference = reference.name
        if when == "before":
            self.error_before = error if math.isfinite(error) else None
        else:
            self.error_after = error if math.isfinite(error) else None
        # A NaN is not at most the tolerance.
        if not error <= self.tolerance:
            self.fail(
                "incorrect",
                f"{when} timing the final latents were off {reference.name} by {error:.3g} (relative RMS); "
                f"at most {self.tolerance:.3g} passes",
            )

    @property
    def correctness(self) -> Correctness | None:
        """The errors seen so far; None when nothing was compared."""
        if self.reference is None:
            return None
        return Correctness(
            error_before=self.error_before,
            error_after=self.error_after,
            tolerance=self.tolerance,
            reference=self.reference,
        )

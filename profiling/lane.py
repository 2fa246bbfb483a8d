"""One backend's way through a group: what it built, measured and got wrong, until that becomes a record."""

from __future__ import annotations

import gc
import math
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from ldmperf.kernels import KernelUnsupported
from ldmperf.model import UnsupportedConfig

from .backends import Backend, Inputs, Phased, Trajectory, Unsupported
from .cases import Case
from .check import TOLERANCES, Reference, relative_rms
from .records import Correctness, Status
from .timing import Timed, Times, timed
from .visible import visible

T = TypeVar("T")

# How torch and the CUDA libraries word it where they raise no OutOfMemoryError.
_OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED")
_LONGEST_MESSAGE = 400


def failure(error: Exception) -> tuple[Status, str]:
    """The status that an exception stands for, and its first line with its type."""
    text = str(error)
    # A record's texts are JSON, which has no lone surrogates; a path in a message may.
    lines = [visible(line.strip()) for line in text.splitlines() if line.strip()]
    first = lines[0] if lines else "no message"
    if isinstance(error, Unsupported | KernelUnsupported | UnsupportedConfig):
        return "unsupported", _shortened(first)
    message = _shortened(f"{type(error).__name__}: {first}")
    out_of_memory = isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(words in text for words in _OUT_OF_MEMORY)
    )
    return ("oom" if out_of_memory else "error"), message


def _shortened(text: str) -> str:
    """At most so long, without its middle: a message begins with the cause and ends with what to do."""
    if len(text) <= _LONGEST_MESSAGE:
        return text
    half = _LONGEST_MESSAGE // 2 - 2
    return f"{text[:half]}... {text[-half:]}"


def graph_memory(device: torch.device) -> int:
    """Bytes that are set aside for captured CUDA graphs and hold no tensor that torch counts as allocated."""
    return unused_in_pools(torch.cuda.memory_snapshot()) if device.type == "cuda" else 0


def unused_in_pools(segments: Iterable[Mapping[str, Any]]) -> int:
    """Of the allocator's segments, those outside the pool that all tensors share."""
    return sum(
        s["total_size"] - s["allocated_size"] for s in segments if s.get("segment_pool_id", (0, 0)) != (0, 0)
    )


def release_memory() -> None:
    """Gives back what nothing refers to any more, to the device too."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


@dataclass(kw_only=True)
class Outcome:
    """How something that may fail is going. Once it has failed, further work is refused."""

    status: Status = "ok"
    message: str | None = None

    @property
    def active(self) -> bool:
        """Whether nothing has gone wrong so far."""
        return self.status == "ok"

    def release(self) -> None:
        """Gives up what a failure leaves no use for; a subclass holds something."""

    def fail(self, status: Status, message: str) -> None:
        """Ends this one; others go on with the memory it held."""
        self.status, self.message = status, message
        self.release()

    def fail_with(self, error: Exception) -> None:
        """Ends this one by an exception."""
        self.fail(*failure(error))
        # The frames of the traceback hold the tensors that the next one needs the room of.
        traceback.clear_frames(error.__traceback__)
        release_memory()

    def attempt(self, work: Callable[[], T]) -> T | None:
        """What `work` returns, or None when it raises, which ends this one, and when it has ended already."""
        if not self.active:
            return None
        try:
            return work()
        except Exception as error:
            self.fail_with(error)
            return None


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

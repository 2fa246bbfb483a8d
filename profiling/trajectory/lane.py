"""One backend's way through a group: built, called, checked, warmed up, sampled, checked again, recorded."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from ldmperf.model import CheckpointError

from ..measure.device_watch import DeviceWatch
from ..measure.environment import state_now
from ..measure.error import relative_rms
from ..measure.genuine import CallWatch
from ..measure.graph_memory import graph_memory
from ..measure.integrity import FIRST_CALL, WARM_UP, Returned
from ..measure.outcomes import Outcome, Untrusted
from ..measure.recorded import Correctness, Samples
from ..measure.timing import Timed, Times, timed
from ..terminal.visible import counted, visible
from .backend import Backend, Configured, Parted, Phased, Problem, Trajectory
from .case import Case
from .check import TOLERANCES, Reference, own_tolerance
from .group_facts import GroupFacts
from .record_parts import Energy, Parts, Phases
from .records import Record


@dataclass
class Lane(Outcome):
    """A backend in its group."""

    case: Case
    backend: Backend
    shared: GroupFacts
    trajectory: Trajectory | None = None
    # Of the check's inputs: from the first call, and from the last timed trajectory or one after it.
    first_latents: Tensor | None = None
    last_latents: Tensor | None = None
    # Of the last timed round whose inputs were fresh.
    round_latents: Tensor | None = None
    # The backend or reference that agreed with the latents of such a round.
    confirmed_by: str | None = None
    watch: CallWatch = field(default_factory=CallWatch)
    returned: Returned = field(default_factory=Returned)
    reference: Reference | None = None
    # The backend's own, or the dtype's until the group knows how the other implementation rounds.
    tolerance: float = field(init=False)
    errors: dict[Literal["before", "after"], float | None] = field(default_factory=dict)
    phases: dict[str, float] = field(default_factory=dict)
    times: Times = field(default_factory=Times)
    # Of the samples, in their order; empty where the trajectory has no parts.
    parts: dict[str, list[float]] = field(default_factory=dict)
    stopped_by: Literal["seconds"] | None = None
    peak_memory_bytes: int | None = None
    graph_memory_bytes: int = 0
    warmup_count: int = 0
    # The next trajectory would pay for memory that was given back.
    is_unsettled: bool = False
    is_recorded: bool = False
    # As `record` made it.
    made: Record | None = None
    during: DeviceWatch = field(init=False)

    def __post_init__(self) -> None:
        own = own_tolerance(self.backend)
        self.tolerance = TOLERANCES[self.case.dtype] if own is None else own
        self.during = DeviceWatch(self.shared.sensor)

    @property
    def name(self) -> str:
        return self.case.backend

    @property
    def device(self) -> torch.device:
        return torch.device(self.case.device)

    def release(self) -> None:
        self.trajectory = self.first_latents = self.last_latents = self.round_latents = None
        self.returned = Returned()

    def begin(self, problem: Problem) -> None:
        """Builds the trajectory and calls it once, on the check's inputs."""
        with self._graph_memory_counted():
            self.attempt(lambda: self._build_and_call(problem))

    def _build_and_call(self, problem: Problem) -> None:
        self.shared.entered(self.case, "build")
        start = time.perf_counter()
        with self.watch.around():
            self.trajectory = self.backend.build(problem)
        self.phases["build_ms"] = 1e3 * (time.perf_counter() - start)
        self.shared.entered(self.case, "first call")
        first = self.run(problem.check_inputs())
        self.phases["first_call_ms"] = first.wall_ms
        self._take_phases()
        self.first_latents = self.returned.take(first.value, FIRST_CALL)
        self.shared.ran(self.case, "first call")

    def warm_up(self, problem: Problem) -> None:
        """Runs once before timing."""
        self.shared.entered(self.case, "warm-up")
        # A stochastic check was captured with given noise: the graph that is timed is captured now.
        with self._graph_memory_counted():
            self.attempt(lambda: self._settle(problem))
        self._take_phases()
        if self.active:
            self.shared.ran(self.case, "warm-up")

    def sample(self, problem: Problem, number: int, is_last: bool) -> Timed[object]:
        """The sample of round `number`; the last one is of the check's inputs."""
        self.shared.entered(self.case, "check" if is_last else "timing")
        if self.is_unsettled:
            self._settle(problem)
            self.is_unsettled = False
        result = self.run_measured(problem.check_inputs() if is_last else self.round_inputs(problem, number))
        self.during.read_throttling()
        if isinstance(self.trajectory, Parted):
            for part, ms in self.trajectory.parts.items():
                self.parts.setdefault(part, []).append(ms)
        if is_last:
            self.last_latents = self.returned.take(result.value, "its last sample", may_repeat=FIRST_CALL)
        else:
            where = f"round {1 + number}"
            self.round_latents = self.returned.take(result.value, where)
            if not self.round_latents.isfinite().all():
                raise Untrusted("incorrect", f"in {where} the final latents were not finite")
        # Only now: a thread that is given time could still fill in the result.
        self.watch.settle()
        self.shared.ran(self.case, "check" if is_last else "timing")
        return Timed(None, result.wall_ms, result.gpu_ms)

    def round_inputs(self, problem: Problem, number: int) -> Any:
        """The inputs of timed round `number`, the same for all lanes of the group."""
        return problem.inputs(1 + number, self.shared.round_seed)

    def finish(self, problem: Problem, times: Times) -> None:
        """Keeps its times and checks it again: by its last sample, or by an untimed trajectory."""
        self.times = times
        self.attempt(self._judge_times)
        if self.last_latents is None and self.active:
            self.shared.entered(self.case, "check")
            self.last_latents = self.attempt(lambda: self._again(problem))
            self.shared.ran(self.case, "check")
        self.attempt(self.returned.let_go)
        if self.active:
            self.check("after")

    def _again(self, problem: Problem) -> Tensor:
        return self.returned.take(self.run(problem.check_inputs()).value, "the check", may_repeat=FIRST_CALL)

    def _judge_times(self) -> None:
        """Raises Untrusted where its times are not those of its work."""
        evaluations = self.shared.evaluations or 0
        least_ms = self.shared.least_ms(min((*self.times.wall_ms, *self.times.gpu_ms), default=math.inf))
        self.watch.judge(least_ms, f"a trajectory of {counted(evaluations, 'evaluation')}")

    def run(self, inputs: Any) -> Timed[Tensor]:
        """One trajectory, on both clocks."""
        trajectory = self.trajectory
        assert trajectory is not None
        self.returned.let_go()
        with self.watch.around():
            return timed(lambda: trajectory(inputs), self.device)

    def run_measured(self, inputs: Any) -> Timed[Tensor]:
        """One trajectory whose peak memory counts."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        result = self.run(inputs)
        self.watch.note(result)
        if self.device.type == "cuda":
            # A replayed graph allocates nothing: its memory was set aside when it was captured.
            peak = torch.cuda.max_memory_allocated(self.device) + self.graph_memory_bytes
            self.peak_memory_bytes = max(peak, self.peak_memory_bytes or 0)
        return result

    def check(self, when: Literal["before", "after"]) -> None:
        """Compares final latents with the reference's; a wrong result ends this lane."""
        latents = self.first_latents if when == "before" else self.last_latents
        assert latents is not None
        assert self.reference is not None
        error = relative_rms(latents, self.reference.latents)
        self.errors[when] = error if math.isfinite(error) else None
        # A NaN is not at most the tolerance.
        if not error <= self.tolerance:
            self.fail(
                "incorrect",
                f"{when} timing the result was off {self.reference.name} by {error:.3g} (relative RMS); "
                f"at most {self.tolerance:.3g} passes",
            )

    def record(self) -> Record:
        """The record of a finished lane."""
        self.is_recorded = True
        shared, reference, times = self.shared, self.reference, self.times
        beside = {name for order in times.order for name in order}
        no_counter = shared.sensor.missing if self.active else None
        self.made = shared.record(
            self.case,
            status=self.status,
            message=self.message and _without_place(self.message, self.case),
            correctness=None
            if reference is None
            else Correctness(
                error_before=self.errors.get("before"),
                error_after=self.errors.get("after"),
                tolerance=self.tolerance,
                reference=reference.name,
            ),
            wall_ms=Samples.of(times.wall_ms) if self.active else None,
            gpu_ms=Samples.of(times.gpu_ms) if self.active and times.gpu_ms else None,
            parts=Parts(**{part: Samples.of(ms) for part, ms in self.parts.items()})
            if self.active and self.parts
            else None,
            phases=Phases(
                weights_ms=shared.weights_ms,
                reference_ms=None if reference is None else reference.ms,
                **self.phases,
            ),
            peak_memory_bytes=self.peak_memory_bytes,
            energy=None if no_counter is None else Energy(message=no_counter),
            settings=self.backend.settings if isinstance(self.backend, Configured) else (),
            device_during=self.during.state,
            device_after=state_now(shared.sensor),
            harness=shared.harness(
                warmup_count=self.warmup_count,
                interleaved=tuple(name for name in shared.backends if name in beside),
                order=tuple(times.order),
                stopped_by=self.stopped_by,
                confirmed_by=self.confirmed_by,
            ),
        )
        return self.made

    @contextmanager
    def _graph_memory_counted(self) -> Iterator[None]:
        """Counts the memory that is set aside for captured graphs meanwhile as this lane's."""
        before = graph_memory(self.device)
        yield
        self.graph_memory_bytes += max(graph_memory(self.device) - before, 0)

    def _settle(self, problem: Problem) -> None:
        """Runs a trajectory that is no sample: it allocates again what was freed, and captures anew."""
        result = self.run(problem.inputs(0))
        self.returned.take(result.value, WARM_UP)
        self.phases["warmup_ms"] = self.phases.get("warmup_ms", 0.0) + result.wall_ms
        self.warmup_count += 1

    def _take_phases(self) -> None:
        """Adds what the trajectory tells of its preparation."""
        if isinstance(self.trajectory, Phased):
            self.phases.update(self.trajectory.phases)


def _without_place(message: str, case: Case) -> str:
    """A message without the folders above a checkpoint: records are shared, and do not say where it lies."""
    if case.is_checkpoint:
        # A CheckpointError escapes more of a path than `visible`.
        for shown in (visible(str(case.path.parent)), str(CheckpointError(str(case.path.parent)))):
            message = message.replace(f"{shown}/", "")
    return message

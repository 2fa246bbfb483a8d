"""One group of cases that differ only in the backend: built, checked, timed in turn, checked again, recorded.

The last timed trajectory of each runs on the check's inputs, so what was timed is what was checked; where a
stochastic sampler needs injected noise for that, the second check is a trajectory of its own, untimed. A backend
that has its samples leaves the rotation and is recorded at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Literal

import torch

from ldmperf.model import CheckpointError, UNet
from ldmperf.samplers import NoiseSchedule, make_plan

from ..measure.environment import DeviceState, Environment, device_state
from ..measure.error import relative_rms
from ..measure.outcomes import Unsupported, release_memory
from ..measure.recorded import Samples, utc_now
from ..measure.timing import Deadline, RepetitionRule, Timed, Times, garbage_collection_paused, interleave
from ..peer import SCHEDULER_CONFIG
from ..step.flops import count_gflop, count_parameters
from ..terminal.visible import visible
from .backend import Backend, Configured, Problem
from .case import Case
from .check import Reference, References, check_inputs, make_inputs, tolerances
from .lane import Lane
from .network import make_network
from .records import Harness, Phases, Record

# Told after each trajectory: whose it was, and "first call", "warm-up", "timing" or "check".
Ran = Callable[[Case, str], None]


def warmup_rounds(case: Case) -> int:
    """Untimed trajectories between the first call and timing: on the CPU the first call is warm-up enough."""
    return 0 if case.device == "cpu" else 1


def forget_compiled() -> None:
    """Drops what torch.compile made for an earlier group: it holds memory, and there is a limit on how much."""
    torch.compiler.reset()


class Networks:
    """Makes networks and keeps the last: neighbouring groups share it, and two might not fit."""

    def __init__(self) -> None:
        self._kept: tuple[tuple[object, ...], UNet, float] | None = None

    def get(self, case: Case) -> tuple[UNet, float]:
        """The case's network and how long making it took, in ms."""
        identity = (case.unet, case.task, case.dtype, case.device, case.seed)
        if self._kept is None or self._kept[0] != identity:
            self._kept = None
            release_memory()
            start = time.perf_counter()
            unet = make_network(case)
            self._kept = (identity, unet, 1e3 * (time.perf_counter() - start))
        return self._kept[1:]


def make_problem(case: Case, unet: UNet) -> Problem:
    """The case's trajectory on that network; raises `Unsupported` for steps that the sampler cannot take."""
    try:
        plan = make_plan(case.sampler, NoiseSchedule.from_diffusers(SCHEDULER_CONFIG), case.steps)
    except ValueError as refusal:
        raise Unsupported(str(refusal)) from None
    return Problem(case, unet, plan, SCHEDULER_CONFIG)


@dataclass
class _Shared:
    """What the records of a group have in common."""

    started_at: datetime
    before: DeviceState
    weights_ms: float | None = None
    parameters: int | None = None
    gflop: float | None = None
    evaluations: int | None = None


def _without_place(message: str, case: Case) -> str:
    """A message without the folders above a checkpoint: records are shared, and do not say where it lies."""
    if case.is_checkpoint:
        # A CheckpointError escapes more of a path than `visible`.
        for shown in (visible(str(case.path.parent)), str(CheckpointError(str(case.path.parent)))):
            message = message.replace(f"{shown}/", "")
    return message


class Group:
    """The cases, what they share, and a lane for each.

    recorded: called with the record of each lane as soon as that lane is done, failed or not. What `deadline` left
    no time to begin, or to take a single sample of, has no record.
    """

    def __init__(
        self,
        cases: Sequence[Case],
        rule: RepetitionRule,
        backends: Mapping[str, Backend],
        environment: Environment,
        references: References,
        run_id: str,
        *,
        ran: Ran,
        recorded: Callable[[Record], None],
        deadline: Deadline,
    ) -> None:
        self.case = cases[0]
        self.rule = rule
        self.backends = backends
        self.environment = environment
        self.run_id = run_id
        self.kept_references = references
        self.ran = ran
        self.recorded = recorded
        self.deadline = deadline
        self.lanes = {case.backend: Lane(case, backends[case.backend]) for case in cases}
        self.references: dict[str, Reference] = {}
        self.shared = _Shared(utc_now(), device_state(self.case.device))
        # Whose next trajectory would pay for memory that was given back.
        self.unsettled: set[str] = set()

    @property
    def active(self) -> list[Lane]:
        """The lanes that are not done and have not failed."""
        return [lane for lane in self.lanes.values() if lane.active and not lane.is_recorded]

    def measure(self, networks: Networks) -> None:
        """Measures all lanes; only an interrupt is raised."""
        forget_compiled()
        try:
            problem = self._problem(networks)
        except Exception as error:
            for lane in self.lanes.values():
                lane.fail_with(error)
        else:
            self._prepare(problem)
            self._time(problem)
        self._record_failed()

    def _problem(self, networks: Networks) -> Problem:
        case, shared = self.case, self.shared
        unet, shared.weights_ms = networks.get(case)
        problem = make_problem(case, unet)
        shared.evaluations = len(problem.plan.steps)
        shared.parameters = count_parameters(unet.config)
        shared.gflop = count_gflop(unet.config, case.latent_height, case.latent_width, case.context_tokens)
        return problem

    def _prepare(self, problem: Problem) -> None:
        """Builds, calls once, checks and warms up, so that nothing but timing is left."""
        begun = []
        for lane in self.lanes.values():
            if self.deadline.passed:
                break
            begun.append(lane)
            with lane.graph_memory_counted():
                self._build_and_call(lane, problem)
            self._record_failed()
        self.lanes = {lane.case.backend: lane for lane in begun}
        if not self.deadline.passed:
            self._check_first_calls(problem)
            self._record_failed()
        release_memory()
        for _ in range(warmup_rounds(self.case)):
            for lane in self.active:
                if self.deadline.passed:
                    break
                # A stochastic sampler's check was captured with given noise: what is timed is captured now.
                with lane.graph_memory_counted():
                    self._warm_up(lane, problem)
                lane.take_phases()
                self._record_failed()
        if problem.plan.stochastic:
            # A capture gives memory back too, that of those that are warm already.
            self._unsettle()

    def _build_and_call(self, lane: Lane, problem: Problem) -> None:
        start = time.perf_counter()
        lane.trajectory = lane.attempt(lambda: lane.backend.build(problem))
        if not lane.active:
            return
        lane.phases["build_ms"] = 1e3 * (time.perf_counter() - start)
        first = lane.attempt(lambda: lane.run(check_inputs(problem)))
        if first is not None:
            lane.phases["first_call_ms"] = first.wall_ms
            lane.take_phases()
            lane.latents = lane.attempt(lambda: first.value.double().cpu())
            self.ran(lane.case, "first call")

    def _check_first_calls(self, problem: Problem) -> None:
        # All references first: a lane that fails its check gives up the latents that another is compared with.
        for lane in self.active:
            reference = lane.attempt(partial(self._reference, lane, problem))
            if reference is not None:
                self.references[lane.case.backend] = reference
        self.kept_references.release()
        self._set_tolerances()
        for lane in self.active:
            assert lane.latents is not None
            lane.check(lane.latents, self.references[lane.case.backend], "before")

    def _set_tolerances(self) -> None:
        implementations = {name: lane.backend.implementation for name, lane in self.lanes.items()}
        errors = {}
        for lane in self.active:
            assert lane.latents is not None
            errors[lane.case.backend] = relative_rms(lane.latents, self.references[lane.case.backend].latents)
        for name, tolerance in tolerances(self.case.dtype, implementations, errors, self.references).items():
            self.lanes[name].tolerance = tolerance

    def _reference(self, lane: Lane, problem: Problem) -> Reference:
        """By another implementation: in float32 its own first call serves, else it is computed, once a profile."""
        implementation = lane.backend.implementation
        if problem.case.dtype == "float32":
            for name, other in self.lanes.items():
                plain = name == other.backend.implementation
                if plain and name != implementation and other.latents is not None:
                    return Reference(f"{name} float32", other.latents, None)
        for name, known in self.references.items():
            if self.lanes[name].backend.implementation == implementation:
                return known
        return self.kept_references.get(problem, implementation, self.backends)

    def _warm_up(self, lane: Lane, problem: Problem) -> None:
        lane.attempt(lambda: lane.warm_up(make_inputs(problem, 0)))
        if lane.active:
            self.ran(lane.case, "warm-up")
        else:
            self._unsettle()

    def _unsettle(self) -> None:
        """Memory was given back: nobody's next trajectory is a sample, where that costs (on a GPU)."""
        if warmup_rounds(self.case):
            self.unsettled = {lane.case.backend for lane in self.active}

    def _sample(self, lane: Lane, problem: Problem, number: int, is_last: bool) -> Timed[object]:
        if lane.case.backend in self.unsettled:
            lane.warm_up(make_inputs(problem, 0))
            self.unsettled.discard(lane.case.backend)
        if not is_last:
            sample = lane.run_measured(make_inputs(problem, 1 + number))
        else:
            sample = lane.run_measured(check_inputs(problem))
            lane.last_latents = sample.value.double().cpu()
        self.ran(lane.case, "check" if is_last else "timing")
        return Timed(None, sample.wall_ms, sample.gpu_ms)

    def _time(self, problem: Problem) -> None:
        # With noise that is given a stochastic sampler's check is no run of those that are timed.
        closing = not problem.plan.stochastic
        times: dict[str, Times] = {}

        def on_failure(name: str, error: Exception) -> None:
            self.lanes[name].fail_with(error)
            self._unsettle()
            self._record_failed()

        def on_done(names: Sequence[str]) -> None:
            for name in names:
                self._finish(self.lanes[name], times[name], problem)

        with garbage_collection_paused():
            interleave(
                {lane.case.backend: partial(self._sample, lane, problem) for lane in self.active},
                self.rule,
                on_failure,
                closing=closing,
                on_done=on_done,
                deadline=self.deadline,
                times=times,
            )
            for lane in self.active:
                taken = times[lane.case.backend]
                if not taken.wall_ms:
                    continue
                if closing:
                    last = lane.attempt(partial(self._sample, lane, problem, len(taken.wall_ms), True))
                    if last is None:
                        continue
                    taken.add(last)
                    taken.order.append((lane.case.backend,))
                self._finish(lane, taken, problem, stopped_by="seconds")

    def _finish(
        self, lane: Lane, times: Times, problem: Problem, stopped_by: Literal["seconds"] | None = None
    ) -> None:
        """Checks a lane that has its samples again, and records it."""
        lane.times = times
        if lane.last_latents is None:
            lane.last_latents = lane.attempt(lambda: lane.run(check_inputs(problem)).value.double().cpu())
            self.ran(lane.case, "check")
            self._unsettle()
        if lane.last_latents is not None:
            lane.check(lane.last_latents, self.references[lane.case.backend], "after")
        self._record(lane, stopped_by)

    def _record_failed(self) -> None:
        for lane in self.lanes.values():
            if not lane.active and not lane.is_recorded:
                self._record(lane)

    def _record(self, lane: Lane, stopped_by: Literal["seconds"] | None = None) -> None:
        shared, times = self.shared, lane.times
        reference = self.references.get(lane.case.backend)
        beside = {name for order in times.order for name in order}
        lane.is_recorded = True
        self.recorded(
            Record(
                run_id=self.run_id,
                case_key=lane.case.key,
                case=lane.case.recorded(),
                status=lane.status,
                message=lane.message and _without_place(lane.message, lane.case),
                correctness=lane.correctness,
                wall_ms=Samples.of(times.wall_ms) if lane.active else None,
                gpu_ms=Samples.of(times.gpu_ms) if lane.active and times.gpu_ms else None,
                phases=Phases(
                    weights_ms=shared.weights_ms,
                    reference_ms=None if reference is None else reference.ms,
                    **lane.phases,
                ),
                parameters=shared.parameters,
                gflop_per_forward=shared.gflop,
                evaluations=shared.evaluations,
                peak_memory_bytes=lane.peak_memory_bytes,
                settings=lane.backend.settings if isinstance(lane.backend, Configured) else (),
                device_before=shared.before,
                device_after=device_state(self.case.device),
                environment=self.environment,
                harness=Harness(
                    min_count=self.rule.min_count,
                    min_seconds=self.rule.min_seconds,
                    warmup_count=lane.warmup_count,
                    interleaved=tuple(name for name in self.lanes if name in beside),
                    order=tuple(times.order),
                    stopped_by=stopped_by,
                ),
                started_at=shared.started_at,
            )
        )

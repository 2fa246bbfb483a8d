"""One group of cases that differ only in the backend: built, checked, timed in turn, checked again, recorded.

The last timed round runs on the check's inputs, so what was timed is what was checked; where a stochastic sampler
needs injected noise for that, the second check is a round of its own, untimed.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import partial

import torch
from torch import Tensor

from ldmperf.model import UNet
from ldmperf.samplers import NoiseSchedule, make_plan

from .backends import Backend, Problem, Unsupported
from .cases import Case
from .check import Reference, check_inputs, compute_reference, make_inputs
from .environment import DeviceState, Environment, device_state, pinned_ptxas
from .flops import count_gflop, count_parameters
from .lane import Lane, release_memory
from .network import make_network
from .records import Harness, Phases, Record, Samples, utc_now
from .timing import RepetitionRule, Timed, garbage_collection_paused, interleave

# The scheduler of Stable Diffusion 1 and 2; each diffusers class and each plan takes what it knows from it.
SCHEDULER_CONFIG: Mapping[str, object] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "steps_offset": 1,
    "set_alpha_to_one": False,
    "clip_sample": False,
    "skip_prk_steps": True,
}


# Told after each trajectory: whose it was, and "first call", "warm-up", "timing" or "check".
Ran = Callable[[Case, str], None]


def warmup_rounds(case: Case) -> int:
    """Untimed trajectories between the first call and timing: on the CPU the first call is warm-up enough."""
    return 0 if case.device == "cpu" else 1


@contextmanager
def measuring_settings() -> Iterator[None]:
    """Process-wide switches of torch and triton while measuring, the same for all backends; put back afterwards.

    float32 means float32: no TF32 in products or convolutions. cuDNN chooses its algorithms by trying them, which
    falls into the first call. triton keeps to one ptxas, whatever a compiled peer does.
    """
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with (
            pinned_ptxas(),
            torch.backends.cudnn.flags(enabled=True, benchmark=True, deterministic=False, allow_tf32=False),
        ):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


def forget_compiled() -> None:
    """Drops what torch.compile made for an earlier group: it holds memory, and there is a limit on how much."""
    if "torch._dynamo" in sys.modules:
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


@dataclass
class _Shared:
    """What the records of a group have in common."""

    started_at: datetime
    before: DeviceState
    weights_ms: float | None = None
    parameters: int | None = None
    gflop: float | None = None
    evaluations: int | None = None


class Group:
    """The cases, what they share, and a lane for each."""

    def __init__(
        self, cases: Sequence[Case], rule: RepetitionRule, ran: Ran, backends: Mapping[str, Backend]
    ) -> None:
        self.case = cases[0]
        self.rule = rule
        self.ran = ran
        self.backends = backends
        self.lanes = {case.backend: Lane(case, backends[case.backend]) for case in cases}
        self.references: dict[str, Reference] = {}

    @property
    def active(self) -> list[Lane]:
        return [lane for lane in self.lanes.values() if lane.active]

    def measure(self, networks: Networks, environment: Environment) -> list[Record]:
        """The records of all lanes; only an interrupt is raised."""
        shared = _Shared(utc_now(), device_state(self.case.device))
        forget_compiled()
        try:
            problem = self._problem(networks, shared)
        except Exception as error:
            for lane in self.lanes.values():
                lane.fail_with(error)
        else:
            for lane in self.lanes.values():
                with lane.graph_memory_counted():
                    self._build_and_call(lane, problem)
            self._check_first_calls(problem)
            for lane in self.active:
                # A stochastic sampler's check was captured with given noise: what is timed is captured now.
                with lane.graph_memory_counted():
                    self._warm_up(lane, problem)
                lane.take_phases()
            release_memory()
            self._time_and_check(problem)
            for lane in self.active:
                lane.run_traced(make_inputs(problem, 0), len(problem.plan.steps))
        return self._records(shared, environment)

    def _problem(self, networks: Networks, shared: _Shared) -> Problem:
        case = self.case
        unet, shared.weights_ms = networks.get(case)
        try:
            plan = make_plan(case.sampler, NoiseSchedule.from_diffusers(SCHEDULER_CONFIG), case.steps)
        except ValueError as refusal:
            raise Unsupported(str(refusal)) from None
        shared.evaluations = len(plan.steps)
        shared.parameters = count_parameters(unet.config)
        shared.gflop = count_gflop(unet.config, case.latent_height, case.latent_width, case.context_tokens)
        return Problem(case, unet, plan, SCHEDULER_CONFIG)

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
        for lane in self.active:
            assert lane.latents is not None
            lane.check(lane.latents, self.references[lane.case.backend], "before")

    def _reference(self, lane: Lane, problem: Problem) -> Reference:
        """By another implementation: in float32 its own first call serves, else it is computed, once a group."""
        implementation = lane.backend.implementation
        if problem.case.dtype == "float32":
            for name, other in self.lanes.items():
                plain = name == other.backend.implementation
                if plain and name != implementation and other.latents is not None:
                    return Reference(f"{name} float32", other.latents, None)
        for name, known in self.references.items():
            if self.lanes[name].backend.implementation == implementation:
                return known
        return compute_reference(problem, implementation, self.backends)

    @staticmethod
    def _run(lane: Lane, problem: Problem, number: int) -> Timed[Tensor]:
        return lane.run(make_inputs(problem, number))

    def _warm_up(self, lane: Lane, problem: Problem) -> None:
        for number in range(warmup_rounds(self.case)):
            warm = lane.attempt(partial(self._run, lane, problem, number))
            if warm is not None:
                lane.phases["warmup_ms"] = lane.phases.get("warmup_ms", 0.0) + warm.wall_ms
                self.ran(lane.case, "warm-up")

    def _time_and_check(self, problem: Problem) -> None:
        stochastic = problem.plan.stochastic
        first_round = warmup_rounds(self.case)

        def run_once(lane: Lane) -> Callable[[int], Timed[object]]:
            def once(number: int) -> Timed[object]:
                sample = lane.run_measured(make_inputs(problem, first_round + number))
                self.ran(lane.case, "timing")
                return Timed(None, sample.wall_ms, sample.gpu_ms)

            return once

        def run_last(lane: Lane) -> Timed[Tensor]:
            # With noise that is given it is no run of those that are timed, whose memory counts.
            run = lane.run if stochastic else lane.run_measured
            sample = run(check_inputs(problem))
            return Timed(sample.value.double().cpu(), sample.wall_ms, sample.gpu_ms)

        with garbage_collection_paused():
            times = interleave(
                {name: run_once(lane) for name, lane in self.lanes.items() if lane.active},
                self.rule,
                lambda name, error: self.lanes[name].fail_with(error),
                to_come=0 if stochastic else 1,
            )
            last = [(lane, lane.attempt(partial(run_last, lane))) for lane in self.active]
        for lane, sample in last:
            if sample is None:
                continue
            lane.times = times[lane.case.backend]
            if not stochastic:
                lane.times.add(sample)
            self.ran(lane.case, "check")
            lane.check(sample.value, self.references[lane.case.backend], "after")

    def _records(self, shared: _Shared, environment: Environment) -> list[Record]:
        after = device_state(self.case.device)
        timed_lanes = tuple(name for name, lane in self.lanes.items() if lane.active)
        harness = Harness(
            min_count=self.rule.min_count,
            min_seconds=self.rule.min_seconds,
            warmup_count=warmup_rounds(self.case),
            interleaved=timed_lanes,
        )
        records = []
        for lane in self.lanes.values():
            reference = self.references.get(lane.case.backend)
            records.append(
                Record(
                    case_key=lane.case.key,
                    case=lane.case,
                    status=lane.status,
                    message=lane.message,
                    correctness=lane.correctness,
                    wall_ms=Samples.of(lane.times.wall_ms) if lane.active else None,
                    gpu_ms=Samples.of(lane.times.gpu_ms) if lane.active and lane.times.gpu_ms else None,
                    phases=Phases(
                        weights_ms=shared.weights_ms,
                        reference_ms=None if reference is None else reference.ms,
                        **lane.phases,
                    ),
                    parameters=shared.parameters,
                    gflop_per_forward=shared.gflop,
                    evaluations=shared.evaluations,
                    peak_memory_bytes=lane.peak_memory_bytes,
                    trace=lane.trace if lane.active else None,
                    device_before=shared.before,
                    device_after=after,
                    environment=environment,
                    harness=harness,
                    started_at=shared.started_at,
                )
            )
        return records

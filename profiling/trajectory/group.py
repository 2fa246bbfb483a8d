"""One group of cases that differ only in the backend: built, checked, timed in turn, checked again, recorded.

The last timed trajectory of each runs on the check's inputs, so what was timed is what was checked; where a
stochastic sampler needs injected noise for that, the second check is a trajectory of its own, untimed. A backend
that has its samples leaves the rotation and is recorded at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from ..measure.error import relative_rms
from ..measure.outcomes import release_memory
from ..measure.timing import Deadline, Timed, Times, garbage_collection_paused, interleave
from .backend import Backend, Problem
from .case import Case
from .check import Reference, References, own_tolerance, tolerances
from .energy_windows import EnergyTime, energy_windows
from .floors import Floors
from .group_facts import GroupFacts
from .lane import Lane
from .network import Networks
from .records import Record
from .shared_rounds import SharedRounds


def warmup_rounds(case: Case) -> int:
    """Untimed trajectories between the first call and timing: on the CPU the first call is warm-up enough."""
    return 0 if case.device == "cpu" else 1


@dataclass
class Group:
    """The cases, and a lane for each.

    on_record: called with the record of each lane as soon as that lane is done, failed or not. What `deadline`
    left no time to begin, or to take a single sample of, has no record.
    energy: the time for windows of energy after the timing of all lanes; None measures none.
    """

    cases: Sequence[Case]
    backends: Mapping[str, Backend]
    shared: GroupFacts
    references: References
    on_record: Callable[[Record], None]
    deadline: Deadline
    floors: Floors = field(default_factory=Floors)
    energy: EnergyTime | None = None
    lanes: list[Lane] = field(init=False)

    def __post_init__(self) -> None:
        self.lanes = [Lane(case, self.backends[case.backend], self.shared) for case in self.cases]

    @property
    def active(self) -> list[Lane]:
        """The lanes that are not done and have not failed."""
        return [lane for lane in self.lanes if lane.active and not lane.is_recorded]

    def measure(self, networks: Networks) -> None:
        """Measures all lanes; only an interrupt is raised."""
        # What was compiled for an earlier group holds memory, and torch limits how much it keeps.
        torch.compiler.reset()
        try:
            problem = self._problem(networks)
        except Exception as error:
            for lane in self.lanes:
                lane.fail_with(error)
        else:
            self._prepare(problem)
            self._time(problem)
            if self.energy is not None:
                energy_windows(self.lanes, problem, self.energy)
        self._record_failed()

    def _problem(self, networks: Networks) -> Problem:
        shared = self.shared
        shared.entered(self.cases[0], "weights")
        problem, shared.weights_ms = networks.problem(self.cases[0])
        shared.evaluations = problem.evaluations
        shared.parameters = problem.parameters
        shared.gflop = problem.gflop
        shared.floor = self.floors.of(problem)
        shared.floor_anew = partial(self.floors.anew, problem)
        return problem

    def _prepare(self, problem: Problem) -> None:
        """Builds, calls once, checks and warms up, so that nothing but timing is left."""
        begun = []
        for lane in self.lanes:
            if self.deadline.passed:
                break
            begun.append(lane)
            lane.begin(problem)
            self._record_failed()
        self.lanes = begun
        if not self.deadline.passed:
            self._check_first_calls(problem)
            self._record_failed()
        release_memory()
        for _ in range(warmup_rounds(problem.case)):
            for lane in self.active:
                if self.deadline.passed:
                    break
                lane.warm_up(problem)
                if not lane.active:
                    self._unsettle()
                self._record_failed()
        if problem.is_stochastic:
            # A capture takes memory away from lanes that are warm already.
            self._unsettle()

    def _check_first_calls(self, problem: Problem) -> None:
        # All references first: a lane that fails its check gives up the latents that another is compared with.
        for lane in self.active:
            lane.reference = lane.attempt(partial(self._reference, lane, problem))
        self.references.release()
        references, errors = {}, {}
        for lane in self.active:
            assert lane.reference is not None
            assert lane.first_latents is not None
            references[lane.name] = lane.reference
            errors[lane.name] = relative_rms(lane.first_latents, lane.reference.latents)
        implementations = {lane.name: lane.backend.implementation for lane in self.active}
        coarse = {lane.name: own_tolerance(lane.backend) for lane in self.active}
        own = {name: tolerance for name, tolerance in coarse.items() if tolerance is not None}
        passing = tolerances(problem.case.dtype, implementations, errors, references, own)
        for lane in self.active:
            lane.tolerance = passing[lane.name]
            lane.check("before")

    def _reference(self, lane: Lane, problem: Problem) -> Reference:
        """Another implementation's latents: in float32 those of its first call, else computed, once a profile."""
        implementation = lane.backend.implementation
        if problem.case.dtype == "float32":
            for other in self.lanes:
                is_plain = other.name == other.backend.implementation != implementation
                if is_plain and other.first_latents is not None:
                    return Reference(f"{other.name} float32", other.first_latents, None)
        for other in self.lanes:
            if other.reference is not None and other.backend.implementation == implementation:
                return other.reference
        self.shared.entered(lane.case, "reference")
        return self.references.get(problem, implementation, self.backends)

    def _unsettle(self) -> None:
        """Memory was given back: nobody's next trajectory is a sample, where that costs (on a GPU)."""
        for lane in self.active:
            lane.is_unsettled = warmup_rounds(lane.case) > 0

    def _time(self, problem: Problem) -> None:
        # A stochastic sampler's check has given noise, unlike what is timed: it cannot be a sample.
        closing = not problem.is_stochastic
        lanes = {lane.name: lane for lane in self.active}
        rounds = SharedRounds(problem, self.references, self.backends)

        def sample(lane: Lane, number: int, is_last: bool) -> Timed[object]:
            taken = lane.sample(problem, number, is_last)
            if not is_last:
                rounds.compare(lane, number)
            return taken

        def on_failure(name: str, error: Exception) -> None:
            lanes[name].fail_with(error)
            self._unsettle()
            self._record_failed()

        def on_done(done: Mapping[str, Times]) -> None:
            for name, times in done.items():
                self._finish(lanes[name], times, problem, rounds)

        with garbage_collection_paused():
            taken = interleave(
                {name: partial(sample, lane) for name, lane in lanes.items()},
                self.shared.rule,
                on_failure,
                closing=closing,
                on_done=on_done,
                deadline=self.deadline,
            )
            for lane in self.active:
                times = taken[lane.name]
                if not times.wall_ms:
                    continue
                if closing:
                    last = lane.attempt(partial(lane.sample, problem, len(times.wall_ms), True))
                    if last is None:
                        continue
                    times.add(last)
                    times.order.append((lane.name,))
                lane.stopped_by = "seconds"
                self._finish(lane, times, problem, rounds)

    def _finish(self, lane: Lane, times: Times, problem: Problem, rounds: SharedRounds) -> None:
        floor = self.shared.floor
        lane.finish(problem, times)
        gave_back = rounds.confirm(lane)
        # Ceilings that were measured anew took memory too.
        if problem.is_stochastic or gave_back or self.shared.floor is not floor:
            self._unsettle()
        self.on_record(lane.record())

    def _record_failed(self) -> None:
        for lane in self.lanes:
            if not lane.active and not lane.is_recorded:
                self.on_record(lane.record())

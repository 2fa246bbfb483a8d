"""One kernel case: its peers built, checked, timed in turn, checked again, recorded."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

import torch
from torch import Tensor

from ..measure.environment import DeviceState, Environment, device_state
from ..measure.outcomes import Outcome, Unsupported, release_memory
from ..measure.recorded import Correctness, Samples, utc_now
from ..measure.settings import measuring_settings
from ..measure.timing import Timed, Times, garbage_collection_paused, interleave, timed
from .device import EagerCalls, GraphCalls, Pace, Workload, calibrated, input_sets, l2_cache_bytes, timed_run
from .implementation import Arguments, Implementation
from .inputs import CallInputs, tolerance_of
from .kernel_records import CopyBandwidth, KernelRecord, Mode, UnitRates, record_key
from .peers import Peer
from .selection import Job

_REFERENCE = "ours, float64"


@dataclass
class _Contestant(Outcome):
    """A peer on a case: built, called once and compared; its calls on every set of inputs."""

    peer: Peer
    implementation: Implementation | None = None
    first_call_ms: float | None = None
    polynomial: int | None = None
    error: float | None = None
    calls: list[Callable[[], Any]] = field(default_factory=list)

    def release(self) -> None:
        self.implementation, self.calls = None, []

    def setting(self) -> AbstractContextManager[Any]:
        """Within which its calls are made."""
        return nullcontext() if self.implementation is None else self.implementation.setting()


@dataclass
class _Contender(Outcome):
    """A contestant in one mode."""

    contestant: _Contestant
    mode: Mode
    workload: Workload | None = None
    runs: int = 1
    error_after: float | None = None
    ms: list[float] = field(default_factory=list)
    calls_per_sample: int = 1
    delay_cycles: int = 0
    # Whether it ran since memory was last given back to the device; what takes memory again is no sample.
    is_warm: bool = False

    def release(self) -> None:
        self.workload = None


class KernelBench:
    """Measures jobs on one device; `copy` and `rates` are what that device does, measured in this run."""

    def __init__(
        self,
        device: str,
        peers: Sequence[Peer],
        modes: Sequence[Mode],
        pace: Pace,
        environment: Environment,
        copy: CopyBandwidth | None,
        rates: UnitRates | None = None,
        seed: int = 0,
    ) -> None:
        self.device_name, self.device = device, torch.device(device)
        self.peers, self.modes, self.pace = peers, modes, pace
        self.environment, self.copy, self.rates, self.seed = environment, copy, rates, seed
        self._operators: set[str] = set()

    def keys(self, job: Job) -> set[str]:
        """The keys of the records that `measure` would make of it now."""
        return {
            record_key(job.case, self.device_name, peer.name, mode, self.seed)
            for peer in self._peers_of(job)
            for mode in self.modes
        }

    def skip(self, job: Job) -> None:
        """Takes its records as there: what one record an operator says is not said again."""
        self._operators.add(job.case.operator)

    def _peers_of(self, job: Job) -> list[Peer]:
        first = job.case.operator not in self._operators
        return [peer for peer in self.peers if peer.serves(job.case, first)]

    @torch.inference_mode()
    def measure(self, job: Job) -> list[KernelRecord]:
        """The records of all peers in all modes; only an interrupt is raised."""
        case = job.case
        contestants = [_Contestant(peer) for peer in self._peers_of(job)]
        self._operators.add(case.operator)
        lanes = [_Contender(contestant, mode) for mode in self.modes for contestant in contestants]
        started_at, before = utc_now(), device_state(self.device_name)
        moved = case.bytes_moved
        count, cold = input_sets(moved, l2_cache_bytes(self.device))
        with measuring_settings():
            try:
                inputs = CallInputs(case, count, self.device, self.seed)
                reference = inputs.reference()
            except Exception as error:
                for contestant in contestants:
                    contestant.fail_with(error)
            else:
                for contestant in contestants:
                    self._build_and_check(contestant, inputs, reference)
                for mode in self.modes:
                    self._time([lane for lane in lanes if lane.mode == mode], inputs, reference)
            for lane in lanes:
                if lane.contestant.message is not None:
                    lane.fail(lane.contestant.status, lane.contestant.message)
        after = device_state(self.device_name)
        records = [
            self._record(job, lane, started_at, before, after, (count, "cold" if cold else "warm"))
            for lane in lanes
        ]
        del contestants, lanes
        release_memory()
        return records

    def _build_and_check(self, contestant: _Contestant, inputs: CallInputs, reference: tuple[Tensor, ...]) -> None:
        implementation = contestant.attempt(lambda: contestant.peer.build(inputs.case, self.device))
        if implementation is None:
            return
        contestant.implementation = implementation
        contestant.polynomial = contestant.attempt(lambda: _polynomial(implementation, inputs.sets[0]))
        inputs.restore()
        prepared = contestant.attempt(lambda: [implementation.prepare(arguments) for arguments in inputs.sets])
        if prepared is None:
            return
        contestant.calls = [functools.partial(implementation.call, **arguments) for arguments in prepared]
        with contestant.setting():
            result = contestant.attempt(lambda: timed(contestant.calls[0], self.device))
        if result is None:
            return
        contestant.first_call_ms = result.wall_ms
        contestant.error = _checked(contestant, inputs, result.value, reference, "before")

    def _time(self, lanes: Sequence[_Contender], inputs: CallInputs, reference: tuple[Tensor, ...]) -> None:
        lanes = [lane for lane in lanes if lane.contestant.active]
        for lane in lanes:
            with lane.contestant.setting():
                lane.workload = lane.attempt(functools.partial(self._workload, lane))
                runs = lane.attempt(functools.partial(self._calibrated, lane))
            if runs is not None and lane.workload is not None:
                lane.runs, lane.calls_per_sample = runs, runs * lane.workload.calls_per_run
                lane.delay_cycles = lane.workload.delay_cycles if self.device.type == "cuda" else 0
        running = {lane.contestant.peer.name: lane for lane in lanes if lane.active}

        def one_sample(lane: _Contender, *_: object) -> Timed[object]:
            workload = lane.workload
            assert workload is not None
            with lane.contestant.setting():
                if not lane.is_warm:
                    workload.run(lane.runs)
                    lane.is_warm = True
                return timed_run(workload, lane.runs, self.device)

        def failed(name: str, failure: Exception) -> None:
            running[name].fail_with(failure)
            for lane in running.values():
                lane.is_warm = False

        with garbage_collection_paused():
            times = interleave(
                {name: functools.partial(one_sample, lane) for name, lane in running.items()},
                self.pace.rule,
                failed,
            )
        for name, found in times.items():
            running[name].ms = [ms / running[name].calls_per_sample for ms in _clock(found)]
        for lane in lanes:
            if lane.active:
                lane.error_after = self._check_again(lane, inputs, reference)
            lane.release()
        release_memory()

    def _workload(self, lane: _Contender) -> Workload:
        if lane.mode == "eager":
            return EagerCalls(lane.contestant.calls)
        if self.device.type != "cuda":
            raise Unsupported("a CUDA graph needs a GPU")
        if not lane.contestant.peer.capturable:
            raise Unsupported(f"{lane.contestant.peer.name} runs host code between its launches")
        try:
            return GraphCalls(lane.contestant.calls, self.device)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise Unsupported(
                f"cannot be captured: {str(error).splitlines()[0] if str(error) else error!r}"
            ) from None

    def _calibrated(self, lane: _Contender) -> int:
        assert lane.workload is not None
        return calibrated(lane.workload, self.pace, self.device)

    def _check_again(self, lane: _Contender, inputs: CallInputs, reference: tuple[Tensor, ...]) -> float | None:
        """The first set's result once more, by the very workload that was timed."""
        inputs.restore()
        workload = lane.workload

        def again() -> Any:
            if isinstance(workload, GraphCalls):
                for tensor in _tensors(workload.results[0]):
                    tensor.fill_(math.nan)
                workload.run(1)
                return workload.results[0]
            return lane.contestant.calls[0]()

        with lane.contestant.setting():
            result = lane.attempt(again)
        return _checked(lane, inputs, result, reference, "after") if lane.active else None

    def _record(
        self,
        job: Job,
        lane: _Contender,
        started_at: datetime,
        before: DeviceState,
        after: DeviceState,
        sets: tuple[int, Literal["cold", "warm"]],
    ) -> KernelRecord:
        contestant = lane.contestant
        correctness = None
        if contestant.error is not None or lane.status == "incorrect":
            correctness = Correctness(
                error_before=contestant.error,
                error_after=lane.error_after,
                tolerance=tolerance_of(job.case),
                reference=_REFERENCE,
            )
        ok = lane.active
        return KernelRecord(
            case_key=record_key(job.case, self.device_name, contestant.peer.name, lane.mode, self.seed),
            size=job.size,
            batch=job.batch,
            case=job.case,
            peer=contestant.peer.name,
            mode=lane.mode,
            device=self.device_name,
            seed=self.seed,
            status=lane.status,
            message=lane.message,
            correctness=correctness,
            ms=Samples.of(lane.ms) if ok else None,
            clock=("device" if self.device.type == "cuda" else "host") if ok else None,
            calls_per_sample=lane.calls_per_sample if ok else None,
            delay_cycles=lane.delay_cycles if ok else None,
            input_sets=sets[0] if ok else None,
            l2=sets[1] if ok else None,
            first_call_ms=contestant.first_call_ms,
            copy_bandwidth=self.copy,
            unit_rates=self.rates if job.case.attention is not None else None,
            polynomial=contestant.polynomial,
            device_before=before,
            device_after=after,
            environment=self.environment,
            interleaved=tuple(peer.name for peer in self.peers),
            started_at=started_at,
        )


def _polynomial(implementation: Implementation, arguments: Arguments) -> int | None:
    """How many of every eight exponentials its launches evaluate as a polynomial, where they say so."""
    launches = [] if implementation.launches is None else implementation.launches(**arguments)
    found = [launch.arguments.get("POLYNOMIAL") for launch in launches]
    return max((int(share) for share in found if share is not None), default=None)


def _clock(times: Times) -> list[float]:
    return times.gpu_ms or times.wall_ms


def _tensors(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result or ())


def _checked(
    checked: Outcome,
    inputs: CallInputs,
    result: Any,
    reference: tuple[Tensor, ...],
    when: Literal["before", "after"],
) -> float | None:
    """The largest relative RMS error of the outputs, None unless finite; a wrong result ends the outcome."""

    error = checked.attempt(lambda: inputs.error(result, reference))
    if error is None:
        return None
    tolerance = tolerance_of(inputs.case)
    if error > tolerance:
        checked.fail(
            "incorrect",
            f"{when} timing the result was off {_REFERENCE} by {error:.3g} (relative RMS); "
            f"at most {tolerance:g} passes",
        )
    return error if math.isfinite(error) else None

"""One kernel case: its peers built, checked, timed in turn, checked again, recorded."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

import torch
from torch import Tensor

from ldmperf.kernels import OPERATORS

from ..backends import Unsupported
from ..cases import DType
from ..check import relative_rms
from ..environment import DeviceState, Environment, device_state
from ..group import measuring_settings
from ..kernel_cases import KernelCase
from ..lane import Outcome, release_memory
from ..records import Correctness, Samples, utc_now
from ..timing import Timed, Times, garbage_collection_paused, interleave, timed
from .device import EagerCalls, GraphCalls, Pace, Workload, calibrated, input_sets, l2_cache_bytes
from .peers import Arguments, Implementation, Peer
from .records import CopyBandwidth, KernelRecord, Mode, record_key
from .selection import Job

# Relative RMS error that passes: several roundings of the dtype, as torch's own operators round between their
# parts, and far less than a wrong formula gives.
_TOLERANCES: dict[DType, float] = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1e-2}
# Pipelines keep latents in the network's dtype, and guidance multiplies the rounding of its difference by 7.5.
_SAMPLER_FACTOR = 5.0
_REFERENCE = "ours, float64"


@dataclass
class _Contestant(Outcome):
    """A peer on a case: built, called once and compared; its calls on every set of inputs."""

    peer: Peer
    implementation: Implementation | None = None
    first_call_ms: float | None = None
    error: float | None = None
    calls: list[Callable[[], Any]] = field(default_factory=list)

    def release(self) -> None:
        self.implementation, self.calls = None, []


@dataclass
class _Lane(Outcome):
    """A contestant in one mode."""

    contestant: _Contestant
    mode: Mode
    workload: Workload | None = None
    runs: int = 1
    error_after: float | None = None
    ms: list[float] = field(default_factory=list)
    calls_per_sample: int = 1

    def release(self) -> None:
        self.workload = None


class _Inputs:
    """Sets of arguments; the first is the one that results are checked on, restored before each check."""

    def __init__(self, case: KernelCase, sets: int, device: torch.device, seed: int) -> None:
        generator = torch.Generator(device).manual_seed(seed)
        self.case = case
        self.sets = [case.arguments(device, generator) for _ in range(sets)]
        self._pristine = {
            spec.name: self.sets[0][spec.name].clone() for spec in case.tensors if spec.access == "update"
        }

    def restore(self) -> None:
        """Updated tensors as they were, written ones full of NaN, and NaN in the memory that results will take."""
        for spec in self.case.tensors:
            if spec.access == "update":
                self.sets[0][spec.name].copy_(self._pristine[spec.name])
            elif spec.access == "write":
                self.sets[0][spec.name].fill_(math.nan)
        device = self.sets[0][self.case.tensors[0].name].device
        # Freed at once: the next allocation of this size takes the same block.
        for result in self.case.results:
            torch.full((-(-result.nbytes // 4),), math.nan, device=device)

    def in_float64(self) -> Arguments:
        """The first set, with the numbers that its dtype rounded to."""
        return {
            name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
            for name, value in self.sets[0].items()
        }


def tolerance_of(case: KernelCase) -> float:
    """The relative RMS error of a case's result that passes."""
    return _TOLERANCES[case.dtype] * (_SAMPLER_FACTOR if case.operator == "sampler_update" else 1.0)


def outputs(arguments: Mapping[str, Any], result: Any) -> tuple[Tensor, ...]:
    """What a call computed: its result, or what it updated: the latents, the next model input, other registers."""
    if isinstance(result, Tensor):
        return (result,)
    if result is not None:
        return tuple(result)
    registers = arguments["registers"].unbind(0)
    return (registers[0], arguments["model_input"], *registers[1:])


class KernelBench:
    """Measures jobs on one device; `copy` is that device's copy bandwidth in this run."""

    def __init__(
        self,
        device: str,
        peers: Sequence[Peer],
        modes: Sequence[Mode],
        pace: Pace,
        environment: Environment,
        copy: CopyBandwidth | None,
    ) -> None:
        self.device_name, self.device = device, torch.device(device)
        self.peers, self.modes, self.pace = peers, modes, pace
        self.environment, self.copy = environment, copy
        self._operators: set[str] = set()

    @torch.inference_mode()
    def measure(self, job: Job) -> list[KernelRecord]:
        """The records of all peers in all modes; only an interrupt is raised."""
        case = job.case
        first = case.operator not in self._operators
        self._operators.add(case.operator)
        contestants = [_Contestant(peer) for peer in self.peers if peer.serves(case, first)]
        lanes = [_Lane(contestant, mode) for mode in self.modes for contestant in contestants]
        started_at, before = utc_now(), device_state(self.device_name)
        moved = case.bytes_moved
        count, cold = input_sets(moved, l2_cache_bytes(self.device))
        with measuring_settings():
            try:
                inputs = _Inputs(case, count, self.device, seed=0)
                reference = self._reference(inputs)
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

    def _reference(self, inputs: _Inputs) -> tuple[Tensor, ...]:
        arguments = inputs.in_float64()
        return outputs(arguments, OPERATORS[inputs.case.operator].reference(**arguments))

    def _build_and_check(self, contestant: _Contestant, inputs: _Inputs, reference: tuple[Tensor, ...]) -> None:
        implementation = contestant.attempt(lambda: contestant.peer.build(inputs.case, self.device))
        if implementation is None:
            return
        contestant.implementation = implementation
        inputs.restore()
        prepared = contestant.attempt(lambda: [implementation.prepare(arguments) for arguments in inputs.sets])
        if prepared is None:
            return
        contestant.calls = [functools.partial(implementation.call, **arguments) for arguments in prepared]
        result = contestant.attempt(lambda: timed(contestant.calls[0], self.device))
        if result is None:
            return
        contestant.first_call_ms = result.wall_ms
        contestant.error = _checked(contestant, inputs, result.value, reference, "before")

    def _time(self, lanes: Sequence[_Lane], inputs: _Inputs, reference: tuple[Tensor, ...]) -> None:
        lanes = [lane for lane in lanes if lane.contestant.active]
        for lane in lanes:
            lane.workload = lane.attempt(functools.partial(self._workload, lane))
            runs = lane.attempt(functools.partial(self._calibrated, lane))
            if runs is not None and lane.workload is not None:
                lane.runs, lane.calls_per_sample = runs, runs * lane.workload.calls_per_run
        running = {lane.contestant.peer.name: lane for lane in lanes if lane.active}

        def one_sample(lane: _Lane, _: int) -> Timed[object]:
            workload = lane.workload
            assert workload is not None
            return timed(lambda: workload.run(lane.runs), self.device)

        with garbage_collection_paused():
            times = interleave(
                {name: functools.partial(one_sample, lane) for name, lane in running.items()},
                self.pace.rule,
                lambda name, failure: running[name].fail_with(failure),
            )
        for name, found in times.items():
            running[name].ms = [ms / running[name].calls_per_sample for ms in _clock(found)]
        for lane in lanes:
            if lane.active:
                lane.error_after = self._check_again(lane, inputs, reference)
            lane.release()
        release_memory()

    def _workload(self, lane: _Lane) -> Workload:
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

    def _calibrated(self, lane: _Lane) -> int:
        assert lane.workload is not None
        return calibrated(lane.workload, self.pace, self.device)

    def _check_again(self, lane: _Lane, inputs: _Inputs, reference: tuple[Tensor, ...]) -> float | None:
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

        result = lane.attempt(again)
        return _checked(lane, inputs, result, reference, "after") if lane.active else None

    def _record(
        self,
        job: Job,
        lane: _Lane,
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
            case_key=record_key(job.case, self.device_name, contestant.peer.name, lane.mode),
            size=job.size,
            batch=job.batch,
            case=job.case,
            peer=contestant.peer.name,
            mode=lane.mode,
            device=self.device_name,
            status=lane.status,
            message=lane.message,
            correctness=correctness,
            ms=Samples.of(lane.ms) if ok else None,
            clock=("device" if self.device.type == "cuda" else "host") if ok else None,
            calls_per_sample=lane.calls_per_sample if ok else None,
            input_sets=sets[0] if ok else None,
            l2=sets[1] if ok else None,
            first_call_ms=contestant.first_call_ms,
            copy_bandwidth=self.copy,
            device_before=before,
            device_after=after,
            environment=self.environment,
            interleaved=tuple(peer.name for peer in self.peers),
            started_at=started_at,
        )


def _clock(times: Times) -> list[float]:
    return times.gpu_ms or times.wall_ms


def _tensors(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result or ())


def _checked(
    checked: Outcome,
    inputs: _Inputs,
    result: Any,
    reference: tuple[Tensor, ...],
    when: Literal["before", "after"],
) -> float | None:
    """The largest relative RMS error of the outputs, None unless finite; a wrong result ends the outcome."""

    def worst() -> float:
        pairs = zip(outputs(inputs.sets[0], result), reference, strict=False)
        errors = [relative_rms(found, exact) for found, exact in pairs]
        # A NaN is no maximum.
        return max((error if math.isfinite(error) else math.inf for error in errors), default=math.inf)

    error = checked.attempt(worst)
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

"""A peer's way through a bench: built and checked on a call, then sampled and checked again in each mode."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from ..measure.device_watch import DeviceWatch
from ..measure.genuine import CallWatch
from ..measure.integrity import check_plain, is_poisoned, poison
from ..measure.outcomes import Outcome, Unsupported
from ..measure.rates import device_ms
from ..measure.recorded import Correctness
from ..measure.timing import Timed, Times, timed
from ..terminal.visible import counted
from .device import EagerCalls, GraphCalls, Pace, Workload, calibrated, timed_run
from .implementation import Implementation
from .inputs import CallInputs, tolerance_of
from .kernel_records import Mode
from .peers import Peer

# The check's reference, not the peer of that name.
_REFERENCE = "ours, float64"


@dataclass(frozen=True)
class Check:
    """The inputs of a call, its exact outputs for the first set of them, and those before it was renewed."""

    inputs: CallInputs
    exact: tuple[Tensor, ...]
    earlier: tuple[Tensor, ...] | None = None

    def renewed(self) -> Check:
        """The check of other numbers in the same memory; this one holds no longer."""
        self.inputs.renew()
        self.inputs.restore()
        return Check(self.inputs, self.inputs.reference(), earlier=self.exact)

    @property
    def tolerance(self) -> float:
        return tolerance_of(self.inputs.call)

    def error(self, checked: Outcome, result: Any, when: Literal["before", "in", "after"]) -> float | None:
        """The largest relative RMS error of the outputs, None unless finite; a wrong result ends the outcome."""
        error = checked.attempt(lambda: self._error(result))
        if error is None:
            return None
        if error > self.tolerance:
            checked.fail("incorrect", self._cheat(result) or f"{when} timing {self._off(error)}")
        return error if math.isfinite(error) else None

    def _error(self, result: Any) -> float:
        for tensor in tensors_of(result):
            check_plain(tensor)
        return self.inputs.error(result, self.exact)

    def _off(self, error: float) -> str:
        return f"the result was off {_REFERENCE} by {error:.3g} (relative RMS); at most {self.tolerance:g} passes"

    def _cheat(self, result: Any) -> str | None:
        """What a wrong result is known for."""
        if any(is_poisoned(tensor) for tensor in tensors_of(result)):
            return "a cached output: it returned the memory of an earlier result, unwritten"
        if self.earlier is not None and self.inputs.error(result, self.earlier) <= self.tolerance:
            return (
                "a cached output: with other numbers in the same memory it returned the result of the earlier ones"
            )
        return None


def tensors_of(result: Any) -> tuple[Tensor, ...]:
    """The tensors that a call returned: one, several, or none where it updates its arguments."""
    return (result,) if isinstance(result, Tensor) else tuple(result or ())


@dataclass
class BuiltPeer(Outcome):
    """A peer on a call: built, called once and checked; its calls on every set of inputs."""

    peer: Peer
    device: torch.device
    implementation: Implementation | None = None
    first_call_ms: float | None = None
    polynomial: int | None = None
    error: float | None = None
    calls: list[Callable[[], Any]] = field(default_factory=list)
    watch: CallWatch = field(default_factory=CallWatch)

    def release(self) -> None:
        self.implementation, self.calls = None, []

    def setting(self) -> AbstractContextManager[Any]:
        """Within which its calls are made."""
        return nullcontext() if self.implementation is None else self.implementation.setting()

    def begin(self, check: Check) -> None:
        """Builds the calls, makes the first and checks its result."""
        self.attempt(lambda: self._build(check.inputs))
        with self.setting():
            first = self.attempt(self._call)
        if first is not None:
            self.first_call_ms = first.wall_ms
            self.error = check.error(self, first.value, "before")

    def _call(self) -> Timed[Any]:
        with self.watch.around():
            return timed(self.calls[0], self.device)

    def _build(self, inputs: CallInputs) -> None:
        with self.watch.around():
            self.implementation = made = self.peer.build(inputs.call, self.device)
            self.polynomial = made.polynomial(inputs.sets[0])
            inputs.restore()
            prepared = [made.prepare(arguments) for arguments in inputs.sets]
        self.calls = [functools.partial(made.call, **arguments) for arguments in prepared]


@dataclass
class PeerLane(Outcome):
    """A built peer whose calls are made in one mode."""

    built: BuiltPeer
    mode: Mode
    workload: Workload | None = None
    # Runs of the workload in a sample.
    runs: int = 1
    calls_per_sample: int = 1
    delay_cycles: int = 0
    ms: list[float] = field(default_factory=list)
    error_after: float | None = None
    # Whether it ran since memory was last given back to the device; what takes memory again is no sample.
    is_warm: bool = False
    during: DeviceWatch = field(default_factory=DeviceWatch)
    watch: CallWatch = field(init=False)

    def __post_init__(self) -> None:
        # Its own times, and the threads that the peer has started at any time.
        self.watch = CallWatch(threads=self.built.watch.threads)

    def release(self) -> None:
        self.workload = None

    def prepare(self, pace: Pace) -> None:
        """Makes the workload, and finds how often it runs in a sample."""
        with self.built.setting():
            self.attempt(lambda: self._calibrate(pace))

    def _calibrate(self, pace: Pace) -> None:
        device = self.built.device
        with self.watch.around():
            self.workload = self._made_workload()
            self.runs = calibrated(self.workload, pace, device)
        self.calls_per_sample = self.runs * self.workload.calls_per_run
        self.delay_cycles = self.workload.delay_cycles if device.type == "cuda" else 0

    def _made_workload(self) -> Workload:
        calls, device = self.built.calls, self.built.device
        if self.mode == "eager":
            return EagerCalls(calls)
        if device.type != "cuda":
            raise Unsupported("a CUDA graph needs a GPU")
        if not self.built.peer.capturable:
            raise Unsupported(f"{self.built.peer.name} runs host code between its launches")
        try:
            return GraphCalls(calls, device)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            first = str(error).splitlines()[0] if str(error) else repr(error)
            raise Unsupported(f"cannot be captured: {first}") from None

    def sample(self, *_: object) -> Timed[object]:
        """One sample, after an untimed call where memory was given back."""
        assert self.workload is not None
        with self.built.setting(), self.watch.around():
            if not self.is_warm:
                self.workload.run(self.runs)
                self.is_warm = True
            result = timed_run(self.workload, self.runs, self.built.device)
        self.during.read_throttling()
        self.watch.settle()
        # The host's clock has a delay in it, and so does not tell of other streams; a captured graph leaves none.
        self.watch.note(replace(result, wall_ms=device_ms(result), gpu_ms=None) if self.delay_cycles else result)
        return result

    def check_timed(self, check: Check) -> None:
        """Checks the first set's result as the samples have left it, where each call starts from the same."""
        assert self.workload is not None
        result = self.workload.results[0]
        if result is not None and not check.inputs.accumulates:
            self.error_after = check.error(self, result, "in")
            for tensor in tensors_of(result):
                poison(tensor)

    def finish(self, times: Times, check: Check, least_ms: float | None = None) -> None:
        """Takes the times of a call, and checks the first set's result again, by the workload that was timed.

        least_ms: the least time of a call, where it is known.
        """
        self.ms = [ms / self.calls_per_sample for ms in times.gpu_ms or times.wall_ms]
        what = f"a sample of {counted(self.calls_per_sample, 'call')}"
        least_of_sample = None if least_ms is None else self.calls_per_sample * least_ms
        self.attempt(lambda: self.watch.judge(least_of_sample, what))
        if not self.active:
            return
        self.attempt(check.inputs.restore)
        with self.built.setting():
            result = self.attempt(self._again)
        if self.active:
            self.error_after = check.error(self, result, "after")

    def _again(self) -> Any:
        if not isinstance(self.workload, GraphCalls):
            with self.watch.around():
                return self.built.calls[0]()
        result = self.workload.results[0]
        for tensor in tensors_of(result):
            poison(tensor)
        self.workload.run(1)
        return result

    def correctness(self, tolerance: float) -> Correctness | None:
        """The errors of both checks; None where nothing was compared."""
        if self.built.error is None and self.status != "incorrect":
            return None
        before, after = self.built.error, self.error_after
        return Correctness(error_before=before, error_after=after, tolerance=tolerance, reference=_REFERENCE)

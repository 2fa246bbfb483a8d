"""Subjects of a sweep whose trajectories take a moment, and end their process when their backend's name says so.

A backend "PHASE:FAULT" does that in that phase: "first call:SIGSEGV", "timing:exit 3", "build:hang". Others are
right; "peer" is the other implementation; "gated" is not timed before the file FAKE_GATE is there. Imported by
name in the processes of a sweep.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import pickle
import resource
import signal
import subprocess
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from ldmperf.profiling.measure import gpu_lock, recorded
from ldmperf.profiling.measure.ceiling_cache import KeptCeilings
from ldmperf.profiling.measure.ceiling_probes import measure_ceilings
from ldmperf.profiling.step.roofline import StepPart
from ldmperf.profiling.sweep import group_child
from ldmperf.profiling.sweep.child_end import HEADER, ParentPipe
from ldmperf.profiling.trajectory.backend import Backend, Subject, Trajectory
from ldmperf.profiling.trajectory.case import Case, Task

# A case takes this many samples at least.
COUNT = 3
FAULTS = ("SIGSEGV", "SIGKILL", "exit 3", "hang", "start and hang")
PHASES = ("build", "first call", "reference", "timing", "check")


def fail(fault: str) -> None:
    """Ends or stops this process as told."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if fault == "start and hang":
        process = subprocess.Popen(["sleep", "1000"])
        Path(os.environ["FAKE_PIDS"]).write_text(str(process.pid))
        fault = "hang"
    if fault == "hang":
        # A call that never returns and keeps the interpreter to itself.
        ctypes.PyDLL(None).sleep(1000)
    elif fault.startswith("exit"):
        os._exit(int(fault.removeprefix("exit")))
    else:
        os.kill(os.getpid(), signal.Signals[fault])
        time.sleep(1000)


@dataclass(frozen=True)
class FakeProblem:
    case: Case
    network: nn.Module
    evaluations: int = 1
    is_stochastic: bool = False
    parameters: int = 4
    gflop: float = 1e-9

    def step_parts(self) -> Sequence[StepPart]:
        return ()

    def inputs(self, number: int, seed: int | None = None) -> Tensor:
        generator = torch.Generator().manual_seed((seed or 0) % 2**32 + number)
        return torch.randn(4, generator=generator)

    def check_inputs(self) -> Tensor:
        return self.inputs(10**6)

    def references(self, implementation: str, *, of_round: bool = False) -> tuple[tuple[str, torch.dtype], ...]:
        other = implementation if implementation.startswith("reference:") else "peer"
        return ((other, torch.float64),)

    def as_drawn(self, inputs: Any) -> Any:
        return inputs

    def with_network(self, network: nn.Module) -> Self:
        return type(self)(self.case, network)


@dataclass(frozen=True)
class FakeBackend:
    name: str

    @property
    def implementation(self) -> str:
        return self.name

    def build(self, problem: FakeProblem) -> Trajectory:
        is_reference = next(problem.network.parameters()).dtype == torch.float64
        at, _, fault = self.name.partition(":")
        calls = 0
        if (is_reference and at == "reference") or (not is_reference and at == "build"):
            fail(fault)
        if at == "warns":
            warnings.warn("beware", RuntimeWarning, stacklevel=2)

        def trajectory(inputs: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            if not is_reference and (at, calls) in (("first call", 1), ("timing", 2), ("check", 1 + COUNT)):
                fail(fault)
            while at == "gated" and calls > 1 and not os.path.exists(os.environ["FAKE_GATE"]):
                time.sleep(0.01)
            time.sleep(1e-3 * problem.case.batch)
            return 2 * inputs

        return trajectory


class FakeSubject:
    """A case of unet "weights:FAULT" faults while its network is made."""

    @property
    def backends(self) -> Mapping[str, Backend]:
        names = (
            "steady",
            "second",
            "gated",
            "peer",
            "warns",
            *(f"{phase}:{fault}" for phase in PHASES for fault in FAULTS),
        )
        return {name: FakeBackend(name) for name in names}

    def identity(self, case: Case) -> tuple[object, ...]:
        return (case.group_key,)

    def network(self, case: Case) -> nn.Module:
        at, _, fault = case.unet.partition(":")
        if at == "weights":
            fail(fault)
        return nn.Linear(2, 2)

    def problem(self, case: Case, network: nn.Module) -> FakeProblem:
        return FakeProblem(case, network)

    def gflop(self, case: Case) -> float | None:
        return 1e-9


def a_case(backend: str = "steady", **changes: Any) -> Case:
    """A case of these subjects, its references in float64."""
    return Case(**({"unet": "39M", "steps": 1, "dtype": "bfloat16", "backend": backend} | changes))


def fakes() -> Mapping[Task, Subject]:
    return {"t2i": FakeSubject()}


@dataclass(frozen=True)
class Changed:
    """`fakes`, in a process in which `change(*given)` was called first."""

    change: Callable[..., None]
    given: tuple[object, ...] = ()

    def __call__(self) -> Mapping[Task, Subject]:
        return fakes()

    def __reduce__(self) -> tuple[Any, ...]:
        return _arrive, (self.change, self.given)


def _arrive(change: Callable[..., None], given: tuple[object, ...]) -> Changed:
    change(*given)
    return Changed(change, given)


def one_gpu(uuid: str, locks: Path) -> None:
    """The process sees one GPU with this UUID."""
    gpu_lock.gpu_uuid = lambda device: uuid
    gpu_lock.LOCKS = locks


def quick_ceilings() -> None:
    """A sample of each rate is enough."""
    group_child.KeptCeilings = partial(KeptCeilings, measure=partial(measure_ceilings, seconds_each=0.0))  # type: ignore[assignment, misc]


def clock_backwards() -> None:
    """The time of day is two hours earlier each time that it is asked for."""
    hours = itertools.count(2, 2)

    class Backwards(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return datetime.now(tz) - timedelta(hours=next(hours))

    recorded.datetime = Backwards  # type: ignore[misc]


def last_words(parent: ParentPipe) -> None:
    """Says something and ends before it was taken."""
    content = pickle.dumps("last words")
    os.write(parent.said.fileno(), HEADER.pack(len(content)) + content)
    os._exit(3)


def broken() -> Mapping[Task, Subject]:
    raise ValueError("no subjects today")

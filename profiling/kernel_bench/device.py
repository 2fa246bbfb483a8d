"""Calls in a row on a device: one by one or as a CUDA graph, with inputs that rotate past the L2 cache."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ldmperf.samplers import own_workspaces

from ..measure.rates import DELAY_CYCLES, Call, device_ms
from ..measure.timing import RepetitionRule, Timed, timed

# More would take longer to make than to measure with.
MOST_INPUT_SETS = 256
MOST_CALLS = 10_000


@dataclass(frozen=True)
class Pace:
    """Repetition: a sample is as many calls as fill `sample_ms`, many times the clock's resolution."""

    rule: RepetitionRule
    sample_ms: float


PACES = {"cuda": Pace(RepetitionRule(20, 0.02), 1.0), "cpu": Pace(RepetitionRule(5, 0.02), 2.0)}


class Workload(Protocol):
    """Something to repeat; a run is `calls_per_run` calls.

    Before a timed sample the device waits for `delay_cycles`, see `timed`; 0 where the launch is to be seen.
    `results`: the last of each call, None before the first.
    """

    calls_per_run: int
    delay_cycles: int
    results: list[Any]

    def run(self, count: int) -> None: ...


class EagerCalls:
    """Calls launched one by one, in turn. Each keeps its last result, so that results rotate as inputs do."""

    calls_per_run = 1
    # A call shorter than its launch shows the launch.
    delay_cycles = 0

    def __init__(self, calls: Sequence[Call]) -> None:
        self._calls = calls
        self.results: list[Any] = [None] * len(calls)
        self._next = 0

    def run(self, count: int) -> None:
        for _ in range(count):
            self.results[self._next] = self._calls[self._next]()
            self._next = (self._next + 1) % len(self._calls)


class GraphCalls:
    """All calls as one CUDA graph, each with a result of its own; replayed, the host launches once for all.

    Raises what capturing raises; the current stream is then as before.
    """

    delay_cycles = DELAY_CYCLES

    def __init__(self, calls: Sequence[Call], device: torch.device) -> None:
        self.calls_per_run = len(calls)
        before = torch.cuda.current_stream(device)
        stream = torch.cuda.Stream(device)
        # Whatever a first call on a stream sets up (workspaces, compiled code) must not fall into the capture.
        stream.wait_stream(before)
        with torch.cuda.stream(stream):
            for call in calls[:2]:
                call()
        before.wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        try:
            with own_workspaces(), torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                self.results = [call() for call in calls]
        except Exception:
            # torch leaves the capturing stream current when ending the capture fails.
            torch.cuda.set_stream(before)
            raise

    def run(self, count: int) -> None:
        for _ in range(count):
            self._graph.replay()


def input_sets(bytes_a_set: int, l2_bytes: int | None) -> tuple[int, bool]:
    """How many sets of inputs and results to rotate, and whether that is at least twice the L2 cache."""
    if l2_bytes is None:
        return 1, False
    wanted = math.ceil(2 * l2_bytes / max(bytes_a_set, 1))
    sets = min(max(wanted, 1), MOST_INPUT_SETS)
    return sets, sets >= wanted


def l2_cache_bytes(device: torch.device) -> int | None:
    """Of a CUDA device, as the driver says; None for others."""
    if device.type != "cuda":
        return None
    return int(torch.cuda.get_device_properties(device).L2_cache_size)


def runs_per_sample(run_ms: float, sample_ms: float) -> int:
    """How many runs of `run_ms` each fill a sample."""
    if not run_ms > 0:
        return MOST_CALLS
    return min(max(math.ceil(sample_ms / run_ms), 1), MOST_CALLS)


def timed_run(workload: Workload, runs: int, device: torch.device) -> Timed[object]:
    """`runs` runs in a row, timed as one sample."""
    return timed(lambda: workload.run(runs), device, delay_cycles=workload.delay_cycles)


def calibrated(workload: Workload, pace: Pace, device: torch.device) -> int:
    """Runs per sample, from one untimed and one timed round over the inputs."""
    runs = 1 if workload.calls_per_run > 1 else 3
    workload.run(runs)
    sample = timed_run(workload, runs, device)
    return runs_per_sample(device_ms(sample) / runs, pace.sample_ms)

"""Kernels under pytest-benchmark, timed on the device: `pytest bench --benchmark-json=kernels.json`.

A round is one sample of the kernel bench (as many calls as its clock needs), its time that of one call: the JSON
holds what `ldmperf kernels` measures, in the form that github-action-benchmark and Bencher read. A wrong result
fails its test. With --records, the records and their raw samples go to bench/results/<gpu>/ as well.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest

from ldmperf.kernels import OPERATORS, Chip
from ldmperf.profiling.kernel_bench.bench import KernelBench
from ldmperf.profiling.kernel_bench.kernel_records import KernelRecord, KernelStore, Mode
from ldmperf.profiling.kernel_bench.peers import Peer
from ldmperf.profiling.kernel_bench.run import BenchChoices
from ldmperf.profiling.kernel_bench.selection import Job
from ldmperf.profiling.measure.conditions import commit_name
from ldmperf.profiling.measure.environment import collect_environment
from ldmperf.profiling.measure.recorded import utc_now
from ldmperf.profiling.options import best_device

RESULTS = Path(__file__).with_name("results")


class SampleClock:
    """A clock in seconds that a sample moves: what pytest-benchmark reads before and after a round."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


CLOCK = SampleClock()


@cache
def kernel_bench() -> KernelBench:
    """One for the session: its copy bandwidth is that of the run."""
    device = best_device()
    return BenchChoices(operators=tuple(OPERATORS), device=device).bench(collect_environment(device))


@cache
def store() -> KernelStore:
    environment = kernel_bench().environment
    name = environment.gpu.name if environment.gpu else f"cpu {environment.cpu}"
    folder = RESULTS / Chip(name, 0).file_name
    folder.mkdir(parents=True, exist_ok=True)
    return KernelStore(folder / f"{utc_now():%Y-%m-%d}-{commit_name(environment)}-kernels.jsonl")


@cache
def measured(job: Job, keep: bool) -> dict[tuple[str, Mode], KernelRecord]:
    """The records of a call, its peers measured in turn, once."""
    records = kernel_bench().measure(job)
    if keep:
        store().append(*records)
    return {(record.peer, record.mode): record for record in records}


@pytest.mark.benchmark(timer=CLOCK)
def test_kernel(benchmark: Any, job: Job, mode: Mode, peer: Peer, request: pytest.FixtureRequest) -> None:
    record = measured(job, request.config.getoption("records"))[peer.name, mode]
    if record.status == "unsupported":
        pytest.skip(record.message or "")
    assert record.ms is not None, f"{record.status}: {record.message}"
    benchmark.group = f"{job.call.operator} {job.call.label} ({job.size} batch {job.batch}, {mode})"
    benchmark.extra_info |= {
        "clock": record.clock,
        "l2": record.l2,
        "calls_per_sample": record.calls_per_sample,
        "delay_cycles": record.delay_cycles,
        "gb_per_s": record.gb_per_s,
        "percent_of_copy": record.percent_of_copy,
        "tflops": record.tflops,
        "percent_of_bound": record.percent_of_bound,
        "case_key": record.case_key,
    }
    samples = iter(record.ms.samples)

    def round_() -> None:
        CLOCK.now += next(samples) / 1e3

    benchmark.pedantic(round_, rounds=record.ms.n, iterations=1)

"""Groups of a real GPU, each timed by a process of its own, and their traces by one more."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ldmperf.profiling import Case
from ldmperf.profiling.measure.timing import Deadline, RepetitionRule
from ldmperf.profiling.sweep.group_process import environment_of
from ldmperf.profiling.sweep.local import Sweep, run_sweep
from ldmperf.profiling.trajectory.records import RecordStore
from ldmperf.profiling.trajectory.runner import Listener

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.alone,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_groups_are_timed_and_traced_by_processes_of_their_own(tmp_path: Path) -> None:
    cases = tuple(
        Case(
            unet="39M",
            steps=2,
            dtype="float16",
            device="cuda",
            latent_height=16,
            latent_width=16,
            seed=seed,
            backend="torch",
        )
        for seed in (0, 1)
    )
    environment = environment_of("cuda")
    assert environment.gpu is not None
    assert environment.gpu.name == torch.cuda.get_device_name()
    store = RecordStore(tmp_path / "records.jsonl")
    sweep = Sweep(cases, RepetitionRule(2), "run", {"cuda": environment})
    assert run_sweep(sweep, store, Listener(), Deadline(None)) == (2, False)
    latest = {record.case_key: record for record in store.load()}
    assert set(latest) == {case.key for case in cases}
    for record in latest.values():
        assert record.status == "ok", record.message
        assert record.gpu_ms is not None
        assert record.peak_memory_bytes is not None
        assert record.trace is not None
        assert record.environment == environment

"""bench/ under pytest-benchmark: its JSON holds the recorded samples, in the form that dashboards read."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ldmperf.profiling.kernel_bench.kernel_records import KernelRecord
from ldmperf.profiling.measure.store import load_lines

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of bench/, so that records written in a test are none of the repository's."""
    folder = tmp_path_factory.mktemp("bench")
    for name in ("conftest.py", "test_kernels_bench.py"):
        shutil.copy(ROOT / "bench" / name, folder / name)
    return folder


def run(bench: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(bench), str(bench)]
    # pytest-benchmark measures nothing in a worker of pytest-xdist, as which this one may run.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    return subprocess.run(
        [*command, *options],
        cwd=bench,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=environment,
    )


def test_the_json_holds_the_samples_of_the_records(bench: Path) -> None:
    pytest.importorskip("pytest_benchmark")
    found = run(bench, "--kernels", "sampler_update", "--records", "--benchmark-json", "out.json")
    assert found.returncode == 0, found.stdout
    assert "skipped" in found.stdout
    results = json.loads((bench / "out.json").read_text())
    (path,) = bench.glob("results/*/*-kernels.jsonl")
    records, rejected = load_lines(path, KernelRecord)
    assert rejected == 0
    samples = {record.case_key: record.ms for record in records if record.ms is not None}
    assert len(samples) == len(results["benchmarks"]) >= 4
    for entry in results["benchmarks"]:
        recorded = samples[entry["extra_info"]["case_key"]]
        # What github-action-benchmark reads: name, stats.mean, stats.stddev, stats.rounds, in seconds.
        assert entry["stats"]["rounds"] == recorded.n
        assert entry["stats"]["mean"] == pytest.approx(sum(recorded.samples) / recorded.n / 1e3, rel=1e-6)
        assert sorted(entry["stats"]["data"]) == pytest.approx(
            sorted(ms / 1e3 for ms in recorded.samples), rel=1e-6
        )
        assert entry["name"].startswith("test_kernel[sampler_update")


def test_a_wrong_option_names_the_right_ones(bench: Path) -> None:
    pytest.importorskip("pytest_benchmark")
    found = run(bench, "--kernels", "gelu")
    assert found.returncode != 0
    assert "geglu" in found.stdout + found.stderr

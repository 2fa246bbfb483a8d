"""PyTorch HUD, schema v3: a JSON object a line for each series (ClickHouse's JSONEachRow).

Fields and types are those of the table oss_ci_benchmark_v3 (pytorch/test-infra, clickhouse_db_schema). Its action
upload-benchmark-results adds what only the CI knows: name, repo, head_branch, workflow_id, run_attempt, job_id.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..compare.metrics import Metric
from ..record_files import record_kind
from ..terminal.visible import visible
from .series import Series, conditions, environment, in_its_run, processor, series_of, shown, texts

if TYPE_CHECKING:
    from ..record_files import AnyRecord

# Of which the version is told, with their repositories.
_DEPENDENCIES = {
    "torch": "pytorch/pytorch",
    "triton": "triton-lang/triton",
    "diffusers": "huggingface/diffusers",
    "numpy": "numpy/numpy",
}


def pytorch_hud(records: Sequence[AnyRecord], metrics: Sequence[Metric]) -> str:
    """A line for each series of each run; its time is that of the record."""
    found = series_of(shown(records, in_its_run), metrics)
    return "".join(json.dumps(_row(series), allow_nan=False) + "\n" for series in found)


def _row(series: Series) -> dict[str, Any]:
    record, figure = series.record, series.figure
    of, case = record.environment, texts(conditions(record))
    row: dict[str, Any] = {"timestamp": int(record.started_at.timestamp()), "schema_version": "v3"}
    if of.git_commit is not None:
        row["head_sha"] = visible(of.git_commit)
    spread = {"p20": figure.p20, "p80": figure.p80, "min": figure.min}
    told = {name: repr(value) for name, value in spread.items() if value is not None}
    return row | {
        "runners": [_runner(record)],
        "benchmark": {
            "name": "ldmperf",
            "mode": "inference",
            "dtype": case.get("dtype", ""),
            "extra_info": {"kind": record_kind(record), "run_id": visible(record.run_id or "")} | case,
        },
        # HUD tells series apart by the model and the metric, and by no extra_info.
        "model": {
            "name": record.case_id,
            "type": record_kind(record),
            "backend": case.get("backend", case.get("peer", "")),
            "origins": ["ldmperf"],
            "extra_info": {"case": visible(record.case_key)},
        },
        "dependencies": _dependencies(record),
        "metric": {
            "name": series.metric.name,
            "benchmark_values": [figure.value],
            "extra_info": {"unit": series.metric.unit, "samples": str(len(figure.samples))} | told,
        },
    }


def _runner(record: AnyRecord) -> dict[str, Any]:
    of = record.environment
    gpu = of.gpu
    runner = {
        "name": of.machine_id and visible(of.machine_id),
        "type": visible(processor(record)),
        "cpu_info": of.cpu and visible(of.cpu),
        "cpu_count": of.usable_cores,
        "avail_mem_in_gb": None if of.memory_bytes is None else of.memory_bytes // 2**30,
        "gpu_info": gpu and visible(gpu.name),
        # A trajectory runs on one, however many there are.
        "gpu_count": gpu and 1,
        "avail_gpu_mem_in_gb": None if gpu is None or gpu.memory_bytes is None else gpu.memory_bytes // 2**30,
        "extra_info": texts(environment(record)),
    }
    return {name: value for name, value in runner.items() if value is not None}


def _dependencies(record: AnyRecord) -> dict[str, dict[str, str]]:
    versions = texts(environment(record))
    return {
        name: {"repo": repository, "version": versions[name]}
        for name, repository in _DEPENDENCIES.items()
        if name in versions
    }

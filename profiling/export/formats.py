"""The table of formats: who writes each, and which metrics it has unless told."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..compare.metrics import METRICS, Metric
from ..figures.text import joined, statuses_in_words
from ..measure.folders import RunError
from ..terminal.visible import counted
from .bencher import bencher
from .csv_table import csv_table
from .github_action_benchmark import github_action_benchmark
from .openmetrics import openmetrics
from .pytest_json import pytest_json
from .pytorch_hud import pytorch_hud
from .series import in_its_run, series_of, shown

if TYPE_CHECKING:
    from ..record_files import AnyRecord


@dataclass(frozen=True)
class Format:
    """A format: `text` writes records in metrics, `usual` are those written unless told.

    has_failures: whether it has a place for records without a time.
    """

    text: Callable[[Sequence[AnyRecord], Sequence[Metric]], str]
    usual: tuple[str, ...]
    has_failures: bool = False


_TIMES = ("wall_ms", "gpu_ms", "ms")
_COSTS = (*_TIMES, "first_call_ms", "peak_memory_bytes", "joules_per_image")
_COMPILED = ("registers", "spills", "shared_bytes", "instructions")

FORMATS: Mapping[str, Format] = {
    "github-action-benchmark": Format(github_action_benchmark, (*_COSTS, *_COMPILED)),
    "bencher": Format(bencher, (*_COSTS, "images_per_s", *_COMPILED)),
    "pytorch-hud-v3": Format(pytorch_hud, tuple(METRICS)),
    "pytest-benchmark": Format(pytest_json, _TIMES),
    "openmetrics": Format(openmetrics, tuple(METRICS), has_failures=True),
    "csv": Format(csv_table, tuple(METRICS), has_failures=True),
}


def exported(records: Sequence[AnyRecord], name: str, metrics: Sequence[Metric]) -> tuple[str, str]:
    """The text of the records in a format, and what is left out of it, in words.

    Raises CaseError for metrics that the format does not hold, RunError for records that it does not, and where
    nothing would be left.
    """
    form = FORMATS[name]
    text = form.text(records, metrics)
    if form.has_failures:
        return text, ""
    chosen = shown(records, in_its_run)
    failed = [record.status for record in chosen if record.status != "ok"]
    left_out = f"{counted(len(failed), 'case')} left out: {statuses_in_words(failed)}" if failed else ""
    if not series_of(chosen, metrics):
        names = ", ".join(metric.name for metric in metrics)
        raise RunError(f"{joined((f'no record has any of {names}', left_out))}; name other records or --metric")
    return text, left_out

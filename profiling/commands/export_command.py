"""The command `ldmperf export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..compare.metrics import METRICS
from ..terminal.visible import emit
from .shared import RecordPaths, gathered, list_option, stop, tell

_FORMATS = "github-action-benchmark, bencher, pytorch-hud-v3, pytest-benchmark, openmetrics or csv."


def export(
    records: RecordPaths = None,
    *,
    format_name: Annotated[str, typer.Option("--format", help=_FORMATS, metavar="FORMAT")],
    metric: list_option(  # type: ignore[valid-type]
        f"{', '.join(METRICS)}; unless told those that are usual for the format."
    ) = None,
    out: Annotated[
        Path | None, typer.Option(help="The file to write; standard output unless told.", metavar="FILE")
    ] = None,
) -> None:
    """Write records as a benchmark dashboard reads them.

    A series is called by the `case_id` of its case and the metric, the same on every commit and machine. Formats
    without a place for several commits or machines refuse them; openmetrics, pytorch-hud-v3 and csv take them.
    Failed cases have no value: csv and openmetrics have their status, the others leave them out and count them on
    stderr. A line that is no whole record is set aside and named, and the exit code is 1.

    \b
    Examples:
      ldmperf export --format github-action-benchmark --out benchmark.json
      ldmperf export runs/20261124T093000Z-1a84ffb --format bencher --metric wall_ms
      ldmperf export bench/results/*/*.jsonl --format csv --out records.csv
    """
    from ..compare.metrics import metrics_named
    from ..export.formats import FORMATS, exported
    from ..measure.store import write_whole
    from ..options import known_name

    form = FORMATS[known_name("format", format_name, FORMATS)]
    metrics = metrics_named(metric or [], METRICS, form.usual)
    found = gathered(records)
    text, left_out = exported(found.records, format_name, metrics)
    if out is None:
        emit(text)
    else:
        try:
            write_whole(out, text.encode())
        except OSError as failure:
            stop(f"cannot write {out} ({failure.strerror}); name another file with --out", 1)
    if left_out:
        tell(left_out)
    if found.aside.in_file:
        raise typer.Exit(1)

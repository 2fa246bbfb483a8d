"""The command `ldmperf report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..report.reporting import ReportNotWritten, report_path
from ..trajectory.runs import find_run
from .shared import DEFAULT_OUT, stop


def report(
    run: Annotated[
        str,
        typer.Argument(
            help="A run's folder, one of `ldmperf kernels`, or a file of records; without it the latest run.",
            metavar="FOLDER | RECORDS.jsonl",
        ),
    ] = "latest",
    out: Annotated[
        Path | None,
        typer.Option(
            help="Where the page is written; the folder itself unless told. Without FOLDER: where run folders are."
        ),
    ] = None,
) -> None:
    """Print the table of a run and write its report.html and charts anew; of kernels, the tables and kernels.md.

    Of a file of records only the tables are printed, unless --out says where the page goes. A line that is no
    whole record, or one of a later version, is set aside: the first 20 are named with number and reason, and the
    exit code is 1. A file without any record is a wrong call.

    \b
    Examples:
      ldmperf report
      ldmperf report runs/20261124T093000Z-1a84ffb
      ldmperf report bench/results/h200/2026-11-24-1a84ffb.jsonl --out page
    """
    try:
        if run == "latest":
            whole = report_path(find_run(out or DEFAULT_OUT, run), None)
        else:
            whole = report_path(Path(run), out)
    except ReportNotWritten as failure:
        stop(str(failure), 1)
    if not whole:
        raise typer.Exit(1)

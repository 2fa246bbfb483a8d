"""The command `ldmperf report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..options import CaseError
from ..report.reporting import ReportNotWritten, is_page, report_paths
from ..trajectory.runs import find_run
from .shared import DEFAULT_OUT, RecordPaths, stop


def report(
    paths: RecordPaths = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--out",
            help="A page, where the name ends in .html; else a folder for page and charts. A single folder of a "
            "run or of kernels is written to itself unless told. Without paths a folder is where run folders are.",
            metavar="PAGE.html | FOLDER",
        ),
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Print every case; above 50 a summary is printed unless told.")
    ] = False,
    records_url: Annotated[
        str | None,
        typer.Option(
            help="Where the records can be had, for the page's link; their files beside the page unless told.",
            metavar="URL",
        ),
    ] = None,
) -> None:
    """Print the tables of records and write a page with the charts.

    The page is one file that needs no network. Records of several files, machines and commits are put together in
    one page, and it says so. Nothing is compared across kinds of machines, versions or settings; commits are
    compared in tables of their own: times over commits, and two commits side by side. A line that is no whole
    record, or one of a later version, is set aside: the first 20 are named with number and reason, and the exit
    code is 1. A file without any record is a wrong call.

    \b
    Examples:
      ldmperf report
      ldmperf report runs/20261124T093000Z-1a84ffb
      ldmperf report bench/results/h200/2026-11-24-1a84ffb.jsonl -o page.html
      ldmperf report runs/a runs/b more/*.jsonl --all -o page.html
    """
    from ..report.sources import records_url as read_url

    url = read_url(records_url) if records_url is not None else ""
    if url and out is None:
        raise CaseError("--records-url is for a page: say where it goes with -o page.html")
    try:
        if paths:
            found = report_paths(paths, out, everything=everything, url=url)
        else:
            is_file = out is not None and is_page(out)
            latest = find_run(DEFAULT_OUT if is_file else out or DEFAULT_OUT, "latest")
            found = report_paths([latest], out if is_file else None, everything=everything, url=url)
    except ReportNotWritten as failure:
        stop(str(failure), 1)
    if found.aside.in_file:
        raise typer.Exit(1)

"""The command `ldmperf claims`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ..options import CaseError
from ..terminal.visible import console, say_wrapped
from .shared import DEFAULT_OUT


def claims(
    records: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Run folders and files of records, of every schema version; without any the latest run.",
            metavar="[FOLDER | RECORDS.jsonl]...",
            show_default=False,
        ),
    ] = None,
    table: Annotated[
        bool, typer.Option("--table", help="Print the paper's Table 1, its source and notes, and judge nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print all of it as JSON.")] = False,
) -> None:
    """Judge the paper's claims by records: verdict, figures and conditions of each.

    A verdict is "holds", "does not hold", "undecided" (the limit lies inside the interval of the samples) or "not
    measured", with what it needs. Claims about quality are not judged by timing: what timing can say is printed.
    Only times of one environment are compared. A line that is no whole record is set aside and named, and the exit
    code is 1.

    \b
    Examples:
      ldmperf claims
      ldmperf claims runs/20261124T093000Z-1a84ffb bench/results/h200/2026-11-24-1a84ffb.jsonl
      ldmperf claims records.jsonl --json
      ldmperf claims --table
    """
    from ..claims import printed

    if table:
        if records:
            raise CaseError("--table prints the paper's table and judges nothing: give it without records")
        if as_json:
            typer.echo(json.dumps(printed.paper_json(), indent=2))
        else:
            printed.print_paper(console())
        return
    from ..claims.judge import in_time_order, judge
    from ..figures import overview
    from ..report.notes import warnings
    from ..report.reporting import tell_aside
    from ..trajectory.record_sets import read_sets
    from ..trajectory.runs import find_run

    found, aside = read_sets(records or [find_run(DEFAULT_OUT, "latest")])
    tell_aside(aside)
    # Environments have their letters in this order, in verdicts and notes alike.
    found = in_time_order(found)
    judged = judge(found)
    if as_json:
        typer.echo(json.dumps(printed.as_json(judged), indent=2, allow_nan=False))
    else:
        printed.print_claims(judged, console())
        for warning in warnings(overview(found)):
            say_wrapped(console(), f"Note: {warning}", "yellow")
    if aside.in_file:
        raise typer.Exit(1)

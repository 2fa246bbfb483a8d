"""The command `ldmperf claims`."""

from __future__ import annotations

from typing import Annotated

import typer

from ..options import CaseError
from ..terminal.visible import console, say_wrapped
from .shared import AsJson, RecordPaths, given_records, print_json


def claims(
    records: RecordPaths = None,
    table: Annotated[
        bool, typer.Option("--table", help="Print the paper's Table 1, its source and notes, and judge nothing.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Judge the paper's claims by records.

    Prints verdict, figures and conditions of each claim. A verdict is "holds", "does not hold", "undecided" (the
    limit lies inside the interval of the samples) or "not measured", with what it needs. Claims about quality are
    not judged by timing: what timing can say is printed. Only times of one environment are compared. A line that
    is no whole record is set aside and named, and the exit code is 1.

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
            print_json(printed.paper_json())
        else:
            printed.print_paper(console())
        return
    from ..claims import judge
    from ..figures import overview
    from ..report.notes import warnings

    found, is_whole = given_records(records)
    judged = judge(found)
    if as_json:
        print_json(printed.as_json(judged))
    else:
        printed.print_claims(judged, console())
        for warning in warnings(overview(found)):
            say_wrapped(console(), f"Note: {warning}", "yellow")
    if not is_whole:
        raise typer.Exit(1)

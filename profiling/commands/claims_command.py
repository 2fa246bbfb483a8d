"""The command `ldmperf claims`."""

from __future__ import annotations

from typing import Annotated

import typer

from ..options import CaseError
from ..terminal.visible import console, say_wrapped
from .shared import AsJson, RecordPaths, gathered, print_json


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
    not judged by timing: what timing can say is printed. Records of quality (quality.jsonl) judge them in a closed
    world, at budgets of FLOPs, and of time where the same networks were timed. Only times of one environment are
    compared. A line that is no whole record is set aside and named, and the exit code is 1.

    \b
    Examples:
      ldmperf claims
      ldmperf claims runs/20261124T093000Z-1a84ffb bench/results/h200/2026-11-24-1a84ffb.jsonl
      ldmperf claims closed-world/quality.jsonl closed-world/records.jsonl
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
    from ..measure.folders import RunError
    from ..report.notes import warnings

    found = gathered(records)
    if not found.trajectories and not found.qualities:
        where = records[0] if records else "the latest run"
        raise RunError(f"{where}: no record of a trajectory or of quality in it; give records of ldmperf profile")
    judged = judge(found.trajectories, found.qualities)
    if as_json:
        print_json(printed.as_json(judged))
    else:
        printed.print_claims(judged, console())
        for warning in warnings(overview(found.trajectories)):
            say_wrapped(console(), f"Note: {warning}", "yellow")
    if found.aside.in_file:
        raise typer.Exit(1)

"""The command `ldmperf merge`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..terminal.visible import console, counted, say
from .shared import stop, tell

# Planned cases without a record that are named; the others are counted.
_MOST_NAMED = 20


def merge(
    paths: Annotated[
        list[Path],
        typer.Argument(
            help="Run folders, folders of such, and files of records.",
            metavar="FOLDER | RECORDS.jsonl",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option(help="Where the files go, in a folder for each kind of machine.")],
) -> None:
    """Merge records of many runs: a file for each kind of machine.

    The files are OUT/<machine>/<date>-<commit>.jsonl; kernels and inspections have files of their own. Lines stay
    as they were written, repeats are left out and counted. Of several records of a case on one kind of machine
    that one stays which a report shows. Planned cases without a record are named. Records of several commits, or
    of a checkout with uncommitted changes, are refused, and so is a file in OUT with other records (exit code 2).
    Exit code 1 when a planned case or a shard is missing, or a line is no record; what is there is merged.

    \b
    Examples:
      ldmperf merge runs --out merged
      ldmperf merge node1/runs node2/runs --out bench/results
      ldmperf report merged/*/*.jsonl
    """
    from ..compare.merging import merged, read_written, write_merged
    from ..compare.unmeasured import missing_shards, runs_at, unmeasured
    from ..report.reporting import tell_aside
    from ..trajectory.records import Record

    written, aside = read_written(paths)
    found = merged(written)
    try:
        files = write_merged(out, found)
    except OSError as failure:
        where = failure.filename or out
        stop(
            f"cannot write {where} ({failure.strerror}); nothing was written: choose another folder with --out", 1
        )
    for path, file in zip(files, found.files, strict=True):
        say(console(), f"{path}: {counted(len(file.written), 'record')}")
    for line in found.differences:
        tell(line)
    repeats = found.repeats
    told = (
        (repeats.same, "the same as another"),
        (repeats.completed, "written again with energy or trace"),
        (repeats.superseded, "of a case measured again on the same kind of machine"),
    )
    for count, why in told:
        if count:
            tell(f"left out: {counted(count, 'record')} {why}")
    runs = runs_at(paths)
    shards = missing_shards(runs)
    for line in shards:
        tell(line)
    missing = unmeasured(runs, [each.record for each in written if isinstance(each.record, Record)])
    if missing:
        planned = counted(len(missing), "planned case")
        tell(f"without a record: {planned}; go on with: ldmperf profile --resume FOLDER")
    for key in missing[:_MOST_NAMED]:
        tell(f"  {key}")
    if len(missing) > _MOST_NAMED:
        tell(f"  and {len(missing) - _MOST_NAMED} more")
    tell_aside(aside)
    if shards or missing or aside.in_file:
        raise typer.Exit(1)

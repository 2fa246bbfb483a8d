"""`ldmperf report`: from a path to the table, the files beside it, and the lines that are no records."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..measure.folders import RunError, holds
from ..measure.store import Aside
from ..record_files import gather
from ..terminal.visible import console, counted, say
from ..trajectory.records import RECORDS_NAME, Record
from ..trajectory.runs import RUN_NAME, open_run

if TYPE_CHECKING:
    from ..claims.verdict import ClaimVerdicts
    from ..figures.derived import Overview
    from ..kernel_bench.kernel_records import KernelRecord


class ReportNotWritten(OSError):
    """A folder that the page or a table cannot be written to; the text is one line."""


def report_path(path: Path, out: Path | None) -> bool:
    """Prints whatever records lie at a path. True where all lines of their files are records.

    A run's folder: its table, page and charts. A folder of `ldmperf kernels`: its tables, and kernels.md. Both are
    written to the folder, or to `out`. A file of either kind of records: the tables, and the rest only where `out`
    says where to. Raises RunError where there are no records to read, ReportNotWritten.
    """
    if holds(path, RUN_NAME) and not holds(path, RECORDS_NAME):
        raise RunError(f"{path} has no record yet; measure with: {resume_command(path)}")
    found = gather([path])
    to = out or (path if path.is_dir() else None)
    # First: the reader of the table may be gone after a few of its lines.
    tell_aside(found.aside)
    if found.trajectories:
        _report_records(list(found.trajectories), found.aside, to, path)
    if found.kernels:
        _report_kernels(list(found.kernels), to)
    return not found.aside.in_file


def report_run(folder: Path, out: Path | None = None) -> tuple[list[Record], Aside]:
    """Prints the table of a run and how many cases have no record; writes page and charts to it, or to `out`.

    The records, and the lines that are none. Raises RunError where they cannot be read, ReportNotWritten.
    """
    found = gather([folder / RECORDS_NAME])
    tell_aside(found.aside)
    _report_records(list(found.trajectories), found.aside, out or folder, folder)
    return list(found.trajectories), found.aside


def resume_command(folder: Path) -> str:
    """The command that goes on with a run."""
    return f"ldmperf profile --resume {shlex.quote(str(folder))}"


def _report_records(records: list[Record], aside: Aside, out: Path | None, source: Path) -> None:
    from ..claims.printed import print_summaries
    from ..figures import overview
    from ..report import print_table

    shown = overview(records)
    judged = _judged(records, source)
    print_table(shown, console())
    if holds(source, RUN_NAME):
        try:
            left = {case.key for case in open_run(source).cases} - {record.case_key for record in records}
        except RunError as unreadable:
            say(console(stderr=True), f"what the run has yet to measure is not known: {unreadable}")
        else:
            if left:
                cases = counted(len(left), "planned case has", "planned cases have")
                say(console(stderr=True), f"{cases} no record yet; go on with: {resume_command(source)}")
    try:
        if out is not None:
            _write_page(shown, judged, aside, out, source)
    finally:
        # Last, where they are read; a folder that cannot be written does not take them away.
        print_summaries(judged, console(), shlex.quote(str(source)))


def _judged(records: list[Record], source: Path) -> Sequence[ClaimVerdicts]:
    """The claims by these records; none, and a line that says so, where a package is missing."""
    from ..claims import judge

    try:
        return judge(records)
    except ModuleNotFoundError as missing:
        say(
            console(stderr=True),
            f"no verdicts on the claims: {missing.name} is not installed; pip install {missing.name}, then: "
            f"ldmperf report {shlex.quote(str(source))}",
        )
        return ()


def _write_page(shown: Overview, judged: Sequence[ClaimVerdicts], aside: Aside, out: Path, source: Path) -> None:
    """Writes page and charts, and says where; a missing package is said, too. Raises ReportNotWritten."""
    from ..report import write_report

    try:
        written = write_report(shown, aside.count, out, judged)
    except ModuleNotFoundError as missing:
        say(
            console(stderr=True),
            f"no page and no charts: {missing.name} is not installed; "
            f"pip install altair vl-convert-python jinja2, then: ldmperf report {shlex.quote(str(source))}",
        )
        return
    except OSError as failure:
        raise ReportNotWritten(f"cannot write the report to {out} ({failure.strerror})") from None
    for path in written:
        say(console(), str(path))


def _report_kernels(records: list[KernelRecord], out: Path | None) -> None:
    from ..kernel_bench.run import write_markdown
    from ..kernel_bench.table import markdown, print_records

    print_records(records, console())
    if out is None:
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
        written = write_markdown(out, markdown(records))
    except OSError as failure:
        raise ReportNotWritten(f"cannot write the table to {out} ({failure.strerror})") from None
    say(console(), str(written))


def tell_aside(aside: Aside) -> None:
    """Names the lines that were set aside on stderr, the first of them with their reasons."""
    if not aside.count:
        return
    errors = console(stderr=True)
    for line in aside.first:
        say(errors, str(line))
    named = f", of which the first {len(aside.first)} are named" if len(aside.first) < aside.count else ""
    say(errors, f"{counted(aside.count, 'line')} set aside{named}; no figure comes from them")

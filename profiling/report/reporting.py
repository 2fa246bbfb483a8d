"""`ldmperf report`: from paths to the tables, the page, and the lines that are no records."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..measure.folders import RunError, holds
from ..measure.store import Aside
from ..record_files import NAMES, Gathered, gather_files, joined_files, read_file
from ..terminal.visible import console, counted, say, say_wrapped
from ..trajectory.records import RECORDS_NAME, Record
from ..trajectory.runs import RUN_NAME, open_run, resume_command
from .tables import NOTHING

if TYPE_CHECKING:
    from ..kernel_bench.kernel_records import KernelRecord
    from .page_input import PageInput

# What a name of one page ends with; any other name is a folder's.
PAGE_SUFFIXES = (".html", ".htm")
# Of more paths a line says that they are the same.
_MOST_SPELLED = 3
_THE_SAME = "<the same paths>"


class ReportNotWritten(OSError):
    """A page, or a folder, that cannot be written; the text is one line."""


def report_paths(
    paths: Sequence[Path], out: Path | None = None, *, everything: bool = False, url: str = ""
) -> Gathered:
    """Prints what run folders, kernel folders, folders of such and files of records hold together; those records.

    out         a page where its name ends in .html, else a folder for page, charts and kernels.md. Without it a
                single folder of a run or of kernels has them itself, and nothing is written of anything else
    everything  the whole table on the terminal, however many cases it has
    url         where the records can be had, for the page

    Raises RunError where there are no records to read, ReportNotWritten.
    """
    return _report(gather_files(paths), paths, out or _itself(paths), everything, url)


def report_run(folder: Path) -> Gathered:
    """The same of a run that has just been measured, perhaps without a record; page and charts go to its folder.

    Raises ReportNotWritten.
    """
    path = folder / RECORDS_NAME
    return _report({os.path.realpath(path): read_file(path)}, [folder], folder, False, "")


def _report(
    files: Mapping[str, Gathered], paths: Sequence[Path], out: Path | None, everything: bool, url: str
) -> Gathered:
    found = joined_files(files.values())
    # First: the reader of the table may be gone after a few of its lines.
    tell_aside(found.aside)
    spelled = shlex.join(map(str, paths)) if len(paths) <= _MOST_SPELLED else _THE_SAME
    if not found.records:
        say(console(), NOTHING)
        return found
    content = _content(files, found, out, url, spelled)
    if content.sources.together:
        say_wrapped(console(), f"Put together: {content.sources.together}", "bold")
    try:
        _print(content, found, spelled, everything, out is not None)
        if len(paths) == 1:
            _tell_unmeasured(paths[0], found.trajectories)
        if out is not None:
            _write(content, found, out, spelled)
    finally:
        # Last, where they are read; a folder that cannot be written does not take them away.
        _print_verdicts(content, spelled)
    return found


def is_page(out: Path) -> bool:
    """Whether a name is one page's, and no folder's."""
    return out.suffix.lower() in PAGE_SUFFIXES and not out.is_dir()


def _itself(paths: Sequence[Path]) -> Path | None:
    """The folder that is written to unless told: that of a single run, of kernels or of inspections."""
    if len(paths) != 1 or not any(holds(paths[0], name) for name in NAMES):
        return None
    return paths[0]


def _content(
    files: Mapping[str, Gathered], found: Gathered, out: Path | None, url: str, spelled: str
) -> PageInput:
    """What terminal and page show of these records; without verdicts, and a line that says so, where a package is
    missing."""
    from ..claims.judge import judge_overview
    from ..compare.over_commits import history
    from ..compare.side_by_side import side_by_side
    from ..figures import overview
    from ..figures.headline import headline
    from .kind_sections import kind_sections
    from .page_input import PageInput
    from .quality_curves import quality_curves
    from .sources import Sources

    shown = overview(found.trajectories)
    page = None if out is None else out.parent if is_page(out) else out
    content = PageInput(
        shown,
        headline=headline(shown),
        sources=Sources.of(files, page, url),
        sections=kind_sections(found),
        rejected_lines=found.aside.count,
    )
    try:
        return replace(
            content,
            judged=judge_overview(shown, found.qualities),
            history=history(found.trajectories),
            quality=quality_curves(found.qualities, shown) or None,
            side_by_side=side_by_side(found.records),
        )
    except ModuleNotFoundError as missing:
        say(
            console(stderr=True),
            f"no verdicts on the claims: {missing.name} is not installed; pip install {missing.name}, then: "
            f"ldmperf report {spelled}",
        )
        return content


def _print(content: PageInput, found: Gathered, spelled: str, everything: bool, is_written: bool) -> None:
    from ..quality.quality_table import quality_groups
    from ..static.inspection_table import inspection_groups
    from .kind_sections import kernel_groups, print_kernels, print_launches, print_quality_group
    from .summary_text import MOST_CASES, print_changes, print_headline, print_summary
    from .tables import print_table

    shown, terminal = content.overview, console()
    most = None if everything else MOST_CASES
    kernels, launches = kernel_groups(found.kernels), inspection_groups(found.inspections)
    qualities = quality_groups(found.qualities)
    if found.trajectories and (most is None or len(shown.all_rows) <= most):
        print_table(shown, terminal)
    elif found.trajectories:
        print_headline(content.headline, terminal)
        print_summary(shown, terminal)
    print_changes(content.history, content.side_by_side, terminal)
    for of_group in kernels:
        print_kernels(of_group, terminal, most)
    for launch_group in launches:
        print_launches(launch_group, terminal, most)
    for quality_group in qualities:
        print_quality_group(quality_group, terminal, most)
    counts = [len(shown.all_rows), *(len(of) for groups in (kernels, launches, qualities) for of in groups)]
    if most is not None and max(counts) > most:
        _tell_rest(spelled, is_written)


def _tell_rest(spelled: str, is_written: bool) -> None:
    """Where the cases are that a summary leaves out; a page that is written is named when it is."""
    page = "" if is_written else f"A page with charts: ldmperf report {spelled} -o page.html. "
    say_wrapped(
        console(),
        f"Every case: ldmperf report {spelled} --all. {page}For other programs: ldmperf export {spelled} "
        "--format csv.",
        "dim",
        indent=2,
    )


def _tell_unmeasured(folder: Path, records: Sequence[Record]) -> None:
    """How many of a run's planned cases have no record, on stderr."""
    if not holds(folder, RUN_NAME):
        return
    errors = console(stderr=True)
    try:
        left = {case.key for case in open_run(folder).cases} - {record.case_key for record in records}
    except RunError as unreadable:
        say(errors, f"what the run has yet to measure is not known: {unreadable}")
        return
    if left:
        cases = counted(len(left), "planned case has", "planned cases have")
        say(errors, f"{cases} no record yet; go on with: {resume_command(folder)}")


def _write(content: PageInput, found: Gathered, out: Path, spelled: str) -> None:
    """Writes a page, or a folder with charts and kernels.md, and says where. Raises ReportNotWritten."""
    try:
        written = _write_page(content, out, spelled)
        if found.kernels and not is_page(out):
            out.mkdir(parents=True, exist_ok=True)
            written.append(_write_kernels(found.kernels, out))
    except OSError as failure:
        raise ReportNotWritten(f"cannot write the report to {out} ({failure.strerror})") from None
    for path in written:
        say(console(), str(path))


def _write_page(content: PageInput, out: Path, spelled: str) -> list[Path]:
    """The page, or page and charts; a missing package is said."""
    from ..report import write_page, write_report

    try:
        if is_page(out):
            write_page(content, out)
            return [out]
        return write_report(content, out)
    except ModuleNotFoundError as missing:
        say(
            console(stderr=True),
            f"no page and no charts: {missing.name} is not installed; "
            f"pip install altair vl-convert-python jinja2, then: ldmperf report {spelled}",
        )
        return []


def _write_kernels(records: Sequence[KernelRecord], folder: Path) -> Path:
    from ..kernel_bench.run import write_markdown
    from ..kernel_bench.table import markdown

    return write_markdown(folder, markdown(records))


def _print_verdicts(content: PageInput, spelled: str) -> None:
    from ..claims.printed import print_summaries

    print_summaries(content.judged, console(), spelled)


def tell_aside(aside: Aside) -> None:
    """Names the lines that were set aside on stderr, the first of them with their reasons."""
    if not aside.count:
        return
    errors = console(stderr=True)
    for line in aside.first:
        say(errors, str(line))
    named = f", of which the first {len(aside.first)} are named" if len(aside.first) < aside.count else ""
    say(errors, f"{counted(aside.count, 'line')} set aside{named}; no figure comes from them")

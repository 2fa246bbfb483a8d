"""The tables of kernels, of compiled launches and of qualities, on a page and on the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich.console import Console

from ..figures.text import first_of, statuses_in_words
from ..measure.conditions import commit
from ..quality import QualityRecord
from ..quality.quality_table import (
    QUALITY_NOTE,
    print_qualities,
    quality_conditions,
    quality_grid,
    quality_groups,
)
from ..record_files import Gathered
from ..static.inspection_records import InspectionRecord
from ..static.inspection_table import (
    INSPECTION_NOTE,
    inspection_conditions,
    inspection_grid,
    inspection_groups,
    launch_names,
    print_inspections,
)
from ..terminal.visible import counted, say_wrapped
from .page_input import GridSection

if TYPE_CHECKING:
    from ..kernel_bench.kernel_records import KernelRecord


def kind_sections(found: Gathered) -> tuple[GridSection, ...]:
    """Sections for kernels, each of one kind of machine and commit, for launches, each of one compiler, and for
    qualities, each of one world."""
    return (
        *(section for group in kernel_groups(found.kernels) for section in _of_kernels(group)),
        *(
            GridSection(
                f"Compiled launches: {inspection_conditions(group[0])}", inspection_grid(group), INSPECTION_NOTE
            )
            for group in inspection_groups(found.inspections)
        ),
        *(
            GridSection(
                f"Quality in a closed world: {quality_conditions(group)}", quality_grid(group), QUALITY_NOTE
            )
            for group in quality_groups(found.qualities)
        ),
    )


def kernel_groups(records: Sequence[KernelRecord]) -> list[list[KernelRecord]]:
    """The records that one table may show together."""
    if not records:
        return []
    # Loads torch, which the other kinds do not need.
    from ..kernel_bench.table import by_conditions

    return by_conditions(records)


def _of_kernels(group: Sequence[KernelRecord]) -> Iterator[GridSection]:
    from ..kernel_bench.attention_table import attention_figures, attention_grid, attention_rows, attention_title
    from ..kernel_bench.table import NOTE, conditions, failure_grid, machine_of, notes, ratio_grid, time_grid

    place = f"{machine_of(group[0])}, {group[0].case.dtype}, {commit(group[0].environment)}"
    said = " ".join((f"Measured on {conditions(group)}.", *notes(group)))
    if (grid := ratio_grid(group)).rows:
        yield GridSection(f"Kernels beside their peers: {place}", grid, f"x triton: geometric means. {said}")
    if (grid := time_grid(group)).rows:
        yield GridSection(f"Kernels, each call: {place}", grid, f"{NOTE} {said}")
    if rows := attention_rows(group):
        note = " ".join(f"{line}." for line in attention_figures(rows))
        title = attention_title(rows)
        yield GridSection(f"{title[0].upper()}{title[1:]}: {place}", attention_grid(rows), note)
    if (grid := failure_grid(group)).rows:
        yield GridSection(f"Kernels without a time: {place}", grid)


def print_kernels(records: Sequence[KernelRecord], console: Console, most: int | None) -> None:
    """The tables of a group of kernels; of more than `most` records (None: any number) counts and ratios alone."""
    from ..kernel_bench.table import conditions, notes, print_records, summary_lines

    if most is None or len(records) <= most:
        print_records(records, console)
        return
    say_wrapped(console, conditions(records), "bold")
    calls = counted(len({record.case.key for record in records}), "call")
    statuses = statuses_in_words(record.status for record in records)
    say_wrapped(console, f"{len(records)} times of {calls}: {statuses}")
    for line in (*notes(records), *summary_lines(records)):
        say_wrapped(console, line, indent=2)


def print_launches(records: Sequence[InspectionRecord], console: Console, most: int | None) -> None:
    """The table of a group of compiled launches; of more than `most` (None: any number) counts alone."""
    if most is None or len(records) <= most:
        print_inspections(records, console)
        return
    say_wrapped(console, inspection_conditions(records[0]), "bold")
    kernels = counted(len({record.kernel for record in records}), "kernel")
    statuses = statuses_in_words(record.status for record in records)
    say_wrapped(console, f"{len(records)} compiled launches of {kernels}: {statuses}")
    labels = launch_names(records)
    for title, names in (
        ("spills", [labels[record.case_key] for record in records if record.spills]),
        ("faults", [labels[record.case_key] for record in records if record.faults]),
    ):
        if names:
            say_wrapped(console, f"{title} in {len(names)}: {first_of(names, 5)}", "red", indent=2)


def print_quality_group(records: Sequence[QualityRecord], console: Console, most: int | None) -> None:
    """The table of a group of qualities; of more than `most` (None: any number) counts alone."""
    if most is None or len(records) <= most:
        print_qualities(records, console)
        return
    say_wrapped(console, quality_conditions(records), "bold")
    # Two networks that share a trajectory are no third one, real samples none.
    made = {record.case.network for record in records if record.case.kind not in ("real", "stitched")}
    statuses = statuses_in_words(record.status for record in records)
    say_wrapped(
        console, f"{counted(len(records), 'record')} of quality of {counted(len(made), 'network')}: {statuses}"
    )

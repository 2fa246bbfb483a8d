"""Kernels and compiled launches: their tables on the terminal, in brief where there are many, and on a page."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TYPE_CHECKING, TypeVar

from rich.console import Console

from ..figures.text import first_of, statuses_in_words
from ..record_files import Gathered
from ..terminal.visible import counted, say_wrapped
from .page_input import GridSection

if TYPE_CHECKING:
    from ..kernel_bench.kernel_records import KernelRecord
    from ..static.inspection_records import InspectionRecord

T = TypeVar("T")


def kind_sections(found: Gathered) -> tuple[GridSection, ...]:
    """Sections for kernels, a kind of machine and dtype each, and for compiled launches, a compiler each."""
    sections = []
    for kernels in kernel_groups(found.kernels):
        # Loads torch, which a trajectory's records do not need.
        from ..kernel_bench.table import conditions, kernels_grid, notes, summary_lines

        note = " ".join(f"{line}." for line in (*notes(kernels), *summary_lines(kernels)))
        sections.append(GridSection(f"Kernels: {conditions(kernels)}", kernels_grid(kernels), note))
    for launches in inspection_groups(found.inspections):
        from ..static.inspection_table import NOTE, inspection_conditions, inspection_grid

        title = f"Compiled launches: {inspection_conditions(launches[0])}"
        sections.append(GridSection(title, inspection_grid(launches), NOTE))
    return tuple(sections)


def kernel_groups(records: Iterable[KernelRecord]) -> list[list[KernelRecord]]:
    """The records of each kind of machine, device and dtype, which one table may show together."""
    return _grouped(records, lambda record: (record.environment.kind, record.device, record.case.dtype))


def inspection_groups(records: Iterable[InspectionRecord]) -> list[list[InspectionRecord]]:
    """The records of each architecture, compiler and commit."""
    from ..static.inspection_table import inspection_conditions

    return _grouped(records, inspection_conditions)


def _grouped(records: Iterable[T], key: Callable[[T], Hashable]) -> list[list[T]]:
    groups: dict[Hashable, list[T]] = {}
    for record in records:
        groups.setdefault(key(record), []).append(record)
    return list(groups.values())


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
    from ..static.inspection_table import inspection_conditions, launch_names, print_inspections

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

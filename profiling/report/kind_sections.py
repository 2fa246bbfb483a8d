"""The tables of kernels and of compiled launches on a page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ..measure.conditions import commit
from ..record_files import Gathered
from ..static.inspection_table import NOTE as INSPECTION_NOTE
from ..static.inspection_table import by_compiler, inspection_conditions, inspection_grid
from .page_input import GridSection

if TYPE_CHECKING:
    from ..kernel_bench.kernel_records import KernelRecord


def kind_sections(found: Gathered) -> tuple[GridSection, ...]:
    """Sections of kernels, those of each machine and commit apart, and of what each compiler made of launches."""
    return (
        *(_of_kernels(found.kernels) if found.kernels else ()),
        *(
            GridSection(
                f"Compiled launches: {inspection_conditions(group[0])}", inspection_grid(group), INSPECTION_NOTE
            )
            for group in by_compiler(found.inspections)
        ),
    )


def _of_kernels(records: Sequence[KernelRecord]) -> Iterator[GridSection]:
    # Loads torch, which the other kinds do not need.
    from ..kernel_bench.attention_table import attention_figures, attention_grid, attention_rows, attention_title
    from ..kernel_bench.table import (
        NOTE,
        by_conditions,
        conditions,
        failure_grid,
        machine_of,
        notes,
        ratio_grid,
        time_grid,
    )

    for group in by_conditions(records):
        place = f"{machine_of(group[0])}, {commit(group[0].environment)}"
        said = " ".join((f"Measured on {conditions(group)}.", *notes(group)))
        if (grid := ratio_grid(group)).rows:
            yield GridSection(f"Kernels beside their peers: {place}", grid, f"x triton: geometric means. {said}")
        if (grid := time_grid(group)).rows:
            yield GridSection(f"Kernels, each call: {place}", grid, f"{NOTE} {said}")
        if rows := attention_rows(group):
            note = " ".join(f"{line}." for line in attention_figures(rows))
            yield GridSection(f"{attention_title(rows)}: {place}".capitalize(), attention_grid(rows), note)
        if (grid := failure_grid(group)).rows:
            yield GridSection(f"Kernels without a time: {place}", grid)

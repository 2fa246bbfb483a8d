"""Inspections as a table: a line for each launch, in the terminal and on the page."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from ..measure.conditions import commit
from ..terminal.layout import MISSING, Grid, say_grid
from ..terminal.visible import say_wrapped
from .inspection_records import InspectionRecord

HEADINGS = (
    *("kernel", "call", "with", "tile", "warps", "registers", "spills", "shared bytes", "warps fit", "limit"),
    *("hot instructions", "serialized", "overlap", "faults"),
)
_WORDS = ("kernel", "call", "with", "tile", "limit", "serialized", "overlap", "faults")
# Constants that are shown where they are the same everywhere, too.
_TILE = ("BLOCK", "HEAD_DIM")
INSPECTION_NOTE = (
    "Compiled, not measured. with: tensors that only some launches of a kernel are given. warps fit: at once on a "
    "multiprocessor, and what limits them. hot instructions: of the hot loop, or of all without one. serialized: "
    "ptxas lets each asynchronous matmul wait for the one before. overlap: exponentials beside q k^T, of all."
)


def inspection_conditions(record: InspectionRecord) -> str:
    """What decides the code besides the launch; a table has records of one."""
    environment = record.environment
    ptxas = f", ptxas {environment.ptxas}" if environment.ptxas else ""
    return f"{record.arch}, triton {environment.triton}{ptxas}, {commit(environment)}"


def inspection_grid(records: Sequence[InspectionRecord]) -> Grid:
    """A line for each launch; a column that no launch has a value in is left out."""
    several = len({record.dtype for record in records}) > 1
    shown = _shown(records)
    rows = tuple(_cells(record, several, shown[record.kernel]) for record in records)
    return Grid(HEADINGS, rows, _WORDS).without_empty()


def inspection_groups(records: Sequence[InspectionRecord]) -> list[list[InspectionRecord]]:
    """The records of each architecture, compiler and commit apart; of a launch that is there twice the last."""
    found: dict[str, dict[str, InspectionRecord]] = {}
    for record in sorted(records, key=lambda record: record.started_at):
        found.setdefault(inspection_conditions(record), {})[record.case_key] = record
    return [list(group.values()) for group in found.values()]


def print_inspections(records: Sequence[InspectionRecord], console: Console) -> None:
    """Of each architecture, compiler and commit a table, and how to read them."""
    for group in inspection_groups(records):
        say_wrapped(console, inspection_conditions(group[0]), "bold")
        say_grid(console, inspection_grid(group), leading=3)
    if records:
        say_wrapped(console, INSPECTION_NOTE)


def launch_names(records: Sequence[InspectionRecord]) -> dict[str, str]:
    """A name for each launch, by its key, that says no more than what tells it from the others."""
    shown = _shown(records)
    names = {}
    for record in records:
        of_kernel = shown[record.kernel]
        tensors = _with(record, of_kernel)
        parts = (record.arch, record.kernel, _call(record), record.dtype, tensors and f"with {tensors}")
        tile = " ".join((*_tile(record, of_kernel), f"warps={record.num_warps}"))
        names[record.case_key] = " ".join(part for part in (*parts, tile) if part)
    return names


def _shown(records: Sequence[InspectionRecord]) -> dict[str, frozenset[str]]:
    """By kernel, the tensors and constants in which its launches differ, and its tile."""
    by_kernel: dict[str, list[frozenset[str]]] = {}
    for record in records:
        by_kernel.setdefault(record.kernel, []).append(frozenset(record.tensors + record.constants))
    return {
        kernel: frozenset(
            text
            for text in frozenset.union(*sets)
            if text.startswith(_TILE) or not all(text in found for found in sets)
        )
        for kernel, sets in by_kernel.items()
    }


def _call(record: InspectionRecord) -> str:
    return record.size if record.batch is None else f"{record.size} batch={record.batch}"


def _with(record: InspectionRecord, shown: frozenset[str]) -> str:
    return ", ".join(name for name in record.tensors if name in shown)


def _tile(record: InspectionRecord, shown: frozenset[str]) -> list[str]:
    tile = [text for text in record.constants if text in shown]
    return [*tile, f"number={record.number}"] if record.number > 1 else tile


def _cells(record: InspectionRecord, with_dtype: bool, shown: frozenset[str]) -> tuple[str, ...]:
    overlap = record.overlap
    return (
        record.kernel,
        f"{_call(record)} {record.dtype}" if with_dtype else _call(record),
        _with(record, shown) or MISSING,
        " ".join(_tile(record, shown)) or MISSING,
        str(record.num_warps),
        *(
            _count(value)
            for value in (
                record.registers,
                record.spills,
                record.shared_bytes,
                record.warps_per_multiprocessor,
            )
        ),
        record.occupancy_limit or MISSING,
        _count(record.hot_instructions),
        ", ".join(record.serialized or ()) or MISSING,
        MISSING if overlap is None else f"{overlap.beside_scores}/{overlap.exponentials}",
        "; ".join(record.faults or ()) or MISSING
        if record.status == "ok"
        else f"{record.status}: {record.message}",
    )


def _count(value: int | None) -> str:
    return MISSING if value is None else str(value)

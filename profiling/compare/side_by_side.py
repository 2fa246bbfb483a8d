"""Two commits measured on one kind of machine, case by case, as a table for a page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..figures.text import joined
from ..measure.conditions import commit
from ..record_files import AnyRecord
from ..static.inspection_records import InspectionRecord
from ..terminal.layout import Grid
from .commits import commit_order, machine_names
from .comparison import VerdictRule, compare_sets
from .comparison_table import case_lists, comparison_grid, notes, verdict_counts
from .metrics import metrics_named
from .sets import differences, machine_kind, set_of


@dataclass(frozen=True)
class SideBySide:
    """A comparison of A and B.

    title   which commits, and the kind of machine
    counts  how many rows have which verdict
    shared  what all its cases share, in words
    grid    a row for each case and metric, with its verdict
    lists   heading and names of cases that have no row: failed, or in one of the two only
    notes   what a reader has to know beside the rows
    """

    title: str
    counts: str
    shared: str
    grid: Grid
    lists: tuple[tuple[str, tuple[str, ...]], ...]
    notes: tuple[str, ...]


def side_by_side(records: Sequence[AnyRecord], rule: VerdictRule | None = None) -> tuple[SideBySide, ...]:
    """A comparison for each kind of machine with records of exactly two commits that share a case; A is the older.

    What a compiler made of a launch is the same on every machine: inspections are one kind.
    """
    kinds: dict[tuple[object, ...], list[AnyRecord]] = {}
    for record in records:
        is_compiled = isinstance(record, InspectionRecord)
        kinds.setdefault(() if is_compiled else machine_kind(record.environment), []).append(record)
    machines = machine_names([of_kind[0].environment for of_kind in kinds.values()])
    found = []
    for (kind, of_kind), machine in zip(kinds.items(), machines, strict=True):
        commits = commit_order(of_kind)
        if len(commits) == 2:
            place = machine if kind else "compiled launches"
            found += _compared(of_kind, list(commits), place, rule or VerdictRule())
    return tuple(found)


def _compared(
    records: Sequence[AnyRecord], commits: Sequence[str], place: str, rule: VerdictRule
) -> list[SideBySide]:
    of = {name: [record for record in records if commit(record.environment) == name] for name in commits}
    a, b = (set_of(of[name], Path(name)) for name in commits)
    if set(a.keys).isdisjoint(b.keys):
        return []
    found = compare_sets(a, b, metrics_named([]), rule)
    return [
        SideBySide(
            f"A {commits[0]} beside B {commits[1]}, {place}",
            verdict_counts(found.changes),
            joined(found.shared),
            comparison_grid(found.changes),
            case_lists(found),
            tuple(notes(found, rule, differences(a, b))),
        )
    ]

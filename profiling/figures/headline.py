"""The first sentence of a report: what the smallest network costs of the largest, measured and by FLOPs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..measure.conditions import commit, is_busy, is_unsteady, marks
from ..measure.intervals import FEWEST, Interval, ratio_interval
from ..terminal.visible import counted
from .derived import Overview, Row, Section, rung_place, step_samples
from .phrases import phrases_of
from .text import joined, short_ratio


@dataclass(frozen=True)
class Headline:
    """The smallest network against the largest, of one backend under one set of conditions.

    sentence    "39M costs 0.55 of 145M; its FLOPs say 0.35": times of a step, and the paper's cost, which counts
                FLOPs (counted GFLOP for a network that the paper does not have)
    conditions  what it is true under, the backend first
    interval    of the ratio of times; null where a time may be zero
    doubts      what makes its figures less certain than the sentence sounds; empty where all is well
    """

    small: Row
    large: Row
    section: Section
    sentence: str
    conditions: str
    interval: Interval | None
    doubts: tuple[str, ...]

    @property
    def certainty(self) -> str:
        """ "0.54 to 0.56 with 95% confidence, from the samples of one run"; empty without an interval."""
        found = self.interval
        if found is None:
            return ""
        ends = " to ".join(dict.fromkeys((short_ratio(found.low), short_ratio(found.high))))
        return f"{ends} with {found.confidence:.0%} confidence, from the samples of one run"


def headline(shown: Overview) -> Headline | None:
    """The headline of a record set; None where no two networks have times under the same conditions.

    Chosen is the section and backend with most networks timed; among these the highest rung of the ladder (ours
    before the peer's), then the longest trajectory, then the first in the order of the report.
    """
    found = [(section, rows) for section in shown.sections for rows in _by_backend(section)]
    if not found:
        return None
    section, rows = max(found, key=lambda one: _merit(one[1]))
    small, large = rows[0], rows[-1]
    assert small.cost is not None
    sentence = (
        f"{small.name} costs {short_ratio(small.cost.p50)} of {large.name}; its FLOPs say "
        f"{short_ratio(_flops(small))}"
    )
    phrases = phrases_of(section, shown.environments)
    where = (f"a step with {small.case.backend}", *phrases.values(), f"commit {commit(small.record.environment)}")
    interval = ratio_interval(step_samples(small), step_samples(large))
    return Headline(
        small,
        large,
        section,
        sentence,
        joined(where),
        interval,
        _doubts(small, large, interval),
    )


def _by_backend(section: Section) -> Iterator[list[Row]]:
    """The rows of each backend with two networks timed and counted, the smallest first, the reference last."""
    for backend in dict.fromkeys(row.case.backend for row in section.rows):
        # Rows are in the order of size.
        rows = [row for row in section.rows if row.case.backend == backend and row.cost is not None]
        rows = [row for row in rows if _flops(row) is not None]
        large = next((row for row in rows if row.name == row.reference), None)
        if large is not None and rows[0] is not large:
            yield [*(row for row in rows if row is not large), large]


def _merit(rows: list[Row]) -> tuple[object, ...]:
    return len(rows), rung_place(rows[0].case.backend), rows[0].record.evaluations


def _flops(row: Row) -> float | None:
    """Over the reference's: by the paper's cost, or by GFLOP where it has none."""
    return row.paper_cost if row.paper_cost is not None else row.gflop_ratio


def _doubts(small: Row, large: Row, interval: Interval | None) -> tuple[str, ...]:
    records = [small.record, large.record]
    samples = min(record.wall_ms.n for record in records if record.wall_ms is not None)
    found = []
    if samples < FEWEST:
        found.append(f"{counted(samples, 'sample')} of a time; {FEWEST} at least tell a spread")
    if any(is_unsteady(record.wall_ms) for record in records):
        found.append("a time is unsteady")
    if small.record.environment.machine_id != large.record.environment.machine_id:
        found.append("measured on two machines of one kind")
    if flagged := marks(*records):
        found.append(f"not the times of a free GPU ({flagged})")
    if any(map(is_busy, records)):
        found.append("measured while the machine was busy with other work")
    flops = _flops(small)
    if interval is not None and flops is not None and interval.low <= flops <= interval.high:
        found.append("what its FLOPs say lies within the interval")
    return tuple(found)

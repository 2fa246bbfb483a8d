"""Derived numbers of a record set: costs beside the paper's, ratios to the peer, lines over steps. Pure functions.

A number is only ever compared with one measured under the same conditions in an environment of the same kind
(`Environment.kind`: GPU, processor, versions, settings and commit).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter

from ..measure.environment import Environment
from ..paper import paper_sizes
from ..trajectory.case import BACKENDS, RELEASED_NAMES, Case
from ..trajectory.records import Record
from .best import best_record, by_time
from .lines import Line, fit_line
from .phrases import Conditions

PEER = "diffusers"


@dataclass(frozen=True)
class Spread:
    """A median with the quantiles around it, all in one unit."""

    p20: float
    p50: float
    p80: float


@dataclass(frozen=True)
class Row:
    """A record, the index of its environment's kind, and its ratios, each null where a time is missing.

    reference     name of the network that ratios are relative to
    cost          time over the reference's time
    paper_cost    the paper's normalized cost over the reference's
    gflop_ratio   GFLOP over the reference's, for a network that is not in the paper
    times_faster  the peer's time over this one
    """

    record: Record
    environment: int
    name: str
    cost: Spread | None = None
    reference: str | None = None
    paper_cost: float | None = None
    gflop_ratio: float | None = None
    times_faster: float | None = None

    @property
    def case(self) -> Case:
        return self.record.case


@dataclass(frozen=True)
class Section:
    """Rows of one kind of environment and one set of conditions: they differ in network and backend only."""

    environment: int
    case: Case
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class StepsSeries:
    """Trajectories of one network and backend at two step counts or more; the line is ms over evaluations."""

    environment: int
    case: Case
    name: str
    rows: tuple[Row, ...]
    line: Line


@dataclass(frozen=True)
class Overview:
    """A record set as a report shows it: the family in sections; rivals and pipelines, which are in none.

    environments  the first of each kind
    measured_in   of each kind all its environments, which differ in the machine, its memory or its cores
    superseded    how many records give way to another of the same case
    """

    environments: tuple[Environment, ...]
    conditions: Conditions
    sections: tuple[Section, ...]
    series: tuple[StepsSeries, ...]
    superseded: int
    rivals: tuple[Row, ...] = ()
    measured_in: tuple[tuple[Environment, ...], ...] = ()
    pipelines: tuple[Row, ...] = ()

    @property
    def rows(self) -> list[Row]:
        """Those of the family."""
        return [row for section in self.sections for row in section.rows]

    @property
    def timed(self) -> list[Row]:
        """The rows that have a time."""
        return [row for row in self.rows if row.record.wall_ms is not None]

    @property
    def all_rows(self) -> list[Row]:
        """Those of the family, then the rivals' and the pipelines'."""
        return [*self.rows, *self.rivals, *self.pipelines]


def ratio(numerator: float | None, denominator: float | None) -> float | None:
    """The quotient; null when a side is missing, the denominator is zero, or it leaves the range of a float."""
    if numerator is None or not denominator:
        return None
    quotient = numerator / denominator
    return quotient if math.isfinite(quotient) else None


def decoder_share(record: Record) -> float | None:
    """The decoder's share of the time to an image, of medians; null where either is missing."""
    if record.decoder_ms is None or record.wall_ms is None:
        return None
    return ratio(record.decoder_ms.p50, record.decoder_ms.p50 + record.wall_ms.p50)


def step_ms(record: Record) -> Spread | None:
    """Wall milliseconds of a model evaluation, the sampler's share included; null for a failed case."""
    if record.wall_ms is None or not record.evaluations:
        return None
    n = record.evaluations
    return Spread(record.wall_ms.p20 / n, record.wall_ms.p50 / n, record.wall_ms.p80 / n)


def step_samples(row: Row) -> list[float]:
    """Wall ms of a model evaluation, sample by sample; none for a failed case."""
    wall, evaluations = row.record.wall_ms, row.record.evaluations or 1
    return [] if wall is None else [ms / evaluations for ms in wall.samples]


def overview(records: Sequence[Record]) -> Overview:
    """The records in sections, each case once per kind of environment (`best_record`), with ratios and lines.

    Files may be given in any order: environments have their letters, and cases their latest record, by time.
    """
    records = by_time(records)
    kinds: dict[tuple[object, ...], list[Environment]] = {}
    for environment in dict.fromkeys(record.environment for record in records):
        kinds.setdefault(environment.kind, []).append(environment)
    environments = tuple(of_kind[0] for of_kind in kinds.values())
    index_of = {environment: index for index, of_kind in enumerate(kinds.values()) for environment in of_kind}
    measured: dict[tuple[int, str], list[Record]] = {}
    for record in records:
        measured.setdefault((index_of[record.environment], record.case_key), []).append(record)
    best = {key: best_record(of_case) for key, of_case in measured.items()}
    names = network_names(best.values())
    grouped: dict[tuple[object, ...], list[Record]] = {}
    apart: dict[str, list[Row]] = {"rival": [], "pipeline": []}
    for (index, _), record in best.items():
        if record.case.task in apart:
            apart[record.case.task].append(Row(record, index, record.case.label))
            continue
        grouped.setdefault((index, *_conditions(record.case)), []).append(record)
    sections = tuple(
        Section(index := index_of[group[0].environment], group[0].case, _rows(index, group, names))
        for _, group in sorted(grouped.items(), key=lambda item: _sort_key(item[0]))
    )
    conditions = Conditions.of(environments, sections)
    superseded = len(records) - len(best)
    measured_in = tuple(map(tuple, kinds.values()))
    rivals, pipelines = (tuple(rows) for rows in apart.values())
    series = _steps_series(sections)
    return Overview(environments, conditions, sections, series, superseded, rivals, measured_in, pipelines)


def network_names(records: Iterable[Record]) -> dict[str, str]:
    """The short name of each network (`Case.network`), or all of its name where two share the short one."""
    networks = {record.case.network: record.case for record in records}
    labels = [case.label for case in networks.values()]

    def is_taken(case: Case) -> bool:
        of_others = (*paper_sizes(), *RELEASED_NAMES)
        return case.is_checkpoint and (labels.count(case.label) > 1 or case.label in of_others)

    return {network: network if is_taken(case) else case.label for network, case in networks.items()}


def _all_but(*names: str) -> Callable[[Case], tuple[object, ...]]:
    """The values of a case's fields but for these."""
    # Taken from the model, so that a condition added to cases one day is never averaged over.
    return attrgetter(*(name for name in Case.model_fields if name not in names))


_conditions = _all_but("unet", "weights_sha256", "backend")


def _sort_key(condition: tuple[object, ...]) -> tuple[tuple[float, str], ...]:
    """Sorts numbers by value and all else by text, whatever types the conditions have."""
    return tuple(
        (float(value), "") if isinstance(value, int | float) else (0.0, str(value)) for value in condition
    )


def alike(rows: Iterable[Row], *but: str) -> list[list[Row]]:
    """The rows in groups of one kind of environment and one case but for these fields, as they come."""
    values_of = _all_but(*but)
    grouped: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        grouped.setdefault((row.environment, *values_of(row.case)), []).append(row)
    return list(grouped.values())


def names_by_size(rows: Iterable[Row]) -> list[str]:
    """The networks' names, the smallest first, whatever backend has which."""
    ordered = sorted(rows, key=lambda row: (_magnitude(row.record), row.case.network))
    return list(dict.fromkeys(row.name for row in ordered))


def _paper_cost(record: Record) -> float | None:
    """The paper's normalized cost of a network; null for one that the paper does not have."""
    size = paper_sizes().get(record.case.network)
    return None if size is None else size.normalized_cost


def _magnitude(record: Record) -> tuple[float, float]:
    """Orders networks by their cost on paper: normalized for the paper's sizes, else GFLOP in the same unit."""
    cost = _paper_cost(record)
    if cost is None:
        cost = (record.gflop_per_forward or 0.0) / paper_sizes()["866M"].gflop
    return cost, record.parameters or 0.0


def _reference(timed: Sequence[Record]) -> Record:
    """The largest network, of the paper's sizes if one is there: the paper's costs are rescaled to it."""
    in_paper = [record for record in timed if record.case.network in paper_sizes()]
    return max(in_paper or timed, key=_magnitude)


def _references(section: Sequence[Record]) -> dict[str, Record]:
    """What each backend's times are relative to: the largest network that it has a time for."""
    timed: dict[str, list[Record]] = {}
    for record in section:
        if (spread := step_ms(record)) and spread.p50 > 0:
            timed.setdefault(record.case.backend, []).append(record)
    return {backend: _reference(of) for backend, of in timed.items()}


def rung_place(backend: str) -> int:
    """A backend's place on the ladder; those that are not on it come behind all others."""
    return BACKENDS.index(backend) if backend in BACKENDS else len(BACKENDS)


def _rows(environment: int, section: Sequence[Record], names: dict[str, str]) -> tuple[Row, ...]:
    references = _references(section)
    peers = {record.case.network: record for record in section if record.case.backend == PEER}
    # The peer last: ours are read against the paper first, then against the peer. Records come in the order of
    # measuring, which is not the ladder's.
    found = dict.fromkeys(record.case.backend for record in section)
    backends = sorted(found, key=lambda name: (name == PEER, rung_place(name)))
    ordered = sorted(section, key=lambda r: (backends.index(r.case.backend), _magnitude(r), r.case.network))
    rows = []
    for record in ordered:
        row = Row(record, environment, names[record.case.network])
        reference = references.get(record.case.backend)
        if record.wall_ms is not None and reference is not None:
            cost, gflop = _paper_cost(record), record.gflop_per_forward
            row = replace(
                row,
                cost=_cost(record, reference),
                reference=names[reference.case.network],
                paper_cost=ratio(cost, _paper_cost(reference)),
                gflop_ratio=ratio(gflop, reference.gflop_per_forward) if cost is None else None,
                times_faster=_times_faster(record, peers.get(record.case.network)),
            )
        rows.append(row)
    return tuple(rows)


def _cost(record: Record, reference: Record) -> Spread | None:
    own, base = step_ms(record), step_ms(reference)
    if own is None or base is None:
        return None
    p20, p50, p80 = (ratio(value, base.p50) for value in (own.p20, own.p50, own.p80))
    return None if p20 is None or p50 is None or p80 is None else Spread(p20, p50, p80)


def _times_faster(record: Record, peer: Record | None) -> float | None:
    if peer is None or peer is record or peer.wall_ms is None or record.wall_ms is None:
        return None
    return ratio(peer.wall_ms.p50, record.wall_ms.p50)


def _steps_series(sections: Sequence[Section]) -> tuple[StepsSeries, ...]:
    """Rows that differ in steps only, where a line can be laid through them."""
    series = []
    for rows in alike([row for section in sections for row in section.rows], "steps"):
        timed = [row for row in rows if row.record.wall_ms is not None]
        points = [(r.record.evaluations or 0, r.record.wall_ms.p50) for r in timed if r.record.wall_ms]
        line = fit_line(points, relative=True)
        if line is not None:
            series.append(StepsSeries(timed[0].environment, timed[0].case, timed[0].name, tuple(timed), line))
    return tuple(series)

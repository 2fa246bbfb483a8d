"""What the charts and filters of a page go by: a row for each case, as columns of words and of numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..claims.offers import PAPER_STEPS, Course, paper_fid
from ..compare.commits import commit_order
from ..figures.derived import Overview, Row, Spread, StepsSeries, alike, ratio, rung_place, step_ms
from ..measure.recorded import Samples
from ..paper import paper_sizes
from ..terminal.visible import visible
from .fact_tables import PLACES, FactTable, Placing, Words, natural, told_by
from .quality_curves import QualityCurves
from .quality_facts import QualityFacts

if TYPE_CHECKING:
    from ..compare.history import History


@dataclass(frozen=True)
class Facts:
    """The tables of a page.

    cases    a row for each of `Overview.rows`, in that order
    fid      a row for each network, backend and set of conditions that the paper has a FID of
    history  a row for each case on each commit
    quality  a row for each network and step count of a closed world, and for each guidance rate
    filters  the conditions of `cases` that vary, with their values in order; the backend is one
    first    the conditions that are looked at first: those of the headline
    """

    cases: FactTable
    fid: FactTable
    history: FactTable
    quality: QualityFacts
    filters: Mapping[str, Words]
    first: Mapping[str, str]

    @classmethod
    def of(
        cls,
        shown: Overview,
        history: History | None = None,
        first: Row | None = None,
        quality: QualityCurves | None = None,
    ) -> Facts:
        placing = Placing.of(shown)
        cases = _cases(shown, placing)
        by_place = told_by(cases.words, "environment", "device", "commit")
        names = [name for name in placing.names if name != "environment" or not by_place]
        order = _orders(shown)
        values = {
            name: tuple(sorted(set(cases.words.get(name, ())), key=order.get(name, natural)))
            for name in (*names, "backend")
        }
        filters = {name: of for name, of in values.items() if len(of) > 1}
        looked_at = {} if first is None else placing.words(first)
        of_quality = QualityFacts.of(quality or QualityCurves(), placing)
        return cls(cases, _fid(shown, placing), _history(shown, history, placing), of_quality, filters, looked_at)

    def table(self, name: str) -> FactTable:
        """By the name that a chart has of it."""
        return self.tables[name]

    @property
    def tables(self) -> dict[str, FactTable]:
        """All of them by name."""
        always = {"cases": self.cases, "fid": self.fid, "history": self.history}
        return always | self.quality.tables


def _orders(shown: Overview) -> dict[str, Callable[[str], Any]]:
    """How the values of a condition are sorted: commits by time, backends as the ladder has them."""
    times = list(commit_order([row.record for row in shown.all_rows]))
    return {"commit": [visible(name) for name in times].index, "backend": lambda name: (rung_place(name), name)}


def _cases(shown: Overview, placing: Placing) -> FactTable:
    lines = {id(row.record): series for series in shown.series for row in series.rows}
    floors = _floor_costs(shown)
    facts = []
    for row in shown.rows:
        record, series = row.record, lines.get(id(row.record))
        start = None if series is None else _start(series)
        numbers: dict[str, float | None] = {
            "gflop": record.gflop_per_forward,
            "rung": rung_place(row.case.backend),
            "evaluations": record.evaluations,
            "images": row.case.batch,
            **_spread("step", step_ms(record)),
            **_spread("wall", None if series is None else record.wall_ms),
            **_spread("cost", None if row.cost is None or row.cost.p20 <= 0 else row.cost),
            "paper": row.gflop_ratio if row.paper_cost is None else row.paper_cost,
            "floor_cost": floors.get(id(record)),
            "line": None if series is None else series.line.at(record.evaluations or 0),
            "line_from": start,
            "line_start": None if series is None or start is None else series.line.at(start),
            "images_per_s": record.images_per_s,
            "joules": record.joules_per_image,
        }
        reference = f"{visible(row.reference)} = 1" if row.reference else ""
        by_gflop = row.paper_cost is None and row.gflop_ratio is not None
        label = visible(row.name) + (" (by GFLOP)" if by_gflop else "")
        told = {"reference": reference, "label": label, "no_time": "" if record.status == "ok" else record.status}
        facts.append((placing.words(row) | told, numbers))
    return FactTable.of(facts, placing.names)


def _spread(name: str, of: Spread | Samples | None) -> dict[str, float | None]:
    quantiles = (None, None, None) if of is None else (of.p20, of.p50, of.p80)
    return dict(zip((f"{name}_p20", f"{name}_p50", f"{name}_p80"), quantiles, strict=True))


def _start(series: StepsSeries) -> int:
    """Where a line is drawn from: zero, but for two points, which say nothing of the fixed part."""
    return 0 if len(series.rows) > 2 else min(row.record.evaluations or 0 for row in series.rows)


def _floor_costs(shown: Overview) -> dict[int, float | None]:
    """The floor of a step over that of the row's reference, by the record's id."""
    found: dict[int, float | None] = {}
    for section in shown.sections:
        floors = {(row.name, row.case.backend): row.record.floor for row in section.rows}
        for row in section.rows:
            own, base = row.record.floor, floors.get((row.reference or "", row.case.backend))
            if own is not None and base is not None:
                found[id(row.record)] = ratio(own.step_ms, base.step_ms)
    return found


def _fid(shown: Overview, placing: Placing) -> FactTable:
    """The paper's FID beside the time of an image at its steps: measured, or by the line over measured steps."""
    facts = []
    for rows in alike(shown.timed, "steps"):
        case = rows[0].case.model_copy(update={"steps": PAPER_STEPS})
        fid, size = paper_fid(case), paper_sizes().get(case.network)
        measured = {row.case.steps: row for row in rows}
        ms = Course.of({steps: row.record.ms_per_image or 0.0 for steps, row in measured.items()}).at(PAPER_STEPS)
        if fid is None or size is None or not ms:
            continue
        row = measured.get(PAPER_STEPS, rows[0])
        wall = row.record.wall_ms if PAPER_STEPS in measured else None
        images = row.case.batch
        counts = ", ".join(map(str, sorted(measured)))
        numbers = {
            "fid": fid,
            "ms": ms,
            "ms_p20": ms if wall is None else wall.p20 / images,
            "ms_p80": ms if wall is None else wall.p80 / images,
            "paper_image": size.normalized_cost * PAPER_STEPS,
            "predicted": float(wall is None),
        }
        basis = f"predicted from {counts} steps" if wall is None else f"measured at {PAPER_STEPS} steps"
        facts.append((placing.words(row, "steps") | {"basis": basis}, numbers))
    return FactTable.of(facts, placing.names)


def _history(shown: Overview, history: History | None, placing: Placing) -> FactTable:
    """Of each case on each commit. Its conditions are those of the cases, without commit and environment."""
    if history is None:
        return FactTable()
    of_case = {row.record.case_id: row for row in shown.rows}
    places = sorted({(point.at, point.commit) for series in history.series for point in series.points})
    facts = []
    for series in history.series:
        words = placing.words(of_case[series.case_id], *PLACES)
        words["machine"] = visible(series.machine)
        for point in series.points:
            numbers = {"place": float(places.index((point.at, point.commit))), **_spread("step", point.step_ms)}
            facts.append((words | {"commit": visible(point.commit), "verdict": point.verdict}, numbers))
    names = tuple(name for name in placing.names if name not in PLACES)
    return FactTable.of(facts, ("machine", *names))

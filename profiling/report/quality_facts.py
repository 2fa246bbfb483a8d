"""What the charts of quality go by: a row for each cell at what it costs, and for each guidance rate."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..claims.closed_worlds import ClosedWorld, seeds_in_words
from ..claims.pooled_figures import LOGARITHM
from ..claims.sample_costs import TimeBudget
from ..figures.phrases import TASKS, phrases_of
from ..figures.text import first_of, joined
from ..measure.conditions import commit
from ..terminal.visible import counted, visible
from .fact_tables import FactOf, FactTable, Placing
from .quality_curves import METRICS, CostCurves, CurvePoint, GuidanceCurves, QualityCurves, frontier

# Of the time of a trajectory; its steps, sampler and guidance are a cell's own.
_TIMED = ("environment", "device", "commit", "dtype", "batch", "latent", "context_tokens")
_OF_A_CELL = ("size", "sampler", "steps", "guidance_scale", "task")


@dataclass(frozen=True)
class QualityFacts:
    """The tables of a page's charts of quality: over FLOPs, over time, and over the guidance rate."""

    flops: FactTable
    times: FactTable
    guidance: FactTable

    @property
    def tables(self) -> dict[str, FactTable]:
        """By the names that charts have of them."""
        return {"quality": self.flops, "quality-times": self.times, "quality-guidance": self.guidance}

    @classmethod
    def of(cls, curves: QualityCurves, placing: Placing) -> QualityFacts:
        timed = [of for of in curves.costs if isinstance(of.unit, TimeBudget)]
        flops = [of for of in curves.costs if not isinstance(of.unit, TimeBudget)]
        names = ("world", "task", "sampler")
        return cls(
            FactTable.of([fact for of in flops for fact in _of_costs(of, "gflop_image", {}, ())], names),
            FactTable.of(
                [fact for of in timed for fact in _over_time(of, placing)],
                (*names, *(name for name in placing.names if name not in _OF_A_CELL), "backend"),
            ),
            FactTable.of(
                [fact for of in curves.guidance for fact in _of_guidance(of)], (*names, "steps", "split")
            ),
        )


def _over_time(curves: CostCurves, placing: Placing) -> list[FactOf]:
    """With the conditions of the times: those that vary on the page as words, the others in the note."""
    assert isinstance(curves.unit, TimeBudget)
    row = next(iter(curves.unit.costs.values())).rows[0]
    words = {name: text for name, text in placing.words(row).items() if name not in _OF_A_CELL}
    phrases = phrases_of(row, placing.shown.environments)
    shared = [phrases[name] for name in _TIMED if name not in placing.names and phrases.get(name)]
    notes = curves.unit.notes(point.cell for point in curves.points)
    return _of_costs(curves, "ms", words, (*shared, *notes))


def _of_costs(curves: CostCurves, cost: str, words: Mapping[str, str], notes: Iterable[str]) -> list[FactOf]:
    placed = _placed(curves.world, curves.sampler) | dict(words)
    missing = [f"no {curves.unit.unit} known of {first_of(curves.without_cost)}"] if curves.without_cost else []
    placed |= _notes(curves.points, (*notes, *missing))
    fronts = {metric.field: {*map(id, frontier(curves.points, metric.field))} for metric in METRICS}
    facts: list[FactOf] = []
    for point in curves.points:
        numbers = {cost: point.at, **_numbers(curves.world, point)}
        for field, front in fronts.items():
            numbers[f"{field}_front"] = numbers[field] if id(point) in front else None
        facts.append((_words(point) | placed, numbers))
    return facts


def _of_guidance(curves: GuidanceCurves) -> list[FactOf]:
    placed = _placed(curves.world, curves.sampler)
    placed |= {"steps": counted(curves.steps, "step"), "split": f"{curves.split} prompts"}
    placed |= _notes(curves.points)
    return [
        (_words(point) | placed, {"rate": point.at} | _numbers(curves.world, point)) for point in curves.points
    ]


def _placed(world: ClosedWorld, sampler: str) -> dict[str, str]:
    return {"world": visible(world.name), "task": TASKS[world.task], "sampler": visible(sampler)}


def _words(point: CurvePoint) -> dict[str, str]:
    network, kind = visible(point.cell.network), point.kind
    series = network if kind == "diffusion" else kind
    return {"series": series, "network": network, "kind": kind, "cell": f"{network}, {point.cell.steps}"}


def _numbers(world: ClosedWorld, point: CurvePoint) -> dict[str, float | None]:
    """Steps, and of each metric the mean, its interval and that of real samples, where its axis has them."""
    found: dict[str, float | None] = {"evaluations": point.cell.steps}
    for metric in METRICS:
        field, interval = metric.field, point.intervals.get(metric.field)
        real = world.ceiling if field == "alignment" else world.real(metric)
        found |= {
            field: None if interval is None else interval.value,
            f"{field}_low": None if interval is None else interval.low,
            f"{field}_high": None if interval is None else interval.high,
            f"{field}_real": None if real is None or (metric.scale is LOGARITHM and real <= 0) else real,
        }
    return found


def _notes(points: Sequence[CurvePoint], more: Iterable[str] = ()) -> dict[str, str]:
    """Of each metric: samples and seeds of its points, how sure its intervals are, on which commits."""
    samples = sorted({point.cell.samples for point in points})
    commits = sorted({commit(record.environment) for point in points for record in point.cell.records})
    count = f"{samples[0]} to {samples[-1]} samples" if len(samples) > 1 else counted(samples[0], "sample")
    place = f"commit{'' if len(commits) == 1 else 's'} {joined(commits)}"
    notes = {}
    for field in (metric.field for metric in METRICS):
        having = [point for point in points if field in point.figures]
        confidence = min((point.intervals[field].confidence for point in having), default=0.0)
        seeds = [seeds_in_words(point.figures[field] for point in having)] if having else []
        sure = f"intervals of {confidence:.0%}" if confidence else "without replicates there is no interval"
        notes[f"{field}_note"] = visible("; ".join((count, *seeds, sure, place, *more)))
    return notes

"""What the guidance rate moves in a closed world: quality, or how well a caption is followed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..figures.derived import Overview
from ..figures.text import times
from ..measure.intervals import Interval, each_of, extreme_interval
from ..terminal.layout import MISSING, Grid
from ..terminal.visible import counted
from . import limits
from .budget_words import advantage_text, judged_text
from .catalogue import Claim
from .closed_worlds import QUALITY_METRICS, ClosedWorld, QualityCell, QualityMetric, of_the_same_seeds
from .pooled_figures import ERRORS, LOGARITHM, PooledFigure, contrast
from .quality_verdict import conditions_of, figure_text, quality_verdict, unmeasured_quality
from .verdict import Judged, Verdict


@dataclass(frozen=True)
class GuidanceSweep:
    """One network at one step count, at several guidance rates, the lowest first.

    cells   all of them; rate 1 is told, and in no range
    """

    cells: tuple[QualityCell, ...]

    @property
    def network(self) -> str:
        return self.cells[0].network

    @property
    def within(self) -> tuple[QualityCell, ...]:
        """Those at the paper's rates."""
        low, high = limits.GUIDANCE_RANGE
        return tuple(cell for cell in self.cells if low <= cell.guidance_scale <= high)


def quality_guidance(claim: Claim, worlds: Sequence[ClosedWorld], shown: Overview) -> list[Verdict]:
    """Whether the guidance rate moves quality by a larger factor than alignment, and than its errors."""
    found = []
    for world in worlds:
        for sampler in world.samplers:
            sweeps = _sweeps(world, sampler)
            for metric in QUALITY_METRICS if sweeps else ():
                found.append(_guidance(claim, world, sampler, metric, sweeps))
    return found


def _sweeps(world: ClosedWorld, sampler: str) -> list[GuidanceSweep]:
    """Of each network the sweep with most rates; of several test prompts first, then that of the most steps."""
    grouped: dict[tuple[str, int, str], list[QualityCell]] = {}
    for cell in world.guided_cells(sampler):
        grouped.setdefault((cell.network, cell.steps, cell.records[0].case.split), []).append(cell)
    best: dict[str, tuple[tuple[int, bool, int], GuidanceSweep]] = {}
    for (network, steps, split), cells in grouped.items():
        sweep = GuidanceSweep(of_the_same_seeds(cells))
        merit = (len(sweep.within), split == "test", steps)
        if len(sweep.within) >= limits.FEWEST_RATES and (network not in best or merit > best[network][0]):
            best[network] = (merit, sweep)
    return [best[name][1] for name in world.networks if name in best]


@dataclass(frozen=True)
class _Moved:
    """By what factors the rate moves the metric, the errors and the alignment of a network, as logarithms."""

    quality: Interval
    errors: Interval
    alignment: Interval
    excess: Interval
    figures: tuple[PooledFigure, ...]

    @property
    def over_errors(self) -> bool:
        return self.quality.value > self.errors.value

    @property
    def over_alignment(self) -> bool:
        return self.quality.value > self.alignment.value


def _moved(sweep: GuidanceSweep, metric: QualityMetric, confidence: float) -> _Moved | None:
    """Null where a figure has no logarithm: KID at or below zero, an alignment without errors."""
    scales = ((metric.field, LOGARITHM), ("alignment", ERRORS), ("alignment", LOGARITHM))
    found = [[cell.figure(field, scale) for cell in sweep.within] for field, scale in scales]
    figures = [[figure for figure in of if figure is not None] for of in found]
    if any(len(of) < len(sweep.within) for of in figures):
        return None
    quality, errors, alignment = (_ends(of) for of in figures)

    def excess(*numbers: Any) -> Any:
        import numpy

        moved = [numbers[place] - numbers[place + 1] for place in (0, 2, 4)]
        return moved[0] - numpy.maximum(moved[1], moved[2])

    together = (*quality, *errors, *alignment)
    ranges = [contrast(of, lambda most, least: most - least) for of in (quality, errors, alignment)]
    return _Moved(ranges[0], ranges[1], ranges[2], contrast(together, excess, confidence), together)


def _ends(figures: Sequence[PooledFigure]) -> tuple[PooledFigure, PooledFigure]:
    """The rates with the largest and the smallest number: the range is between these, of resamples too. The range
    of each resample would be larger than that of the figures, by noise."""
    ordered = sorted(figures, key=lambda figure: figure.number)
    return ordered[-1], ordered[0]


def _guidance(
    claim: Claim, world: ClosedWorld, sampler: str, metric: QualityMetric, sweeps: Sequence[GuidanceSweep]
) -> Verdict:
    said = conditions_of(world, sampler, metric)
    together = each_of(len(sweeps))
    found = {sweep.network: _moved(sweep, metric, together) for sweep in sweeps}
    moved = {name: of for name, of in found.items() if of is not None}
    cells = [cell for sweep in sweeps for cell in sweep.cells]
    grid = _guidance_grid(world, metric, sweeps, moved)
    if len(moved) < len(found):
        missing = next(name for name in found if name not in moved)
        needs = f"a {metric.name} above 0 and an alignment below 1 of the {missing} at every rate, to tell factors"
        return unmeasured_quality(claim, needs, said, grid, cells)
    # At every network: the least decides.
    least = extreme_interval(min, [of.excess for of in moved.values()])
    name = min(moved, key=lambda name: moved[name].excess.value)
    of, sweep = moved[name], next(sweep for sweep in sweeps if sweep.network == name)
    low, high = (cell.guidance_scale for cell in (sweep.within[0], sweep.within[-1]))
    split = "" if sweep.cells[0].records[0].case.split == "test" else " on held-out prompts"
    errors, alignment = (times(LOGARITHM.back(moves.value)) for moves in (of.errors, of.alignment))
    disagree = ""
    if of.over_errors != of.over_alignment:
        more, less = ("wrong", "right") if of.over_errors else ("right", "wrong")
        disagree = f": more than the share that is {more}, not more than the share that is {less}"
    bound = f"a bound over {counted(len(moved), 'network')}"
    sentence = (
        f"between guidance {low:g} and {high:g} at {counted(sweep.cells[0].steps, 'step')}{split} the "
        f"{metric.name} of the {name} changes {times(LOGARITHM.back(of.quality.value))}, the share of "
        f"factors that is right {alignment} and the share that is wrong {errors}{disagree}; the first over the "
        f"larger of the others is least there ({judged_text(LOGARITHM, least, bound, 'holds')})"
    )
    judged = Judged("log of the metric's range over the larger of alignment's", least, 0.0, above=True)
    figures = [figure for one in moved.values() for figure in one.figures]
    return quality_verdict(claim, judged, sentence, said, grid, cells, figures)


def _guidance_grid(
    world: ClosedWorld, metric: QualityMetric, sweeps: Sequence[GuidanceSweep], moved: Mapping[str, _Moved]
) -> Grid:
    """A row for each network and rate, one for its ranges, and one of real samples."""
    rows = []
    for sweep in sweeps:
        for cell in sweep.cells:
            quality, alignment = metric.figure(cell), cell.figure("alignment", LOGARITHM)
            texts = (MISSING if figure is None else figure_text(figure) for figure in (quality, alignment))
            rows.append((sweep.network, f"{cell.guidance_scale:g}", *texts, MISSING))
        if (of := moved.get(sweep.network)) is not None:
            ranges = (advantage_text(LOGARITHM, moves) for moves in (of.quality, of.alignment, of.errors))
            rows.append((sweep.network, "range", *ranges))
    real, ceiling = world.real(metric), world.ceiling
    if real is not None or ceiling is not None:
        texts = (MISSING if value is None else f"{value:.4g}" for value in (real, ceiling))
        rows.append(("real samples", MISSING, *texts, MISSING))
    headings = ("network", "guidance", metric.name, "alignment", "errors of alignment")
    return Grid(headings, tuple(rows), ("network", "guidance")).without_empty()

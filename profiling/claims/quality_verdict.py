"""Verdicts on quality in a closed world: their conditions, and what a sentence says of seeds and replicates."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from ..figures.phrases import TASKS
from ..figures.text import joined
from ..measure.intervals import Interval
from ..terminal.layout import Grid
from ..terminal.visible import counted
from .catalogue import Claim
from .closed_worlds import Cells, ClosedWorld, QualityCell, QualityMetric, seeds_in_words
from .pooled_figures import PooledFigure
from .verdict import FEW_SIZES, Finding, Judged, Verdict

# Each verdict says how far it reaches.
WHERE = "in this closed world"


def conditions_of(world: ClosedWorld, sampler: str | None, metric: QualityMetric | None) -> dict[str, str]:
    """Name and phrase of the conditions of a verdict, without a budget."""
    found = {"world": f"closed world {world.name}", "task": TASKS.get(world.task, world.task)}
    found |= {} if sampler is None else {"sampler": sampler}
    return found | ({} if metric is None else {"metric": metric.name})


def quality_verdict(
    claim: Claim,
    judged: Judged,
    sentence: str,
    conditions: Mapping[str, str],
    figures: Grid,
    cells: Sequence[QualityCell],
    decided_by: Sequence[PooledFigure],
    notes: Iterable[str] = (),
) -> Verdict:
    """The verdict of a number; the sentence says from how many seeds, and what is few.

    cells: all that the figures tell of. decided_by: the figures that the number is made of.
    """
    finding, confidence = judged.finding, judged.interval.confidence
    said = [f"{WHERE}, {sentence}", seeds_in_words(decided_by)]
    if not confidence:
        finding = "undecided"
        said.append("records without replicates decide nothing")
    elif confidence < 0.95:
        least = min(figure.replicates for figure in decided_by)
        said.append(f"with {counted(least, 'replicate')} the interval has {confidence:.0%} confidence")
    counts = sorted({samples for figure in decided_by for samples, _ in figure.resamples})
    if len(counts) > 1:
        told = f"compared are {counts[0]} to {counts[-1]} samples"
        said.append(f"{told}: Frechet and Wasserstein distances of fewer are larger")
    names = list(dict.fromkeys(cell.network for cell in cells))
    if len(names) <= FEW_SIZES:
        said.append(f"judged on {counted(len(names), 'network')} only ({joined(names)})")
    return _told(claim, finding, "; ".join([*said, *notes]), conditions, figures, cells, judged)


def unmeasured_quality(
    claim: Claim, needs: str, conditions: Mapping[str, str], figures: Grid, cells: Sequence[QualityCell]
) -> Verdict:
    """What is there, and what a verdict needs besides."""
    return _told(claim, "not measured", f"needs {needs}", conditions, figures, cells)


def finding_of(advantage: Interval) -> Finding:
    """Of a claim that it lies above 0."""
    return Judged("advantage", advantage, 0.0, above=True).finding


def rank_of(advantage: Interval) -> tuple[int, float]:
    """Of several that have to lie above 0 the first in this order decides: a lost one, then an open one."""
    return ("does not hold", "undecided", "holds").index(finding_of(advantage)), advantage.value


def cells_grid(cells: Cells) -> Grid:
    """What is there: the networks and their step counts."""
    rows = [(name, joined(map(str, sorted(of_network)))) for name, of_network in cells.items()]
    return Grid(("network", "steps"), tuple(rows), ("network", "steps"))


def figure_text(figure: PooledFigure) -> str:
    return f"{figure.value:.4g}"


def _told(
    claim: Claim,
    finding: Finding,
    sentence: str,
    conditions: Mapping[str, str],
    figures: Grid,
    cells: Sequence[QualityCell],
    judged: Judged | None = None,
) -> Verdict:
    networks = {cell.network for cell in cells}
    least = min((cell.samples for cell in cells), default=None)
    # A cell may be there for several budgets, and each time anew.
    failed = len({name for cell in cells for name in cell.lost})
    if failed:
        left_out = "is left out" if failed == 1 else "are left out"
        sentence += f"; {counted(failed, 'training seed')} of its cells failed and {left_out}"
    return Verdict(claim, finding, sentence, conditions, figures, len(networks), least, judged)

"""Generators of other kinds in a closed world, beside a network of the family of about as many parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ..figures.derived import Overview
from ..figures.text import count, joined
from ..measure.intervals import Interval, each_of, extreme_interval
from ..quality import Generator
from ..terminal.layout import MISSING, Grid
from ..terminal.visible import counted
from . import limits
from .budget_words import advantage_text, judged_text, number_text
from .catalogue import Claim
from .closed_worlds import QUALITY_METRICS, Cells, ClosedWorld, QualityCell, QualityMetric
from .pooled_figures import PooledFigure, contrast
from .quality_budgets import AffordedCell, best_or_longest, figured
from .quality_verdict import (
    cells_grid,
    conditions_of,
    figure_text,
    quality_verdict,
    rank_of,
    unmeasured_quality,
)
from .verdict import Judged, Verdict

# The kinds that the claim speaks of, in words.
RIVAL_KINDS: Mapping[Generator, str] = {
    "gan": "GAN",
    "vae": "VAE",
    "masked-transformer": "masked transformer",
}


@dataclass(frozen=True)
class RivalPair:
    """A generator at its best, and the likest network of the family at the same training seeds.

    best     of that network, at its best steps
    equal    of the same, at the most steps up to the rival's; null where it has none
    """

    rival: AffordedCell
    best: AffordedCell
    equal: AffordedCell | None

    @property
    def figures(self) -> list[PooledFigure]:
        return [of.figure for of in (self.rival, self.best, self.equal) if of is not None]

    @property
    def cells(self) -> list[QualityCell]:
        return [of.cell for of in (self.rival, self.best, self.equal) if of is not None]

    def parameters(self, confidence: float) -> Interval:
        """By how much the rival is worse than the network at its best: it needs more parameters to be as good."""
        return contrast((self.rival.figure, self.best.figure), lambda rival, own: rival - own, confidence)

    def steps(self, confidence: float) -> Interval | None:
        """By how much the rival is better than the network at as many steps, which needs more to be as good."""
        if self.equal is None:
            return None
        return contrast((self.equal.figure, self.rival.figure), lambda own, rival: own - rival, confidence)


def quality_single_shot(claim: Claim, worlds: Sequence[ClosedWorld], shown: Overview) -> list[Verdict]:
    """Whether a rival of as many parameters is better at as many steps, and worse than the network at its best."""
    found = []
    for world in worlds:
        for kind in RIVAL_KINDS if world.task == "t2i" else ():
            rivals = [world.cells(sampler, kind) for sampler in world.samplers_of(kind)]
            for sampler in world.samplers if any(rivals) else ():
                for metric in QUALITY_METRICS:
                    found.append(_single_shot(claim, world, kind, rivals, sampler, metric))
    return found


def _single_shot(
    claim: Claim,
    world: ClosedWorld,
    kind: Generator,
    rivals: Sequence[Cells],
    sampler: str,
    metric: QualityMetric,
) -> Verdict:
    said = conditions_of(world, sampler, metric) | {"rival": RIVAL_KINDS[kind]}
    family = world.cells(sampler)
    names = [name for of in rivals for name in of]
    pairs = dict(_pairs(world, rivals, family, metric))
    alone = [name for name in names if name not in pairs]
    if not pairs:
        needs = (
            f"the quality of a network of the family within {limits.LIKE_PARAMETERS:g}x of the parameters of "
            f"{joined(names)}"
        )
        cells = [cell for of in rivals for by_steps in of.values() for cell in by_steps.values()]
        merged = {name: by_steps for of in rivals for name, by_steps in of.items()}
        return unmeasured_quality(claim, needs, said, cells_grid(merged), cells)
    grid = _rivals_grid(world, pairs, family, metric)
    cells = [cell for pair in pairs.values() for cell in pair.cells]
    together = each_of(2 * len(pairs))
    parameters = {name: pair.parameters(together) for name, pair in pairs.items()}
    steps = {name: found for name, pair in pairs.items() if (found := pair.steps(together)) is not None}
    if without := [name for name in pairs if name not in steps]:
        pair = pairs[without[0]]
        few = f"{counted(pair.rival.cell.steps, 'step')} or fewer"
        needs = f"the {pair.best.cell.network} with {few}, as many as the {without[0]} takes"
        return unmeasured_quality(claim, needs, said, grid, cells)
    halves = [("more parameters", name, of) for name, of in parameters.items()]
    halves += [("fewer steps", name, of) for name, of in steps.items()]
    found = extreme_interval(min, [of for *_, of in halves])
    decides, name, _ = min(halves, key=lambda half: rank_of(half[2]))
    pair = pairs[name]
    rival, best, equal = pair.rival, pair.best, pair.equal
    assert equal is not None
    bound = f"a bound over both and {counted(len(pairs), 'rival')}"
    fewer, more = (number_text(metric.scale, of[name].value) for of in (steps, parameters))
    left_out = f"; no network of about as many parameters is there for {joined(alone)}" if alone else ""
    sentence = (
        f"the {name} with {counted(rival.cell.steps, 'step')} has a {metric.name} of {figure_text(rival.figure)}, "
        f"the {best.cell.network}, of about as many parameters, of {figure_text(equal.figure)} with "
        f"{equal.cell.steps} and of {figure_text(best.figure)} with {best.cell.steps}, its best; the first "
        f"comparison speaks for fewer steps by {fewer}, the second for more parameters by {more}; the one for "
        f"{decides} decides ({judged_text(metric.scale, found, bound, 'for both holds')}); "
        f"{_as_good(world, pair, family, metric)}{left_out}"
    )
    judged = Judged(f"{metric.name}: what speaks for fewer steps, or for more parameters", found, 0.0, above=True)
    decided_by = [figure for one in pairs.values() for figure in one.figures]
    return quality_verdict(claim, judged, sentence, said, grid, cells, decided_by)


def _pairs(
    world: ClosedWorld, rivals: Sequence[Cells], family: Cells, metric: QualityMetric
) -> Iterator[tuple[str, RivalPair]]:
    """By the rival's name; none of a rival without a network of about as many parameters."""
    for of in rivals:
        for name, by_steps in of.items():
            rival = _best(world, metric, by_steps)
            if rival is None or (own := _likest(rival.cell, family)) is None:
                continue
            cells = _at_seeds_of(rival.cell, family[own])
            best = _best(world, metric, cells)
            few = figured((cell for steps, cell in cells.items() if steps <= rival.cell.steps), metric)
            equal = max(few, key=lambda of: of.cell.steps, default=None)
            if best is not None:
                yield name, RivalPair(rival, best, equal)


def _best(world: ClosedWorld, metric: QualityMetric, by_steps: Mapping[int, QualityCell]) -> AffordedCell | None:
    return best_or_longest(world, figured(by_steps.values(), metric), metric)


def _at_seeds_of(rival: QualityCell, by_steps: Mapping[int, QualityCell]) -> dict[int, QualityCell]:
    """At the trainings that the rival has, one of which may have been lucky; at all where it has none of these."""
    found = {steps: of for steps, cell in by_steps.items() if (of := cell.at_seeds(rival.seeds)) is not None}
    return found or dict(by_steps)


def _likest(rival: QualityCell, family: Cells) -> str | None:
    """The network with the likest parameter count; null where none is alike."""
    apart = {name: _apart(rival, next(iter(by_steps.values()))) for name, by_steps in family.items()}
    near = {name: factor for name, factor in apart.items() if factor <= limits.LIKE_PARAMETERS}
    return min(near, key=lambda name: (near[name], name), default=None)


def _apart(one: QualityCell, other: QualityCell) -> float:
    """The factor between two parameter counts, 1 or more; infinite where one is not known."""
    a, b = one.parameters, other.parameters
    return max(a / b, b / a) if a and b else float("inf")


def _as_good_with(pair: RivalPair, family: Cells, metric: QualityMetric) -> int | None:
    """The fewest steps with which the pair's network is as good as the rival; with more it may be worse again."""
    cells = _at_seeds_of(pair.rival.cell, family[pair.best.cell.network])
    found = {steps: metric.figure(cell) for steps, cell in cells.items()}
    good = [steps for steps, of in found.items() if of is not None and of.number <= pair.rival.figure.number]
    return min(good, default=None)


def _smallest(world: ClosedWorld, pair: RivalPair, family: Cells, metric: QualityMetric) -> str | None:
    """The smallest network that is as good as the rival at its best steps."""
    for name, by_steps in family.items():
        best = _best(world, metric, _at_seeds_of(pair.rival.cell, by_steps))
        if best is not None and best.figure.number <= pair.rival.figure.number:
            return name
    return None


def _as_good(world: ClosedWorld, pair: RivalPair, family: Cells, metric: QualityMetric) -> str:
    """ "the w8 is as good with 3 steps; the smallest network that is as good is the w8"."""
    own, smallest = pair.best.cell.network, _smallest(world, pair, family, metric)
    steps = _as_good_with(pair, family, metric)
    first = (
        f"the {own} is as good with {counted(steps, 'step')}"
        if steps
        else f"the {own} is as good with no number of steps"
    )
    return f"{first}; {f'the smallest network that is as good is the {smallest}' if smallest else 'no network is'}"


def _rivals_grid(world: ClosedWorld, pairs: Mapping[str, RivalPair], family: Cells, metric: QualityMetric) -> Grid:
    """A row for each rival, and one of real samples."""
    rows: list[tuple[str, ...]] = []
    for name, pair in pairs.items():
        steps = pair.steps(0.95)
        rows.append(
            (
                *(name, count(pair.rival.cell.parameters), str(pair.rival.cell.steps)),
                *(figure_text(pair.rival.figure), pair.best.cell.network, count(pair.best.cell.parameters)),
                *(str(pair.best.cell.steps), figure_text(pair.best.figure)),
                MISSING if pair.equal is None else figure_text(pair.equal.figure),
                MISSING if steps is None else advantage_text(metric.scale, steps),
                advantage_text(metric.scale, pair.parameters(0.95)),
                str(_as_good_with(pair, family, metric) or MISSING),
                _smallest(world, pair, family, metric) or MISSING,
            )
        )
    if (real := world.real(metric)) is not None:
        rows.append(("real samples", MISSING, MISSING, f"{real:.4g}", *[MISSING] * 9))
    headings = (
        *("rival", "parameters", "steps", metric.name, "network", "its parameters", "its best steps"),
        *(f"its {metric.name}", "with the rival's steps", "rival better by", "rival worse by"),
        *("as good with steps", "smallest as good"),
    )
    words = ("rival", "network", "rival better by", "rival worse by", "smallest as good")
    return Grid(headings, tuple(rows), words).without_empty()

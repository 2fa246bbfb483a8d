"""Super-resolution in a closed world: what pre-training is worth, beside what longer fine-tuning is worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..figures.derived import Overview
from ..figures.text import joined
from ..measure.intervals import Interval, each_of, extreme_interval
from ..terminal.layout import MISSING, Grid
from ..terminal.visible import counted
from .budget_words import advantage_text, judged_text, number_text
from .catalogue import Claim
from .closed_worlds import QUALITY_METRICS, ClosedWorld, QualityCell, QualityMetric, of_the_same_seeds
from .pooled_figures import LOGARITHM, PooledFigure, contrast
from .quality_verdict import conditions_of, figure_text, quality_verdict, unmeasured_quality
from .verdict import Judged, Verdict

# By training steps.
_Trainings = Mapping[int, QualityCell]


@dataclass(frozen=True)
class TwoBeginnings:
    """A network of super-resolution that began with the weights of text-to-image, and one that began with drawn
    weights, each after several numbers of training steps."""

    pretrained: _Trainings
    scratch: _Trainings

    @property
    def cells(self) -> list[QualityCell]:
        return [*self.pretrained.values(), *self.scratch.values()]

    def figures(self, metric: QualityMetric, shortest: int, longest: int) -> tuple[PooledFigure, ...] | None:
        """From scratch after the longest training, pre-trained after that and after the shortest, at the training
        seeds that all of these have; null where one is missing."""
        places = ((self.scratch, longest), (self.pretrained, longest), (self.pretrained, shortest))
        cells = of_the_same_seeds([of[trained] for of, trained in places if trained in of])
        found = [figure for cell in cells if (figure := metric.figure(cell)) is not None]
        return tuple(found) if len(found) == len(places) else None


def quality_pretraining(claim: Claim, worlds: Sequence[ClosedWorld], shown: Overview) -> list[Verdict]:
    """Whether pre-training changes the distance after the longest fine-tuning by more than the longest changes
    that of the pre-trained network, beside the shortest."""
    found = []
    for world in worlds:
        for sampler in world.samplers if world.task == "sr" else ():
            by_steps = _beginnings(world, sampler)
            for metric in QUALITY_METRICS:
                found.append(_pretraining(claim, world, sampler, metric, by_steps))
    return found


def _beginnings(world: ClosedWorld, sampler: str) -> dict[int, dict[str, TwoBeginnings]]:
    """By steps of sampling and network."""
    found: dict[int, dict[str, TwoBeginnings]] = {}
    for name in world.networks:
        for steps in sorted({r.case.steps for r in world.records if r.case.network == name}):
            pretrained = world.trainings(name, sampler, steps)
            scratch = world.trainings(name, sampler, steps, "scratch")
            if pretrained or scratch:
                found.setdefault(steps, {})[name] = TwoBeginnings(pretrained, scratch)
    return found


def _pretraining(
    claim: Claim,
    world: ClosedWorld,
    sampler: str,
    metric: QualityMetric,
    by_steps: Mapping[int, Mapping[str, TwoBeginnings]],
) -> Verdict:
    said = conditions_of(world, sampler, metric)
    # The most networks, then the most steps.
    judgeable = {steps: _judgeable(of, metric) for steps, of in by_steps.items()}
    steps = max(by_steps, key=lambda steps: (len(judgeable[steps]), len(_times(by_steps[steps])), steps))
    networks, figures, times = by_steps[steps], judgeable[steps], _times(by_steps[steps])
    together = each_of(len(figures)) if figures else 0.95
    excesses = {name: contrast(of, _excess, together) for name, of in figures.items()}
    grid = _grid(world, metric, networks, excesses, figures)
    cells = [cell for of in networks.values() for cell in of.cells]
    if not figures:
        needs = (
            "networks of super-resolution that were fine-tuned from text-to-image weights, and as long from drawn "
            f"weights (scratch), for two numbers of training steps, at the same steps of {sampler}"
        )
        return unmeasured_quality(claim, needs, said, grid, cells)
    least = min(excesses, key=lambda name: excesses[name].value)
    found = extreme_interval(min, list(excesses.values()))
    scratch, longest, shortest = (figure.number for figure in figures[least])
    scale, first, last = metric.scale, times[0], times[-1]
    without = [name for name in networks if name not in figures]
    missing = f"; not all of this is there of {joined(without)}" if without else ""
    bound = f"a bound over {counted(len(figures), 'network')}"
    beyond = "the first factor over the second" if scale is LOGARITHM else "the first difference less the second"
    effects = (number_text(scale, scratch - longest), number_text(scale, shortest - longest))
    sentence = (
        f"at {counted(steps, 'step')} of sampling the {least} has a {metric.name} of "
        f"{figure_text(figures[least][1])} when pre-trained and fine-tuned for {counted(last, 'step')}, of "
        f"{figure_text(figures[least][0])} from drawn weights after as many ({effects[0]}), and of "
        f"{figure_text(figures[least][2])} when fine-tuned for {first} only ({effects[1]}); {beyond} is least "
        f"there ({judged_text(scale, found, bound, 'pre-training decides more')}){missing}"
    )
    judged = Judged(
        f"{metric.name}: pre-training's effect, less that of fine-tuning longer", found, 0.0, above=True
    )
    decided_by = [figure for of in figures.values() for figure in of]
    return quality_verdict(claim, judged, sentence, said, grid, cells, decided_by)


def _excess(scratch: Any, longest: Any, shortest: Any) -> Any:
    """The effect of pre-training, less that of fine-tuning time whichever way it goes.

    Where longer is better this is scratch less shortest: from scratch after the longest, pre-trained after the
    shortest. Fine-tuning that makes worse is an effect of time too, and none of pre-training.
    """
    return (scratch - longest) - abs(shortest - longest)


def _times(networks: Mapping[str, TwoBeginnings]) -> list[int]:
    """The training steps after which a network is there from both beginnings."""
    return sorted({trained for of in networks.values() for trained in of.pretrained.keys() & of.scratch.keys()})


def _judgeable(
    networks: Mapping[str, TwoBeginnings], metric: QualityMetric
) -> dict[str, tuple[PooledFigure, ...]]:
    """The figures that decide, of each network that has them; none where there is one training time."""
    times = _times(networks)
    if len(times) < 2:
        return {}
    found = {name: of.figures(metric, times[0], times[-1]) for name, of in networks.items()}
    return {name: figures for name, figures in found.items() if figures is not None}


def _grid(
    world: ClosedWorld,
    metric: QualityMetric,
    networks: Mapping[str, TwoBeginnings],
    excesses: Mapping[str, Interval],
    figures: Mapping[str, tuple[PooledFigure, ...]],
) -> Grid:
    """Two rows for each network, one for each beginning, and one of real samples; a column for each time."""
    times = sorted({trained for of in networks.values() for trained in (*of.pretrained, *of.scratch)})
    rows = []
    for name, of in networks.items():
        effects = [MISSING] * 3
        if name in excesses:
            scratch, longest, shortest = (figure.number for figure in figures[name])
            effects = [number_text(metric.scale, effect) for effect in (scratch - longest, shortest - longest)]
            effects.append(advantage_text(metric.scale, excesses[name]))
        for beginning, trainings, told in (
            ("text-to-image", of.pretrained, effects),
            ("drawn weights", of.scratch, [MISSING] * 3),
        ):
            found = [None if (cell := trainings.get(time)) is None else metric.figure(cell) for time in times]
            texts = (MISSING if figure is None else figure_text(figure) for figure in found)
            rows.append((name, beginning, *texts, *told))
    if (real := world.real(metric)) is not None:
        rows.append(("real samples", MISSING, *(f"{real:.4g}" for _ in times), *[MISSING] * 3))
    after = [f"{metric.name} after {time}" for time in times]
    headings = ("network", "began with", *after, "pre-training", "fine-tuning longer", "the former beyond it")
    return Grid(headings, tuple(rows), ("network", "began with", headings[-1])).without_empty()

"""Stitched trajectories: one network takes the first steps and another the rest (T-Stitch, arXiv 2402.14167)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from . import cells
from .family import World
from .networks import forward_gflop, step_cost
from .study import TUNED_ON, Study, held_out_score, judged_cell, tuned_rates

_SAMPLER = "ddim"

# The width of the network that takes each step.
Plan = tuple[int, ...]


def plans(world: World) -> list[Plan]:
    """Each pair of networks, number of steps and share of them that the first one takes."""
    return [
        (first,) * early + (second,) * (steps - early)
        for first, second in cells.stitched_pairs(world.widths)
        for steps in cells.STITCHED_STEPS
        for early in sorted({round(part * steps) for part in cells.STITCHED_PARTS})
    ]


def unbeaten(scores: Mapping[Plan, float], forward: Mapping[int, float]) -> list[Plan]:
    """The plans that no other one beats (the less the better) with as many steps and FLOPs at most.

    What a step costs beside its FLOPs depends on the machine. The best plan under a budget is among these on any
    machine where time grows with both, which a width that its operators are slow at breaks.
    `forward`: FLOPs of a forward by width.
    """
    flops = {plan: sum(forward[width] for width in plan) for plan in scores}

    def beats(other: Plan, plan: Plan) -> bool:
        cheaper = len(other) <= len(plan) and flops[other] <= flops[plan]
        return cheaper and scores[other] < scores[plan]

    return [plan for plan in scores if not any(beats(other, plan) for other in scores)]


@dataclass(frozen=True)
class ScorePlan:
    """Judges a plan on held-out prompts, at the guidance of the wider network."""

    plan: Plan

    @property
    def cost(self) -> float:
        return sum(map(step_cost, self.plan)) / 80

    def run(self, study: Study) -> None:
        _score(study, self.plan)


@dataclass(frozen=True)
class JudgePlan:
    """Judges a plan with a training seed, if none beats it on held-out prompts."""

    plan: Plan
    seed: int

    @property
    def cost(self) -> float:
        return sum(map(step_cost, self.plan)) / 20

    def run(self, study: Study) -> None:
        scores = {plan: _score(study, plan) for plan in plans(study.world)}
        world = study.world
        forward = {width: forward_gflop(world.config(width), world.latent) for width in world.widths}
        if self.plan in unbeaten(scores, forward):
            case = study.case(self.plan, self.seed, _SAMPLER, _rate(study, self.plan), "test")
            judged_cell(study, case, self.plan, tuned=True)


def _score(study: Study, plan: Plan) -> float:
    """By the networks that guidance is chosen by."""
    case = study.case(plan, TUNED_ON, _SAMPLER, _rate(study, plan), "held-out")
    return held_out_score(judged_cell(study, case, plan))


def _rate(study: Study, plan: Plan) -> float:
    return tuned_rates(study, max(plan), _SAMPLER)[len(plan)]

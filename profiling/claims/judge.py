"""Records in, verdicts on every claim out. Pure: neither the order of records nor the unit of time matters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ..figures.derived import Overview, overview
from ..trajectory.records import Record
from . import limits
from .budget_rules import (
    distillation_keeps_trend,
    large_wins_relaxed,
    small_wins_at_budget,
    sr_small_wins_below_20,
)
from .catalogue import Claim, all_claims
from .cost_rules import cost_proportional, energy_proportional, steps_linear
from .image_rules import ddim50_slow, single_shot_cheaper
from .variant_rules import cfg_quality_not_alignment, sampler_independent
from .verdict import ClaimVerdicts, Verdict


@dataclass(frozen=True)
class ClaimRule:
    """How a claim is judged: verdicts for each set of conditions, none where the records have nothing to say.

    needs     what the records must hold for that
    decides   whether timing (or energy) alone can decide the claim; else its quality needs what the claim says
    """

    verdicts: Callable[[Claim, Overview], list[Verdict]]
    needs: str
    decides: bool = False


_TWO_SIZES = "times of two of the paper's sizes under the same conditions"
# A claim that is not here is one that timing says nothing of.
RULES: Mapping[str, ClaimRule] = {
    "cost-proportional": ClaimRule(cost_proportional, _TWO_SIZES, decides=True),
    "steps-linear": ClaimRule(
        steps_linear,
        f"times of a network at {limits.FEWEST_STEP_COUNTS} step counts under the same conditions",
        decides=True,
    ),
    "small-wins-at-budget": ClaimRule(small_wins_at_budget, _TWO_SIZES),
    "large-wins-relaxed": ClaimRule(large_wins_relaxed, _TWO_SIZES),
    "sampler-independent": ClaimRule(sampler_independent, f"{_TWO_SIZES} with two samplers"),
    "ddim50-slow": ClaimRule(ddim50_slow, "times of DDIM", decides=True),
    "single-shot-cheaper": ClaimRule(
        single_shot_cheaper,
        f"times of a rival (--rival) and of a size within {limits.LIKE_PARAMETERS:g}x of its parameters",
        decides=True,
    ),
    "distillation-keeps-trend": ClaimRule(
        distillation_keeps_trend,
        f"times of {limits.DISTILLED_RIVAL} and {limits.REFERENCE} under the same conditions",
    ),
    "sr-small-wins-below-20": ClaimRule(sr_small_wins_below_20, f"{_TWO_SIZES} (--task sr)"),
    "cfg-quality-not-alignment": ClaimRule(
        cfg_quality_not_alignment, "times of a network with guidance and without (--guidance 1,7.5)"
    ),
    "energy-proportional": ClaimRule(
        energy_proportional,
        f"joules of {limits.FEWEST_ENERGIES} sizes under the same conditions, by NVML's counter",
        decides=True,
    ),
}


def judge(records: Sequence[Record]) -> tuple[ClaimVerdicts, ...]:
    """Every claim with its verdicts, in the order of the catalogue."""
    return judge_overview(overview(records))


def judge_overview(shown: Overview) -> tuple[ClaimVerdicts, ...]:
    """The same of records that have been put in order already."""
    return tuple(ClaimVerdicts(claim, _verdicts(claim, shown)) for claim in all_claims())


def _verdicts(claim: Claim, shown: Overview) -> tuple[Verdict, ...]:
    rule = RULES.get(claim.id)
    if rule is None:
        return (Verdict(claim, "not measured", f"needs {claim.needs}"),)
    needs = rule.needs if rule.decides else f"{rule.needs}; besides, {claim.needs}"
    return tuple(rule.verdicts(claim, shown)) or (Verdict(claim, "not measured", f"needs {needs}"),)

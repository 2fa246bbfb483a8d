"""Records in, verdicts on every claim out. Pure: neither the order of records nor the unit of time matters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ..figures.derived import Overview, overview
from ..quality import QualityRecord
from ..trajectory.records import Record
from . import limits
from .budget_rules import (
    distillation_keeps_trend,
    large_wins_relaxed,
    small_wins_at_budget,
    sr_small_wins_below_20,
)
from .catalogue import Claim, all_claims
from .closed_worlds import ClosedWorld, closed_worlds
from .cost_rules import cost_proportional, energy_proportional, steps_linear
from .guidance_rules import quality_guidance
from .image_rules import ddim50_slow, single_shot_cheaper
from .quality_distillation_rules import quality_distillation
from .quality_fine_tuning_rules import quality_pretraining
from .quality_order_rules import quality_sampler_independent, quality_scales
from .quality_rival_rules import quality_single_shot
from .quality_rules import quality_large_wins, quality_small_wins
from .quality_sr_rules import quality_sr_small_wins
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


# How quality in closed worlds judges a claim; the overview has the times of the same networks.
QualityRule = Callable[[Claim, Sequence[ClosedWorld], Overview], list[Verdict]]
QUALITY_RULES: Mapping[str, QualityRule] = {
    "small-wins-at-budget": quality_small_wins,
    "large-wins-relaxed": quality_large_wins,
    "sampler-independent": quality_sampler_independent,
    "single-shot-cheaper": quality_single_shot,
    "distillation-keeps-trend": quality_distillation,
    "sr-small-wins-below-20": quality_sr_small_wins,
    "cfg-quality-not-alignment": quality_guidance,
    "quality-scales-with-compute": quality_scales,
    "pretraining-over-finetuning": quality_pretraining,
}


def judge(records: Sequence[Record], qualities: Sequence[QualityRecord] = ()) -> tuple[ClaimVerdicts, ...]:
    """Every claim with its verdicts, in the order of the catalogue: by times, then by quality in closed worlds."""
    return judge_overview(overview(records), qualities)


def judge_overview(shown: Overview, qualities: Sequence[QualityRecord] = ()) -> tuple[ClaimVerdicts, ...]:
    """The same of records that have been put in order already."""
    worlds = closed_worlds(qualities)
    return tuple(ClaimVerdicts(claim, _verdicts(claim, shown, worlds)) for claim in all_claims())


def _verdicts(claim: Claim, shown: Overview, worlds: Sequence[ClosedWorld]) -> tuple[Verdict, ...]:
    rule, quality_rule = RULES.get(claim.id), QUALITY_RULES.get(claim.id)
    found = [] if rule is None else rule.verdicts(claim, shown)
    found += [] if quality_rule is None else quality_rule(claim, worlds, shown)
    if found:
        return tuple(found)
    needs = claim.needs or ""
    if rule is not None:
        needs = rule.needs if rule.decides else f"{rule.needs}; besides, {claim.needs}"
    if worlds and quality_rule is not None:
        needs += "; or in a closed world networks that were judged on test prompts, at the guidance tuned for them"
    return (Verdict(claim, "not measured", f"needs {needs}"),)

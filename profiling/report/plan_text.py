"""The answer of `ldmperf plan` as text and as JSON."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console

from ..claims.offers import Budget, Offer
from ..claims.planning import Answer, Plan
from ..figures import text
from ..terminal.layout import MISSING, laid_out, number
from ..terminal.visible import say, say_wrapped, width_of
from .notes import warnings

_WORDS = ("size", "sampler", "backend", "FID", "front", "basis", "fits", "flags")


def print_answer(answer: Answer, console: Console) -> None:
    """Prints the budget, the table of each plan with what it leaves out, and what the columns mean."""
    say_wrapped(console, f"Budget: {budget_in_words(answer.budget)}", "bold")
    shown = answer.shown
    say_wrapped(console, text.joined(shown.conditions.shared), "bold")
    for plan in answer.plans:
        say(console)
        if heading := plan_heading(answer, plan):
            say_wrapped(console, heading, "bold cyan")
        _print_plan(plan, answer.budget, console)
    if not answer.plans:
        say(console)
        say_wrapped(console, "Nothing to plan with: no case of these has a time.")
    say(console)
    for note in _notes(answer):
        say_wrapped(console, note, "dim")
    for warning in warnings(shown):
        say_wrapped(console, f"Note: {warning}", "yellow")


def plan_heading(answer: Answer, plan: Plan) -> str:
    """What sets a plan apart from the others; empty when nothing does."""
    return answer.shown.conditions.heading(plan, "sampler", "steps")


def budget_in_words(budget: Budget) -> str:
    """ "50 ms of wall time and 5 J per image"."""
    energy = "" if budget.joules is None else f" and {budget.joules:g} J"
    return f"{budget.wall_ms:.10g} ms of wall time{energy} per {budget.per}"


def answer_json(answer: Answer) -> dict[str, Any]:
    """The answer as JSON has it; times in milliseconds, energies in joules, both of what the budget counts."""
    budget = answer.budget

    def offered(offer: Offer, plan: Plan) -> dict[str, Any]:
        return _offer_json(offer) | {"front": offer in plan.front, "interval_fits": offer.interval_fits(budget)}

    return {
        "budget": {"wall_ms": budget.wall_ms, "joules": budget.joules, "per": budget.per},
        "plans": [
            {
                "environment": answer.shown.environments[plan.environment].model_dump(mode="json"),
                "conditions": plan.case.model_dump(
                    exclude={"unet", "weights_sha256", "backend", "sampler", "steps"}
                ),
                "offers": [offered(offer, plan) for offer in plan.offers],
                "beyond": [_offer_json(offer) for offer in plan.beyond],
                "least": [_offer_json(offer) for offer in plan.least],
                "limits": {limit: list(told) for limit, told in plan.limits.items()},
            }
            for plan in answer.plans
        ],
        "warnings": list(warnings(answer.shown)),
    }


def _offer_json(offer: Offer) -> dict[str, Any]:
    case = offer.case
    return {
        "name": offer.name,
        "network": case.network,
        "sampler": case.sampler,
        "steps": case.steps,
        "backend": case.backend,
        "ms": offer.ms.value,
        "ms_low": offer.ms.low,
        "ms_high": offer.ms.high,
        "confidence": offer.ms.confidence,
        "joules": offer.joules,
        "fid": offer.fid,
        "basis": offer.basis,
        "flags": offer.flags or None,
    }


def _print_plan(plan: Plan, budget: Budget, console: Console) -> None:
    if plan.offers:
        columns = _columns(plan, budget)
        rows = [[cell(offer) for cell in columns.values()] for offer in plan.offers]
        for line in laid_out(tuple(columns), rows, words=_WORDS, width=width_of(console), leading=3).lines:
            say(console, line)
    else:
        say(console, "  Nothing fits.")
    for line in _left_out(plan, budget):
        say_wrapped(console, f"  {line}", indent=4)


def _columns(plan: Plan, budget: Budget) -> dict[str, Callable[[Offer], str]]:
    """What stands under each heading; a batch of one has one time."""
    batch, front = plan.case.batch, plan.front
    other, factor = ("batch", batch) if budget.per == "image" else ("image", 1 / batch)
    return {
        "size": lambda offer: offer.name,
        "sampler": lambda offer: offer.case.sampler,
        "steps": lambda offer: str(offer.case.steps),
        "backend": lambda offer: offer.case.backend,
        f"ms per {budget.per}": lambda offer: number(offer.ms.value),
        "interval": lambda offer: f"{number(offer.ms.low)}..{number(offer.ms.high)}",
        f"ms per {other}": lambda offer: number(offer.ms.value * factor) if batch > 1 else MISSING,
        f"J per {budget.per}": lambda offer: number(offer.joules),
        "FID": lambda offer: "not known" if offer.fid is None else f"{offer.fid:.2f}",
        "front": lambda offer: "front" if offer in front else MISSING,
        "basis": lambda offer: offer.basis,
        "fits": lambda offer: "yes" if offer.interval_fits(budget) else "may exceed",
        "flags": lambda offer: offer.flags or MISSING,
    }


def _left_out(plan: Plan, budget: Budget) -> list[str]:
    """What does not fit, and of what nothing but the measured step counts is told."""
    lines = []
    if plan.least:
        lines.append(f"No trajectory fits of: {_priced(plan.least, budget)}, the cheapest that were measured.")
    beyond = [offer for offer in plan.beyond if offer not in plan.least]
    if beyond:
        lines.append(f"Of known FID, but beyond the budget: {_priced(beyond, budget)}.")
    lines += [f"{limit[0].upper()}{limit[1:]}: {text.joined(told)}." for limit, told in plan.limits.items()]
    return lines


def _priced(offers: Sequence[Offer], budget: Budget) -> str:
    def price(offer: Offer) -> str:
        energy = "" if offer.joules is None else f", {number(offer.joules)} J"
        if budget.joules is not None and offer.joules is None:
            energy = ", its energy not measured"
        fid = "" if offer.fid is None else f"FID {offer.fid:.2f}, "
        how = "" if offer.basis == "measured" else f", {offer.basis}"
        how += f", {offer.flags}" if offer.flags else ""
        case = offer.case
        steps = f"{case.sampler} {case.steps}"
        return f"{offer.name} ({fid}{steps} {case.backend}, {number(offer.ms.value)} ms{energy}{how})"

    return "; ".join(map(price, offers))


def _notes(answer: Answer) -> list[str]:
    """What the columns mean, and how many cases have no time."""
    shown = answer.shown
    offers = [offer for plan in answer.plans for offer in plan.offers]
    notes = []
    if offers:
        confidence = min(offer.ms.confidence for offer in offers)
        notes += [
            "of each size and sampler: the most steps that fit, the most that were measured, and the paper's 50; "
            "each on the backend that is fastest there",
            "FID: the paper's, of its trained networks after 50 steps of ddim at guidance 7.5, less is better; "
            "not known for other step counts, samplers and networks, and not measured here",
            "front: no other offer of known FID is as fast and as good",
            f"interval: where the median lies with a confidence of at least {confidence:.0%}; may exceed: it "
            "reaches beyond the budget",
        ]
    if any(offer.basis != "measured" for offer in offers):
        notes.append(
            "interpolated, extrapolated: by the least-squares line through the measured step counts, between them "
            "and outside of them; the interval is what the medians' own and the farthest from the line allow"
        )
    without = [row.record.status for row in shown.rows if row.record.wall_ms is None]
    if without:
        notes.append(
            f"{len(without)} of {len(shown.rows)} cases without a time: {text.statuses_in_words(without)}"
        )
    return notes

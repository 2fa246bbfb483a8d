"""What a budget buys, from records: the sizes, samplers and step counts that fit. Pure functions.

Nothing crosses environments or conditions: each has a plan of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..figures.derived import Overview, Row, alike, names_by_size, overview
from ..options import CaseError, known_names
from ..trajectory.case import Case
from ..trajectory.records import Record
from .offers import LIMITS, PAPER_STEPS, Budget, Curve, Offer, paper_fid

# What an option can narrow a plan to, as text of a row.
FILTERS: Mapping[str, Callable[[Row], str]] = {
    "size": lambda row: row.name,
    "sampler": lambda row: row.case.sampler,
    "batch": lambda row: str(row.case.batch),
    "dtype": lambda row: row.case.dtype,
    "backend": lambda row: row.case.backend,
}


@dataclass(frozen=True)
class Plan:
    """What fits a budget in one environment under one set of conditions.

    case      one of those planned with; sampler, steps, network and backend vary
    offers    what fits. First what has the paper's FID, the best first; then the others, the largest network
              first. Of a network and sampler: the most steps, the most measured steps, the steps of the paper's
              FID; each on the backend that is fastest there
    beyond    what has the paper's FID and does not fit, the best first
    least     of each network without an offer: the cheapest trajectory that was measured
    limits  networks and samplers by the reason why only measured step counts are offered of them
    """

    environment: int
    case: Case
    offers: tuple[Offer, ...]
    beyond: tuple[Offer, ...]
    least: tuple[Offer, ...]
    limits: Mapping[str, tuple[str, ...]]

    @property
    def front(self) -> tuple[Offer, ...]:
        """The offers that no other one undercuts in time at a FID as good, the fastest first."""
        return pareto_front(self.offers)


@dataclass(frozen=True)
class Answer:
    """The plans of a record set; `shown` is what of it was planned with."""

    budget: Budget
    shown: Overview
    plans: tuple[Plan, ...]


def answer(records: Sequence[Record], budget: Budget, only: Mapping[str, Sequence[str]] | None = None) -> Answer:
    """What fits the budget. `only`: the values to keep, by the names of FILTERS.

    The order of the records does not matter. Raises CaseError for a value that no record has.
    """
    shown = overview(records)
    if only:
        shown = overview([row.record for row in _only(shown, only)])
    grouped = alike(shown.timed, "unet", "weights_sha256", "backend", "sampler", "steps")
    return Answer(budget, shown, tuple(_plan(of_plan, budget) for of_plan in grouped))


def pareto_front(offers: Iterable[Offer]) -> tuple[Offer, ...]:
    """Those of known FID that no other beats in time or FID without losing in the other; the fastest first."""
    front: list[Offer] = []
    best = math.inf
    for offer in sorted(offers, key=lambda o: (o.ms.value, o.fid or 0.0)):
        if offer.fid is not None and offer.fid < best:
            front.append(offer)
            best = offer.fid
    return tuple(front)


def _only(shown: Overview, only: Mapping[str, Sequence[str]]) -> list[Row]:
    rows = shown.rows
    for name, values in only.items():
        wanted = known_names(name, values, dict.fromkeys(map(FILTERS[name], shown.rows)))
        if not wanted:
            raise CaseError(f"--{name}: no value given; leave the option out to take all")
        rows = [row for row in rows if FILTERS[name](row) in wanted]
    return rows


def _plan(rows: Sequence[Row], budget: Budget) -> Plan:
    offers: list[Offer] = []
    beyond: list[Offer] = []
    least: dict[str, Offer] = {}
    limits: dict[str, list[str]] = {}
    names = names_by_size(rows)
    for of_sampler in alike(rows, "backend", "steps"):
        curves = [Curve.of(of_curve, budget) for of_curve in alike(of_sampler, "steps")]
        of_curves = [curve.ms.limit for curve in curves]
        if None not in of_curves:
            told = f"{curves[0].name} {curves[0].case.sampler}"
            limits.setdefault(min(filter(None, of_curves), key=LIMITS.index), []).append(told)
        known = [offer for curve in curves for offer in _known(curve, budget)]
        fitting = _fastest(offer for offer in known if offer.fits(budget))
        offers += _kept(fitting)
        if not any(offer.fid for offer in fitting.values()):
            beyond += [offer for offer in _fastest(known).values() if offer.fid is not None]
        for offer in known:
            if offer.basis == "measured" and (
                offer.name not in least or offer.ms.value < least[offer.name].ms.value
            ):
                least[offer.name] = offer
    offered = {offer.name for offer in offers}

    def place(offer: Offer) -> tuple[bool, float, int, str, int]:
        return offer.fid is None, offer.fid or 0.0, -names.index(offer.name), offer.case.sampler, -offer.case.steps

    return Plan(
        rows[0].environment,
        rows[0].case,
        tuple(sorted(offers, key=place)),
        tuple(sorted(beyond, key=place)),
        tuple(least[name] for name in names if name not in offered),
        {limit: tuple(told) for limit, told in limits.items()},
    )


def _known(curve: Curve, budget: Budget) -> list[Offer]:
    """The step counts to choose from: measured, the most that the line affords, that of the paper's FID."""
    counts = {*curve.intervals, curve.most_steps(budget)} - {0}
    if paper_fid(curve.case.model_copy(update={"steps": PAPER_STEPS})) is not None:
        counts.add(PAPER_STEPS)
    found = (offer for steps in sorted(counts) if (offer := curve.offer(steps)) is not None)
    return [offer for offer in found if not curve.contradicts(offer, budget)]


def _fastest(offers: Iterable[Offer]) -> dict[int, Offer]:
    """The best way to each step count: measured before told by a line, then the fastest."""
    found: dict[int, Offer] = {}
    for offer in sorted(offers, key=lambda o: (o.basis != "measured", o.ms.value, o.case.backend)):
        found.setdefault(offer.case.steps, offer)
    return found


def _kept(fitting: Mapping[int, Offer]) -> list[Offer]:
    """The most steps, the most measured steps, and those of known FID."""
    measured = [steps for steps, offer in fitting.items() if offer.basis == "measured"]
    kept = {max(fitting, default=0), max(measured, default=0)}
    return [offer for steps, offer in fitting.items() if steps in kept or offer.fid is not None]

"""Verdicts in a sentence for each claim, with the conditions that the sentence is true under."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from .catalogue import Claim
from .judge import RULES
from .verdict import ClaimVerdicts, Finding, Verdict

# Values of one condition that are named; of more the first and the last.
_MOST_NAMED = 4


@dataclass(frozen=True)
class Summary:
    """A claim with its finding, where there is one for all conditions, and the sentence that begins with it.

    told   the sentence of the verdict that is told first, without finding and conditions
    place  how often each finding was made, and the conditions of that verdict
    """

    claim: Claim
    finding: Finding | None
    sentence: str
    told: str
    place: str


def shared_by_all(judged: Iterable[ClaimVerdicts]) -> dict[str, str]:
    """The conditions that all verdicts with figures share: said once, not with each.

    Those by times and those by quality have few in common: what either share is there, unless others differ in it.
    """
    verdicts = [verdict for of in judged for verdict in of.verdicts if verdict.conditions]
    found: dict[str, str] = {}
    for kind in (False, True):
        alike = [verdict.conditions for verdict in verdicts if verdict.is_of_quality == kind]
        for name in set.intersection(*map(set, alike)) if alike else ():
            found[name] = alike[0][name]
    # In the order in which verdicts have them.
    names = dict.fromkeys(name for verdict in verdicts for name in verdict.conditions)
    return {
        name: found[name]
        for name in names
        if name in found and all(verdict.conditions.get(name, found[name]) == found[name] for verdict in verdicts)
    }


def summary(of: ClaimVerdicts, shared: Mapping[str, str]) -> Summary:
    """The sentence of a claim: how many sets of conditions found what, and the verdict that is told first.

    shared: conditions that the reader knows already.
    """
    # What was decided is told, however many sets of conditions beside it decide nothing.
    measured = [finding for finding in of.findings if finding != "not measured"]
    findings = [finding for finding in measured if finding != "undecided"] or measured or of.findings
    told = max((_of_finding(of, finding) for finding in findings), key=len)
    clearest = max(told, key=lambda verdict: -1.0 if verdict.judged is None else verdict.judged.distance)
    place = _in_brackets(_place([clearest], of.verdicts, shared))
    finding = of.findings[0] if len(of.findings) == 1 else None
    if len(of.verdicts) == 1:
        sentence = f"{clearest.finding}: {clearest.sentence}{place}"
        return Summary(of.claim, finding, sentence, clearest.sentence, place.strip(" ()"))
    counted = f"{counted_findings(of, shared)}; most clearly{place}"
    return Summary(of.claim, finding, f"{counted}: {clearest.sentence}", clearest.sentence, counted)


def counted_findings(of: ClaimVerdicts, shared: Mapping[str, str]) -> str:
    """How often each finding was made, and where: "holds in 1 of 2 sets of conditions (torch)"."""
    everywhere = of.verdicts
    parts = []
    for finding in of.findings:
        verdicts = _of_finding(of, finding)
        count = f"{len(verdicts)} of {len(everywhere)}"
        if len(verdicts) == len(everywhere):
            count = "both" if len(everywhere) == 2 else f"all {len(everywhere)}"
        place = _in_brackets(_place(verdicts, everywhere, shared))
        parts.append(f"{finding} in {count} sets of conditions{place}")
    return "; ".join(parts)


def summaries(judged: Sequence[ClaimVerdicts]) -> list[Summary]:
    """A sentence for each claim that a time decided, or left undecided."""
    shared = shared_by_all(judged)
    return [summary(of, shared) for of in judged if of.is_judged]


def only_timed(judged: Iterable[ClaimVerdicts]) -> list[str]:
    """The claims that these records have figures for, and timing cannot judge."""
    return [of.claim.id for of in judged if of.has_figures and not of.is_judged and not _could_be_judged(of)]


def left_open(judged: Iterable[ClaimVerdicts]) -> list[str]:
    """The claims that these records have figures for, but too few to judge them by."""
    return [of.claim.id for of in judged if of.has_figures and not of.is_judged and _could_be_judged(of)]


def _could_be_judged(of: ClaimVerdicts) -> bool:
    """Whether more records of the kind that is there would decide it."""
    rule = RULES.get(of.claim.id)
    return (rule is not None and rule.decides) or any(verdict.is_of_quality for verdict in of.verdicts)


def _of_finding(of: ClaimVerdicts, finding: Finding) -> list[Verdict]:
    return [verdict for verdict in of.verdicts if verdict.finding == finding]


def _in_brackets(place: str) -> str:
    return f" ({place})" if place else ""


def _place(verdicts: Sequence[Verdict], everywhere: Sequence[Verdict], shared: Mapping[str, str]) -> str:
    """The conditions of some verdicts that the reader does not know already, each with its values."""
    names = dict.fromkeys(name for verdict in everywhere for name in verdict.conditions)
    parts = []
    for name in names:
        values = list(dict.fromkeys(v.conditions[name] for v in verdicts if name in v.conditions))
        if not values or values == [shared.get(name)]:
            continue
        # A processor's name has a comma of its own.
        parts.append(" / ".join(values if len(values) <= _MOST_NAMED else (values[0], "...", values[-1])))
    return "; ".join(parts)

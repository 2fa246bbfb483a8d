"""Claims with their verdicts in the terminal and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console

from ..figures.text import count, joined, short_ratio
from ..paper import paper_notes, paper_sizes, paper_source
from ..terminal.layout import Grid, formatted, laid_out
from ..terminal.visible import say, say_wrapped, width_of
from .catalogue import PublishedReading, claims_source, published_readings
from .summary import counted_findings, left_open, only_timed, shared_by_all, summaries, summary
from .verdict import FINDINGS, ClaimVerdicts, Verdict

TITLE = "What these records say of the paper's claims"
LEGEND = (
    "interval: 95% unless a sentence says less, by bootstrap over the raw samples of one run, of quality over "
    "replicates and training seeds; where the worst or the best of several decides, all their intervals hold "
    "together at that rate. What differs from run to run is not in it. A claim whose limit lies inside is "
    "undecided. predicted: by a line over other steps."
)
_STYLES = {"holds": "green", "does not hold": "red", "undecided": "yellow", "not measured": "dim"}


def print_summaries(judged: Sequence[ClaimVerdicts], console: Console, records: str) -> None:
    """A sentence for each claim that the records decide; nothing where they have no figures at all.

    records: what to give to `ldmperf claims` for the rest.
    """
    timed, needy = only_timed(judged), left_open(judged)
    told = summaries(judged)
    if not told and not timed and not needy:
        return
    say(console)
    say_wrapped(console, TITLE, "bold")
    for one in told:
        say_wrapped(console, f"{one.claim.id}: {one.sentence}.", indent=2)
    others = f"; timing alone does not judge {joined(timed)}" if timed else ""
    others += f"; more records are needed for {joined(needy)}" if needy else ""
    say_wrapped(console, f"Figures and conditions: ldmperf claims {records}{others}.", "dim", indent=2)


def print_claims(judged: Sequence[ClaimVerdicts], console: Console) -> None:
    """Every claim: its sentence, the figures under each set of conditions, and what was published elsewhere.

    Before them how often each was found to hold.
    """
    shared = shared_by_all(judged)
    say_wrapped(console, TITLE, "bold")
    if shared:
        say_wrapped(console, joined(shared.values()))
    if any(of.is_judged for of in judged):
        say(console)
        _print_grid(console, counts_grid(judged))
    for of in judged:
        # Of several verdicts each has its sentence below.
        sentence = summary(of, shared).sentence if len(of.verdicts) == 1 else counted_findings(of, shared)
        say(console)
        say_wrapped(console, f"{of.claim.id}: {of.claim.text}", "bold", indent=2)
        say_wrapped(
            console, f"  {sentence}.", _STYLES[of.findings[0] if len(of.findings) == 1 else "undecided"], indent=4
        )
        for verdict in of.verdicts:
            _print_verdict(console, verdict, of, len(of.verdicts) > 1)
        for reading in published_readings(of.claim.id):
            say_wrapped(console, f"  published elsewhere: {reading}", "dim", indent=4)
    say(console)
    for reading in published_readings(None):
        say_wrapped(console, f"published elsewhere: {reading}", "dim", indent=2)
    say_wrapped(console, LEGEND, "dim")
    say_wrapped(console, f"claims: {claims_source()}", "dim")


def counts_grid(judged: Sequence[ClaimVerdicts]) -> Grid:
    """A row for each claim that was judged: its sets of conditions by what was found under them."""
    rows = tuple(
        (of.claim.id, *(str(sum(verdict.finding == finding for verdict in of.verdicts)) for finding in FINDINGS))
        for of in judged
        if of.is_judged
    )
    return Grid(("sets of conditions", *FINDINGS), rows, ("sets of conditions",))


def _print_verdict(console: Console, verdict: Verdict, of: ClaimVerdicts, has_others: bool) -> None:
    if verdict.figures is None:
        return
    if has_others:
        place = joined(phrase for name, phrase in verdict.conditions.items() if name not in of.common)
        say_wrapped(console, f"  {place or 'alike'}: {verdict.finding}: {verdict.sentence}.", indent=4)
    _print_grid(console, verdict.figures)


def _print_grid(console: Console, grid: Grid) -> None:
    width = width_of(console)
    laid = laid_out(
        grid.headings, grid.rows, words=grid.words, width=None if width is None else max(width - 2, 40)
    )
    for line in laid.lines:
        say(console, f"  {line}")


def paper_grid() -> Grid:
    """Table 1 of the paper, with the parameters and GFLOP that a count gives."""
    rows = tuple(
        (
            name,
            count(size.parameters),
            f"{size.gflop:.1f}",
            f"{size.printed_gflops:.1f}",
            short_ratio(size.normalized_cost) if size.normalized_cost >= 0.1 else f"{size.normalized_cost:.2f}",
            formatted(size.fid, ".2f"),
            formatted(size.clip, ".3f"),
        )
        for name, size in paper_sizes().items()
    )
    headings = ("size", "parameters", "GFLOP counted", "GFLOPS printed", "normalized cost", "FID", "CLIP")
    return Grid(headings, rows, ("size",))


def print_paper(console: Console) -> None:
    """Table 1 with its source and notes, that on the misprint among them."""
    say_wrapped(console, paper_source(), "bold")
    _print_grid(console, paper_grid())
    for note in paper_notes():
        say_wrapped(console, f"- {note}", indent=2)


def as_json(judged: Sequence[ClaimVerdicts]) -> dict[str, Any]:
    """All of it as what JSON can hold; figures are texts, as they are printed."""
    shared = shared_by_all(judged)
    return {
        "source": claims_source(),
        "claims": [
            {
                "id": of.claim.id,
                "claim": of.claim.text,
                "timing": of.claim.timing,
                "needs": of.claim.needs,
                "findings": list(of.findings),
                "summary": summary(of, shared).sentence,
                "verdicts": [_verdict_json(verdict) for verdict in of.verdicts],
                "published": [_reading_json(reading) for reading in published_readings(of.claim.id)],
            }
            for of in judged
        ],
        "published": [_reading_json(reading) for reading in published_readings(None)],
    }


def paper_json() -> dict[str, Any]:
    """Table 1 as what JSON can hold."""
    sizes = [{"name": name, **asdict(size)} for name, size in paper_sizes().items()]
    return {"source": paper_source(), "notes": list(paper_notes()), "sizes": sizes}


def _verdict_json(verdict: Verdict) -> dict[str, Any]:
    judged, figures = verdict.judged, verdict.figures
    return {
        "finding": verdict.finding,
        "sentence": verdict.sentence,
        "conditions": dict(verdict.conditions),
        "sizes": verdict.sizes,
        "samples": verdict.samples,
        "judged": None
        if judged is None
        else {
            "name": judged.name,
            "low": judged.interval.low,
            "value": judged.interval.value,
            "high": judged.interval.high,
            "confidence": judged.interval.confidence,
            "limit": judged.limit,
            "holds": "above" if judged.above else "at or below",
        },
        "figures": None if figures is None else {"headings": list(figures.headings), "rows": list(figures.rows)},
    }


def _reading_json(reading: PublishedReading) -> dict[str, str]:
    return {name: value for name, value in asdict(reading).items() if name != "claims"}

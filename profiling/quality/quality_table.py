"""Qualities as a table: a line for each network, sampler and step count, in the terminal and on the page."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from ..measure.conditions import commit
from ..terminal.layout import MISSING, Grid, formatted, number, say_grid
from ..terminal.visible import counted, say_wrapped
from .quality_records import QualityEstimate, QualityRecord

HEADINGS = (
    *("network", "kind", "seed", "training steps", "sampler", "steps", "guidance", "tuned", "split", "samples"),
    *("GFLOP per image", "Frechet", "KID", "sliced Wasserstein", "alignment", "all right", "why not", "commit"),
)
_WORDS = ("network", "kind", "sampler", "tuned", "split", "why not", "commit")
QUALITY_NOTE = (
    "Distances to real samples: smaller is better, and that of real samples themselves is the least that can be "
    "seen. alignment: the share of a caption's factors that the judge reads right. tuned: this guidance was the "
    "best on held-out prompts. All of it holds in this closed world only."
)


def quality_conditions(records: Sequence[QualityRecord]) -> str:
    """What the records of a table have in common: world, task and commit, or how many commits."""
    commits = {commit(record.environment) for record in records}
    case = records[0].case
    return f"{case.world}, {case.task}, {commits.pop() if len(commits) == 1 else counted(len(commits), 'commit')}"


def quality_groups(records: Sequence[QualityRecord]) -> list[list[QualityRecord]]:
    """The records of each world and task apart; of a case that one commit judged twice the last.

    A study that goes on after changes of the code is one study: verdicts are on all of its commits together.
    """
    found: dict[tuple[str, str], dict[tuple[str, str], QualityRecord]] = {}
    for record in sorted(records, key=lambda record: record.started_at):
        group = found.setdefault((record.case.world, record.case.task), {})
        group[record.case_key, commit(record.environment)] = record
    return [list(group.values()) for group in found.values()]


def quality_grid(records: Sequence[QualityRecord]) -> Grid:
    """A line for each record; a column that none has a value in is left out, and so is that of one commit."""
    several = len({commit(record.environment) for record in records}) > 1
    rows = ((*_cells(record), commit(record.environment) if several else MISSING) for record in records)
    return Grid(HEADINGS, tuple(rows), _WORDS).without_empty()


def print_qualities(records: Sequence[QualityRecord], console: Console) -> None:
    """Of each world and task a table, and how to read them."""
    for group in quality_groups(records):
        say_wrapped(console, quality_conditions(group), "bold")
        say_grid(console, quality_grid(group), leading=6)
    if records:
        say_wrapped(console, QUALITY_NOTE)


def _cells(record: QualityRecord) -> tuple[str, ...]:
    case = record.case
    is_real = case.kind == "real"
    return (
        case.network,
        case.kind,
        MISSING if is_real else str(case.training_seed),
        MISSING if is_real else str(case.training_steps),
        case.sampler,
        MISSING if is_real else str(case.steps),
        formatted(case.guidance_scale, "g") if case.guided else MISSING,
        "tuned" if record.tuned else MISSING,
        case.split,
        str(case.samples),
        number(record.gflop_per_image),
        *(_value(figure) for figure in record.estimates.values()),
        formatted(record.all_right, ".3f"),
        MISSING if record.status == "ok" else f"{record.status}: {record.message}",
    )


def _value(figure: QualityEstimate | None) -> str:
    return MISSING if figure is None else f"{figure.value:.4g}"

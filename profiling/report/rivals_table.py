"""The table of rivals beside the family: whole samples, and where each ends."""

from __future__ import annotations

from collections.abc import Callable

from ..figures import text
from ..figures.beside import ends_with, ms_to_image, rivals_beside
from ..figures.derived import Overview, Row
from ..figures.phrases import Conditions
from ..terminal.layout import MISSING, Grid, formatted, number
from ..terminal.visible import visible
from .details import flags_cell

RIVALS_TITLE = "Rivals beside the family: whole samples"
RIVALS_NOTE = (
    "ms per image: until a sample ends with latents, tokens or an image; ms to an image: with the decoder that "
    "latents and tokens need, where --with-decoder timed it. Of the family: the size nearest to each rival in "
    "parameters, at each number of steps on its fastest backend. Guided steps run twice the batch."
)
# Which a rival has of its own.
_OWN = ("task", "sampler", "steps", "guidance_scale", "context_tokens")


def rivals_grid(shown: Overview) -> Grid:
    """A line for each rival, and for the sizes of the family beside it; no rows where no rival was measured."""
    rows = rivals_beside(shown)
    conditions = Conditions.of(shown.environments, rows)
    columns: dict[str, Callable[[Row], str]] = {
        "generator": lambda row: visible(row.name),
        "backend": lambda row: visible(row.case.backend),
        "conditions": lambda row: conditions.heading(row, *_OWN) or MISSING,
        "parameters": lambda row: text.count(row.record.parameters),
        "GFLOP": lambda row: formatted(row.record.gflop_per_forward, ".1f"),
        "steps": _steps,
        "ends with": ends_with,
        "ms per image": lambda row: number(row.record.ms_per_image),
        "p20..p80": _spread,
        "ms to an image": lambda row: number(ms_to_image(row.record, ends_with(row))),
        "flags": lambda row: flags_cell(row.record),
        "no time because": lambda row: MISSING if row.record.wall_ms is not None else text.failure(row.record),
    }
    words = ("generator", "backend", "conditions", "steps", "ends with", "flags", "no time because")
    cells = tuple(tuple(cell(row) for cell in columns.values()) for row in rows)
    return Grid(tuple(columns), cells, words).without_empty() if cells else Grid(tuple(columns), ())


def _steps(row: Row) -> str:
    evaluations = row.record.evaluations or row.case.steps
    sampler = "" if row.case.task == "rival" else f"{row.case.sampler} "
    return f"{sampler}{evaluations}{' guided' if row.case.guided else ''}"


def _spread(row: Row) -> str:
    wall, batch = row.record.wall_ms, row.case.batch
    return MISSING if wall is None else f"{number(wall.p20 / batch)}..{number(wall.p80 / batch)}"

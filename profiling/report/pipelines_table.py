"""The table of pipelines: from a prompt to an image, by part."""

from __future__ import annotations

from collections.abc import Callable

from ..figures import text
from ..figures.derived import Overview, Row, alike, ratio
from ..figures.phrases import Conditions
from ..terminal.layout import MISSING, Grid, number
from ..terminal.visible import visible
from ..trajectory.case import PIPELINE_BACKENDS
from .details import flags_cell

PIPELINES_NOTE = (
    "Medians of whole calls, wall clock; the parts are on the GPU's clock where there is one: text, the steps and "
    "what prepares them, the decoder, and what the pipeline does with the images. A part has the time in which "
    "the GPU waits for the host. speed: diffusers' own pipeline (pipe) over this one. first call: with "
    "compilation and capture."
)


def pipelines_title(shown: Overview) -> str:
    """The conditions that all pipelines share."""
    return f"Pipelines ({text.joined(Conditions.of(shown.environments, shown.pipelines).shared)})"


def pipelines_grid(shown: Overview) -> Grid:
    """A line for each pipeline and backend, those of one set of conditions together; no rows without pipelines."""
    conditions = Conditions.of(shown.environments, shown.pipelines)
    columns: dict[str, Callable[[Row, Row | None], str]] = {
        "pipeline": lambda row, peer: visible(row.name),
        "backend": lambda row, peer: visible(row.case.backend),
        "conditions": lambda row, peer: conditions.heading(row) or MISSING,
        "ms": lambda row, peer: number(_median(row)),
        "p20..p80": lambda row, peer: _spread(row),
        "text": lambda row, peer: _part(row, "text"),
        "steps": lambda row, peer: _part(row, "steps"),
        "decode": lambda row, peer: _part(row, "decode"),
        "rest": lambda row, peer: _part(row, "rest"),
        "speed": _speed,
        "first call": lambda row, peer: number(row.record.phases.first_call_ms),
        "flags": lambda row, peer: flags_cell(row.record),
        "no time because": lambda row, peer: MISSING if _median(row) is not None else text.failure(row.record),
    }
    words = ("pipeline", "backend", "conditions", "flags", "no time because")
    cells = []
    for group in alike(shown.pipelines, "backend"):
        peer = next((row for row in group if row.case.backend == PIPELINE_BACKENDS[0]), None)
        ordered = sorted(group, key=lambda row: PIPELINE_BACKENDS.index(row.case.backend))
        cells += [tuple(cell(row, peer) for cell in columns.values()) for row in ordered]
    return Grid(tuple(columns), tuple(cells), words).without_empty() if cells else Grid(tuple(columns), ())


def _median(row: Row) -> float | None:
    return None if row.record.wall_ms is None else row.record.wall_ms.p50


def _spread(row: Row) -> str:
    wall = row.record.wall_ms
    return MISSING if wall is None else f"{number(wall.p20)}..{number(wall.p80)}"


def _part(row: Row, part: str) -> str:
    return MISSING if row.record.parts is None else number(getattr(row.record.parts, part).p50)


def _speed(row: Row, peer: Row | None) -> str:
    faster = ratio(None if peer is None else _median(peer), _median(row))
    return MISSING if faster is None else f"{faster:.2f}x"

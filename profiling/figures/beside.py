"""Rivals beside the family: the sizes of about as many parameters, measured under the same conditions."""

from __future__ import annotations

import math
from collections.abc import Iterable

from ..rivals.rival import RIVALS
from ..terminal.layout import MISSING
from ..trajectory.records import Record
from .derived import Overview, Row


def rivals_beside(shown: Overview) -> tuple[Row, ...]:
    """The rivals and, of the family, the size nearest to each in parameters; the fewest parameters first.

    Sizes are of the same environment, device, dtype, batch and latent, in text-to-image. Of each size a row for
    each number of steps, of the sampler, guidance and backend that took the least time. Rows of one set of
    conditions stand together.
    """
    groups: dict[tuple[object, ...], list[Row]] = {}
    for row in shown.rivals:
        groups.setdefault(conditions_of_both(row), []).append(row)
    found: list[Row] = []
    for conditions, rivals in groups.items():
        family = [row for row in shown.rows if row.case.task == "t2i" and conditions_of_both(row) == conditions]
        found += sorted([*rivals, *_nearest(rivals, family)], key=_place)
    return tuple(found)


def _nearest(rivals: Iterable[Row], family: Iterable[Row]) -> list[Row]:
    timed = [row for row in family if row.record.wall_ms is not None and row.record.parameters]
    if not timed:
        return []
    networks = {
        min(timed, key=lambda row: parameters_apart(row, rival)).case.network
        for rival in rivals
        if rival.record.parameters
    }
    fastest: dict[tuple[str, int], Row] = {}
    for row in sorted(timed, key=lambda row: row.record.wall_ms.p50 if row.record.wall_ms else math.inf):
        if row.case.network in networks:
            fastest.setdefault((row.case.network, row.case.steps), row)
    return list(fastest.values())


def parameters_apart(one: Row, other: Row) -> float:
    """The factor between two parameter counts, 1 or more; infinite where one is not known."""
    a, b = one.record.parameters, other.record.parameters
    return max(a / b, b / a) if a and b else math.inf


def conditions_of_both(row: Row) -> tuple[object, ...]:
    """What a rival must share with the family: all that does not belong to how either of them samples."""
    case = row.case
    return row.environment, case.device, case.dtype, case.batch, case.latent_height, case.latent_width


def _place(row: Row) -> tuple[object, ...]:
    return row.record.parameters or 0, row.name, row.case.steps, row.case.backend


def ends_with(row: Row) -> str:
    """What a sample is when its time ends: "latents" of the family, "tokens" or "image" of a rival."""
    if row.case.task != "rival":
        return "latents"
    rival = RIVALS.get(row.case.unet)
    return MISSING if rival is None else rival.ends_with


def ms_to_image(record: Record, end: str) -> float | None:
    """Median ms for each image, the decoder's share included; null where a decoder is needed and was not timed."""
    if record.wall_ms is None or (end != "image" and record.decoder_ms is None):
        return None
    decoder = 0.0 if record.decoder_ms is None else record.decoder_ms.p50
    return (record.wall_ms.p50 + decoder) / record.case.batch

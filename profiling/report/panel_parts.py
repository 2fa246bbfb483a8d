"""What the panels of charts are put together from: axes, marks, layers and tips over the facts."""

from __future__ import annotations

from typing import Any, TypeAlias

import altair as alt

# What alt.layer says it returns.
Panel: TypeAlias = alt.LayerChart | alt.FacetChart
# The name of the data of every panel.
FACTS = "facts"
# Hollow, so that marks on top of each other are all seen.
MARK: dict[str, Any] = {"filled": False, "size": 90, "strokeWidth": 2, "opacity": 1}
# Where a falling curve leaves room for a label.
BESIDE: dict[str, Any] = {"align": "left", "baseline": "bottom", "dx": 7, "dy": -5}
WIDTH, HEIGHT = 420, 320
# Of an axis of times that may be long: each labelled tick in the unit that suits it.
UNITS = (
    "datum.label === '' ? '' : !datum.value ? '0' : abs(datum.value) < 1000 ? format(datum.value, '~g') + ' ms' : "
    "format(datum.value / 1000, ',~g') + ' s'"
)
# What a tip calls a number.
_CALLED = {
    "fid": "FID in the paper",
    "ms": "ms of an image",
    "paper_image": "the paper's cost of an image",
    "paper": "the paper's cost",
    "cost_p50": "measured cost",
    "floor_cost": "cost by the floor",
    "step_p20": "ms of a step, p20",
    "step_p50": "ms of a step",
    "step_p80": "ms of a step, p80",
    "evaluations": "model evaluations",
    "wall_p50": "ms of a trajectory",
    "line": "ms by the line",
    "images_per_s": "images per second",
    "joules": "joules per image",
    "images": "images of a batch",
    "gflop_image": "GFLOP of an image",
    "rate": "guidance",
    "frechet": "Frechet distance",
    "kid": "KID",
    "sliced_wasserstein": "sliced Wasserstein",
    "alignment": "alignment",
    "low": "interval from",
    "high": "interval to",
}


def log_axis(field: str, title: str, count: int = 8, base: int = 10, **axis: Any) -> dict[str, Any]:
    """An axis of magnitudes with room for marks at its ends."""
    return {
        "shorthand": f"{field}:Q",
        "title": title,
        "scale": alt.Scale(type="log", base=base, nice=False, padding=24),
        "axis": alt.Axis(tickCount=count, format=",~g", labelOverlap="greedy", **axis),
    }


def the_facts() -> alt.Chart:
    return alt.Chart(alt.NamedData(FACTS))


def layered(*layers: alt.Chart | alt.LayerChart, height: float | alt.Step = HEIGHT) -> Panel:
    return alt.layer(*layers).properties(width=WIDTH, height=height)


def told(field: str) -> str:
    """An expression: the number as the tables have it, with four digits, whole from a thousand on."""
    return (
        f"!isValid(datum.{field}) ? '-' : abs(datum.{field}) >= 1000 ? format(datum.{field}, '.0f') : "
        f"format(datum.{field}, '.4r')"
    )


def with_tips(
    *fields: str, words: tuple[str, ...] = ("size", "backend"), of: alt.Chart | None = None
) -> alt.Chart:
    """The facts, or what was made `of` them, with a tip: what each mark is of, and its numbers."""
    tips = [alt.Tooltip(f"{name}:N") for name in words]
    tips += [alt.Tooltip(f"{name}_told:N", title=_CALLED[name]) for name in fields]
    facts = the_facts() if of is None else of
    return facts.transform_calculate(**{f"{name}_told": told(name) for name in fields}).encode(tooltip=tips)

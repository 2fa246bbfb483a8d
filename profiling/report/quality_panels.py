"""One panel of each chart of quality: a metric over what an image costs, and over the guidance rate."""

from __future__ import annotations

from typing import Any

import altair as alt

from ..claims.closed_worlds import QualityMetric
from ..claims.pooled_figures import LOGARITHM
from .palette import NEUTRAL, TEXT, Palette
from .panel_parts import BESIDE, MARK, UNITS, Panel, layered, log_axis, the_facts, with_tips
from .quality_curves import ALIGNMENT

# Of each column of costs the title of its axis, and how its ticks are told.
_COSTS: dict[str, tuple[str, dict[str, Any]]] = {
    "ms": ("time of an image", {"labelExpr": UNITS}),
    "gflop_image": ("GFLOP of an image, all forwards", {}),
}
_IS_FAMILY = "datum.kind === 'diffusion'"


def metric_name(metric: QualityMetric) -> str:
    """As a title begins with it."""
    return metric.name[0].upper() + metric.name[1:]


def frontier_panel(palette: Palette, metric: QualityMetric, cost: str) -> Panel:
    """A metric over a column of costs: networks as lines over their steps, the frontier as stairs below them."""
    title, axis = _COSTS[cost]
    x, y = alt.X(**log_axis(cost, title, 6, **axis)), _metric_axis(metric)
    front = f"{metric.field}_front"
    family = the_facts().transform_filter(_IS_FAMILY)
    return layered(
        *_real(metric, y),
        *_curves(palette, metric, family, x, y, cost),
        the_facts()
        .transform_filter(f"isValid(datum.{front})")
        .mark_line(interpolate="step-after", strokeWidth=3.5, opacity=0.6, color=TEXT)
        .encode(x, alt.Y(f"{front}:Q"), order=alt.Order(f"{cost}:Q")),
        *_points(palette, metric, x, y, cost, ("network", "kind"), ("evaluations", cost)),
        family.transform_window(place="row_number()", sort=[alt.SortField(cost, "descending")], groupby=["series"])
        .transform_filter("datum.place === 1")
        .mark_text(**BESIDE)
        .encode(x, y, text="network:N"),
    )


def guidance_panel(palette: Palette, metric: QualityMetric) -> Panel:
    """A metric over the guidance rate, a line for each network."""
    x = alt.X("rate:Q", title="guidance rate", scale=alt.Scale(zero=False, nice=False, padding=18))
    y = _metric_axis(metric)
    return layered(
        *_real(metric, y),
        *_curves(palette, metric, the_facts(), x, y, "rate"),
        *_points(palette, metric, x, y, "rate", ("network",), ("rate",)),
        height=260,
    )


def _metric_axis(metric: QualityMetric) -> alt.Y:
    if metric.scale is LOGARITHM:
        return alt.Y(**log_axis(metric.field, f"{metric.name} (less is better)", 6))
    better = "more" if metric is ALIGNMENT else "less"
    scale = alt.Scale(zero=False, nice=False, padding=18)
    title = f"{metric.name} ({better} is better)"
    return alt.Y(f"{metric.field}:Q", title=title, scale=scale, axis=alt.Axis(tickCount=6))


def _real(metric: QualityMetric, y: alt.Y) -> list[alt.Chart]:
    """A rule at what real samples have, against real ones."""
    field = f"{metric.field}_real"
    real = (
        the_facts().transform_filter(f"isValid(datum.{field})").transform_aggregate(of="count()", groupby=[field])
    )
    at = alt.Y(f"{field}:Q")
    side: dict[str, Any] = (
        {"baseline": "top", "dy": 4} if metric is ALIGNMENT else {"baseline": "bottom", "dy": -4}
    )
    return [
        real.mark_rule(color=NEUTRAL, strokeDash=[6, 4], strokeWidth=1.5).encode(at),
        real.mark_text(align="left", dx=4, color=NEUTRAL, **side).encode(
            at, x=alt.value(0), text=alt.value("real samples")
        ),
    ]


def _curves(
    palette: Palette, metric: QualityMetric, of: alt.Chart, x: alt.X, y: alt.Y, order: str
) -> list[alt.Chart]:
    """A line for each series, in the band of its intervals."""
    low, high = f"{metric.field}_low", f"{metric.field}_high"
    of = of.transform_filter(f"isValid(datum.{metric.field})")
    # A legend's symbols take the opacity of a layer unless told.
    colour = palette.colour.legend(symbolOpacity=1)
    return [
        of.mark_area(opacity=0.18).encode(x, alt.Y(f"{low}:Q"), y2=f"{high}:Q", color=colour),
        of.mark_line(strokeWidth=1.5).encode(x, y, order=alt.Order(f"{order}:Q"), color=colour),
    ]


def _points(
    palette: Palette,
    metric: QualityMetric,
    x: alt.X,
    y: alt.Y,
    at: str,
    words: tuple[str, ...],
    numbers: tuple[str, ...],
) -> list[alt.Chart]:
    """A mark for each fact, hollow of the family, and its interval."""
    low, high = f"{metric.field}_low", f"{metric.field}_high"
    filled = alt.condition(_IS_FAMILY, alt.value(0), alt.value(1))
    inside = alt.Fill(f"{palette.column}:N", scale=palette.colours)
    ends = the_facts().transform_calculate(low=f"datum.{low}", high=f"datum.{high}")
    return [
        the_facts().mark_rule(strokeWidth=1.5).encode(x, alt.Y(f"{low}:Q"), y2=f"{high}:Q", color=palette.colour),
        with_tips(*numbers, metric.field, "low", "high", words=words, of=ends)
        .mark_point(**MARK)
        .encode(x, y, color=palette.colour, shape=palette.shape, fill=inside, fillOpacity=filled),
    ]

"""The chart of `ldmperf plan`: time against the paper's FID, the budget and the Pareto front."""

from __future__ import annotations

import math
import textwrap
from pathlib import Path
from typing import Any

import altair as alt

from ..claims.offers import Budget
from ..claims.planning import Answer, Plan
from ..figures import text
from ..terminal.visible import visible
from .drawings import Drawing, Spec, write_charts
from .ladder import STARRED
from .palette import CONFIG, TEXT
from .plan_text import budget_in_words, plan_heading

_FITS = {"on the front": "#0072B2", "fits": "#E69F00", "beyond the budget": "#767676"}
STAIRS = "#56B4E9"
_BASES = {"measured": "circle", "interpolated": "triangle-up", "extrapolated": "triangle-down"}


def pareto_drawing(answer: Answer) -> Drawing:
    """A panel for each plan with trajectories of known FID, or the reason why there is none."""
    title = "What the budget buys"
    summary = (
        "The paper's FID after 50 steps of DDIM over the wall time of such a trajectory, on a logarithmic axis, "
        "each size on its fastest backend. The dashed line is the budget, "
        f"{budget_in_words(answer.budget)}. The stairs join the offers that no other one beats in both. Bars are "
        "the intervals of the medians."
    )
    panels = [(plan, points) for plan in answer.plans if (points := _points(plan))]
    if not panels:
        reason = (
            "it takes a size of the paper at 50 steps of ddim, guidance 7.5, latent 64x64 and 77 tokens, measured "
            "or told by a line over steps"
        )
        return Drawing("pareto", title, summary, reason=reason)
    side = 420 if len(panels) == 1 else 340
    charts = [
        _panel(points, answer.budget).properties(
            width=side, height=0.75 * side, title=visible(plan_heading(answer, plan))
        )
        for plan, points in panels
    ]
    conditions = textwrap.wrap(
        visible(text.joined(answer.shown.conditions.shared)), 70 if len(panels) == 1 else 110
    )
    if any(offer.flags for plan, _ in panels for offer in (*plan.offers, *plan.beyond) if offer.fid is not None):
        conditions.append(f"* {STARRED}")
    heading = alt.TitleParams(f"Within {budget_in_words(answer.budget)}", subtitle=conditions, subtitlePadding=6)
    panes = alt.concat(*charts, columns=2).resolve_scale(color="shared", shape="shared")
    chart: Spec = panes.properties(title=heading, description=summary).to_dict() | {"config": dict(CONFIG)}
    return Drawing("pareto", title, summary, chart)


def _points(plan: Plan) -> list[dict[str, Any]]:
    front = plan.front
    told = [
        *((offer, "on the front" if offer in front else "fits") for offer in plan.offers),
        *((offer, "beyond the budget") for offer in plan.beyond),
    ]
    return [
        {
            "size": visible(offer.name) + ("*" if offer.flags else ""),
            "ms": offer.ms.value,
            "low": max(offer.ms.low, offer.ms.value * 1e-3),
            "high": offer.ms.high,
            "fid": offer.fid,
            "place": place,
            "basis": offer.basis,
        }
        for offer, place in told
        if offer.fid is not None
    ]


def _panel(points: list[dict[str, Any]], budget: Budget) -> alt.LayerChart | alt.FacetChart:
    times = [budget.wall_ms, *(float(point[name]) for point in points for name in ("low", "high"))]
    domain = [math.exp(math.log(min(times)) - 0.3), math.exp(math.log(max(times)) + 0.3)]
    scale = alt.Scale(type="log", domain=domain, nice=False)
    x = alt.X("ms:Q", scale=scale, title=f"ms per {budget.per}", axis=alt.Axis(format="~g", tickCount=6))
    fids = [float(point["fid"]) for point in points]
    # Wide enough for ticks that say which FID a single point has.
    margin = max(0.5, 0.08 * (max(fids) - min(fids)))
    y = alt.Y(
        "fid:Q",
        scale=alt.Scale(zero=False, nice=False, domain=[min(fids) - margin, max(fids) + margin]),
        title="the paper's FID (less is better)",
    )
    colour = alt.Color("place:N", scale=alt.Scale(domain=list(_FITS), range=list(_FITS.values())))
    shape = alt.Shape("basis:N", scale=alt.Scale(domain=list(_BASES), range=list(_BASES.values())))
    marks = alt.Chart(alt.InlineData(values=points))
    stairs = [point for point in points if point["place"] == "on the front"]
    limit = alt.Chart(alt.InlineData(values=[{"ms": budget.wall_ms}]))
    return alt.layer(
        limit.mark_rule(color="#D55E00", strokeDash=[5, 4], strokeWidth=1.5).encode(x),
        alt.Chart(alt.InlineData(values=stairs)).mark_line(interpolate="step-after", color=STAIRS).encode(x, y),
        marks.mark_rule(strokeWidth=2).encode(alt.X("low:Q", scale=scale), y, x2="high:Q", color=colour),
        marks.mark_point(size=90, strokeWidth=2, opacity=1).encode(x, y, color=colour, shape=shape),
        marks.mark_text(align="left", baseline="bottom", dx=7, dy=-5, color=TEXT).encode(x, y, text="size:N"),
    )


def write_pareto(answer: Answer, directory: Path) -> tuple[list[Path], str]:
    """Writes pareto.png and pareto.svg to the folder; their paths, and the reason where there are none.

    Files of an earlier answer are removed then. Raises OSError where the folder cannot be written.
    """
    drawing = pareto_drawing(answer)
    directory.mkdir(parents=True, exist_ok=True)
    return write_charts([drawing], directory), drawing.reason

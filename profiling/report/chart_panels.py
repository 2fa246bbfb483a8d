"""One panel of each chart: an altair definition for the browser and for files alike.

A panel has no numbers of its own: it draws whatever facts it is given, in axes that follow from them.
"""

from __future__ import annotations

import altair as alt

from .palette import NEUTRAL, TEXT, Palette
from .panel_parts import BESIDE, MARK, UNITS, Panel, layered, log_axis, the_facts, told, with_tips


def _fid_axis() -> alt.Y:
    scale = alt.Scale(zero=False, padding=18)
    return alt.Y("fid:Q", title="the paper's FID (less is better)", scale=scale, axis=alt.Axis(tickCount=6))


def fid_panel(palette: Palette) -> Panel:
    """The paper's FID over ms of an image; hollow where predicted."""
    x = alt.X(**log_axis("ms", "time of an image at 50 steps", 6, labelExpr=UNITS))
    y, order = _fid_axis(), alt.Order("paper_image:Q")
    filled = alt.condition("datum.predicted", alt.value(0), alt.value(1))
    inside = alt.Fill("backend:N", scale=palette.colours)
    return layered(
        the_facts().mark_line(strokeWidth=1.5).encode(x, y, order=order, color=palette.colour),
        the_facts().mark_rule(strokeWidth=2).encode(alt.X("ms_p20:Q"), y, x2="ms_p80:Q", color=palette.colour),
        with_tips("fid", "ms", words=("size", "backend", "basis")).mark_point(**MARK).encode(
            x, y, color=palette.colour, shape=palette.shape, fill=inside, fillOpacity=filled
        ),
        the_facts().transform_aggregate(right="max(ms)", groupby=["size", "fid"]).mark_text(**BESIDE).encode(
            alt.X("right:Q"), y, text="size:N"
        ),
    )  # fmt: skip


def fid_flops_panel() -> Panel:
    """The paper's FID over the paper's cost of an image."""
    x, y = alt.X(**log_axis("paper_image", "the paper's cost of an image (866M forwards)")), _fid_axis()
    sizes = the_facts().transform_aggregate(groupby=["size", "fid", "paper_image"], backends="count()")
    return layered(
        sizes.mark_line(strokeWidth=1.5, color=NEUTRAL).encode(x, y, order=alt.Order("paper_image:Q")),
        with_tips("fid", "paper_image", words=("size",), of=sizes)
        .mark_point(size=90, strokeWidth=2, opacity=1, filled=True, color=NEUTRAL)
        .encode(x, y),
        sizes.mark_text(**BESIDE).encode(x, y, text="size:N"),
    )


def cost_panel(palette: Palette) -> Panel:
    """Measured cost over the paper's, with the floor's and the line on which time follows FLOPs."""
    x = alt.X(**log_axis("paper", "the paper's cost (FLOPs), largest size = 1"))
    y = alt.Y(**log_axis("cost_p50", "measured cost of a step, largest size = 1"))
    lowest = the_facts().transform_aggregate(low="min(paper)", high="max(paper)")
    floor = (
        the_facts()
        .transform_filter("isValid(datum.floor_cost)")
        .transform_aggregate(floor_cost="mean(floor_cost)", groupby=["paper"])
    )
    tops = the_facts().transform_aggregate(top="max(cost_p80)", groupby=["label", "paper"])
    least = floor.transform_window(place="row_number()", sort=[alt.SortField("paper")]).transform_filter(
        "datum.place == 1"
    )
    return layered(
        lowest.mark_rule(color=NEUTRAL, strokeDash=[6, 4], strokeWidth=1.5).encode(
            alt.X("low:Q"), alt.Y("low:Q"), x2="high:Q", y2="high:Q"
        ),
        lowest.mark_text(align="left", baseline="top", dx=8, color=NEUTRAL).encode(
            alt.X("low:Q"), alt.Y("low:Q"), text=alt.value("time follows FLOPs")
        ),
        floor.mark_line(color=NEUTRAL, strokeDash=[1, 4], strokeWidth=2.5, strokeCap="round").encode(
            x, alt.Y("floor_cost:Q")
        ),
        least.mark_text(align="left", baseline="top", dx=8, dy=2, color=NEUTRAL).encode(
            x, alt.Y("floor_cost:Q"), text=alt.value("floor")
        ),
        the_facts().mark_rule(strokeWidth=2).encode(x, alt.Y("cost_p20:Q"), y2="cost_p80:Q", color=palette.colour),
        with_tips("paper", "cost_p50", "floor_cost")
        .mark_point(**MARK)
        .encode(x, y, color=palette.colour, shape=palette.shape),
        # Across the line, where neighbours are furthest apart.
        tops.mark_text(align="right", baseline="middle", angle=60, dx=-11, limit=140).encode(
            x, alt.Y("top:Q"), text="label:N"
        ),
    )


def ladder_panel(palette: Palette) -> Panel:
    """A bar of ms of a step for each backend, in the order of the ladder."""
    y = alt.Y("backend:N", sort=alt.EncodingSortField("rung", op="min"), title=None)
    scale = alt.Scale(zero=True, nice=False)
    x = alt.X("step_p50:Q", title="ms of a step", scale=scale, axis=alt.Axis(tickCount=5))
    return layered(
        with_tips("step_p20", "step_p50", "step_p80").mark_bar(height={"band": 0.7}).encode(
            x, y, color=palette.colour
        ),
        the_facts().mark_rule(strokeWidth=2, color=TEXT).encode(alt.X("step_p20:Q"), y, x2="step_p80:Q"),
        # The room for the text beside the longest bar.
        the_facts()
        .transform_calculate(room="datum.step_p80 * 1.25")
        .mark_point(opacity=0)
        .encode(alt.X("room:Q"), y),
        the_facts().transform_calculate(told=told("step_p50")).mark_text(align="left", dx=6).encode(
            alt.X("step_p80:Q"), y, text="told:N"
        ),
        the_facts().mark_text(align="left", dx=6, fontStyle="italic").encode(y, x=alt.value(0), text="no_time:N"),
        height=alt.Step(26),
    )  # fmt: skip


def steps_panel(palette: Palette) -> Panel:
    """ms of a trajectory over model evaluations, with the line of each backend."""
    x = alt.X("evaluations:Q", title="model evaluations", scale=alt.Scale(zero=True), axis=alt.Axis(tickMinStep=1))
    y = alt.Y("wall_p50:Q", title="time of a trajectory", axis=alt.Axis(tickCount=5, labelExpr=UNITS))
    return layered(
        the_facts().mark_rule(strokeWidth=1.5).encode(
            alt.X("line_from:Q"), alt.Y("line_start:Q"), x2="evaluations:Q", y2="line:Q", color=palette.colour
        ),
        the_facts().mark_rule(strokeWidth=2).encode(x, alt.Y("wall_p20:Q"), y2="wall_p80:Q", color=palette.colour),
        with_tips("evaluations", "wall_p50", "line").mark_point(**MARK).encode(
            x, y, color=palette.colour, shape=palette.shape
        ),
        height=220,
    )  # fmt: skip


def by_size_panel(palette: Palette, field: str, title: str) -> Panel:
    """A number of each size and backend, on a logarithmic axis."""
    x = alt.X("size:N", sort=alt.EncodingSortField("gflop", op="min"), title=None, axis=alt.Axis(labelAngle=-30))
    y = alt.Y(**log_axis(field, title))
    return layered(
        the_facts().mark_line(strokeWidth=1.5).encode(x, y, color=palette.colour),
        with_tips(field).mark_point(**MARK).encode(x, y, color=palette.colour, shape=palette.shape),
        height=260,
    )


def batch_panel(palette: Palette) -> Panel:
    """Images per second over the images of a batch."""
    # Batches double.
    x, y = (
        alt.X(**log_axis("images", "images of a batch", 6, base=2)),
        alt.Y(**log_axis("images_per_s", "images per second")),
    )
    return layered(
        the_facts().mark_line(strokeWidth=1.5).encode(x, y, color=palette.colour),
        with_tips("images", "images_per_s")
        .mark_point(**MARK)
        .encode(x, y, color=palette.colour, shape=palette.shape),
        height=220,
    )


def history_panel(palette: Palette) -> Panel:
    """ms of a step over commits, the oldest first, changes ringed."""
    x = alt.X("commit:N", sort=alt.EncodingSortField("place", op="min"), title=None, axis=alt.Axis(labelAngle=-30))
    y = alt.Y("step_p50:Q", title="ms of a step", scale=alt.Scale(zero=False, padding=18))
    is_changed = "datum.verdict == 'FASTER' || datum.verdict == 'SLOWER'"
    ring = alt.condition(is_changed, alt.value(1), alt.value(0))
    # Arrows of neighbours that lie on each other can still be read; words cannot.
    arrow = "datum.verdict == 'FASTER' ? '▼' : datum.verdict == 'SLOWER' ? '▲' : ''"
    return layered(
        the_facts().mark_line(strokeWidth=1.5).encode(x, y, color=palette.colour),
        the_facts().mark_rule(strokeWidth=2).encode(x, alt.Y("step_p20:Q"), y2="step_p80:Q", color=palette.colour),
        with_tips("step_p50", words=("size", "backend", "commit", "verdict"))
        .mark_point(**MARK)
        .encode(x, y, color=palette.colour, shape=palette.shape),
        the_facts().mark_point(size=320, strokeWidth=2.5, color=TEXT).encode(x, y, opacity=ring),
        the_facts()
        .transform_calculate(arrow=arrow)
        .mark_text(align="left", dx=14, fontSize=14)
        .encode(x, y, text="arrow:N"),
        height=260,
    )

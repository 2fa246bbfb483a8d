"""The charts of a run: one altair definition each, rendered for the page (SVG) and for files (PNG, SVG)."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

import altair as alt

from ..figures import text
from ..figures.derived import PEER, Overview, Row, Section, StepsSeries, step_ms
from ..terminal.visible import visible
from .ladder import MIN_RUNGS, ladders

# What alt.layer says it returns.
Panel: TypeAlias = alt.LayerChart | alt.FacetChart
Point: TypeAlias = dict[str, Any]

# Okabe and Ito's colours, told apart with any colour vision; the shapes tell the same without colour.
COLOURS = ("#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
PEER_COLOUR = "#D55E00"
SHAPES = ("circle", "triangle-up", "diamond", "triangle-down", "cross", "stroke")
PEER_SHAPE = "square"
# Hollow, so that marks on top of each other are all seen.
MARK: dict[str, Any] = {"filled": False, "size": 90, "strokeWidth": 2, "opacity": 1}
FONT = "Liberation Sans, Arial, Helvetica, sans-serif"
LOG_TICKS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)
FINE_TICKS = (0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 1, 1.5, 2, 3, 4, 5, 7, 10)


@dataclass(frozen=True)
class Drawing:
    """A chart, or the reason why it was not drawn; `summary` says in words what the chart shows."""

    name: str
    title: str
    summary: str
    chart: alt.ConcatChart | None = None
    reason: str = ""

    def png(self) -> bytes:
        """The chart at twice the screen's resolution."""
        buffer = io.BytesIO()
        assert self.chart is not None
        self.chart.save(buffer, format="png", scale_factor=2)
        return buffer.getvalue()

    def svg(self) -> str:
        buffer = io.StringIO()
        assert self.chart is not None
        self.chart.save(buffer, format="svg")
        return buffer.getvalue()


@dataclass(frozen=True)
class Palette:
    """The colour and shape of each backend, the same in every panel of a run."""

    colour: alt.Color
    shape: alt.Shape

    @classmethod
    def of(cls, shown: Overview) -> Palette:
        """The peer has its own; the others take theirs in the order of the records."""
        names = list(dict.fromkeys(row.case.backend for row in shown.rows))
        others = [name for name in names if name != PEER]
        colours = [PEER_COLOUR if name == PEER else COLOURS[others.index(name) % len(COLOURS)] for name in names]
        shapes = [PEER_SHAPE if name == PEER else SHAPES[others.index(name) % len(SHAPES)] for name in names]
        return cls(
            alt.Color("backend:N", scale=alt.Scale(domain=names, range=colours)),
            alt.Shape("backend:N", scale=alt.Scale(domain=names, range=shapes)),
        )

    def marks(self, points: list[Point], x: alt.X, y: alt.Y, scale: alt.Scale) -> tuple[alt.Chart, alt.Chart]:
        """A bar from p20 to p80 and a mark at p50 for each point."""
        chart = alt.Chart(alt.InlineData(values=points))
        bars = chart.mark_rule(strokeWidth=2).encode(x, alt.Y("p20:Q", scale=scale), y2="p80:Q", color=self.colour)
        return bars, chart.mark_point(**MARK).encode(x, y, color=self.colour, shape=self.shape)


def drawings(shown: Overview) -> tuple[Drawing, ...]:
    """The charts of a run, drawn or with the reason why not."""
    palette = Palette.of(shown)
    return _cost_drawing(shown, palette), _steps_drawing(shown, palette), _ladder_drawing(shown, palette)


def _cost_drawing(shown: Overview, palette: Palette) -> Drawing:
    name, title = "cost", "Measured cost against the paper's cost"
    summary = (
        "Wall-clock time of a step relative to the largest size, over the paper's normalized cost relative to the "
        "same size, both on logarithmic axes. On the dashed line time follows FLOPs; above it a small model costs "
        "more than the paper's measure says. Bars are p20 to p80."
    )
    panels: list[tuple[str, list[Point]]] = []
    for section in shown.sections:
        heading = shown.conditions.heading(section)
        points = _cost_points(section)
        references = dict.fromkeys(point["reference"] for point in points)
        for reference in references:
            of_reference = [point for point in points if point["reference"] == reference]
            # Axes in units of different sizes are different axes: such backends get panels of their own.
            backends = dict.fromkeys(point["backend"] for point in of_reference) if len(references) > 1 else ()
            if len({point["size"] for point in of_reference}) > 1:
                panels.append((text.joined((heading, *backends)), of_reference))
    if not panels:
        return Drawing(name, title, summary, reason="it takes two sizes measured under the same conditions")
    low, high = _log_domain([point for _, points in panels for point in points])
    side = 420 if len(panels) == 1 else 360
    charts = [
        _cost_panel(points, palette, low, high).properties(width=side, height=side, title=heading)
        for heading, points in panels
    ]
    return Drawing(name, title, summary, finished(charts, columns=2))


def _cost_points(section: Section) -> list[Point]:
    points = []
    for row in section.rows:
        on_paper = row.paper_cost if row.paper_cost is not None else row.gflop_ratio
        if row.cost is None or not on_paper or row.cost.p20 <= 0:
            continue
        points.append(
            {
                "size": visible(row.name) + (" (by GFLOP)" if row.paper_cost is None else ""),
                "backend": row.case.backend,
                "paper": on_paper,
                **asdict(row.cost),
                "reference": row.reference,
            }
        )
    return points


def _cost_panel(points: list[Point], palette: Palette, low: float, high: float) -> Panel:
    ticks = [tick for tick in (LOG_TICKS if high > 20 * low else FINE_TICKS) if low <= tick <= high]
    scale = alt.Scale(type="log", domain=[low, high], nice=False)
    axis = alt.Axis(values=ticks, format="~g")
    reference = visible(points[0]["reference"])
    x = alt.X("paper:Q", scale=scale, axis=axis, title=f"the paper's cost (FLOPs), {reference} = 1")
    y = alt.Y("p50:Q", scale=scale, axis=axis, title=f"measured ms per step, {reference} = 1")
    diagonal = alt.Chart(alt.InlineData(values=[{"paper": low, "p50": low}, {"paper": high, "p50": high}]))
    corner = alt.Chart(alt.InlineData(values=[{"paper": low, "p50": low}]))
    # One label where a size's marks are, above the highest: one for each mark would cover the others.
    tops = {
        (point["size"], point["paper"]): point for point in sorted(points, key=lambda point: float(point["p80"]))
    }
    labels = alt.Chart(alt.InlineData(values=list(tops.values())))
    return alt.layer(
        diagonal.mark_line(color="#767676", strokeDash=[5, 4], strokeWidth=1.5).encode(x, y),
        corner.mark_text(align="left", baseline="top", angle=315, dx=14, dy=5, color="#595959").encode(
            x, y, text=alt.value("time follows FLOPs")
        ),
        *palette.marks(points, x, y, scale),
        # Across the diagonal, where neighbours are furthest apart.
        labels.mark_text(align="right", baseline="middle", angle=60, dx=-11, limit=160, color="#222222").encode(
            x, alt.Y("p80:Q", scale=scale), text="size:N"
        ),
    )


def _log_domain(points: list[Point]) -> tuple[float, float]:
    """Limits for both axes, with room for marks and labels, that hold (1, 1) and every point."""
    values = [1.0, *(float(point[name]) for point in points for name in ("paper", "p20", "p80"))]
    return math.exp(math.log(min(values)) - 0.5), math.exp(math.log(max(values)) + 0.5)


def _steps_drawing(shown: Overview, palette: Palette) -> Drawing:
    name, title = "steps", "Time of a trajectory over its steps"
    summary = (
        "Wall-clock time from noise to latents over the number of steps, for each size and backend, with the "
        "least-squares line, from three step counts on carried on to zero, where it shows the fixed part. "
        "Bars are p20 to p80."
    )
    if not shown.series:
        return Drawing(name, title, summary, reason="it takes a size measured at two step counts or more")
    panels: dict[tuple[object, ...], list[StepsSeries]] = {}
    for series in shown.series:
        same = series.case.model_dump(exclude={"steps", "backend"})
        panels.setdefault((series.environment, *same.items()), []).append(series)
    charts = []
    for group in panels.values():
        of_panel = text.joined((visible(group[0].name), shown.conditions.heading(group[0], "steps")))
        charts.append(_steps_panel(group, palette).properties(width=230, height=190, title=of_panel))
    return Drawing(name, title, summary, finished(charts, columns=3))


def _steps_panel(group: Sequence[StepsSeries], palette: Palette) -> Panel:
    points = [point for series in group for row in series.rows if (point := _steps_point(row))]
    most = max(point["evaluations"] for point in points)
    lines = [
        {"backend": series.case.backend, "evaluations": at, "p50": series.line.at(at)}
        for series in group
        # Two points say nothing of the fixed part: their line is not carried on to zero.
        for at in (0 if len(series.rows) > 2 else min(row.record.evaluations or 0 for row in series.rows), most)
    ]
    plain = all(row.record.evaluations == row.case.steps for series in group for row in series.rows)
    x = alt.X(
        "evaluations:Q",
        title="steps" if plain else "model evaluations",
        scale=alt.Scale(domain=[0, most * 1.05], nice=False),
        axis=alt.Axis(values=sorted({0, *(point["evaluations"] for point in points)}), format="d"),
    )
    heights = [0.0, *(point["p80"] for point in points), *(line["p50"] for line in lines)]
    scale = alt.Scale(domain=[min(heights), max(heights) * 1.08], nice=False)
    y = alt.Y("p50:Q", title="ms of a trajectory", scale=scale, axis=alt.Axis(tickCount=5))
    return alt.layer(
        alt.Chart(alt.InlineData(values=lines)).mark_line(strokeWidth=1.5).encode(x, y, color=palette.colour),
        *palette.marks(points, x, y, scale),
    )


def _steps_point(row: Row) -> Point | None:
    wall = row.record.wall_ms
    if wall is None:
        return None
    backend, evaluations = row.case.backend, row.record.evaluations
    return {"backend": backend, "evaluations": evaluations, "p20": wall.p20, "p50": wall.p50, "p80": wall.p80}


def _ladder_drawing(shown: Overview, palette: Palette) -> Drawing:
    name, title = "ladder", "The ladder at each size"
    summary = (
        "Wall-clock time of a step on each backend, from the peer to all of ours, a panel for each size. "
        "Bars are medians, the lines on them p20 to p80."
    )
    charts = []
    for ladder in ladders(shown):
        points = [
            {"backend": rung.row.case.backend, **asdict(spread)}
            for rung in ladder.rungs
            if (spread := step_ms(rung.row.record))
        ]
        if points:
            of_panel = text.joined((visible(ladder.name), shown.conditions.heading(ladder.section)))
            charts.append(_ladder_panel(points, palette).properties(width=300, title=of_panel))
    if not charts:
        reason = f"it takes a size tried on {MIN_RUNGS} backends under the same conditions"
        return Drawing(name, title, summary, reason=reason)
    return Drawing(name, title, summary, finished(charts, columns=2))


def _ladder_panel(points: list[Point], palette: Palette) -> Panel:
    order = [point["backend"] for point in points]
    y = alt.Y("backend:N", sort=order, title=None)
    most = max(point["p80"] for point in points)
    scale = alt.Scale(domain=[0, most * 1.2], nice=False)
    x = alt.X("p50:Q", title="ms of a step", scale=scale, axis=alt.Axis(tickCount=5))
    marks = alt.Chart(alt.InlineData(values=points))
    return alt.layer(
        marks.mark_bar(height={"band": 0.7}).encode(x, y, color=palette.colour),
        marks.mark_rule(strokeWidth=2, color="#1a1a1a").encode(alt.X("p20:Q", scale=scale), y, x2="p80:Q"),
        marks.mark_text(align="left", dx=6).encode(
            alt.X("p80:Q", scale=scale), y, text=alt.Text("p50:Q", format=".4~r")
        ),
    )


def finished(charts: Sequence[Panel], columns: int) -> alt.ConcatChart:
    """Panels side by side with one legend."""
    whole: alt.ConcatChart = (
        alt.concat(*charts, columns=columns)
        .resolve_scale(color="shared", shape="shared")
        .configure(font=FONT, background="white", padding=12)
        .configure_axis(labelFontSize=12, titleFontSize=13, titleFontWeight="normal", gridColor="#e6e6e6")
        .configure_legend(labelFontSize=13, title=None, orient="top", offset=4, symbolStrokeWidth=2)
        .configure_text(fontSize=12, font=FONT)
        .configure_title(fontSize=13, anchor="start")
        .configure_view(stroke="#cccccc")
    )
    return whole

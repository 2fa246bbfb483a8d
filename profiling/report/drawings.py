"""Charts as they are drawn: which facts make a panel, which panels are shown, and their files."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import altair as alt
import vl_convert

from ..figures.derived import Overview, Row, rung_place
from ..figures.text import joined
from ..measure.conditions import commit
from ..measure.store import write_whole
from ..terminal.visible import visible
from .charts import Chart, all_charts
from .fact_tables import Fact, FactTable, natural
from .facts import Facts
from .page_tables import label_of
from .palette import CONFIG, Palette
from .panel_parts import FACTS
from .quality_charts import quality_charts
from .quality_curves import QualityCurves

if TYPE_CHECKING:
    from ..compare.history import History

# A Vega-Lite specification.
Spec: TypeAlias = dict[str, Any]
_SCALE = 2
# Characters of a line that a panel of a file has room for.
_NOTE_WIDTH = 76


@dataclass(frozen=True)
class Drawing:
    """A chart, or the reason why it was not drawn; `summary` says in words what the chart shows.

    `shared`: the conditions of all its panels, which a file of its own says below the title.
    """

    name: str
    title: str
    summary: str
    chart: Spec | None = None
    reason: str = ""
    shared: str = ""

    def png(self) -> bytes:
        """The chart on white, at twice the screen's resolution."""
        image: bytes = vl_convert.vegalite_to_png(self._by_itself() | {"background": "white"}, scale=_SCALE)
        return image

    def svg(self) -> str:
        markup: str = vl_convert.vegalite_to_svg(self._by_itself())
        return markup

    def inner_svg(self) -> str:
        """The chart for a page, which has its title and its conditions."""
        assert self.chart is not None
        markup: str = vl_convert.vegalite_to_svg(self.chart)
        return markup

    def _by_itself(self) -> Spec:
        assert self.chart is not None
        title = {
            "text": self.title,
            "subtitle": textwrap.wrap(self.shared, 80),
            "fontSize": 16,
            "offset": 12,
        }
        return self.chart | ({} if "title" in self.chart else {"title": title})


@dataclass(frozen=True)
class Pane:
    """The facts of one set of conditions, and their places in the table.

    key  the columns that set it apart from other panels, by name
    """

    key: dict[str, str]
    facts: tuple[Fact, ...]
    places: tuple[int, ...]


@dataclass(frozen=True)
class ChartSet:
    """The charts of a page: facts, colours, definitions, and what is drawn of them at first.

    palettes  of backends, and of the networks of closed worlds where there are any
    shared    the conditions of all cases and their commit, where there is one
    """

    facts: Facts
    palettes: tuple[Palette, ...]
    charts: tuple[Chart, ...]
    drawings: tuple[Drawing, ...]
    shared: str = ""

    @classmethod
    def of(
        cls,
        shown: Overview,
        history: History | None = None,
        first: Row | None = None,
        quality: QualityCurves | None = None,
    ) -> ChartSet:
        """first: the row whose conditions are looked at first."""
        quality = quality or QualityCurves()
        facts = Facts.of(shown, history, first, quality)
        palette = Palette.of(sorted((row.case.backend for row in shown.all_rows), key=rung_place))
        networks = Palette.of(quality.series, "series")
        palettes = (palette, networks) if quality else (palette,)
        # What closed worlds say of quality comes first: what a sample costs is one of its axes.
        charts = (*quality_charts(networks), *all_charts(palette))
        commits = {commit(environment) for environment in shown.environments}
        shared = visible(
            joined((*shown.conditions.shared, *(f"commit {name}" for name in commits if len(commits) == 1)))
        )
        drawings = tuple(drawn(of, facts, "" if of.is_of_quality else shared) for of in charts)
        return cls(facts, palettes, charts, drawings, shared)

    def svgs(self) -> dict[str, str]:
        """By name the charts of few panels, which a page shows where no script runs."""
        pairs = zip(self.charts, self.drawings, strict=True)
        return {chart.name: of.inner_svg() for chart, of in pairs if of.chart is not None and not chart.is_small}

    def for_browser(self) -> list[dict[str, Any]]:
        """The charts with panels, for the script: what makes a panel, and its Vega specification without data."""
        return [
            {
                "name": chart.name,
                "title": chart.title,
                "summary": chart.summary,
                "needs": chart.needs,
                "table": chart.table,
                "values": chart.values,
                "across": chart.across,
                "least": chart.least,
                "note": chart.note,
                "series": chart.series,
                "shared": visible(drawing.shared),
                "facets": (facets := facets_of(chart, self.facts.table(chart.table))),
                "labels": [label_of(name) for name in facets],
                "limits": [chart.limit(name) for name in facets],
                "spec": for_browser(chart),
            }
            for chart, drawing in zip(self.charts, self.drawings, strict=True)
            if drawing.chart is not None
        ]

    def write(self, directory: Path) -> list[Path]:
        """Writes each chart as PNG and SVG; returns their paths."""
        return write_charts(self.drawings, directory)


def panels_of(chart: Chart, table: FactTable) -> tuple[Pane, ...]:
    """Every panel of a chart, in the order of its conditions."""
    facets = facets_of(chart, table)
    rows = table.rows()
    grouped: dict[tuple[str, ...], list[int]] = {}
    for place, fact in enumerate(rows):
        if all(fact[name] is not None for name in chart.values):
            grouped.setdefault(tuple(fact[name] for name in facets), []).append(place)
    found = [
        Pane(dict(zip(facets, key, strict=True)), tuple(rows[place] for place in places), tuple(places))
        for key, places in grouped.items()
        if len({rows[place][chart.across] for place in places}) >= chart.least
    ]
    return tuple(sorted(found, key=lambda panel: [natural(value) for value in panel.key.values()]))


def facets_of(chart: Chart, table: FactTable) -> tuple[str, ...]:
    """The columns that set the panels of a chart apart."""
    return (*(name for name in table.conditions if name not in chart.without), *chart.beside)


def shown_first(chart: Chart, panels: Sequence[Pane], first: Mapping[str, str]) -> tuple[Pane, ...]:
    """The panels that are shown: conditions are chosen one by one, as `first` has them or the fullest panel."""
    shown = tuple(panels)
    fullest = max(panels, key=lambda panel: len(panel.facts), default=None)
    for name in {} if fullest is None else fullest.key:
        if fullest is None or len(shown) <= chart.limit(name):
            continue
        values = [panel.key[name] for panel in shown]
        value = next((value for value in (first.get(name), fullest.key[name]) if value in values), values[0])
        shown = tuple(panel for panel in shown if panel.key[name] == value)
    return shown


def drawn(chart: Chart, facts: Facts, shared: str = "") -> Drawing:
    """The panels that are shown first, side by side under one legend."""
    panels = panels_of(chart, facts.table(chart.table))
    if not panels:
        return Drawing(chart.name, chart.title, chart.summary, reason=chart.needs)
    shown = shown_first(chart, panels, facts.first)
    of_files = ("$schema", "config", "datasets")
    inner = {name: part for name, part in panel_spec(chart).items() if name not in of_files}
    charts = [
        _named(inner, f"{FACTS}{place}")
        | {"title": {"text": joined(panel.key.values()), "subtitle": _notes(chart, panel)}}
        for place, panel in enumerate(shown)
    ]
    datasets = {f"{FACTS}{place}": list(panel.facts) for place, panel in enumerate(shown)}
    whole = side_by_side(charts, min(2, len(charts)), datasets)
    return Drawing(chart.name, chart.title, chart.summary, whole, shared=shared)


def _notes(chart: Chart, panel: Pane) -> list[str]:
    """What a reader of the panel has to know of its facts, in lines."""
    notes = dict.fromkeys(fact[chart.note] for fact in panel.facts if chart.note and fact[chart.note])
    return [line for note in notes for line in textwrap.wrap(note, _NOTE_WIDTH)]


def side_by_side(charts: Sequence[Spec], columns: int, datasets: dict[str, list[Fact]] | None = None) -> Spec:
    """Panels with one legend."""
    return {
        "$schema": alt.SCHEMA_URL,
        "concat": list(charts),
        "columns": columns,
        "resolve": {"scale": {"color": "shared", "shape": "shared", "fill": "shared"}},
        "config": dict(CONFIG),
        "datasets": datasets or {},
    }


def _named(part: Any, name: str) -> Any:
    """The same specification over the data of this name."""
    if isinstance(part, dict):
        return {
            key: {"name": name} if key == "data" and value == {"name": FACTS} else _named(value, name)
            for key, value in part.items()
        }
    return [_named(one, name) for one in part] if isinstance(part, list) else part


@lru_cache(maxsize=128)
def panel_spec(chart: Chart) -> Spec:
    """The panel as a Vega-Lite specification, checked against its schema; not to be written to."""
    return chart.panel.to_dict()


@lru_cache(maxsize=128)
def for_browser(chart: Chart) -> Spec:
    """The panel as a Vega specification without data, as wide as the page lets it be."""
    spec = panel_spec(chart) | {"config": dict(CONFIG), "autosize": {"type": "fit-x", "contains": "padding"}}
    compiled: Spec = vl_convert.vegalite_to_vega(spec)
    return compiled


def write_charts(drawings: Sequence[Drawing], directory: Path) -> list[Path]:
    """Writes the charts as PNG and SVG; returns their paths. Removes those not drawn."""
    written = []
    for drawing in drawings:
        png, svg = directory / f"{drawing.name}.png", directory / f"{drawing.name}.svg"
        if drawing.chart is None:
            # An earlier report's chart would pass for one of these records.
            png.unlink(missing_ok=True)
            svg.unlink(missing_ok=True)
            continue
        write_whole(png, drawing.png())
        write_whole(svg, drawing.svg().encode())
        written += [png, svg]
    return written

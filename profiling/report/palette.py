"""Colours and shapes of the charts' series, and how axes and texts look: on paper, in light and in dark."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import altair as alt

from ..figures.derived import PEER
from ..terminal.visible import visible

# After Okabe and Ito, told apart with any colour vision; each has a contrast of 3 to white and to the dark page.
COLOURS = ("#0072B2", "#009E73", "#C2559B", "#B07B00", "#3A93D6", "#7D6BD0", "#6B8E23", "#8C7B6B")
PEER_COLOUR = "#D55E00"
# The shapes tell the same without colour; the characters are the same shapes in the legend of a page.
SHAPES: Mapping[str, str] = {
    "circle": "●",
    "triangle-up": "▲",
    "diamond": "◆",
    "triangle-down": "▼",
    "cross": "✚",
    "triangle-right": "▶",
    "triangle-left": "◀",
}
PEER_SHAPE, PEER_CHARACTER = "square", "■"
# Of what is no series: the floor, the line on which time follows FLOPs. Readable on white and on dark.
NEUTRAL = "#7a7a7a"
# Texts and axes take the colour of the text around a chart; in a file that is black.
TEXT = "currentColor"
FONT = "Liberation Sans, Arial, Helvetica, sans-serif"
CONFIG: Mapping[str, Any] = {
    "font": FONT,
    "background": None,
    "padding": 6,
    "axis": {
        "labelFontSize": 12,
        "titleFontSize": 13,
        "titleFontWeight": "normal",
        "titlePadding": 8,
        "labelColor": TEXT,
        "titleColor": TEXT,
        "domainColor": NEUTRAL,
        "tickColor": NEUTRAL,
        "gridColor": NEUTRAL,
        "gridOpacity": 0.22,
    },
    "legend": {
        "labelFontSize": 13,
        "labelColor": TEXT,
        "title": None,
        "orient": "top",
        "columns": 4,
        "offset": 4,
        "symbolStrokeWidth": 2,
    },
    "title": {"fontSize": 13, "anchor": "start", "color": TEXT, "subtitleColor": TEXT},
    "text": {"fontSize": 12, "font": FONT, "color": TEXT},
    "view": {"stroke": None},
}


@dataclass(frozen=True)
class SeriesMark:
    """A backend, or a network of a closed world, as charts and their legends show it."""

    name: str
    colour: str
    shape: str
    character: str


@dataclass(frozen=True)
class Palette:
    """The colour and shape of each backend, or of each text of another column, in every chart of a page.

    column  whose texts they are of
    """

    series: tuple[SeriesMark, ...]
    column: str = "backend"

    @classmethod
    def of(cls, texts: Iterable[str], column: str = "backend") -> Palette:
        """The peer has its own; the others take theirs in the order given."""
        names = list(dict.fromkeys(map(visible, texts)))
        others = [name for name in names if name != PEER]
        shapes = list(SHAPES.items())

        def one(name: str) -> SeriesMark:
            if name == PEER:
                return SeriesMark(name, PEER_COLOUR, PEER_SHAPE, PEER_CHARACTER)
            place = others.index(name)
            return SeriesMark(name, COLOURS[place % len(COLOURS)], *shapes[place % len(shapes)])

        return cls(tuple(map(one, names)), column)

    @property
    def colours(self) -> alt.Scale:
        """From the column's texts to colours."""
        return alt.Scale(domain=[of.name for of in self.series], range=[of.colour for of in self.series])

    @property
    def colour(self) -> alt.Color:
        """Of a mark, by the column."""
        return alt.Color(f"{self.column}:N", scale=self.colours)

    @property
    def shape(self) -> alt.Shape:
        """Of a mark, by the column."""
        scale = alt.Scale(domain=[of.name for of in self.series], range=[of.shape for of in self.series])
        return alt.Shape(f"{self.column}:N", scale=scale)

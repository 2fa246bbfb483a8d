"""Whether two networks have the same order in several series, under two samplers say: the share of such pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from ..measure.intervals import Interval
from .closed_worlds import Cells, QualityMetric
from .pooled_figures import PooledFigure, contrast

# A step count and two networks, the smaller first.
NetworkPair = tuple[int, str, str]
# By network and steps.
FigureTable = Mapping[tuple[str, int], PooledFigure]


@dataclass(frozen=True)
class SharedOrder:
    """Of `count` pairs that differ beyond noise in one of two series at least the share in the same order."""

    share: Interval
    count: int
    decided_by: tuple[PooledFigure, ...]


def figure_table(cells: Cells, metric: QualityMetric) -> dict[tuple[str, int], PooledFigure]:
    """By network and steps."""
    found = {(name, steps): metric.figure(cell) for name, of in cells.items() for steps, cell in of.items()}
    return {place: figure for place, figure in found.items() if figure is not None}


def shared_pairs(figures: Mapping[str, FigureTable], networks: Sequence[str]) -> list[NetworkPair]:
    """The pairs of networks, the smallest first, with a figure at the same steps in all series; none of one."""
    shared = set.intersection(*map(set, figures.values())) if len(figures) > 1 else set()
    return sorted(
        (steps, small, large)
        for small, large in combinations(networks, 2)
        for steps in {count for _, count in shared}
        if {(small, steps), (large, steps)} <= shared
    )


def shared_order(figures: Mapping[str, FigureTable], pairs: Sequence[NetworkPair]) -> SharedOrder | None:
    """Over each two of the series; null where no pair differs beyond noise."""
    decided = {(series, pair): _is_decided(of, pair) for series, of in figures.items() for pair in pairs}
    places = [
        (one, other, pair)
        for one, other in combinations(figures, 2)
        for pair in pairs
        if decided[one, pair] or decided[other, pair]
    ]
    if not places:
        return None
    needed = list(
        dict.fromkeys(
            (series, name, steps) for *two, (steps, *names) in places for series in two for name in names
        )
    )
    at = {place: index for index, place in enumerate(needed)}

    def share(*numbers: Any) -> Any:
        def sign(series: str, pair: NetworkPair) -> Any:
            steps, small, large = pair
            return numbers[at[series, small, steps]] > numbers[at[series, large, steps]]

        return sum(1.0 * (sign(one, pair) == sign(other, pair)) for one, other, pair in places) / len(places)

    decided_by = tuple(figures[series][name, steps] for series, name, steps in needed)
    return SharedOrder(contrast(decided_by, share), len(places), decided_by)


def _is_decided(figures: FigureTable, pair: NetworkPair) -> bool:
    steps, small, large = pair
    found = contrast([figures[small, steps], figures[large, steps]], lambda one, other: one - other)
    return found.low > 0 or found.high < 0

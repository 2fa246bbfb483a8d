"""Least-squares lines through points. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Line:
    """A least-squares line; `r2` is null with two points, which a line always meets, or when y does not vary."""

    slope: float
    intercept: float
    r2: float | None

    def at(self, x: float) -> float:
        """The line's y."""
        return self.intercept + self.slope * x

    def x_at(self, y: float) -> float:
        """Where a line that is not level has this y."""
        return (y - self.intercept) / self.slope


def least_squares(
    xs: Sequence[Any], ys: Sequence[Any], weights: Sequence[Any], total: Callable[[Iterable[Any]], Any] = sum
) -> tuple[Any, Any]:
    """Slope and intercept of the line with the least weighted squares: of numbers, or of arrays elementwise."""
    of_weights = total(weights)
    mean_x = total(w * x for w, x in zip(weights, xs, strict=True)) / of_weights
    mean_y = total(w * y for w, y in zip(weights, ys, strict=True)) / of_weights
    both = total(w * (x - mean_x) * (y - mean_y) for w, x, y in zip(weights, xs, ys, strict=True))
    slope = both / total(w * (x - mean_x) ** 2 for w, x in zip(weights, xs, strict=True))
    return slope, mean_y - slope * mean_x


def fit_line(points: Iterable[tuple[float, float]], *, relative: bool = False) -> Line | None:
    """The least-squares line through (x, y) points; null with fewer than two different x.

    `relative`: squares of deviations relative to y, which is right for times, whose errors grow with them. `r2` is
    of the points as they are, in both cases.
    """
    pairs = list(points)
    xs, ys = [x for x, _ in pairs], [y for _, y in pairs]
    if len(set(xs)) < 2:
        return None
    # However far apart the times, each keeps a weight that a float can tell from none.
    weights = [max((min(ys) / y) ** 2, 1e-24) for y in ys] if relative and min(ys) > 0 else [1.0] * len(ys)
    slope, intercept = least_squares(xs, ys, weights, math.fsum)
    mean_y = math.fsum(ys) / len(ys)
    residual = math.fsum((y - intercept - slope * x) ** 2 for x, y in pairs)
    total = math.fsum((y - mean_y) ** 2 for y in ys)
    return Line(slope, intercept, 1 - residual / total if len(pairs) > 2 and total > 0 else None)

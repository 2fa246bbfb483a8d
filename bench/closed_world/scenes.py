"""Captioned scenes of known factors: two objects on a textured ground, the same bits on every machine.

A scene is a function of a seed and a number. Its draws are raw 64-bit words of Philox4x64; its pixels come from
additions, multiplications, divisions, square roots and comparisons in float64 alone, each of which IEEE 754 rounds
in one way. Sines and exponentials would differ in the last bit between libraries.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SHAPES = ("disc", "ring", "triangle", "cross", "bar")
COLOURS = {
    "red": (0.90, 0.15, 0.15),
    "green": (0.15, 0.75, 0.20),
    "blue": (0.20, 0.30, 0.95),
    "yellow": (0.95, 0.85, 0.15),
    "magenta": (0.80, 0.25, 0.85),
    "white": (0.95, 0.95, 0.95),
}
GROUNDS = ("plain", "gradient", "stripes", "checker")
GROUND_COLOURS = {
    "slate": (0.10, 0.10, 0.12),
    "brown": (0.45, 0.30, 0.20),
    "teal": (0.20, 0.40, 0.45),
    "grey": (0.50, 0.50, 0.50),
}

# The factors of a scene in the order of its caption; the first object is the left one.
FACTORS: dict[str, tuple[str, ...]] = {
    "left shape": SHAPES,
    "left colour": tuple(COLOURS),
    "right shape": SHAPES,
    "right colour": tuple(COLOURS),
    "ground": GROUNDS,
    "ground colour": tuple(GROUND_COLOURS),
}
COUNTS = tuple(len(values) for values in FACTORS.values())

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

# What a caption does not tell, with the range that it is drawn from. Lengths are in pixels of an image of side 32.
# A turn is the tangent of half an angle, here of 45 degrees to either side; quarter turns are added.
_EIGHTH = 0.41421356237309503
_OBJECT = {
    "y": (9.0, 23.0),
    "radius": (6.4, 7.6),
    "turn": (-_EIGHTH, _EIGHTH),
    "quarter turns": (0.0, 4.0),
    "red": (0.88, 1.12),
    "green": (0.88, 1.12),
    "blue": (0.88, 1.12),
}
FREE: dict[str, tuple[float, float]] = {
    "ground turn": (-_EIGHTH, _EIGHTH),
    "ground quarter turns": (0.0, 4.0),
    "ground phase": (0.0, 1.0),
    "ground period": (11.0, 16.0),
    "left x": (7.0, 9.0),
    **{f"left {name}": values for name, values in _OBJECT.items()},
    "right x": (23.0, 25.0),
    **{f"right {name}": values for name, values in _OBJECT.items()},
}
_UNIT_SIDE = 32
# Random words of a scene, of which a counter of Philox gives four.
_WORDS = 28


@dataclass(frozen=True)
class Scenes:
    """Scenes of a seed, without end. `side` is that of their images in pixels, a multiple of 4."""

    seed: int
    side: int = _UNIT_SIDE

    def factors(self, first: int, count: int) -> Ints:
        """The factors [count, 6] of the scenes from number `first` on, as indices into the values of `FACTORS`."""
        return self._drawn(first, count)[0]

    def images(self, first: int, count: int) -> tuple[NDArray[np.uint8], Ints]:
        """RGB images [count, 3, side, side] of the scenes from number `first` on, and their factors [count, 6]."""
        factors, free = self._drawn(first, count)
        return rendered(factors, free, self.side), factors

    def _drawn(self, first: int, count: int) -> tuple[Ints, dict[str, Floats]]:
        philox = np.random.Philox(key=self.seed, counter=first * (_WORDS // 4))
        words = philox.random_raw(count * _WORDS).reshape(count, _WORDS)
        told = len(FACTORS)
        factors = ((words[:, :told] >> np.uint64(32)) * np.array(COUNTS, np.uint64) >> np.uint64(32)).astype(
            np.int64
        )
        uniform = (words[:, told : told + len(FREE)] >> np.uint64(11)) * 2.0**-53
        return factors, {
            name: low + (high - low) * column
            for (name, (low, high)), column in zip(FREE.items(), uniform.T, strict=True)
        }


def caption(factors: Ints) -> str:
    """The factors [6] of a scene in words."""
    told = {name: values[index] for (name, values), index in zip(FACTORS.items(), factors, strict=True)}
    objects = [f"a {told[f'{place} colour']} {told[f'{place} shape']}" for place in ("left", "right")]
    return f"{objects[0]} and {objects[1]} on {told['ground colour']} {told['ground']}"


def rendered(factors: Ints, free: dict[str, Floats], side: int) -> NDArray[np.uint8]:
    """Images [n, 3, side, side] of factors [n, 6] and values [n] for each name of `FREE`."""
    unit = side / _UNIT_SIDE
    of = {name: values[:, None, None] for name, values in free.items()}
    centres = (np.arange(side, dtype=np.float64) + 0.5) / unit
    x, y = centres[None, None, :], centres[None, :, None]
    colours: Floats = np.array(list(GROUND_COLOURS.values()))[factors[:, 5]]
    image = colours[:, :, None, None] * (1 + 0.8 * _ground(factors[:, 4], of, x, y))[:, None]
    for index, place in enumerate(("left", "right")):
        its = {name: of[f"{place} {name}"] for name in ("x", *_OBJECT)}
        inside = _distance(factors[:, 2 * index], its, x, y) * unit
        mask = np.clip(inside + 0.5, 0, 1)[:, None]
        tints = np.stack([its[name] for name in ("red", "green", "blue")], 1)
        colours = np.array(list(COLOURS.values()))[factors[:, 2 * index + 1]]
        image = image * (1 - mask) + mask * (colours[:, :, None, None] * tints)
    drawn: NDArray[np.uint8] = np.floor(np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)
    return drawn


def _turned(x: Floats, y: Floats, turn: Floats, quarters: Floats) -> tuple[Floats, Floats]:
    """x and y in axes that are turned, by the rational form of cosine and sine."""
    cos, sin = (1 - turn * turn) / (1 + turn * turn), 2 * turn / (1 + turn * turn)
    quarter = np.floor(quarters)
    cos, sin = (
        np.where(quarter == 0, cos, np.where(quarter == 1, -sin, np.where(quarter == 2, -cos, sin))),
        np.where(quarter == 0, sin, np.where(quarter == 1, cos, np.where(quarter == 2, -sin, -cos))),
    )
    return cos * x + sin * y, cos * y - sin * x


def _ground(kind: Ints, of: dict[str, Floats], x: Floats, y: Floats) -> Floats:
    """The texture [n, side, side] of a ground, from -1 to 1."""
    middle = _UNIT_SIDE / 2
    u, v = _turned(x - middle, y - middle, of["ground turn"], of["ground quarter turns"])

    def wave(length: Floats) -> Floats:
        """A triangle wave from -1 to 1, of the ground's period and phase."""
        part = length / of["ground period"] + of["ground phase"]
        return 4 * np.abs(part - np.floor(part) - 0.5) - 1

    along, across = wave(u), wave(v)
    textures = (0 * u, u / 20, 0.65 * along, 0.65 * np.clip(4 * along * across, -1, 1))
    return np.choose(kind[:, None, None], textures)


def _distance(shape: Ints, of: dict[str, Floats], x: Floats, y: Floats) -> Floats:
    """How far inside an object each pixel lies, in pixels; negative outside, [n, side, side]."""
    r = of["radius"]
    u, v = _turned(x - of["x"], y - of["y"], of["turn"], of["quarter turns"])
    d, a, b = np.sqrt(u * u + v * v), np.abs(u), np.abs(v)
    root3 = math.sqrt(3)
    disc = 0.9 * r - d
    ring = 0.25 * r - np.abs(d - 0.8 * r)
    # Half planes of an equilateral triangle about its centre.
    triangle = np.minimum(v + 0.55 * r, 0.55 * r - (root3 * a + v) / 2 + 0.12 * r)
    cross = np.maximum(np.minimum(r - a, 0.3 * r - b), np.minimum(r - b, 0.3 * r - a))
    bar = np.minimum(1.05 * r - a, 0.4 * r - b)
    return np.choose(shape[:, None, None], (disc, ring, triangle, cross, bar))

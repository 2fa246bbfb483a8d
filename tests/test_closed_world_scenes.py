"""Scenes of the closed world: pixels against shapes filled point by point, factors, and the same bits always."""

from __future__ import annotations

import cmath
import hashlib
import itertools
import math

import numpy as np
import pytest
from closed_world.scenes import (
    COLOURS,
    FACTORS,
    FREE,
    GROUND_COLOURS,
    GROUNDS,
    SHAPES,
    Scenes,
    caption,
    rendered,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.lib.stride_tricks import sliding_window_view
from scipy import stats

SEEDS = st.integers(0, 2**64 - 1)
# Points of a pixel along a side, of which the share inside a shape is its cover.
POINTS = 12
# SHA-256 of the bytes of 64 images and of their factors as little-endian int64.
BITS = {
    32: "8cdb5d185c0a60c2038d3ac44164c6216f7d2460c3a0731748a179814ab0b6c6",
    64: "6fdf739e2d97f6b78a06d998c2ab7b30783e975812ea0e4afa19493b010967a4",
}
# Areas in squares of the radius. The triangle has the height 1.89, the cross is two rectangles of 2 by 0.6.
AREAS = {
    "disc": math.pi * 0.9**2,
    "ring": math.pi * (1.05**2 - 0.55**2),
    "triangle": 1.89**2 / math.sqrt(3),
    "cross": 2 * 2 * 0.6 - 0.6**2,
    "bar": 2.1 * 0.8,
}


def drawn(seed: int, number: int) -> tuple[list[int], dict[str, float]]:
    """Factors and free values of a scene, from 28 words of Philox in integers of Python."""
    words = [int(word) for word in np.random.Philox(key=seed, counter=7 * number).random_raw(28)]
    factors = [(word >> 32) * len(values) >> 32 for word, values in zip(words, FACTORS.values(), strict=False)]
    shares = [(word >> 11) / 2**53 for word in words[len(FACTORS) :]]
    return factors, {
        name: low + (high - low) * u for (name, (low, high)), u in zip(FREE.items(), shares, strict=False)
    }


def turned(points: np.ndarray, turn: float, quarters: float) -> np.ndarray:
    """Complex points in axes that are turned by the drawn angle."""
    return points * cmath.exp(-1j * (2 * math.atan(turn) + math.floor(quarters) * math.pi / 2))


def inside(shape: str, w: np.ndarray) -> np.ndarray:
    """Whether complex points are in a shape of radius 1."""
    if shape == "disc":
        return abs(w) <= 0.9
    if shape == "ring":
        return (abs(w) >= 0.55) & (abs(w) <= 1.05)
    if shape == "triangle":
        half = 1.89 / math.sqrt(3)
        corners = [-half - 0.55j, half - 0.55j, 1.34j]
        edges = zip(corners, corners[1:] + corners[:1], strict=True)
        return np.logical_and.reduce([((w - a) * (b - a).conjugate()).imag >= 0 for a, b in edges])
    if shape == "cross":
        return (abs(w.real) <= 1) & (abs(w.imag) <= 0.3) | (abs(w.imag) <= 1) & (abs(w.real) <= 0.3)
    return (abs(w.real) <= 1.05) & (abs(w.imag) <= 0.4)


def texture(ground: str, w: np.ndarray, period: float, phase: float) -> np.ndarray:
    along, across = (
        2 / math.pi * np.arcsin(np.cos(2 * math.pi * (part / period + phase))) for part in (w.real, w.imag)
    )
    return {
        "plain": 0 * along,
        "gradient": w.real / 20,
        "stripes": 0.65 * along,
        "checker": 0.65 * np.clip(4 * along * across, -1, 1),
    }[ground]


def grid(side: int, points: int = 1) -> np.ndarray:
    """Complex places [side * points, side * points] of pixels' points, in pixels of an image of side 32."""
    line = (np.arange(side * points) + 0.5) * 32 / (side * points)
    return line[None, :] + 1j * line[:, None]


def painted(factors: list[int], free: dict[str, float], side: int) -> tuple[np.ndarray, np.ndarray]:
    """The image [3, side, side] in float64 from 0 to 1, and where a pixel is at an edge of an object."""
    told = [values[index] for values, index in zip(FACTORS.values(), factors, strict=True)]
    w = turned(grid(side) - (16 + 16j), free["ground turn"], free["ground quarter turns"])
    shade = 1 + 0.8 * texture(told[4], w, free["ground period"], free["ground phase"])
    image = np.array(GROUND_COLOURS[told[5]])[:, None, None] * shade
    edges = np.zeros((side, side), bool)
    for place, shape, colour in (("left", *told[:2]), ("right", *told[2:4])):
        centre = complex(free[f"{place} x"], free[f"{place} y"])
        turn, quarters, radius = (free[f"{place} {name}"] for name in ("turn", "quarter turns", "radius"))
        points = inside(shape, turned(grid(side, POINTS) - centre, turn, quarters) / radius)
        cover = points.reshape(side, POINTS, side, POINTS).mean((1, 3))
        tint = np.array([free[f"{place} {name}"] for name in ("red", "green", "blue")]) * COLOURS[colour]
        image = image * (1 - cover) + cover * tint[:, None, None]
        # By points on the borders of pixels too, or an edge along one could be missed.
        line = np.arange(side * POINTS + 1) * 32 / (side * POINTS)
        points = inside(shape, turned(line[None, :] + 1j * line[:, None] - centre, turn, quarters) / radius)
        windows = sliding_window_view(points, (POINTS + 1, POINTS + 1))[::POINTS, ::POINTS]
        edges |= windows.any((2, 3)) & ~windows.all((2, 3))
    return np.clip(image, 0, 1), edges


def grown(mask: np.ndarray) -> np.ndarray:
    """A mask with the eight neighbours of its pixels."""
    padded = np.pad(mask, 1)
    shifts = itertools.product(range(3), repeat=2)
    return np.logical_or.reduce([padded[y : y + len(mask), x : x + len(mask)] for y, x in shifts])


@settings(deadline=None, max_examples=60)
@given(seed=SEEDS, number=st.integers(0, 2**32), side=st.sampled_from([32, 64]))
def test_an_image_is_its_shapes_filled_point_by_point(seed, number, side):
    images, factors = Scenes(seed, side).images(number, 1)
    told, free = drawn(seed, number)
    assert factors[0].tolist() == told
    expected, edges = painted(told, free, side)
    off = abs(images[0] - 255 * expected)
    # Away from edges only the rounding to whole numbers. Softness reaches a pixel beyond the triangle's corners.
    near = grown(grown(edges))
    assert off[:, ~near].max() <= 0.5 + 1e-9
    # At edges the distance to the nearest side stands for the cover, and is off at corners.
    assert off.max() <= 110
    assert off[:, near].mean() <= 2.5


@pytest.mark.parametrize("side", [32, 64, 128])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_has_its_area_colour_and_place(shape, side):
    # White without a tint on slate, and the other object far to the right.
    turns = np.random.default_rng(side).uniform(-0.41, 0.41, 40)
    values = {name: np.full(40, (low + high) / 2) for name, (low, high) in FREE.items()}
    values |= {name: np.ones(40) for name in FREE if name.split()[1] in ("red", "green", "blue")}
    values |= {"left x": np.full(40, 12.0), "left turn": turns, "left quarter turns": np.arange(40) % 4 + 0.5}
    values |= {"right x": np.full(40, 80.0), "left radius": np.linspace(6.4, 7.6, 40)}
    names = [shape, "white", "bar", "blue", "plain", "slate"]
    factors = np.array([[values.index(name) for values, name in zip(FACTORS.values(), names, strict=True)]] * 40)
    images = rendered(factors, values, side).astype(float)
    # 0.10 and 0.95 of 255, as whole numbers.
    cover = (images[:, 0] - 26) / (242 - 26)
    assert cover.min() == 0
    assert cover.max() == 1
    areas = cover.sum((1, 2)) * (32 / side) ** 2 / values["left radius"] ** 2
    assert areas == pytest.approx(np.full(40, AREAS[shape]), rel=0.64 / side)
    place = (cover * grid(side)).sum((1, 2)) / cover.sum((1, 2))
    # The triangle's heights from its centre are 1.34 and 0.55 of the radius, and from its centroid 1.26 and 0.63.
    off = 0.08j if shape == "triangle" else 0
    angles = 2 * np.arctan(turns) + np.arange(40) % 4 * math.pi / 2
    assert abs(place - (12 + 16j) - off * values["left radius"] * np.exp(1j * angles)).max() < 1.6 / side


def test_the_middle_of_a_disc_and_of_a_ring():
    images, factors = Scenes(5, 64).images(0, 400)
    seen = set()
    for number, (image, told) in enumerate(zip(images, factors, strict=True)):
        _, free = drawn(5, number)
        for place, shape, colour in (("left", *told[:2]), ("right", *told[2:4])):
            x, y = (int(2 * free[f"{place} {axis}"]) for axis in "xy")
            tint = np.array([free[f"{place} {name}"] for name in ("red", "green", "blue")])
            own = np.clip(255 * tint * list(COLOURS.values())[colour], 0, 255)
            if SHAPES[shape] == "ring":
                assert abs(image[:, y, x] - own).max() > 3
            else:
                assert abs(image[:, y, x] - own).max() <= 0.5 + 1e-9
            seen.add((SHAPES[shape], place))
    assert len(seen) == 10


@pytest.mark.parametrize("ground", GROUNDS)
@pytest.mark.parametrize(("period", "side"), [(12.0, 32), (16.0, 32), (12.5, 64)])
def test_a_ground_repeats_after_its_period(ground, period, side):
    # Objects far outside of the image, and a ground that is not turned.
    values = {name: np.array([(low + high) / 2]) for name, (low, high) in FREE.items()}
    values |= {name: np.array([900.0]) for name in ("left x", "right x")}
    values |= {
        "ground turn": np.zeros(1),
        "ground quarter turns": np.zeros(1),
        "ground period": np.array([period]),
    }
    image = rendered(np.array([[0, 0, 0, 0, GROUNDS.index(ground), 3]]), values, side)[0]
    shift = round(period * side / 32)
    same = (image[:, :, shift:] == image[:, :, :-shift]).all()
    half = (image[:, :, shift // 2 :] == image[:, :, : -(shift // 2)]).all()
    assert same == (ground != "gradient")
    assert half == (ground == "plain")
    # Stripes and gradients are the same all the way down.
    assert (image == image[:, :1]).all() == (ground != "checker")
    if ground == "checker":
        assert (image[:, shift:] == image[:, :-shift]).all()
    if ground == "gradient":
        # 0.5 grey, 0.8 of a shade that rises by 1 in 20 pixels.
        assert np.diff(image[0, 0].astype(float)).mean() == pytest.approx(
            255 * 0.5 * 0.8 / 20 * 32 / side, rel=0.02
        )


@settings(deadline=None)
@given(seed=SEEDS, first=st.integers(0, 2**40), count=st.integers(1, 9), data=st.data())
def test_a_scene_is_the_same_in_every_batch(seed, first, count, data):
    images, factors = Scenes(seed).images(first, count)
    assert images.shape == (count, 3, 32, 32)
    assert images.dtype == np.uint8
    assert (Scenes(seed).factors(first, count) == factors).all()
    at = data.draw(st.integers(0, count - 1))
    alone, told = Scenes(seed).images(first + at, 1)
    assert (alone[0] == images[at]).all()
    assert (told[0] == factors[at]).all()
    # Of another size the same scene.
    double, told = Scenes(seed, 64).images(first, count)
    assert (told == factors).all()
    assert abs(double.reshape(count, 3, 32, 2, 32, 2).mean((3, 5)) - images).mean() < 3


@pytest.mark.parametrize("side", BITS)
def test_bits_are_those_of_every_machine(side):
    images, factors = Scenes(2024, side).images(1000, 64)
    assert hashlib.sha256(images.tobytes() + factors.astype("<i8").tobytes()).hexdigest() == BITS[side]


def test_factors_are_uniform_and_independent():
    factors = Scenes(11).factors(0, 40_000)
    sizes = [len(values) for values in FACTORS.values()]
    for column, size in zip(factors.T, sizes, strict=True):
        assert stats.chisquare(np.bincount(column, minlength=size)).pvalue > 1e-4
    for a, b in itertools.combinations(range(len(sizes)), 2):
        table = np.zeros((sizes[a], sizes[b]))
        np.add.at(table, (factors[:, a], factors[:, b]), 1)
        assert stats.chi2_contingency(table).pvalue > 1e-4
    # One scene after another, and seeds beside one another.
    for other in (np.roll(factors, 1, axis=0), Scenes(12).factors(0, 40_000)):
        same = (other == factors).all(1).sum()
        assert stats.binomtest(int(same), 40_000, 1 / math.prod(sizes)).pvalue > 1e-4


def test_every_caption_is_its_own():
    assert caption(np.array([0, 0, 4, 5, 3, 1])) == "a red disc and a white bar on brown checker"
    sizes = [range(len(values)) for values in FACTORS.values()]
    captions = {caption(np.array(factors)) for factors in itertools.product(*sizes)}
    assert len(captions) == math.prod(len(values) for values in FACTORS.values())

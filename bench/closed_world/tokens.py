"""Latents as tokens: each place's four channels by the nearest of 256 codes, and back.

The codes are k-means of 2000 scenes (Lloyd, IEEE Trans. Inf. Theory 28, 1982), committed as tokens.json. Channels
are rounded to parts of 1/256 first, so distances are sums of integers, exact in float64 in whatever order a
library adds them: a latent has one row of tokens, on every machine.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .data import Source
from .family import WORLDS, World
from .latents import CHANNELS
from .scenes import Floats, Ints

CODES = 256
WEIGHTS = Path(__file__).with_name("tokens.json")
_PART = 256
_FITTED_SEED, _FITTED_SCENES, _ROUNDS = 2405, 2000, 20
# Whose words choose the first codes.
_FIRST_SEED = 5
# Places that are compared with all codes at once.
_AT_ONCE = 16384


@dataclass(frozen=True, eq=False)
class Codebook:
    """codes [K, 4] in parts of 1/256."""

    codes: Ints

    def tokens(self, latents: Tensor) -> Tensor:
        """The nearest codes [n, h, w] of latents [n, 4, h, w]; of codes equally near the first."""
        count, _, height, width = latents.shape
        nearest = _nearest(_places(latents), self.codes)
        return torch.from_numpy(nearest).reshape(count, height, width)

    def latents(self, tokens: Tensor) -> Tensor:
        """Latents [n, 4, h, w] in float32 of tokens [n, h, w]."""
        codes = torch.from_numpy((self.codes / _PART).astype(np.float32))
        return codes[tokens.cpu()].permute(0, 3, 1, 2).contiguous()


def _places(latents: Tensor) -> Ints:
    """[n * h * w, 4] in parts of 1/256."""
    rows = latents.permute(0, 2, 3, 1).reshape(-1, CHANNELS)
    parts: Ints = np.rint(rows.double().numpy() * _PART).astype(np.int64)
    return parts


def _nearest(places: Ints, codes: Ints) -> Ints:
    """The index of the nearest code of each place: least |code|^2 - 2 code . place."""
    wide: Floats = codes.astype(np.float64)
    squares = (wide * wide).sum(1)
    parts = (
        np.argmin(squares - 2 * (places[start : start + _AT_ONCE].astype(np.float64) @ wide.T), 1)
        for start in range(0, len(places), _AT_ONCE)
    )
    nearest: Ints = np.concatenate([*parts])
    return nearest


def fitted(world: World, codes: int = CODES, scenes: int = _FITTED_SCENES, rounds: int = _ROUNDS) -> Codebook:
    """k-means of so many scenes' places, from distinct places drawn by a seed; means are rounded."""
    places = _places(Source(world, _FITTED_SEED).read(0, scenes).latents)
    distinct = np.unique(places, axis=0)
    words = np.random.Philox(key=_FIRST_SEED).random_raw(len(distinct))
    found = distinct[np.argsort(words, kind="stable")[:codes]]
    for _ in range(rounds):
        nearest = _nearest(places, found)
        counts = np.bincount(nearest, minlength=codes)
        sums = np.stack([np.bincount(nearest, column, codes) for column in places.T], 1)
        means = np.rint(sums / np.maximum(counts, 1)[:, None]).astype(np.int64)
        # A code that is nearest to nothing stays.
        found = np.where(counts[:, None] > 0, means, found)
    return Codebook(found)


@cache
def codebook(world: World) -> Codebook:
    """The committed one of a world; KeyError for a world that has none."""
    return Codebook(np.array(json.loads(WEIGHTS.read_text())[world.name]))


def main() -> None:
    """Writes tokens.json anew: `python -m closed_world.tokens` in bench/."""
    world = WORLDS[8]
    WEIGHTS.write_text(json.dumps({world.name: fitted(world).codes.tolist()}) + "\n")


if __name__ == "__main__":
    main()

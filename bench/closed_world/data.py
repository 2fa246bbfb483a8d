"""Latents of scenes as batches: a number of a scene is its place in a seed's endless row."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .family import World
from .latents import autoencoder
from .scenes import Scenes

# Scenes that are rendered at once.
_AT_ONCE = 1024


@dataclass(frozen=True)
class Batch:
    """Latents [n, 4, h, w] in float32 and the factors [n, 6] of their captions."""

    latents: Tensor
    factors: Tensor


class Source:
    """The latents of a seed's scenes, rendered in the order in which they are read.

    `side` of the images, in pixels: the world's own unless told. Whatever it is, the world's autoencoder encodes.
    """

    def __init__(self, world: World, seed: int, side: int | None = None) -> None:
        self._scenes = Scenes(seed, side or world.side)
        self._autoencoder = autoencoder(world.side)
        self._first, self._kept = 0, Batch(torch.empty(0), torch.empty(0))

    def read(self, first: int, count: int) -> Batch:
        """The scenes numbered from `first` on."""
        end = self._first + len(self._kept.factors)
        if not self._first <= first <= first + count <= end:
            self._first, self._kept = first, self._rendered(first, max(count, _AT_ONCE))
        place = slice(first - self._first, first - self._first + count)
        return Batch(self._kept.latents[place], self._kept.factors[place])

    def _rendered(self, first: int, count: int) -> Batch:
        latents, factors = [], []
        for start in range(first, first + count, _AT_ONCE):
            images, told = self._scenes.images(start, min(_AT_ONCE, first + count - start))
            latents.append(self._autoencoder.encode(images))
            factors.append(told)
        return Batch(torch.from_numpy(np.concatenate(latents)), torch.from_numpy(np.concatenate(factors)))

"""The world's autoencoder: a fixed linear map from patches of 4x4 pixels to 4 channels, of integer weights.

Its weights are the principal components of 4000 scenes, rounded (latents.json). Pixels and weights are integers,
so that every sum is exact in float64 in whatever order a library adds: a scene has one latent, on every machine.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .scenes import Floats, Ints, Scenes

PATCH = 4
CHANNELS = 4
WEIGHTS = Path(__file__).with_name("latents.json")
_FITTED_ON = Scenes(seed=2404)
_FITTED_SCENES = 4000
# Weights are multiples of this part.
_PART = 1024


@dataclass(frozen=True)
class LinearAutoencoder:
    """Mean [48] and components [4, 48] in parts of 1024, deviations [4] of what these give."""

    mean: Ints
    components: Ints
    deviations: Floats

    def encode(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Latents [n, 4, side/4, side/4] of images [n, 3, side, side]; about unit variance in each channel."""
        rows = (_patches(images) - self.mean).astype(np.float64) @ self.components.T.astype(np.float64)
        latents = (rows / (_PART * self.deviations)).astype(np.float32)
        return np.ascontiguousarray(latents.transpose(0, 3, 1, 2))

    def decode(self, latents: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Images [n, 3, 4h, 4w] of latents [n, 4, h, w]."""
        count, _, height, width = latents.shape
        rows = latents.transpose(0, 2, 3, 1) * self.deviations
        patches = rows @ (self.components / _PART) + self.mean
        images = patches.reshape(count, height, width, 3, PATCH, PATCH).transpose(0, 3, 1, 4, 2, 5)
        whole = images.reshape(count, 3, PATCH * height, PATCH * width)
        return np.floor(np.clip(whole, 0, 255) + 0.5).astype(np.uint8)


def _patches(images: NDArray[np.uint8]) -> Ints:
    """Patches [n, h, w, 48] of images [n, 3, 4h, 4w]."""
    count, colours, height, width = images.shape
    grid = images.reshape(count, colours, height // PATCH, PATCH, width // PATCH, PATCH)
    return grid.transpose(0, 2, 4, 1, 3, 5).reshape(count, height // PATCH, width // PATCH, -1).astype(np.int64)


def fitted(side: int, count: int = _FITTED_SCENES, seed: int = _FITTED_ON.seed) -> LinearAutoencoder:
    """The principal components of that many scenes, rounded."""
    images, _ = Scenes(seed, side).images(0, count)
    rows = _patches(images).reshape(-1, 3 * PATCH * PATCH).astype(np.float64)
    _, vectors = np.linalg.eigh(np.cov(rows.T))
    top = vectors[:, : -CHANNELS - 1 : -1].T
    # The sign of an eigenvector is the library's choice.
    components = np.round(top * np.sign(top.sum(1, keepdims=True)) * _PART).astype(np.int64)
    mean = np.round(rows.mean(0)).astype(np.int64)
    deviations = np.round(((rows - mean) @ components.T / _PART).std(0), 2)
    return LinearAutoencoder(mean, components, deviations)


@cache
def autoencoder(side: int) -> LinearAutoencoder:
    """The committed one for images of that side; KeyError for a side that has none."""
    weights = json.loads(WEIGHTS.read_text())[str(side)]
    return LinearAutoencoder(
        np.array(weights["mean"]), np.array(weights["components"]), np.array(weights["deviations"])
    )


def main() -> None:
    """Writes latents.json anew: `python -m closed_world.latents` in bench/."""
    found = {}
    for side in (32, 64):
        one = fitted(side)
        found[str(side)] = {
            "mean": one.mean.tolist(),
            "components": one.components.tolist(),
            "deviations": one.deviations.tolist(),
        }
    WEIGHTS.write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()

"""Images as bytes and grids, and numbers that are not finite."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from PIL import Image

from ldmperf.model.pipeline.images import as_bytes, check_finite, grid


def test_pixels_are_rounded_to_the_nearest_byte() -> None:
    values = torch.tensor([-0.5, 0.0, 0.4 / 255, 0.6 / 255, 254.4 / 255, 1.0, 1.5]).view(1, 1, 1, -1)
    found = as_bytes(values.expand(1, 3, 2, -1))
    assert found.shape == (1, 2, 7, 3)
    assert found[0, 0, :, 0].tolist() == [0, 0, 0, 1, 254, 255, 255]


@pytest.mark.parametrize(("count", "rows", "columns"), [(1, 1, 1), (2, 1, 2), (3, 2, 2), (5, 2, 3), (7, 3, 3)])
def test_a_grid_is_as_near_to_a_square_as_can_be(count: int, rows: int, columns: int) -> None:
    images = torch.arange(1, count + 1, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 2, 4, 3)
    whole = grid(images)
    assert whole.shape == (2 * rows, 4 * columns, 3)
    Image.fromarray(whole.numpy())
    cells = [*range(1, count + 1), *[0] * (rows * columns - count)]
    assert whole[::2, ::4, 0].flatten().tolist() == cells
    assert torch.equal(whole[::2], whole[1::2])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("who", ["the UNet", "the autoencoder"])
def test_one_number_that_is_not_finite_names_the_seed(value: float, who: str) -> None:
    latents, pixels = torch.zeros(3, 4, 2, 2), torch.zeros(3, 3, 4, 4)
    seeds: Sequence[int] = (5, 6, 7)
    check_finite(latents, torch.float16, pixels, torch.float32, seeds)
    (latents if who == "the UNet" else pixels)[1, 2, 1, 0] = value
    dtype = "float16" if who == "the UNet" else "float32"
    with pytest.raises(FloatingPointError, match=f"seed 6: {who} gives what is not finite in {dtype}; take"):
        check_finite(latents, torch.float16, pixels, torch.float32, seeds)

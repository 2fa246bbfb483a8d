"""Samples as a picture: a row for each network and number of steps, a column for each prompt.

`python -m closed_world.pictures FOLDER PICTURE.png` in bench/, by the records and networks of a study.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor

from ldmperf.profiling.measure.recorded import new_run_id

from .latents import autoencoder
from .networks import label, load_network, network_folder
from .sampling import Prompts, plan_of, real_samples, sampled
from .study import Study, tuned_rates

STEPS = (1, 2, 4, 8, 50)
_COLUMNS = 14
_SCALE = 2
_MARGIN = 92


def grid(study: Study, widths: tuple[int, ...], steps: tuple[int, ...]) -> dict[str, Tensor]:
    """The latents [14, 4, h, w] of each row by its name; the first are real scenes of the same captions."""
    prompts = Prompts.of("test", _COLUMNS)
    rows = {"real": real_samples(study.world, "test", _COLUMNS).latents}
    for width in widths:
        network = load_network(network_folder(study.weights, width, study.seeds[0]), study.device)
        rates = tuned_rates(study, width, "ddim")
        for number in steps:
            plan = plan_of("ddim", number)
            made = sampled([network] * number, study.world, plan, prompts, rates[number])
            rows[f"{label(width)}, {number} step{'s'[: number > 1]}"] = made
    return rows


def drawn(rows: dict[str, Tensor], side: int) -> Image.Image:
    """The picture of the rows, each beside its name."""
    cell = side * _SCALE
    picture = Image.new("RGB", (_MARGIN + _COLUMNS * cell, len(rows) * cell), "white")
    draw = ImageDraw.Draw(picture)
    for place, (name, latents) in enumerate(rows.items()):
        images: NDArray[np.uint8] = autoencoder(side).decode(latents.numpy())
        draw.text((4, place * cell + cell // 2 - 6), name, fill="black")
        for column, image in enumerate(images):
            one = Image.fromarray(image.transpose(1, 2, 0)).resize((cell, cell), Image.Resampling.NEAREST)
            picture.paste(one, (_MARGIN + column * cell, place * cell))
    return picture


def main(
    folder: Annotated[Path, typer.Argument(help="Of a study, with its quality.jsonl.")],
    picture: Annotated[Path, typer.Argument(help="The .png to write.")],
    weights: Annotated[Path | None, typer.Option(help="The networks' folder; in FOLDER unless told.")] = None,
) -> None:
    """Draw samples of the narrowest, the middle and the widest network by number of steps."""
    study = Study(folder, weights or folder / "weights", new_run_id())
    widths = study.world.widths
    rows = grid(study, (widths[0], widths[len(widths) // 2], widths[-1]), STEPS)
    drawn(rows, study.world.side).save(picture, optimize=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    typer.run(main)

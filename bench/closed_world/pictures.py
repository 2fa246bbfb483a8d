"""Samples as a picture: a row for each network and number of steps, a column for each prompt.

`python -m closed_world.pictures FOLDER PICTURE.png` in bench/, by the networks of a study and the guidance that
its records have. It writes no record.
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
from .study import Study, kept

SAMPLER = "ddim"
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
        rates = _rates(study, width)
        for number in steps:
            plan = plan_of(SAMPLER, number)
            made = sampled([network] * number, study.world, plan, prompts, rates[number])
            rows[f"{label(width)}, {number} step{'s'[: number > 1]}"] = made
    return rows


def _rates(study: Study, width: int) -> dict[int, float]:
    """The guidance of a network at each number of steps, by the study's records."""
    cases = (record.case for record in kept(study).values() if record.tuned)
    return {
        case.steps: case.guidance_scale
        for case in cases
        if (case.network, case.sampler, case.split) == (label(width), SAMPLER, "test")
    }


def _check(study: Study, widths: tuple[int, ...], steps: tuple[int, ...]) -> None:
    """Raises BadParameter where a network or its guidance is missing."""
    for width in widths:
        folder = network_folder(study.weights, width, study.seeds[0])
        if not folder.exists():
            raise typer.BadParameter(f"{folder} is not there: give the networks' folder by --weights")
        if missing := [str(number) for number in steps if number not in _rates(study, width)]:
            raise typer.BadParameter(
                f"{study.records} has no record of {label(width)} with {SAMPLER} at {', '.join(missing)} steps: "
                "end the study's stage sample first"
            )


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
    weights: Annotated[
        Path | None, typer.Option(help="Folder of the networks. [default: weights in FOLDER]")
    ] = None,
) -> None:
    """Draw samples of the narrowest, the middle and the widest network by number of steps."""
    study = Study(folder, weights or folder / "weights", new_run_id())
    every = study.world.widths
    widths = (every[0], every[len(every) // 2], every[-1])
    _check(study, widths, STEPS)
    rows = grid(study, widths, STEPS)
    drawn(rows, study.world.side).save(picture, optimize=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    typer.run(main)

"""Previews: the clean image as the network saw it at any step of any sampler, with graphs and tiles too."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from pipeline_folders import edit_json, write_pipeline
from tapes import Tapes
from torch import Tensor

from ldmperf.model import UNet
from ldmperf.model.pipeline import TextToImage
from ldmperf.samplers import SAMPLERS

pytestmark = pytest.mark.usefixtures("_one_thread")

SIZE = {"height": 8, "width": 16}
PREDICTIONS = {"epsilon": "sd15", "v_prediction": "sd21", "sample": "sd15"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By what the UNet predicts."""
    found = {}
    for prediction, kind in PREDICTIONS.items():
        found[prediction] = write_pipeline(tmp_path_factory.mktemp("pipelines") / prediction, kind)
        file = found[prediction] / "scheduler" / "scheduler_config.json"
        edit_json(file, lambda raw, prediction=prediction: raw.update(prediction_type=prediction))
    return found


def clean(prediction: str, seen: Tensor, output: Tensor, alpha: float, sigma: float) -> Tensor:
    """x_0 where the network made `output` of `seen`, which is at unit variance."""
    alpha, sigma = alpha / math.hypot(alpha, sigma), sigma / math.hypot(alpha, sigma)
    if prediction == "sample":
        return output
    if prediction == "v_prediction":
        return alpha * seen - sigma * output
    return (seen - sigma * output) / alpha


# PNDM refuses a network that predicts the sample.
CASES = [(name, kind) for name in SAMPLERS for kind in PREDICTIONS if (name, kind) != ("pndm", "sample")]


@pytest.mark.parametrize(("sampler", "prediction"), CASES)
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_a_preview_is_of_what_the_network_saw(
    folders: dict[str, Path], prediction: str, sampler: str, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = TextToImage.load(folders[prediction], backend="torch")
    denoise, calls, decoded = pipeline.unet.denoise, [], []

    def noted(model_input: Tensor, *rest: Any) -> Tensor:
        output = denoise(model_input, *rest)
        calls.append((model_input.clone(), output.clone()))
        return output

    def noted_latents(latents: Tensor, *, tile: int | None = None) -> Tensor:
        decoded.append(latents.clone())
        return torch.zeros(1, 3, 8, 16)

    monkeypatch.setattr(pipeline.unet, "denoise", noted)
    monkeypatch.setattr(pipeline, "decode", noted_latents)
    steps = []
    made = pipeline(
        "a b", 1, steps=4, sampler=sampler, guidance_scale=scale, **SIZE,
        preview=lambda step, pixels: steps.append(step),
    )  # fmt: skip
    assert [step.index for step in steps] == list(range(len(made.plan.steps) - 1))
    for step, (seen, output), latents in zip(steps, calls, decoded, strict=False):
        if scale > 1:
            seen, output = seen[:1], output[:1] + scale * (output[1:] - output[:1])
        expected = clean(prediction, seen, output, step.alpha, step.sigma)
        assert (latents - expected).abs().max() < 1e-4 * expected.abs().max(), step.index
    assert torch.equal(decoded[-1], made.latents)


def test_previews_come_without_graphs_and_in_tiles(folders: dict[str, Path]) -> None:
    tapes = Tapes()
    graphed = TextToImage.load(folders["epsilon"], backend="torch", graphs=tapes)
    plain = TextToImage.load(folders["epsilon"], backend="torch")
    seen: dict[int | None, list[Tensor]] = {}
    for tile in (None, 4):
        pixels = seen[tile] = []
        made = graphed(
            "a", 1, steps=3, tile=tile, preview=lambda step, images, pixels=pixels: pixels.append(images), **SIZE
        )
        assert torch.equal(made.latents, plain("a", 1, steps=3, **SIZE).latents)
    assert "replay" not in tapes.log
    assert [len(pixels) for pixels in seen.values()] == [2, 2]
    for whole, tiled in zip(*seen.values(), strict=True):
        assert 0 < (whole - tiled).abs().max() < 0.5


def test_a_stochastic_sampler_has_the_seeds_noise_in_replayed_steps(folders: dict[str, Path]) -> None:
    graphed = TextToImage.load(folders["epsilon"], backend="torch", graphs=Tapes())
    plain = TextToImage.load(folders["epsilon"], backend="torch")
    made = []
    for seeds in ([3, 2**63 + 5], [5, 3]):
        made.append(graphed(["a", "b"], seeds, steps=3, sampler="euler_a", **SIZE).latents)
        assert torch.equal(made[-1], plain(["a", "b"], seeds, steps=3, sampler="euler_a", **SIZE).latents)
    assert not torch.equal(*made)


@pytest.mark.parametrize("graphs", ["off", "tapes"])
def test_the_network_is_given_its_own_dtype(
    folders: dict[str, Path], graphs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that no step casts its input."""
    tapes = {"off": "off", "tapes": Tapes()}[graphs]
    denoise, dtypes = UNet.denoise, set()

    def noted(unet: UNet, model_input: Tensor, *rest: Any) -> Tensor:
        dtypes.add(model_input.dtype)
        return denoise(unet, model_input, *rest)

    monkeypatch.setattr(UNet, "denoise", noted)
    pipeline = TextToImage.load(folders["epsilon"], dtype=torch.bfloat16, backend="torch", graphs=tapes)
    made = pipeline("a", 1, steps=2, **SIZE)
    assert (dtypes, made.latents.dtype) == ({torch.bfloat16}, torch.float32)


@pytest.mark.parametrize("every", [0, -1, 1.5, True, None])
def test_a_number_of_steps_between_previews_is_asked_for(folders: dict[str, Path], every: Any) -> None:
    pipeline = TextToImage.load(folders["epsilon"], backend="torch")
    with pytest.raises(ValueError, match="preview_every must be a whole number of at least 1, not"):
        pipeline("a", 1, steps=1, preview=lambda step, pixels: None, preview_every=every, **SIZE)


def test_statistics_of_latents_are_those_of_xl_alone(folders: dict[str, Path], tmp_path: Path) -> None:
    """diffusers' pipelines of 1 and 2 do not read them."""
    folder = shutil.copytree(folders["epsilon"], tmp_path / "p")
    statistics = {"latents_mean": [0.5, -1.0, 0.0, 2.0], "latents_std": [1.5, 0.5, 1.0, 2.0]}
    edit_json(folder / "vae" / "config.json", lambda raw: raw.update(statistics))
    made = [
        TextToImage.load(path, backend="torch")("a", 1, steps=1, **SIZE) for path in (folder, folders["epsilon"])
    ]
    assert torch.equal(made[0].pixels, made[1].pixels)

"""What the UNet attends to: layers left out, repeated prompts, masks and negative prompts, against diffusers."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from dropin_models import randomized
from pipeline_folders import KINDS, diffusers_pipeline, edit_json, tiny_pipeline, write_pipeline

from ldmperf.model.pipeline import PipelineFolder, TextToImage
from ldmperf.samplers import initial_noise

pytestmark = pytest.mark.usefixtures("_one_thread")

SIZE = {"height": 8, "width": 16}
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: write_pipeline(tmp_path_factory.mktemp("pipelines") / kind, kind) for kind in KINDS}


def check_same(folder: Path, prompts: list[str], **options: Any) -> torch.Tensor:
    """The latents of two steps, which are those of diffusers' pipeline."""
    seeds = list(range(len(prompts)))
    made = TextToImage.load(folder, backend="torch")(prompts, seeds, steps=2, **SIZE, **options).latents
    noise = initial_noise(seeds, made.shape[1:])
    theirs = diffusers_pipeline(folder)(
        prompts, latents=noise, num_inference_steps=2, output_type="latent", **SIZE, **options
    ).images
    assert (made - theirs).abs().max() < TOLERANCE * theirs.abs().max()
    return made


def with_layers(path: Path, first: int, second: int) -> Path:
    """XL whose text encoders have so many layers."""
    pipeline = tiny_pipeline("sdxl")
    for name, layers in (("text_encoder", first), ("text_encoder_2", second)):
        encoder = getattr(pipeline, name)
        config = transformers.CLIPTextConfig(**encoder.config.to_dict() | {"num_hidden_layers": layers})
        pipeline.register_modules(**{name: randomized(type(encoder)(config), torch.float32)})
    pipeline.save_pretrained(path)
    return path


@pytest.mark.parametrize("layers", [(4, 3), (3, 4)])
def test_layers_of_both_encoders_of_xl_are_skipped(layers: tuple[int, int], tmp_path: Path) -> None:
    folder = with_layers(tmp_path / "p", *layers)
    made = [check_same(folder, ["a b c"], negative_prompt=["d"], clip_skip=skip) for skip in (0, 1)]
    assert (made[0] - made[1]).abs().max() > 1e-3
    # The states behind the first layer are the last that there are; the shallower encoder decides.
    with pytest.raises(ValueError, match="clip_skip must be a whole number from 0 to 1, not 2"):
        PipelineFolder.read(folder).check_clip_skip(2)


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_prompts_that_repeat_keep_their_places(folders: dict[str, Path], kind: str) -> None:
    check_same(folders[kind], ["h i", "a b c", "h i", "d"], negative_prompt=["e", "f", "f", "e"])


def test_an_empty_negative_prompt_is_not_none_to_xl(folders: dict[str, Path]) -> None:
    """Without one XL's is zeros."""
    made = [check_same(folders["sdxl"], ["a"], negative_prompt=[text]) for text in ("", "b")]
    zeros = check_same(folders["sdxl"], ["a"])
    assert all((one - zeros).abs().max() > 1e-3 for one in made)
    alone = TextToImage.load(folders["sdxl"], backend="torch")("a", 0, negative_prompt="", steps=2, **SIZE)
    assert torch.equal(alone.latents, made[0])


@pytest.mark.parametrize("kind", KINDS)
def test_a_mask_hides_the_padding_where_the_encoder_asks_for_it(
    folders: dict[str, Path], kind: str, tmp_path: Path
) -> None:
    """The pipeline of XL gives its encoders none."""
    folder = shutil.copytree(folders[kind], tmp_path / "p")
    for file in folder.glob("text_encoder*/config.json"):
        edit_json(file, lambda raw: raw.update(use_attention_mask=True))
    masked = check_same(folder, ["a b", "c"], negative_prompt=["d", ""])
    whole = check_same(folders[kind], ["a b", "c"], negative_prompt=["d", ""])
    assert torch.equal(masked, whole) == (kind == "sdxl")

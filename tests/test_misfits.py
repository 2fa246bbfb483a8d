"""Parts of a pipeline's folder that do not fit each other, and fields that older folders lack."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pipeline_folders import KINDS, diffusers_pipeline, edit_json, write_pipeline

from ldmperf.model.pipeline import PipelineFolder
from ldmperf.model.pipeline.misfits import misfits
from ldmperf.model.pipeline.text_part import TextPart

pytestmark = pytest.mark.usefixtures("_one_thread")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: write_pipeline(tmp_path_factory.mktemp("pipelines") / kind, kind) for kind in KINDS}


def with_field(part: TextPart, **fields: Any) -> TextPart:
    return replace(part, config={**part.config, **fields})


def told(
    folder: PipelineFolder, unet: dict[str, Any], autoencoder: dict[str, Any], text: list[TextPart]
) -> list[str]:
    parts = replace(folder.unet, **unet), replace(folder.autoencoder, **autoencoder), text or list(folder.text)
    return list(misfits(folder.path, folder.is_xl, *parts))


MISFITS: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    (
        "sd15",
        {"context_dim": 24},
        {},
        "cross_attention_dim = 24, but the text encoders give 16;",
    ),
    ("sdxl", {"context_dim": 16}, {}, "cross_attention_dim = 16, but the text encoders give 16 + 16;"),
    ("sd15", {"in_channels": 9}, {}, "in_channels = 9 for 4 latent channels: an inpainting UNet"),
    ("sd15", {"in_channels": 8}, {}, "in_channels = 8 for 4 latent channels: another kind"),
    ("sd15", {"out_channels": 8}, {}, "unet/config.json: out_channels = 8 for 4 latent channels; take all parts"),
    ("sd15", {}, {"scaling_factor": None}, "vae/config.json: scaling_factor is null"),
    ("sd15", {}, {"out_channels": 4}, "vae/config.json: out_channels = 4, not red, green and blue"),
    ("sdxl", {"added_dim": 56}, {}, "6 sizes give 64 (a refiner takes 5 sizes"),
    ("sdxl", {"added_dim": None, "added_time_dim": None}, {}, "no addition_embed_type, which Stable Diffusion XL"),
    (
        "sd15",
        {"added_dim": 64, "added_time_dim": 8},
        {},
        "'text_time' is Stable Diffusion XL's",
    ),
]


@pytest.mark.parametrize(("kind", "unet", "autoencoder", "line"), MISFITS, ids=[m[3][:30] for m in MISFITS])
def test_a_misfit_is_one_line(
    folders: dict[str, Path], kind: str, unet: dict[str, Any], autoencoder: dict[str, Any], line: str
) -> None:
    folder = PipelineFolder.read(folders[kind])
    assert told(folder, {}, {}, []) == []
    (found,) = told(folder, unet, autoencoder, [])
    assert line in found


def test_two_encoders_of_xl(folders: dict[str, Path]) -> None:
    folder = PipelineFolder.read(folders["sdxl"])
    first, second = folder.text
    # Of unlike lengths, or in each other's place: only the second one's pooled state is added to the timestep.
    (line,) = told(folder, {}, {}, [first, replace(second, length=7)])
    assert "the tokenizers make prompts of [8, 7] tokens" in line
    assert told(folder, {}, {}, [with_field(first, projection_dim=24), second]) == []
    (line,) = told(folder, {}, {}, [first, with_field(second, projection_dim=24)])
    assert "projection_class_embeddings_input_dim = 64, but the second text encoder and 6 sizes give 72" in line


@pytest.mark.filterwarnings("ignore:The configuration file of this scheduler:FutureWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_an_old_scheduler_config_is_corrected_as_in_diffusers(
    folders: dict[str, Path], kind: str, tmp_path: Path
) -> None:
    """Without steps_offset: 1 in the pipelines of 1 and 2, 0 in that of XL."""
    folder = shutil.copytree(folders[kind], tmp_path / "p")
    edit_json(folder / "scheduler/scheduler_config.json", lambda raw: raw.pop("steps_offset"))
    scheduler = diffusers_pipeline(folder).scheduler
    scheduler.set_timesteps(7)
    assert PipelineFolder.read(folder).plan(7).timesteps.tolist() == scheduler.timesteps.tolist()


def test_an_index_that_does_not_tell_of_zeros(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders["sdxl"], tmp_path / "p")
    edit_json(folder / "model_index.json", lambda raw: raw.pop("force_zeros_for_empty_prompt"))
    theirs = diffusers_pipeline(folder).config.force_zeros_for_empty_prompt
    assert (PipelineFolder.read(folder).zeros_for_nothing, theirs) == (True, True)

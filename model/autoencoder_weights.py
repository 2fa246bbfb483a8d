"""The autoencoder's weights in other people's formats: folders of diffusers, files of diffusers and CompVis."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from .autoencoder import Autoencoder
from .autoencoder_config import AutoencoderConfig, autoencoder_diffusers_config
from .autoencoder_keys import autoencoder_slots
from .autoencoder_layout import beyond_tensors, find_autoencoder
from .kinds import AUTOENCODER
from .loading import views, write
from .reader import Reader

# Where `save_autoencoder` keeps the configuration in the header of its file, as the fields of a config.json.
AUTOENCODER_METADATA_KEY = "ldmperf.autoencoder_config"


def load_autoencoder(
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    config: AutoencoderConfig | None = None,
    backend: str = "auto",
) -> Autoencoder:
    """An autoencoder in eval mode from a checkpoint on disk.

    path: a folder written by diffusers' `save_pretrained` (the autoencoder's, or a pipeline's with a `vae` folder
    in it), or a .safetensors file in diffusers or CompVis key layout (a whole Stable Diffusion checkpoint too, of
    which only the autoencoder is read), or a shard or the index file of a set of shards. Names of attention before
    diffusers 0.13 and prefixes (`first_stage_model.`, `vae.`, `module.` and the like) are understood.

    The configuration is the folder's config.json, that in a file's metadata (`save_autoencoder`), or the
    config.json beside a file; beside a CompVis file only where it fits the tensors. Of a file without any, shapes
    tell the sizes, with 32 groups to a norm, and the UNet beside it in a whole checkpoint `scaling_factor`; in a
    file of its own an autoencoder of Stable Diffusion 1, 2 and XL looks the same, so that it is None: take 0.18215
    for 1 and 2, 0.13025 for XL. `config` replaces it; what the checkpoint itself states is checked all the same.

    dtype: float64, float32, float16 or bfloat16; the file's own unless given (`AutoencoderConfig.compute_dtype`
    tells whether float16 will do). Raises `CheckpointError` before memory is taken: missing, unexpected or
    misshapen tensors, other dtypes, truncated files, nothing to load, a configuration that is not implemented
    (`UnsupportedCheckpoint`, an `UnsupportedConfig` too). ValueError for another argument of the wrong kind, and
    for a device that is not there.
    """
    return _READER.load(path, config, dtype, device, backend=backend)


def save_autoencoder(autoencoder: Autoencoder, path: str | Path, *, dtype: torch.dtype | None = None) -> None:
    """Write one .safetensors file in diffusers layout, with the configuration in its metadata.

    `load_autoencoder` reads both back; diffusers reads the tensors beside a config.json of
    `autoencoder_diffusers_config`. dtype: float64, float32, float16 or bfloat16; the network's own unless given.
    The file is whole or absent. Raises ValueError for another dtype or ending of the name, OSError where the file
    cannot be written.
    """
    config = {"_class_name": AUTOENCODER.class_name, **autoencoder_diffusers_config(autoencoder.config)}
    write(path, autoencoder_state_dict(autoencoder), AUTOENCODER_METADATA_KEY, config, dtype)


def autoencoder_state_dict(autoencoder: Autoencoder) -> dict[str, Tensor]:
    """The weights under diffusers' keys and in its shapes, for `AutoencoderKL.load_state_dict`.

    The tensors share their memory with the autoencoder's parameters.
    """
    return views(autoencoder, autoencoder_slots(autoencoder))


_READER = Reader(
    AUTOENCODER,
    AutoencoderConfig,
    Autoencoder,
    AUTOENCODER_METADATA_KEY,
    saver="save_autoencoder",
    untold="nothing states its configuration, and its shapes are of no autoencoder with 32 groups to a norm",
    find=find_autoencoder,
    beyond=beyond_tensors,
    slots=autoencoder_slots,
)

"""Weights in other people's formats: diffusers folders, and .safetensors in diffusers or CompVis key layout."""

import dataclasses
from pathlib import Path

import torch
from torch import Tensor

from .config import UNetConfig, diffusers_config
from .float8 import refuse_float8
from .keys import weight_slots
from .kinds import UNET
from .loading import views, write
from .reader import Reader
from .releases import beyond, find_layout
from .unet import UNet

# Where `save_unet` keeps the configuration in the header of its file: JSON with the fields of a config.json.
METADATA_KEY = "ldmperf.unet_config"


def load_unet(
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    config: UNetConfig | None = None,
    backend: str = "auto",
    batch_invariant: bool = False,
) -> UNet:
    """A UNet in eval mode from a checkpoint on disk.

    path: a folder written by diffusers' `save_pretrained` (the UNet's, or a pipeline's with a `unet` folder in
    it), a .safetensors file in diffusers or CompVis key layout (a whole Stable Diffusion checkpoint too, of which
    only the UNet is read), or one shard or the index file of a set of shards, which stand for the set.
    Prefixes of training code (`module.`, `_orig_mod.`, `model.diffusion_model.` and the like) are understood.

    The configuration is the folder's config.json, that in a file's metadata (`save_unet`), or the config.json
    beside a file; beside a CompVis file only where it fits the tensors. A file without any is loaded if its shapes
    are those of a published release whose head counts are known: shapes do not tell the heads. `config` replaces
    it; what the checkpoint itself states is checked all the same.

    dtype: float64, float32, float16 or bfloat16; the file's own unless given. backend and batch_invariant are the
    network's. Raises `CheckpointError` before memory is taken: missing, unexpected or misshapen tensors, other
    dtypes, truncated files, nothing to load, a configuration that is not implemented (`UnsupportedCheckpoint`, an
    `UnsupportedConfig` too). ValueError for another argument of the wrong kind, and for a device that is not
    there.
    """
    return _READER.load(path, config, dtype, device, backend=backend, batch_invariant=batch_invariant)


def save_unet(unet: UNet, path: str | Path, *, dtype: torch.dtype | None = None) -> None:
    """Write one .safetensors file in diffusers layout, with the configuration in its metadata.

    `load_unet` reads both back; diffusers reads the tensors beside a config.json of `diffusers_config`. dtype:
    float64, float32, float16 or bfloat16; the network's own unless given. The file is whole or absent. Raises
    ValueError for another dtype or ending of the name, OSError where the file cannot be written.
    """
    config = {"_class_name": UNET.class_name, **diffusers_config(unet.config)}
    write(path, diffusers_state_dict(unet), METADATA_KEY, config, dtype)


def diffusers_state_dict(unet: UNet) -> dict[str, Tensor]:
    """The weights under diffusers' keys and in its shapes, for `UNet2DConditionModel.load_state_dict`.

    The tensors share their memory with the UNet's parameters. Raises ValueError for a float8 copy, which has lost
    some of them.
    """
    refuse_float8(unet, "diffusers_state_dict")
    return views(unet, weight_slots(unet))


def _acting(config: UNetConfig) -> UNetConfig:
    """The configuration without fields that change no result: sample_size, heads of levels without attention."""
    attends = [*config.attention[:-1], config.attention[-1] or config.has_middle]

    def acting(counts: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(count if here else 1 for count, here in zip(counts, attends, strict=True))

    return dataclasses.replace(
        config,
        num_heads=acting(config.num_heads),
        transformer_layers=acting(config.transformer_layers),
        only_cross_attention=tuple(map(all, zip(config.only_cross_attention, config.attention, strict=True))),
        sample_size=1,
    )


_READER = Reader(
    UNET,
    UNetConfig,
    UNet,
    METADATA_KEY,
    saver="save_unet",
    untold="nothing says how many heads the UNet has, and its shapes are of no known release",
    find=find_layout,
    beyond=beyond,
    slots=weight_slots,
    acting=_acting,
    disputed="heads or norms",
)

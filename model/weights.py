"""Weights in other people's formats: diffusers folders, and .safetensors in diffusers or CompVis key layout.

Headers are read and checked whole before any memory is taken.
"""

import dataclasses
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .arguments import check_backend
from .config import UNetConfig, diffusers_config
from .fields import UnsupportedConfig
from .files import (
    CheckpointError,
    Source,
    UnsupportedCheckpoint,
    find,
    open_all,
    parse_json,
    read_json,
)
from .keys import Slot, weight_slots
from .kinds import UNET
from .loading import check_device, check_dtype, check_path, filled, mismatch, views, write
from .releases import Layout, beyond, find_layout, published
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
    check_dtype(dtype)
    check_device(device)
    check_backend("backend", backend)
    check_path(path)
    if not isinstance(config, UNetConfig | None):
        raise ValueError(
            f"config must be a UNetConfig; got a {type(config).__name__}: pass UNetConfig.from_diffusers(...) of "
            "the fields of a config.json"
        )
    path = Path(path)
    source = find(path, UNET)
    # Neither the caller's default device nor its inference mode reaches the weights.
    with ExitStack() as stack, torch.device("cpu"), torch.inference_mode(False):
        tensors, metadata = open_all(source, stack)
        layout = find_layout(str(path), {key: tuple(tensors[key].get_shape()) for key in tensors})
        stated, origin = _stated(path, source, layout, metadata)
        if config is not None:
            stated, origin = config, "config="
        if stated is None:
            raise CheckpointError(
                f"{path}: nothing says how many heads the UNet has, and its shapes are of no known release; put "
                "its config.json beside it, name the folder with both, write it with ldmperf.model.save_unet, or "
                "pass config=UNetConfig(...) in Python"
            )
        unet, slots, problem = _network(layout, stated, backend, batch_invariant)
        if unet is None or problem:
            raise CheckpointError(
                f"{path}: the tensors are not those of the configuration ({origin}): {problem}; give the whole "
                "checkpoint and the configuration that it was made with"
            )
        stored = [tensors[layout.stored(slot.key, stated)] for slot in slots]
        return filled(unet, slots, stored, path, dtype, device)


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

    The tensors share their memory with the UNet's parameters.
    """
    return views(unet, weight_slots(unet))


def _stated(
    path: Path, source: Source, layout: Layout, metadata: Mapping[str, str]
) -> tuple[UNetConfig | None, str]:
    """The configuration that the checkpoint states, and where; None where it states none and is of no release."""
    inside = metadata.get(METADATA_KEY)
    within = None
    if inside is not None:
        place = f"{source.files[0]}: metadata {METADATA_KEY}"
        within = _checked(parse_json(inside.encode(), place), place)
        if not source.is_folder:
            return within, METADATA_KEY
    beside = None
    if source.config_file is not None:
        raw = read_json(source.config_file)
        # Many files may lie beside a named one; a folder's config.json is its own.
        if source.is_folder or UNET.is_config(raw):
            beside = _checked(raw, str(source.config_file))
    release = published(layout)
    if beside is None:
        return (None, "") if release is None else (release.config, f"that of {release.name}")
    at = str(source.config_file)
    if within is not None and _acting(within) != _acting(beside):
        raise CheckpointError(
            f"{source.files[0]}: its metadata and {at} differ; remove config.json, or write the file again with "
            "save_unet"
        )
    if layout.compvis and not source.is_folder and release is not None:
        # Stable Diffusion's file often lies in a folder with other networks.
        _, _, problem = _network(layout, beside, "auto")
        if problem:
            return release.config, f"that of {release.name}"
        if _acting(beside) != _acting(release.config):
            raise CheckpointError(
                f"{path}: has the shapes of {release.name} and of {at}, which differ in heads or norms; move the "
                "file or the config.json to a folder of its own"
            )
    return beside, at


def _checked(raw: Mapping[str, Any], place: str) -> UNetConfig:
    try:
        return UNetConfig.from_diffusers(raw)
    except UnsupportedConfig as error:
        raise UnsupportedCheckpoint(f"{place}: {error}") from error
    except RecursionError as error:
        raise CheckpointError(f"{place}: nested too deep for a configuration") from error


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


def _network(
    layout: Layout, config: UNetConfig, backend: str, batch_invariant: bool = False
) -> tuple[UNet | None, list[Slot], str]:
    """The network without memory, its tensors' places, and how the file's tensors differ (empty: not at all)."""
    if problem := beyond(config, layout.shapes.values()):
        return None, [], problem
    with torch.device("meta"):
        unet = UNet(config, backend=backend, batch_invariant=batch_invariant)
    slots = weight_slots(unet)
    expected = {layout.stored(slot.key, config): slot.shape for slot in slots}
    return unet, slots, mismatch(expected, layout.shapes)

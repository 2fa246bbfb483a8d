"""The autoencoder's weights in other people's formats: folders of diffusers, files of diffusers and CompVis.

Headers are read and checked whole before any memory is taken.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .arguments import check_backend
from .autoencoder import Autoencoder
from .autoencoder_config import AutoencoderConfig, autoencoder_diffusers_config
from .autoencoder_keys import autoencoder_slots
from .autoencoder_layout import AutoencoderLayout, beyond_tensors, config_of_shapes, find_autoencoder
from .fields import UnsupportedConfig
from .files import CheckpointError, Source, UnsupportedCheckpoint, find, open_all, parse_json, read_json
from .keys import Slot
from .kinds import AUTOENCODER
from .loading import check_device, check_dtype, check_path, filled, mismatch, views, write

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
    check_dtype(dtype)
    check_device(device)
    check_backend("backend", backend)
    check_path(path)
    if not isinstance(config, AutoencoderConfig | None):
        raise ValueError(
            f"config must be an AutoencoderConfig; got a {type(config).__name__}: pass "
            "AutoencoderConfig.from_diffusers(...) of the fields of a config.json"
        )
    path = Path(path)
    source = find(path, AUTOENCODER)
    # Neither the caller's default device nor its inference mode reaches the weights.
    with ExitStack() as stack, torch.device("cpu"), torch.inference_mode(False):
        tensors, metadata = open_all(source, stack)
        layout = find_autoencoder(str(path), {key: tuple(tensors[key].get_shape()) for key in tensors})
        stated, origin = _stated(source, layout, metadata)
        if config is not None:
            stated, origin = config, "config="
        if stated is None:
            raise CheckpointError(
                f"{path}: nothing states its configuration, and its shapes are of no autoencoder with 32 groups "
                "to a norm; put its config.json beside it, name the folder with both, write it with "
                "ldmperf.model.save_autoencoder, or pass config=AutoencoderConfig(...) in Python"
            )
        network, slots, problem = _network(layout, stated, backend)
        if network is None or problem:
            raise CheckpointError(
                f"{path}: the tensors are not those of the configuration ({origin}): {problem}; give the whole "
                "checkpoint and the configuration that it was made with"
            )
        stored = [tensors[layout.stored(slot.key, stated)] for slot in slots]
        return filled(network, slots, stored, path, dtype, device)


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


def _stated(
    source: Source, layout: AutoencoderLayout, metadata: Mapping[str, str]
) -> tuple[AutoencoderConfig | None, str]:
    """The configuration that the checkpoint states, and where; None where nothing tells it."""
    inside = metadata.get(AUTOENCODER_METADATA_KEY)
    within = None
    if inside is not None:
        place = f"{source.files[0]}: metadata {AUTOENCODER_METADATA_KEY}"
        within = _checked(parse_json(inside.encode(), place), place)
        if not source.is_folder:
            return within, AUTOENCODER_METADATA_KEY
    beside = None
    if source.config_file is not None:
        raw = read_json(source.config_file)
        # Many files may lie beside a named one; a folder's config.json is its own.
        if source.is_folder or AUTOENCODER.is_config(raw):
            beside = _checked(raw, str(source.config_file))
    if beside is None:
        return config_of_shapes(layout), "that of its shapes"
    if within is not None and within != beside:
        raise CheckpointError(
            f"{source.files[0]}: its metadata and {source.config_file} differ; remove config.json, or write the "
            "file again with save_autoencoder"
        )
    if layout.compvis and not source.is_folder:
        # Stable Diffusion's file often lies in a folder with other networks.
        _, _, problem = _network(layout, beside, "auto")
        told = config_of_shapes(layout) if problem else None
        if told is not None:
            return told, "that of its shapes"
    return beside, str(source.config_file)


def _checked(raw: Mapping[str, Any], place: str) -> AutoencoderConfig:
    try:
        return AutoencoderConfig.from_diffusers(raw)
    except UnsupportedConfig as error:
        raise UnsupportedCheckpoint(f"{place}: {error}") from error
    except RecursionError as error:
        raise CheckpointError(f"{place}: nested too deep for a configuration") from error


def _network(
    layout: AutoencoderLayout, config: AutoencoderConfig, backend: str
) -> tuple[Autoencoder | None, list[Slot], str]:
    """The network without memory, its tensors' places, and how the file's tensors differ (empty: not at all)."""
    if problem := beyond_tensors(config, layout):
        return None, [], problem
    with torch.device("meta"):
        network = Autoencoder(config, backend=backend)
    slots = autoencoder_slots(network)
    expected = {layout.stored(slot.key, config): slot.shape for slot in slots}
    return network, slots, mismatch(expected, layout.shapes)

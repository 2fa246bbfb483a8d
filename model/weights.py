"""Weights in other people's formats: diffusers folders, and .safetensors in diffusers or CompVis key layout.

Headers are read and checked whole before any memory is taken.
"""

import dataclasses
import json
import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from .arguments import check_backend
from .config import UNetConfig, diffusers_config
from .fields import UnsupportedConfig, shown
from .files import (
    CheckpointError,
    Source,
    UnsupportedCheckpoint,
    find,
    is_unet_config,
    open_all,
    parse_json,
    read_json,
    some,
)
from .keys import Slot, weight_slots
from .releases import Layout, beyond, find_layout, published
from .unet import UNet

# Where `save_unet` keeps the configuration in the header of its file: JSON with the fields of a config.json.
METADATA_KEY = "ldmperf.unet_config"
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def load_unet(
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    config: UNetConfig | None = None,
    backend: str = "auto",
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

    dtype: float64, float32, float16 or bfloat16; the file's own unless given. Raises `CheckpointError` before
    memory is taken: missing, unexpected or misshapen tensors, other dtypes, truncated files, nothing to load, a
    configuration that is not implemented (`UnsupportedCheckpoint`, an `UnsupportedConfig` too). ValueError for
    another argument of the wrong kind, and for a device that is not there.
    """
    _check_dtype(dtype)
    _check_device(device)
    check_backend("backend", backend)
    if not isinstance(path, str | os.PathLike):
        raise ValueError(f"path must be a str or a Path; got {shown(path)}: give a checkpoint's file or folder")
    if not isinstance(config, UNetConfig | None):
        raise ValueError(
            f"config must be a UNetConfig; got a {type(config).__name__}: pass UNetConfig.from_diffusers(...) of "
            "the fields of a config.json"
        )
    path = Path(path)
    source = find(path)
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
        unet, slots, problem = _network(layout, stated, backend)
        if unet is None or problem:
            raise CheckpointError(
                f"{path}: the tensors are not those of the configuration ({origin}): {problem}; give the whole "
                "checkpoint and the configuration that it was made with"
            )
        stored = [tensors[layout.stored(slot.key, stated)] for slot in slots]
        dtype = _one_dtype(path, slots, stored, dtype)
        state = {
            name: torch.empty_like(parameter, dtype=dtype, device=device)
            for name, parameter in unet.state_dict().items()
        }
        for slot, tensor in zip(slots, stored, strict=True):
            target = state[slot.parameter].narrow(0, slot.start, slot.rows)
            target.copy_(tensor[:].reshape(target.shape))
        unet.load_state_dict(state, assign=True)
    return unet.eval().requires_grad_(False)


def save_unet(unet: UNet, path: str | Path, *, dtype: torch.dtype | None = None) -> None:
    """Write one .safetensors file in diffusers layout, with the configuration in its metadata.

    `load_unet` reads both back; diffusers reads the tensors beside a config.json of `diffusers_config`. dtype:
    float64, float32, float16 or bfloat16; the network's own unless given. The file is whole or absent. Raises
    ValueError for another dtype or ending of the name, OSError where the file cannot be written.
    """
    _check_dtype(dtype)
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: the name must end in .safetensors")
    # Parts of one parameter share its memory, and convolutions are channels-last: the file has neither.
    state = {
        key: value.detach().to("cpu", dtype or value.dtype, copy=True, memory_format=torch.contiguous_format)
        for key, value in diffusers_state_dict(unet).items()
    }
    config = {"_class_name": "UNet2DConditionModel", **diffusers_config(unet.config)}
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        safetensors.torch.save_file(state, unfinished, {"format": "pt", METADATA_KEY: json.dumps(config)})
        os.replace(unfinished, path)
    except SafetensorError as error:
        raise OSError(f"{path}: cannot be written: {error}") from error
    finally:
        unfinished.unlink(missing_ok=True)


def diffusers_state_dict(unet: UNet) -> dict[str, Tensor]:
    """The weights under diffusers' keys and in its shapes, for `UNet2DConditionModel.load_state_dict`.

    The tensors share their memory with the UNet's parameters.
    """
    state = unet.state_dict()
    return {
        slot.key: state[slot.parameter].narrow(0, slot.start, slot.rows).view(slot.shape)
        for slot in weight_slots(unet)
    }


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
        if source.is_folder or is_unet_config(raw):
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
        sample_size=1,
    )


def _network(layout: Layout, config: UNetConfig, backend: str) -> tuple[UNet | None, list[Slot], str]:
    """The network without memory, its tensors' places, and how the file's tensors differ (empty: not at all)."""
    if problem := beyond(config, layout.shapes.values()):
        return None, [], problem
    with torch.device("meta"):
        unet = UNet(config, backend=backend)
    slots = weight_slots(unet)
    return unet, slots, _mismatch(slots, layout, config)


def _mismatch(slots: list[Slot], layout: Layout, config: UNetConfig) -> str:
    """How the tensors differ from those of the configuration; empty where they do not."""
    expected = {layout.stored(slot.key, config): slot.shape for slot in slots}
    found = layout.shapes
    problems = {
        "missing": sorted(expected.keys() - found.keys()),
        "unexpected": sorted(found.keys() - expected.keys()),
        "misshapen": [
            f"{key} {list(found[key])} instead of {list(shape)}"
            for key, shape in sorted(expected.items())
            if key in found and found[key] != shape
        ],
    }
    return "; ".join(f"{len(names)} {kind}: {some(names)}" for kind, names in problems.items() if names)


def _check_dtype(dtype: torch.dtype | None) -> None:
    if dtype is not None and dtype not in _DTYPES.values():
        raise ValueError(f"dtype must be one of {', '.join(map(str, _DTYPES.values()))}; got {dtype}")


def _check_device(device: torch.device | str) -> None:
    try:
        torch.empty(0, device=torch.device(device))
    # AssertionError: a torch without CUDA.
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        raise ValueError(
            f"device {shown(device)} is not there: {str(error).splitlines()[0][:200]}; give 'cpu', or 'cuda' on a "
            "machine with a GPU that torch sees"
        ) from error


def _one_dtype(path: Path, slots: list[Slot], stored: list[Any], wanted: torch.dtype | None) -> torch.dtype:
    """The dtype to load in; the file's dtypes are checked whatever is wanted."""
    names = [tensor.get_dtype() for tensor in stored]
    # Quantized weights need their scales, which other tensors hold: a cast alone is wrong.
    if unknown := [f"{slot.key} ({name})" for slot, name in zip(slots, names, strict=True) if name not in _DTYPES]:
        raise CheckpointError(
            f"{path}: not a float dtype in {some(unknown)}; only {', '.join(_DTYPES)} are read: convert the file"
        )
    if wanted is None and len(set(names)) > 1:
        raise CheckpointError(f"{path}: mixed dtypes {', '.join(sorted(set(names)))}; pass dtype=")
    return wanted or _DTYPES[names[0]]

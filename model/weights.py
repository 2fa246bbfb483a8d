"""Weights in other people's formats: diffusers folders, and .safetensors in diffusers or CompVis key layout.

Headers are read and checked whole before any memory is taken.
"""

import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .config import UNetConfig, UnsupportedConfig
from .keys import Slot, compvis_key, weight_slots
from .unet import UNet

logger = logging.getLogger(__name__)

COMPVIS_PREFIX = "model.diffusion_model."
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded; the message says which file and which tensors, in one line."""


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
    it), or a .safetensors file in diffusers or CompVis key layout (a whole Stable Diffusion checkpoint too; what
    is not the UNet is left alone). A file carries no configuration: it is read off the shapes, except for the head
    counts, which follow the published releases (context width 768: 8 heads, 1024: heads of 64 channels); `config`
    overrides. dtype: the file's own unless given. Raises `CheckpointError` (missing, unexpected or misshapen
    tensors, truncated or empty files, nothing to load) and `UnsupportedConfig` before memory is taken.
    """
    path = Path(path)
    files, folder_config = _find(path)
    with ExitStack() as stack:
        tensors = _open(files, stack)
        shapes = {key: tuple(tensors[key].get_shape()) for key in tensors}
        layout = _layout(path, shapes)
        config = config or folder_config or _infer_config(path, layout)
        with torch.device("meta"):
            unet = UNet(config, backend=backend)
        slots = weight_slots(unet)
        _check(path, slots, layout, config)
        stored = [tensors[layout.stored(slot.key, config)] for slot in slots]
        dtype = dtype or _one_dtype(path, slots, stored)
        state = {
            name: torch.empty_like(parameter, dtype=dtype, device=device)
            for name, parameter in unet.state_dict().items()
        }
        for slot, tensor in zip(slots, stored, strict=True):
            target = state[slot.parameter].narrow(0, slot.start, slot.rows)
            target.copy_(tensor[:].reshape(target.shape))
    unet.load_state_dict(state, assign=True)
    return unet.eval().requires_grad_(False)


def diffusers_state_dict(unet: UNet) -> dict[str, Tensor]:
    """The weights under diffusers' keys and in its shapes, for `UNet2DConditionModel.load_state_dict`.

    The tensors share their memory with the UNet's parameters.
    """
    state = unet.state_dict()
    return {
        slot.key: state[slot.parameter].narrow(0, slot.start, slot.rows).view(slot.shape)
        for slot in weight_slots(unet)
    }


@dataclass(frozen=True)
class _Layout:
    """The tensors of a checkpoint that belong to the UNet: their shapes under the names that the file has."""

    shapes: Mapping[str, tuple[int, ...]]
    prefix: str
    compvis: bool

    @property
    def layers_per_block(self) -> int:
        def count(pattern: str) -> Iterator[int]:
            for key in self.shapes:
                if match := re.fullmatch(re.escape(self.prefix) + pattern, key):
                    yield int(match.group(1))

        if not self.compvis:
            return 1 + max(count(r"down_blocks\.0\.resnets\.(\d+)\.conv1\.weight"), default=-1)
        first = min(count(r"input_blocks\.(\d+)\.0\.op\.weight"), default=None)
        return max(count(r"input_blocks\.(\d+)\.0\..*"), default=0) if first is None else first - 1

    def stored(self, key: str, config: UNetConfig | None) -> str:
        """The file's name of a diffusers key."""
        if not self.compvis:
            return self.prefix + key
        layers = self.layers_per_block if config is None else config.layers_per_block
        return self.prefix + compvis_key(key, layers, () if config is None else config.attention)

    def shape(self, key: str) -> tuple[int, ...] | None:
        return self.shapes.get(self.stored(key, None))


def _find(path: Path) -> tuple[list[Path], UNetConfig | None]:
    """The files to read, and the configuration where the folder has one."""
    if path.is_file():
        if path.suffix != ".safetensors":
            raise CheckpointError(f"{path}: only .safetensors files are read; convert a pickle checkpoint first")
        return [path], None
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such file or folder")
    folder = path if (path / "config.json").is_file() else path / "unet"
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise CheckpointError(
            f"{path}: no config.json here or in a folder unet: not written by diffusers' save_pretrained"
        )
    try:
        raw = json.loads(config_file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{config_file}: not readable as JSON: {error}") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{config_file}: not a JSON object")
    try:
        config = UNetConfig.from_diffusers(raw)
    except UnsupportedConfig as error:
        raise UnsupportedConfig(f"{config_file}: {error}") from error
    # The plain weights, or their shards; a variant (.fp16 and the like) only where it stands alone.
    name = "diffusion_pytorch_model"
    for pattern in (f"{name}.safetensors", f"{name}-?????-of-?????.safetensors"):
        if files := sorted(folder.glob(pattern)):
            return files, config
    variants = sorted(folder.glob("*.safetensors"))
    if len(variants) == 1:
        return variants, config
    if variants:
        raise CheckpointError(f"{folder}: choose one of {', '.join(file.name for file in variants)} by its path")
    raise CheckpointError(
        f"{folder}: no .safetensors file (pickle weights are not read; save with safe_serialization)"
    )


def _open(files: Iterable[Path], stack: ExitStack) -> dict[str, Any]:
    """Every tensor of the files as a lazy slice; the headers are read, the data is not."""
    tensors: dict[str, Any] = {}
    for file in files:
        try:
            handle = stack.enter_context(safe_open(file, framework="pt"))
            for key in handle.keys():  # noqa: SIM118
                if key in tensors:
                    raise CheckpointError(
                        f"{file}: {key} is in another file of the folder too; remove stale shards"
                    )
                tensors[key] = handle.get_slice(key)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{file}: not a readable .safetensors file (truncated or empty?): {error}"
            ) from error
    return tensors


def _layout(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> _Layout:
    for prefix, probe, compvis in (
        (COMPVIS_PREFIX, "input_blocks.0.0.weight", True),
        ("", "input_blocks.0.0.weight", True),
        ("", "conv_in.weight", False),
        ("unet.", "conv_in.weight", False),
    ):
        if prefix + probe in shapes:
            own = {key: shape for key, shape in shapes.items() if key.startswith(prefix)}
            return _Layout(own, prefix, compvis)
    raise CheckpointError(
        f"{path}: no UNet in diffusers (conv_in.weight) or CompVis ({COMPVIS_PREFIX}input_blocks.0.0.weight) "
        f"layout among its {len(shapes)} tensors"
    )


def _infer_config(path: Path, layout: _Layout) -> UNetConfig:
    """Read off the shapes. Heads leave no trace in them: those of the published releases, by context width."""
    channels: list[int] = []
    attention: list[bool] = []
    while (conv := layout.shape(f"down_blocks.{len(channels)}.resnets.0.conv1.weight")) is not None:
        attention.append(layout.shape(f"down_blocks.{len(channels)}.attentions.0.proj_in.weight") is not None)
        channels.append(conv[0])
    level = attention.index(True) if True in attention else 0
    place = f"down_blocks.{level}.attentions.0"
    context = layout.shape(f"{place}.transformer_blocks.0.attn2.to_k.weight")
    projection = layout.shape(f"{place}.proj_in.weight")
    conv_in, conv_out = layout.shape("conv_in.weight"), layout.shape("conv_out.weight")
    if context is None or projection is None or conv_in is None or conv_out is None or len(context) != 2:
        raise CheckpointError(
            f"{path}: the configuration cannot be read off its tensors; pass config=UNetConfig(...)"
        )
    if context[1] == 768:
        heads = [8] * len(channels)
    elif context[1] == 1024 and all(width % 64 == 0 for width in channels):
        heads = [width // 64 for width in channels]
    else:
        raise CheckpointError(
            f"{path}: a file says nothing of the number of heads, and no release has context width {context[1]} "
            f"with channels {channels}; pass config=UNetConfig(...)"
        )
    config = UNetConfig(
        block_channels=tuple(channels),
        num_heads=tuple(heads),
        attention=tuple(attention),
        layers_per_block=layout.layers_per_block,
        has_middle=layout.shape("mid_block.resnets.0.conv1.weight") is not None,
        in_channels=conv_in[1],
        out_channels=conv_out[0],
        context_dim=context[1],
        conv_projection=len(projection) == 4,
    )
    logger.info("%s: configuration read off the shapes: %s", path, config)
    return config


def _check(path: Path, slots: list[Slot], layout: _Layout, config: UNetConfig) -> None:
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
    texts = [f"{len(names)} {kind}: {_some(names)}" for kind, names in problems.items() if names]
    if texts:
        raise CheckpointError(f"{path}: the tensors are not those of the configuration: " + "; ".join(texts))


def _some(names: list[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _one_dtype(path: Path, slots: list[Slot], stored: list[Any]) -> torch.dtype:
    names = {tensor.get_dtype() for tensor in stored}
    unknown = [slot.key for slot, tensor in zip(slots, stored, strict=True) if tensor.get_dtype() not in _DTYPES]
    if unknown:
        raise CheckpointError(f"{path}: not a float dtype in {_some(unknown)}")
    if len(names) > 1:
        raise CheckpointError(f"{path}: mixed dtypes {', '.join(sorted(names))}; pass dtype=")
    return _DTYPES[names.pop()]

"""`AutoencoderConfig`: the sizes of an autoencoder, and the fields of a diffusers config."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .fields import UnsupportedConfig, count, counts, each, integer, integers, shown, strings


@dataclass(frozen=True)
class AutoencoderConfig:
    """An autoencoder of latent diffusion (AutoencoderKL). Levels run from the full resolution down.

    `attention` puts one layer of self-attention into the middle of encoder and decoder. `quant_conv` and
    `post_quant_conv` are 1x1 convolutions behind the encoder and before the decoder. `sample_size`, in pixels, is
    the side of a tile of `decode_tiled` and `encode_tiled`.

    The rest is not read by the network, but by whoever calls it. A UNet's latents are
    (z - shift_factor) scaling_factor; with `latents_mean` and `latents_std`, one number per latent channel,
    (z - latents_mean) scaling_factor / latents_std. A factor of None is not known. `force_upcast` says that
    float16 overflows (`compute_dtype`).
    Raises `UnsupportedConfig`.
    """

    block_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    norm_groups: int = 32
    attention: bool = True
    quant_conv: bool = True
    post_quant_conv: bool = True
    sample_size: int = 512
    scaling_factor: float | None = 0.18215
    shift_factor: float | None = None
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None
    force_upcast: bool = True

    def __post_init__(self) -> None:
        for name in _COUNTS:
            self._set(name, count(name, getattr(self, name)))
        self._set("block_channels", counts("block_channels", self.block_channels))
        if not self.block_channels:
            raise UnsupportedConfig("block_channels is empty: give at least one level")
        if len(self.block_channels) > _MOST_LEVELS:
            raise UnsupportedConfig(
                f"block_channels has {len(self.block_channels)} levels, each half of the one before: give at most "
                f"{_MOST_LEVELS}"
            )
        for channels in self.block_channels:
            if channels % self.norm_groups:
                raise UnsupportedConfig(
                    f"block_channels: {channels} does not divide into norm_groups = {self.norm_groups}: "
                    f"give multiples of {self.norm_groups}, or other norm_groups"
                )
        for name in _FLAGS:
            self._set(name, bool(getattr(self, name)))
        for name in ("scaling_factor", "shift_factor"):
            if getattr(self, name) is not None:
                self._set(name, _number(name, getattr(self, name)))
        for name in ("latents_mean", "latents_std"):
            if getattr(self, name) is not None:
                numbers = tuple(_number(name, one) for one in each(name, getattr(self, name)))
                if len(numbers) != self.latent_channels:
                    raise UnsupportedConfig(
                        f"{name} has {len(numbers)} numbers for {self.latent_channels} latent channels: "
                        "give one for each"
                    )
                self._set(name, numbers)

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    @property
    def scale(self) -> int:
        """Pixels of an image along a side of a latent: 8 for Stable Diffusion."""
        return int(2 ** (len(self.block_channels) - 1))

    def compute_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """float32 for float16 where `force_upcast` says that it overflows, else the dtype itself.

        So diffusers' pipelines of Stable Diffusion XL do; those of 1 and 2 stay in float16 whatever it says.
        """
        return torch.float32 if self.force_upcast and dtype == torch.float16 else dtype

    @classmethod
    def from_diffusers(cls, config: Mapping[str, Any]) -> AutoencoderConfig:
        """From the config.json of a diffusers `AutoencoderKL`; absent fields take that class's defaults.

        Raises `UnsupportedConfig` naming every field whose value this network does not implement, unknown fields
        included.
        """
        return _from_diffusers(config)


_COUNTS = ("layers_per_block", "in_channels", "out_channels", "latent_channels", "norm_groups", "sample_size")
_FLAGS = ("attention", "quant_conv", "post_quant_conv", "force_upcast")
# A side of 2^16 pixels is one latent then.
_MOST_LEVELS = 17
_DOWN, _UP = "DownEncoderBlock2D", "UpDecoderBlock2D"

# Our field, diffusers' field, and the default of AutoencoderKL.
_FIELDS: tuple[tuple[str, str, Any], ...] = (
    ("block_channels", "block_out_channels", (64,)),
    ("layers_per_block", "layers_per_block", 1),
    ("in_channels", "in_channels", 3),
    ("out_channels", "out_channels", 3),
    ("latent_channels", "latent_channels", 4),
    ("norm_groups", "norm_num_groups", 32),
    ("attention", "mid_block_add_attention", True),
    ("quant_conv", "use_quant_conv", True),
    ("post_quant_conv", "use_post_quant_conv", True),
    ("sample_size", "sample_size", 32),
    ("scaling_factor", "scaling_factor", 0.18215),
    ("shift_factor", "shift_factor", None),
    ("latents_mean", "latents_mean", None),
    ("latents_std", "latents_std", None),
    ("force_upcast", "force_upcast", True),
)
_BLOCKS = {"down_block_types": _DOWN, "up_block_types": _UP}
_ACTIVATIONS = ("silu", "swish")


def _number(name: str, value: Any) -> float:
    if not _is_number(value):
        raise UnsupportedConfig(f"{name} = {shown(value)}: give a finite number")
    return float(value)


def _is_number(value: Any) -> bool:
    if integer(value) is None and not isinstance(value, float):
        return False
    try:
        return math.isfinite(float(value))
    except OverflowError:
        return False


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _is_integer(value: Any) -> bool:
    return integer(value) is not None


def _are_numbers(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(_is_number(one) for one in value)


def _or_none(accepts: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or accepts(value)


_ACCEPTED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "block_out_channels": (integers, "only a list, one integer per level"),
    **dict.fromkeys(
        ("layers_per_block", "in_channels", "out_channels", "latent_channels", "norm_num_groups", "sample_size"),
        (_is_integer, "only one integer"),
    ),
    **dict.fromkeys(
        ("mid_block_add_attention", "use_quant_conv", "use_post_quant_conv", "force_upcast"),
        (_is_flag, "only true or false"),
    ),
    **dict.fromkeys(("scaling_factor", "shift_factor"), (_or_none(_is_number), "only a finite number or null")),
    **dict.fromkeys(("latents_mean", "latents_std"), (_or_none(_are_numbers), "only a list of numbers or null")),
}


def _from_diffusers(config: Mapping[str, Any]) -> AutoencoderConfig:
    problems: list[str] = []

    def refuse(field: str, value: Any, only: str) -> None:
        problems.append(f"{shown(field)[1:-1]} = {shown(value)} ({only})")

    class_name = config.get("_class_name", "AutoencoderKL")
    if class_name != "AutoencoderKL":
        refuse("_class_name", class_name, "only 'AutoencoderKL'")
    known = {theirs for _, theirs, _ in _FIELDS}
    for field, value in config.items():
        if field.startswith("_") or field in known or field in _BLOCKS:
            continue
        if field != "act_fn":
            refuse(field, value, "unknown field")
        elif not isinstance(value, str) or value not in _ACTIVATIONS:
            refuse(field, value, "only 'silu'")

    read = {theirs: config.get(theirs, default) for _, theirs, default in _FIELDS}
    size = read["sample_size"]
    if isinstance(size, list | tuple):
        # Only the first says how large diffusers' tiles of latents are; a square has but one.
        read["sample_size"] = size[0] if integers(size) and len(set(map(int, size))) == 1 else "not square"
    for field, value in read.items():
        accepts, only = _ACCEPTED[field]
        if not accepts(value):
            refuse(field, value, only)
    for field, name in _BLOCKS.items():
        _check_blocks(field, name, config.get(field, (name,)), read["block_out_channels"], refuse)
    if problems:
        raise UnsupportedConfig(
            f"unsupported autoencoder config: {'; '.join(problems)}: "
            "use an autoencoder with the values told, or run this one in diffusers"
        )
    return AutoencoderConfig(**{ours: _frozen(read[theirs]) for ours, theirs, _ in _FIELDS})


def _check_blocks(
    field: str, name: str, value: Any, channels: Any, refuse: Callable[[str, Any, str], None]
) -> None:
    if not strings(value):
        refuse(field, value, "only a list, one string per level")
    elif any(one != name for one in value):
        refuse(field, next(one for one in value if one != name), f"only {name!r}")
    elif integers(channels) and len(value) != len(channels):
        refuse(field, value, f"only one per level, {len(channels)}")


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, Iterable) and not isinstance(value, str) else value


def autoencoder_diffusers_config(config: AutoencoderConfig) -> dict[str, Any]:
    """The arguments with which diffusers' `AutoencoderKL` builds the same network."""
    levels = len(config.block_channels)
    return {
        **{theirs: getattr(config, ours) for ours, theirs, _ in _FIELDS},
        "down_block_types": (_DOWN,) * levels,
        "up_block_types": (_UP,) * levels,
        "act_fn": "silu",
    }

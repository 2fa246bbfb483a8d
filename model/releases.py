"""The layout of a checkpoint, from the names of its tensors, and its published release, from their shapes."""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from .config import UNetConfig
from .files import CheckpointError, some
from .keys import compvis_key
from .loading import shortage
from .reader import Layout, Shape

# Prefixes of training code: DataParallel, torch.compile, Lightning, a pipeline or a whole model.
_PREFIXED = re.compile(
    r"((?:(?:module|_orig_mod|model|diffusion_model|unet)\.)*)(conv_in|input_blocks\.0\.0)\.weight"
)


@dataclass(frozen=True)
class UNetLayout(Layout[UNetConfig]):
    """The UNet's tensors."""

    def stored(self, key: str, config: UNetConfig) -> str:
        return self.prefix + (compvis_key(key, config.layers_per_block, config.attention) if self.compvis else key)

    def shape(self, key: str, config: UNetConfig) -> Shape:
        """The shape under a diffusers key; () where there is no such tensor."""
        return self.shapes.get(self.stored(key, config), ())

    def told(self) -> tuple[UNetConfig | None, str]:
        release = published(self)
        return (None, "") if release is None else (release.config, release.name)


def find_layout(place: str, shapes: Mapping[str, Shape]) -> UNetLayout:
    """The UNet among the tensors of a checkpoint, with any prefix of training code before its names."""
    found = [match for key in shapes if (match := _PREFIXED.fullmatch(key))]
    if not found:
        if other := _other_prefix(shapes):
            raise CheckpointError(
                f"{place}: the UNet's tensors begin with {other!r}, a prefix that is not known; strip it and save "
                f"the file again: {{key.removeprefix({other!r}): value for key, value in tensors.items()}}"
            )
        raise CheckpointError(
            f"{place}: no UNet in diffusers (conv_in.weight) or CompVis (input_blocks.0.0.weight) layout among "
            f"its {len(shapes)} tensors ({some(sorted(shapes), 3)}); give a UNet's file or folder"
        )
    if len(found) > 1:
        names = some(match[0] for match in found)
        raise CheckpointError(f"{place}: more than one UNet: {names}; keep one of them in the file")
    prefix = found[0][1]
    own = {key: shape for key, shape in shapes.items() if key.startswith(prefix)}
    return UNetLayout(own, prefix, compvis=found[0][2] != "conv_in")


def _other_prefix(shapes: Mapping[str, Shape]) -> str:
    """The prefix of a UNet's names, empty where there is none; an autoencoder has no time embedding."""
    for first, time in (("conv_in", "time_embedding.linear_1"), ("input_blocks.0.0", "time_embed.0")):
        for key in shapes:
            prefix = key.removesuffix(f"{first}.weight")
            if key.endswith(f".{first}.weight") and f"{prefix}{time}.weight" in shapes:
                return prefix
    return ""


@dataclass(frozen=True)
class Release:
    """Published weights whose shapes tell their configuration, head counts included.

    diffusers: in diffusers layout too. Other UNets have the shapes of Stable Diffusion 2 there, with other heads.
    """

    name: str
    config: UNetConfig
    diffusers: bool = True

    def has(self, layout: UNetLayout) -> bool:
        """Whether the layout has the shapes that distinguish this release from all others."""
        level = self.config.attention.index(True)
        width, context = self.config.block_channels[level], self.config.context_dim
        classes = self.config.num_class_embeds
        place = f"down_blocks.{level}.attentions.0"
        first, second = (f"{place}.transformer_blocks.0.attn{i}.to_k.weight" for i in (1, 2))
        from_context = self.config.only_cross_attention[level]
        return (
            (layout.compvis or self.diffusers)
            and layout.shape("conv_in.weight", self.config)[:1] == self.config.block_channels[:1]
            and layout.shape("class_embedding.weight", self.config)[:1] == (() if classes is None else (classes,))
            and layout.shape(first, self.config) == (width, context if from_context else width)
            and layout.shape(second, self.config) == (width, context)
            and len(layout.shape(f"{place}.proj_in.weight", self.config))
            == (4 if self.config.conv_projection else 2)
        )


RELEASES = (
    Release("Stable Diffusion 1", UNetConfig(context_dim=768, conv_projection=True)),
    Release("Stable Diffusion 2", UNetConfig(num_heads=(5, 10, 20, 20)), diffusers=False),
    Release(
        "Stable Diffusion x4 upscaler",
        UNetConfig(
            block_channels=(256, 512, 512, 1024),
            attention=(False, True, True, True),
            in_channels=7,
            sample_size=128,
            only_cross_attention=(True, True, True, False),
            num_class_embeds=1000,
        ),
    ),
    Release(
        "Stable Diffusion XL base",
        UNetConfig(
            block_channels=(320, 640, 1280),
            num_heads=(5, 10, 20),
            attention=(False, True, True),
            context_dim=2048,
            sample_size=128,
            transformer_layers=(1, 2, 10),
            added_time_dim=256,
            added_dim=2816,
        ),
    ),
    Release(
        "Stable Diffusion XL refiner",
        UNetConfig(
            block_channels=(384, 768, 1536, 1536),
            num_heads=(6, 12, 24, 24),
            attention=(False, True, True, False),
            context_dim=1280,
            sample_size=128,
            transformer_layers=(4, 4, 4, 4),
            added_time_dim=256,
            added_dim=2560,
        ),
    ),
)

_CONFIGS = {release.name: release.config for release in RELEASES}
# Releases by the names that people call them, for networks of their shape without their weights.
RELEASED: dict[str, UNetConfig] = {
    "SD1.5": _CONFIGS["Stable Diffusion 1"],
    "SDXL": _CONFIGS["Stable Diffusion XL base"],
}


def published(layout: UNetLayout) -> Release | None:
    """The release that a file without configuration is of, with the file's own number of input channels."""
    for release in RELEASES:
        if release.has(layout):
            shape = layout.shape("conv_in.weight", release.config)
            # The check of all tensors refuses a shape that is no convolution's.
            channels = shape[1] if len(shape) == 4 and shape[1] else release.config.in_channels
            config = dataclasses.replace(release.config, in_channels=channels)
            return dataclasses.replace(release, config=config)
    return None


def beyond(config: UNetConfig, shapes: Iterable[Shape]) -> str:
    """How far a configuration is beyond the tensors at hand; empty where a network of it may be built.

    The counts are lower bounds, by arithmetic: shortcuts, norms and biases are not counted in the parameters.
    """
    layers, levels = config.layers_per_block, len(config.block_channels)
    tensors, parameters = 10, 9 * config.block_channels[0] * (config.in_channels + config.out_channels)
    for level, width in enumerate(config.block_channels):
        middle = config.has_middle and level == levels - 1
        resblocks = 2 * layers + 1 + 2 * middle
        transformers = (2 * layers + 1) * config.attention[level] + middle
        blocks = transformers * config.transformer_layers[level]
        tensors += 10 * resblocks + 6 * transformers + 20 * blocks
        parameters += 9 * resblocks * width**2 + blocks * (16 * width**2 + 2 * width * config.context_dim)
        from_context = (blocks - middle * config.transformer_layers[level]) * config.only_cross_attention[level]
        parameters += 2 * width * (from_context * config.context_dim + (blocks - from_context) * width)
    parameters += config.time_dim * ((config.added_dim or 0) + (config.num_class_embeds or 0))
    parameters += config.block_channels[0] * (config.time_cond_proj_dim or 0)
    return shortage(tensors, parameters, shapes)

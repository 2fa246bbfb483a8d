"""The rivals as a table: kinds, sizes, and what a sample of each takes and ends with. Values alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

KINDS = ("vae-decoder", "masked-transformer", "gan")
RIVAL_BACKENDS = ("eager", "compile", "compile-max")

# What a sample ends with: an image, or the tokens that a decoder makes one of. The family's ends with latents.
Result = Literal["image", "tokens"]


@dataclass(frozen=True)
class VaeDecoderShape:
    """The decoder of diffusers' AutoencoderKL: channels of its levels, from the image's resolution down."""

    block_channels: tuple[int, ...]
    layers_per_block: int = 2
    norm_groups: int = 32


@dataclass(frozen=True)
class VqDecoderShape:
    """The decoder of diffusers' VQModel, from tokens; each level but the first halves the resolution."""

    block_channels: tuple[int, ...] = (128, 256, 256, 512, 768)
    layers_per_block: int = 2
    norm_groups: int = 32
    latent_channels: int = 64
    codebook: int = 8192


@dataclass(frozen=True)
class TransformerShape:
    """diffusers' UVit2DModel as aMUSEd-512 has it; a token stands for `pixels` x `pixels` of the image.

    `hidden`: width of the transformer, `channels`: of the convolutions and embeddings around it, at the resolution
    of the tokens; the transformer runs at half of it. The defaults are aMUSEd-512's own.
    """

    hidden: int = 1024
    layers: int = 22
    heads: int = 16
    feed_forward: int = 2816
    channels: int = 768
    channel_heads: int = 12
    res_blocks: int = 3
    text_dim: int = 768
    codebook: int = 8192
    vocabulary: int = 8256
    pixels: int = 16


@dataclass(frozen=True)
class GanShape:
    """A StyleGAN2 generator: `channel_base` / resolution channels in each block, at most `most_channels`."""

    channel_base: int = 32768
    most_channels: int = 512
    style_dim: int = 512
    mapping_layers: int = 8


Shape = VaeDecoderShape | VqDecoderShape | TransformerShape | GanShape


@dataclass(frozen=True)
class Rival:
    """A generator of another kind at one size.

    steps: network evaluations of a sample. guidance_scale: of one that takes a text, unless told; None for one
    that takes none. decoder: the name of what makes an image of its result, None where that is an image.
    """

    kind: str
    shape: Shape
    steps: int = 1
    guidance_scale: float | None = None
    ends_with: Result = "image"
    decoder: str | None = None


def _masked(shape: TransformerShape) -> Rival:
    # aMUSEd's own: 12 steps at guidance 10 (diffusers' AmusedPipeline.__call__).
    return Rival("masked-transformer", shape, 12, 10.0, "tokens", "vq-decoder-88M")


# By name: the kind, and the parameters at an image of 512x512. The first decoder is Stable Diffusion's own, the
# second transformer aMUSEd-512's, the first GAN StyleGAN2's configuration F.
RIVALS: Mapping[str, Rival] = {
    "vae-decoder-50M": Rival("vae-decoder", VaeDecoderShape((128, 256, 512, 512))),
    "vae-decoder-309M": Rival("vae-decoder", VaeDecoderShape((320, 640, 1280, 1280))),
    "masked-transformer-47M": _masked(
        TransformerShape(hidden=384, layers=10, heads=6, feed_forward=1056, channels=256, channel_heads=4)
    ),
    "masked-transformer-608M": _masked(TransformerShape()),
    "gan-30M": Rival("gan", GanShape()),
    "gan-397M": Rival("gan", GanShape(channel_base=131072, most_channels=2048)),
}

# What makes an image of latents and of tokens: Stable Diffusion's own, and aMUSEd's.
LATENT_DECODER = "vae-decoder-50M"
DECODERS: Mapping[str, Rival] = {
    LATENT_DECODER: RIVALS[LATENT_DECODER],
    "vq-decoder-88M": Rival("vq-decoder", VqDecoderShape()),
}

"""Whether the parts of a pipeline's folder fit each other."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ..autoencoder_config import AutoencoderConfig
from ..config import UNetConfig
from .text_part import TextPart

# Numbers of an image's sizes that Stable Diffusion XL's base network takes: size, crop, target.
SIZES = 6


def misfits(
    path: Path, is_xl: bool, unet: UNetConfig, autoencoder: AutoencoderConfig, text: list[TextPart]
) -> Iterator[str]:
    """Lines on parts that do not fit each other."""
    config, sizes = path / "unet" / "config.json", [part.width for part in text]
    widths, same = " + ".join(map(str, sizes)), "take all parts from one checkpoint"
    if unet.context_dim != sum(sizes):
        yield f"{config}: cross_attention_dim = {unet.context_dim}, but the text encoders give {widths}; {same}"
    if len({part.length for part in text}) > 1:
        yield f"{path}: the tokenizers make prompts of {[part.length for part in text]} tokens; {same}"
    channels = autoencoder.latent_channels
    if unet.in_channels != channels:
        what = "an inpainting UNet, which needs a mask" if unet.in_channels == 2 * channels + 1 else "another kind"
        yield f"{config}: in_channels = {unet.in_channels} for {channels} latent channels: {what}; {same}"
    if unet.out_channels != channels:
        yield f"{config}: out_channels = {unet.out_channels} for {channels} latent channels; {same}"
    if autoencoder.scaling_factor is None:
        yield f"{path / 'vae' / 'config.json'}: scaling_factor is null; download the file again"
    if autoencoder.out_channels != 3:
        yield f"{path / 'vae' / 'config.json'}: out_channels = {autoencoder.out_channels}, not red, green and blue"
    if is_xl:
        wanted = text[1].pooled_width + SIZES * (unet.added_time_dim or 0)
        if unet.added_dim is None:
            yield f"{config}: no addition_embed_type, which Stable Diffusion XL has; {same}"
        elif unet.added_dim != wanted:
            yield (
                f"{config}: projection_class_embeddings_input_dim = {unet.added_dim}, but the second text encoder "
                f"and {SIZES} sizes give {wanted} (a refiner takes 5 sizes: give the base's folder); {same}"
            )
    elif unet.added_dim is not None:
        yield f"{config}: addition_embed_type = 'text_time' is Stable Diffusion XL's; {same}"

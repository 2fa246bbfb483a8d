"""diffusers' decoders, from latents or tokens to an image: AutoencoderKL and VQModel without their encoders."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..measure.outcomes import Unsupported
from ..peer import import_diffusers
from ..trajectory.case import Case
from .kind import LATENT_PIXELS, RivalKind
from .rival import VaeDecoderShape, VqDecoderShape


class LatentDecoder(nn.Module):
    """`AutoencoderKL.decode`: latents [B, 4, h, w] to an image [B, 3, 8h, 8w]."""

    def __init__(self, autoencoder: Any) -> None:
        super().__init__()
        self.post_quant_conv: nn.Module = autoencoder.post_quant_conv
        self.decoder: nn.Module = autoencoder.decoder

    def forward(self, latents: Tensor) -> Tensor:
        image: Tensor = self.decoder(self.post_quant_conv(latents))
        return image


class TokenDecoder(nn.Module):
    """`VQModel.decode` of tokens [B, h, w]: their entries in the codebook, then the decoder."""

    def __init__(self, autoencoder: Any) -> None:
        super().__init__()
        self.embedding: nn.Module = autoencoder.quantize.embedding
        self.post_quant_conv: nn.Module = autoencoder.post_quant_conv
        self.decoder: nn.Module = autoencoder.decoder

    def forward(self, tokens: Tensor) -> Tensor:
        entries = self.embedding(tokens).permute(0, 3, 1, 2)
        image: Tensor = self.decoder(self.post_quant_conv(entries))
        return image


@dataclass(frozen=True)
class VaeDecoder(RivalKind):
    """One pass of a VAE's decoder (Kingma and Welling, arXiv 1312.6114) from random latents."""

    shape: VaeDecoderShape

    def network(self, case: Case) -> nn.Module:
        shape = self.shape
        levels = len(shape.block_channels)
        return LatentDecoder(
            import_diffusers().AutoencoderKL(
                block_out_channels=shape.block_channels,
                down_block_types=("DownEncoderBlock2D",) * levels,
                up_block_types=("UpDecoderBlock2D",) * levels,
                layers_per_block=shape.layers_per_block,
                latent_channels=4,
                norm_num_groups=shape.norm_groups,
            )
        )

    def arguments(self, case: Case, generator: torch.Generator) -> dict[str, Tensor]:
        size = (case.batch, 4, case.latent_height, case.latent_width)
        return {"latents": torch.randn(size, generator=generator)}


@dataclass(frozen=True)
class VqDecoder(RivalKind):
    """The decoder of a vector-quantized autoencoder (Esser et al., arXiv 2012.09841) from random tokens."""

    shape: VqDecoderShape

    def network(self, case: Case) -> nn.Module:
        shape = self.shape
        levels = len(shape.block_channels)
        return TokenDecoder(
            import_diffusers().VQModel(
                block_out_channels=shape.block_channels,
                down_block_types=("DownEncoderBlock2D",) * levels,
                up_block_types=("UpDecoderBlock2D",) * levels,
                layers_per_block=shape.layers_per_block,
                latent_channels=shape.latent_channels,
                num_vq_embeddings=shape.codebook,
                norm_num_groups=shape.norm_groups,
                mid_block_add_attention=False,
                lookup_from_codebook=True,
            )
        )

    def arguments(self, case: Case, generator: torch.Generator) -> dict[str, Tensor]:
        height, width = token_grid(case, 2 ** (len(self.shape.block_channels) - 1))
        size = (case.batch, height, width)
        return {"tokens": torch.randint(self.shape.codebook, size, generator=generator)}


def token_grid(case: Case, pixels: int, multiple: int = 1) -> tuple[int, int]:
    """Height and width in tokens of so many pixels a side; `Unsupported` unless whole multiples of `multiple`."""
    sides = case.latent_height * LATENT_PIXELS, case.latent_width * LATENT_PIXELS
    if any(side % (pixels * multiple) for side in sides):
        raise Unsupported(
            f"{case.unet} makes images whose sides are multiples of {pixels * multiple} pixels; "
            f"this one is {sides[0]}x{sides[1]}: choose another --latent"
        )
    return sides[0] // pixels, sides[1] // pixels

"""The autoencoder between images and latents: `encode`, `decode`, and both in tiles for large images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldmperf.kernels import philox_normal, seed_tensor

from .arguments import check_backend
from .autoencoder_blocks import decoder_of, encoder_of
from .autoencoder_config import AutoencoderConfig
from .private import PrivacyKept
from .tiles import Tiling, apply_tiled
from .written import as_image, as_tokens

# As diffusers' DiagonalGaussianDistribution: beyond, exp() and its square leave float16's range of use.
_LEAST_LOGVAR, _MOST_LOGVAR = -30.0, 20.0


class Moments(NamedTuple):
    """The normal distribution of an image's latents: mean and logarithm of the variance, each [B, L, h, w]."""

    mean: Tensor
    logvar: Tensor

    def sample(self, *, seeds: Sequence[int] | Tensor | None = None, noise: Tensor | None = None) -> Tensor:
        """Latents mean + exp(logvar / 2) noise, with standard normal noise [B, L, h, w] or from a seed per image.

        A seed gives the noise of `ldmperf.samplers.initial_noise`: the same on every device and in any batch.
        Raises ValueError unless one of both is given and fits.
        """
        if (seeds is None) == (noise is None):
            raise ValueError("give seeds, one per image, or noise, not both: take .mean for neither")
        if noise is None:
            assert seeds is not None
            noise = philox_normal(seed_tensor(seeds, self.mean.device), self.mean.shape[1:])
        if noise.shape != self.mean.shape:
            raise ValueError(
                f"noise must be {list(self.mean.shape)}; got {list(noise.shape)}: give one number per latent, or "
                "one seed per image"
            )
        return self.mean + torch.exp(0.5 * self.logvar) * noise.to(self.mean)


class Autoencoder(nn.Module):
    """The autoencoder of latent diffusion, AutoencoderKL (Rombach et al., arXiv 2112.10752, section 3.1).

    `backend` goes to every operator as in `UNet`, except to attention that no kernel serves (`ImageAttention`).
    It computes in the dtype of its weights: whether float16 is too narrow says `config.compute_dtype`, and whoever
    calls casts (`.to(torch.float32)`), as diffusers' pipelines do. Weights of convolutions are channels-last, as
    the activations are. Raises ValueError for another `backend`.
    """

    def __init__(self, config: AutoencoderConfig, *, backend: str = "auto") -> None:
        super().__init__()
        check_backend("backend", backend)
        self.config = config
        latents = config.latent_channels
        self.encoder = encoder_of(config, backend)
        self.decoder = decoder_of(config, backend)
        # 1x1 convolutions, as linear layers of the tokens.
        self.quant_conv = nn.Linear(2 * latents, 2 * latents) if config.quant_conv else None
        self.post_quant_conv = nn.Linear(latents, latents) if config.post_quant_conv else None
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks it
        self._privacy = PrivacyKept()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the network computes in."""
        return self.decoder.conv_in.weight.dtype

    def encode(self, image: Tensor) -> Moments:
        """The moments [B, L, H // scale, W // scale] of images [B, Cin, H, W] with values from -1 to 1.

        Raises ValueError for shapes that do not fit.
        """
        self._check("image", image, self.config.in_channels, self.config.scale)
        return _moments(self._encode(image))

    def decode(self, latents: Tensor) -> Tensor:
        """Images [B, Cout, scale h, scale w] of latents [B, L, h, w]; values from -1 to 1, and somewhat beyond.

        The latents are the encoder's: a UNet's are divided by `config.scaling_factor` before. Raises ValueError
        for shapes that do not fit.
        """
        self._check("latents", latents, self.config.latent_channels, 1)
        return self._decode(latents)

    def decode_tiled(self, latents: Tensor, *, tile: int | None = None, overlap: float = 0.25) -> Tensor:
        """`decode` in squares of `tile` latents that share `overlap` of their side with the next, blended there.

        For images whose activations do not fit into memory: beside latents and image it takes what one tile takes,
        and the overlaps of one row of tiles. `tile` is `config.sample_size` in latents unless given. Latents that
        fit into a tile are decoded whole. The result differs from `decode` even within a tile: a group norm sees
        its tile alone. It is that of diffusers' `tiled_decode`, where its sizes are whole numbers. Raises
        ValueError for shapes that do not fit, and for no tiles.
        """
        self._check("latents", latents, self.config.latent_channels, 1)
        tiles, scale = self._tiling(tile, overlap), self.config.scale
        if tiles.covers(latents):
            return self._decode(latents)
        size = (latents.shape[0], self.config.out_channels, *(scale * n for n in latents.shape[2:]))
        return apply_tiled(self._decode, latents, tiles, self._empty(size, latents), tiles.times(scale))

    def encode_tiled(self, image: Tensor, *, tile: int | None = None, overlap: float = 0.25) -> Moments:
        """`encode` in squares of `tile` latents, as `decode_tiled`."""
        config, scale = self.config, self.config.scale
        self._check("image", image, config.in_channels, scale)
        tiles = self._tiling(tile, overlap)
        if tiles.times(scale).covers(image):
            return _moments(self._encode(image))
        # Pixels beyond the last whole latent are in no latent of `encode` either.
        size = (image.shape[0], 2 * config.latent_channels, *(n // scale for n in image.shape[2:]))
        out = self._empty(size, image)
        return _moments(apply_tiled(self._encode, image, tiles.times(scale), out, tiles))

    def _tiling(self, tile: int | None, overlap: float) -> Tiling:
        return Tiling.of(max(self.config.sample_size // self.config.scale, 1) if tile is None else tile, overlap)

    def _empty(self, size: Sequence[int], like: Tensor) -> Tensor:
        return torch.empty(size, dtype=self.dtype, device=like.device, memory_format=torch.channels_last)

    def forward(self, image: Tensor) -> Tensor:
        """The image [B, Cin, H, W] encoded and its mean decoded."""
        return self.decode(self.encode(image).mean)

    def _encode(self, image: Tensor) -> Tensor:
        return _pointwise(self.encoder(self._prepared(image), self._in_place()), self.quant_conv)

    def _decode(self, latents: Tensor) -> Tensor:
        out: Tensor = self.decoder(_pointwise(self._prepared(latents), self.post_quant_conv), self._in_place())
        return out

    def _prepared(self, x: Tensor) -> Tensor:
        return x.to(self.dtype, memory_format=torch.channels_last)

    def _in_place(self) -> bool:
        return not torch.is_grad_enabled() and self._privacy.holds(self)

    def _check(self, name: str, x: Tensor, channels: int, least: int) -> None:
        fits = isinstance(x, Tensor) and x.ndim == 4 and x.shape[1] == channels
        if not fits or min(x.shape[2:]) < least:
            got = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"{name} must be [B, {channels}, H, W] with H and W of at least {least}; got {got}")


def _pointwise(x: Tensor, layer: nn.Linear | None) -> Tensor:
    return x if layer is None else as_image(F.linear(as_tokens(x), layer.weight, layer.bias), x.shape[2:])


def _moments(both: Tensor) -> Moments:
    mean, logvar = both.chunk(2, dim=1)
    return Moments(mean, logvar.clamp(_LEAST_LOGVAR, _MOST_LOGVAR))

"""`PipelineAutoencoder`: our autoencoder where a diffusers pipeline expects its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import AutoencoderMixin, DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from ..autoencoder import Autoencoder
from ..autoencoder_config import AutoencoderConfig, autoencoder_diffusers_config
from ..autoencoder_weights import autoencoder_state_dict
from ..fields import UnsupportedConfig
from ..loading import allocate
from .pipeline_model import PipelineModel
from .unet_source import changed_module, weights_reason


class PipelineAutoencoder(PipelineModel, AutoencoderMixin):  # type: ignore[misc]
    """Our autoencoder with the signatures, the outputs and the configuration of diffusers' AutoencoderKL.

    vae      a `ldmperf.model.Autoencoder`
    config   the fields of a diffusers config.json; those of the network's configuration unless given
    source   diffusers' AutoencoderKL that the weights were copied from, for `undo`; later changes of it are not
             followed
    """

    host = AutoencoderKL

    def __init__(self, vae: Autoencoder, *, config: Mapping[str, Any] | None = None, source: Any = None) -> None:
        super().__init__()
        if not isinstance(vae, Autoencoder):
            raise ValueError(
                f"PipelineAutoencoder: vae must be a ldmperf.model.Autoencoder, not {type(vae).__name__}: "
                "load_autoencoder(folder) makes one, rebuild(pipe) takes the pipeline's"
            )
        self.vae = vae
        self._set_up(autoencoder_diffusers_config(vae.config) if config is None else config)
        self._source = (source,)
        self.use_slicing = self.use_tiling = False
        self.tile_sample_min_size = vae.config.sample_size
        self.tile_latent_min_size = vae.config.sample_size // vae.config.scale
        self.tile_overlap_factor = 0.25
        self.train(vae.training)

    @classmethod
    def of(cls, source: Any, *, backend: str = "auto") -> PipelineAutoencoder:
        """Ours with the weights and the configuration of diffusers' model. Raises ValueError, in one line."""
        if (reason := reason_left(source)) is not None:
            raise ValueError(f"this autoencoder stays diffusers': {reason}")
        parameter = next(source.parameters())
        with torch.inference_mode(False), torch.no_grad():
            with torch.device("meta"):
                vae = Autoencoder(_config(source), backend=backend)
            allocate(vae, parameter.dtype, parameter.device)
            theirs = source.state_dict()
            for key, view in autoencoder_state_dict(vae).items():
                view.copy_(theirs[key])
        ours = cls(
            vae.train(source.training).requires_grad_(False),
            config=source.config,
            source=source,
        )
        for name in ("use_slicing", "use_tiling", *_TILES):
            setattr(ours, name, getattr(source, name))
        return ours

    @property
    def source(self) -> Any:
        """diffusers' model that the weights were copied from; None where there is none."""
        return self._source[0]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the network computes in."""
        return self.vae.dtype

    @property
    def post_quant_conv(self) -> nn.Module | None:
        """The network's, for pipelines that read its dtype."""
        return self.vae.post_quant_conv

    def _views(self) -> dict[str, Tensor]:
        return autoencoder_state_dict(self.vae)

    @apply_forward_hook
    def encode(
        self, x: Tensor, return_dict: bool = True
    ) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """The distribution of the latents [B, L, h, w] of images x [B, C, H, W]."""
        self._check_is_here(self.vae.decoder.conv_in.weight)
        parts = x.split(1) if self.use_slicing else (x,)
        both = torch.cat([torch.cat(self._encoded(part), dim=1) for part in parts])
        distribution = DiagonalGaussianDistribution(both)
        return AutoencoderKLOutput(latent_dist=distribution) if return_dict else (distribution,)

    def _encoded(self, x: Tensor) -> tuple[Tensor, Tensor]:
        side = self.tile_sample_min_size
        if self.use_tiling and max(x.shape[2:]) > side:
            return self.vae.encode_tiled(x, tile=side // self.vae.config.scale, overlap=self.tile_overlap_factor)
        return self.vae.encode(x)

    @apply_forward_hook
    def decode(
        self, z: Tensor, return_dict: bool = True, generator: torch.Generator | None = None
    ) -> DecoderOutput | tuple[Tensor]:
        """Images [B, C, H, W] of latents z [B, L, h, w]; nothing is drawn from the generator."""
        self._check_is_here(self.vae.decoder.conv_in.weight)
        parts = z.split(1) if self.use_slicing else (z,)
        image = torch.cat([self._decoded(part) for part in parts])
        return DecoderOutput(sample=image) if return_dict else (image,)

    def _decoded(self, z: Tensor) -> Tensor:
        side = self.tile_latent_min_size
        if self.use_tiling and max(z.shape[2:]) > side:
            return self.vae.decode_tiled(z, tile=side, overlap=self.tile_overlap_factor)
        return self.vae.decode(z)

    def forward(
        self,
        sample: Tensor,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
    ) -> DecoderOutput | tuple[Tensor]:
        """The images [B, C, H, W] encoded, and the distribution's mode or a sample of it decoded."""
        distribution = self.encode(sample, return_dict=False)[0]
        z = distribution.sample(generator=generator) if sample_posterior else distribution.mode()
        decoded: DecoderOutput | tuple[Tensor] = self.decode(z, return_dict=return_dict)
        return decoded


_TILES = ("tile_sample_min_size", "tile_latent_min_size", "tile_overlap_factor")


def _config(source: Any) -> AutoencoderConfig:
    fields = {name: value for name, value in source.config.items() if not name.startswith("_")}
    return AutoencoderConfig.from_diffusers(fields)


def reason_left(source: Any) -> str | None:
    """Why our autoencoder does not compute what this model of diffusers does; None where it does."""
    if type(source) is not AutoencoderKL:
        return f"a {type(source).__name__}, not AutoencoderKL"
    try:
        _config(source)
    except UnsupportedConfig as error:
        return str(error)
    return weights_reason(source) or changed_module(source)

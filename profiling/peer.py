"""diffusers as the peer: its scheduler's settings, its classes' names, its network on our weights."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ldmperf.model import (
    Autoencoder,
    UNet,
    autoencoder_diffusers_config,
    autoencoder_state_dict,
    diffusers_config,
    diffusers_state_dict,
)
from ldmperf.samplers import DIFFUSERS_CLASSES

from .measure.outcomes import Unsupported


def diffusers_unet(unet: UNet) -> Any:
    """diffusers' `UNet2DConditionModel` on the very weights of ours: the memory is shared, in its layout too."""
    diffusers = import_diffusers()
    with torch.device("meta"):
        theirs = diffusers.UNet2DConditionModel(**diffusers_config(unet.config))
    return _on_weights(theirs, diffusers_state_dict(unet))


def diffusers_autoencoder(autoencoder: Autoencoder) -> Any:
    """diffusers' `AutoencoderKL` on the very weights of ours, as `diffusers_unet`."""
    diffusers = import_diffusers()
    with torch.device("meta"):
        theirs = diffusers.AutoencoderKL(**autoencoder_diffusers_config(autoencoder.config))
    return _on_weights(theirs, autoencoder_state_dict(autoencoder))


def _on_weights(theirs: Any, weights: Mapping[str, Tensor]) -> Any:
    theirs.load_state_dict({name: _channels_last(weight) for name, weight in weights.items()}, assign=True)
    return theirs.eval().requires_grad_(False)


def _channels_last(weight: Tensor) -> Tensor:
    """A 1x1 convolution's weight under the strides that torch reads as channels-last; the same memory.

    Both layouts are the same bytes, and torch decides by the strides: with those of a linear layer's view it would
    convolve in NCHW, and copy.
    """
    if weight.dim() != 4 or weight.shape[2:] != (1, 1):
        return weight
    in_channels = weight.shape[1]
    return weight.as_strided(weight.shape, (in_channels, 1, in_channels, in_channels))


def import_diffusers() -> Any:
    """The package, or `Unsupported` where it is not installed."""
    try:
        return importlib.import_module("diffusers")
    except ImportError:
        raise Unsupported("diffusers is not installed: pip install 'ldmperf[peers]'") from None


# The scheduler of Stable Diffusion 1 and 2; each diffusers class and each plan takes what it knows from it.
SCHEDULER_CONFIG: Mapping[str, object] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "steps_offset": 1,
    "set_alpha_to_one": False,
    "clip_sample": False,
    "skip_prk_steps": True,
}


def diffusers_scheduler(sampler: str) -> Any:
    """diffusers' scheduler for a plan of ours, or `Unsupported` where diffusers is not installed."""
    return getattr(import_diffusers(), DIFFUSERS_CLASSES[sampler]).from_config(dict(SCHEDULER_CONFIG))

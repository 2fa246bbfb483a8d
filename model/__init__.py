"""The UNet family: configurations, the network, and its weights in other people's formats."""

from .config import FAMILY, UNetConfig, UnsupportedConfig, diffusers_config
from .unet import Conditioning, UNet
from .weights import CheckpointError, diffusers_state_dict, load_unet

__all__ = [
    "FAMILY",
    "CheckpointError",
    "Conditioning",
    "UNet",
    "UNetConfig",
    "UnsupportedConfig",
    "diffusers_config",
    "diffusers_state_dict",
    "load_unet",
]

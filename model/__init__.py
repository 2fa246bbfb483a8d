"""The UNet family: configurations, the network, and its weights in other people's formats."""

from .conditioning import Conditioning, Constants
from .config import FAMILY, UNetConfig, UnsupportedConfig, diffusers_config
from .unet import UNet
from .weights import CheckpointError, diffusers_state_dict, load_unet

__all__ = [
    "FAMILY",
    "CheckpointError",
    "Conditioning",
    "Constants",
    "UNet",
    "UNetConfig",
    "UnsupportedConfig",
    "diffusers_config",
    "diffusers_state_dict",
    "load_unet",
]

"""The UNet family: configurations, the network, and its weights in other people's formats."""

from .conditioning import Conditioning, Constants
from .config import FAMILY, UNetConfig, diffusers_config
from .fields import UnsupportedConfig
from .files import CheckpointError, UnsupportedCheckpoint, checkpoint_files
from .releases import RELEASED
from .unet import UNet
from .weights import diffusers_state_dict, load_unet, save_unet

__all__ = [
    "FAMILY",
    "RELEASED",
    "CheckpointError",
    "Conditioning",
    "Constants",
    "UNet",
    "UNetConfig",
    "UnsupportedCheckpoint",
    "UnsupportedConfig",
    "checkpoint_files",
    "diffusers_config",
    "diffusers_state_dict",
    "load_unet",
    "save_unet",
]

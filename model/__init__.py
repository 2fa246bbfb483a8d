"""The UNet family and the autoencoder: configurations, networks, and weights in other people's formats."""

from .autoencoder import Autoencoder, Moments
from .autoencoder_config import AutoencoderConfig, autoencoder_diffusers_config
from .autoencoder_weights import autoencoder_state_dict, load_autoencoder, save_autoencoder
from .choices import AUTO, SEPARATE, Choices
from .conditioning import Conditioning, Constants
from .config import FAMILY, UNetConfig, diffusers_config
from .fields import UnsupportedConfig
from .files import CheckpointError, UnsupportedCheckpoint, checkpoint_files
from .float8 import FLOAT8_CHANNELS
from .releases import RELEASED
from .unet import UNet
from .weights import diffusers_state_dict, load_unet, save_unet

__all__ = [
    "AUTO",
    "FAMILY",
    "FLOAT8_CHANNELS",
    "RELEASED",
    "SEPARATE",
    "Autoencoder",
    "AutoencoderConfig",
    "CheckpointError",
    "Choices",
    "Conditioning",
    "Constants",
    "Moments",
    "UNet",
    "UNetConfig",
    "UnsupportedCheckpoint",
    "UnsupportedConfig",
    "autoencoder_diffusers_config",
    "autoencoder_state_dict",
    "checkpoint_files",
    "diffusers_config",
    "diffusers_state_dict",
    "load_autoencoder",
    "load_unet",
    "save_autoencoder",
    "save_unet",
]

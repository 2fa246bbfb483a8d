"""The UNet family: configurations, the network, and its weights in other people's formats."""

from .config import FAMILY, UNetConfig, UnsupportedConfig, diffusers_config
from .unet import Conditioning, UNet

__all__ = ["FAMILY", "Conditioning", "UNet", "UNetConfig", "UnsupportedConfig", "diffusers_config"]

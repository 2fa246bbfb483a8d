"""The kinds of network that a checkpoint may hold, as diffusers names them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class NetworkKind:
    """A kind of network.

    name: in errors. folder: in a pipeline's folder. class_name: diffusers' class. fields: of a config.json that
    names no class, any of which tells the kind.
    """

    name: str
    folder: str
    class_name: str
    fields: frozenset[str]

    def is_config(self, raw: Mapping[str, Any]) -> bool:
        """Whether a config.json is one of this kind: by its class, or by its fields where it names none."""
        if "_class_name" in raw:
            return bool(raw["_class_name"] == self.class_name)
        return not raw.keys().isdisjoint(self.fields)


UNET = NetworkKind(
    "UNet",
    "unet",
    "UNet2DConditionModel",
    frozenset({"block_out_channels", "cross_attention_dim", "down_block_types"}),
)
AUTOENCODER = NetworkKind(
    "autoencoder",
    "vae",
    "AutoencoderKL",
    frozenset({"latent_channels", "scaling_factor", "force_upcast", "mid_block_add_attention"}),
)

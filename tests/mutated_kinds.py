"""The kinds of network whose checkpoints are mutated, each with diffusers as the oracle of its configuration."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from ldmperf.model import (
    AutoencoderConfig,
    UNetConfig,
    autoencoder_diffusers_config,
    autoencoder_state_dict,
    diffusers_config,
    diffusers_state_dict,
    load_autoencoder,
    load_unet,
)
from ldmperf.model.autoencoder_weights import AUTOENCODER_METADATA_KEY
from ldmperf.model.weights import METADATA_KEY


@dataclass(frozen=True)
class Kind:
    """A kind of network: diffusers' class, our functions for it, and a small configuration.

    assert_same_field: one field of ours against diffusers' network. first: the key that a prefix is told by.
    reshaped: parts of keys whose tensors may have other shapes in a file. per_level, one_for_all: fields of
    config.json that go with the number of levels. huge: values that are far beyond the tensors of `config`.
    """

    name: str
    theirs: type[torch.nn.Module]
    config: UNetConfig | AutoencoderConfig
    fields_of: Callable
    state_of: Callable
    load: Callable
    metadata_key: str
    assert_same_field: Callable
    first: str
    reshaped: tuple[str, ...]
    per_level: dict
    one_for_all: dict
    huge: dict

    @property
    def fields(self):
        return self.fields_of(self.config)


def assert_same_unet_field(field, value, theirs, levels):
    their_value = theirs.config[field]
    if field in ("addition_time_embed_dim", "projection_class_embeddings_input_dim") and value is None:
        assert theirs.config.addition_embed_type is None
        return
    if field == "use_linear_projection":
        their_value = bool(their_value)
    if field == "sample_size":
        their_value = 64 if their_value is None else their_value
        value = their_value if their_value in ([value], [value] * 2) else value
    if field in ("attention_head_dim", "transformer_layers_per_block", "only_cross_attention"):
        value, their_value = (
            (one,) * levels if isinstance(one, int) else tuple(one) for one in (value, their_value)
        )
    assert value == (tuple(their_value) if isinstance(value, tuple) else their_value), field


def assert_same_autoencoder_field(field, value, theirs, levels):
    their_value = theirs.config[field]
    if field == "sample_size" and isinstance(their_value, list):
        their_value = their_value[0]
    if isinstance(value, float):
        # An integer may lie between two floats.
        their_value = float(their_value)
    if field == "act_fn":
        assert their_value in ("silu", "swish")
        return
    assert value == (tuple(their_value) if isinstance(value, tuple) else their_value), field


UNET = Kind(
    "UNet",
    UNet2DConditionModel,
    UNetConfig(
        (8,),
        (2,),
        (True,),
        layers_per_block=1,
        has_middle=False,
        norm_groups=4,
        context_dim=8,
        num_class_embeds=3,
        time_cond_proj_dim=4,
    ),
    diffusers_config,
    diffusers_state_dict,
    load_unet,
    METADATA_KEY,
    assert_same_unet_field,
    first="conv_in.weight",
    reshaped=(),
    per_level={"down_block_types": "CrossAttnDownBlock2D", "up_block_types": "CrossAttnUpBlock2D"},
    one_for_all={"attention_head_dim": 1, "transformer_layers_per_block": 1},
    huge={
        "layers_per_block": (10_000, 10**9, 10**4000),
        "block_out_channels": ([2**30, 2**30], [2**40] * 2, [4 * 10**4000], [8] * 100_000, [2**16] * 3),
        "num_class_embeds": (2**16, 2**62, 10**4000),
        "cross_attention_dim": (2**30, 2**62, 10**4000),
        "in_channels": (2**30, 2**62, 10**4000),
        "out_channels": (2**30, 2**62, 10**4000),
        "transformer_layers_per_block": (10_000, 10**4000),
        "attention_head_dim": (10**4000,),
        "norm_num_groups": (10**4000,),
    },
)
AUTOENCODER = Kind(
    "autoencoder",
    AutoencoderKL,
    AutoencoderConfig((4,), layers_per_block=1, latent_channels=2, norm_groups=4, sample_size=8),
    autoencoder_diffusers_config,
    autoencoder_state_dict,
    load_autoencoder,
    AUTOENCODER_METADATA_KEY,
    assert_same_autoencoder_field,
    first="decoder.conv_in.weight",
    # Attention may be stored as 1x1 convolutions, in this layout too.
    reshaped=(".attentions.",),
    per_level={"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"},
    one_for_all={},
    huge={
        "layers_per_block": (10_000, 10**9, 10**4000),
        "block_out_channels": ([2**30] * 2, [4 * 10**4000], [4] * 100_000, [4] * 17, [2**16] * 3),
        "in_channels": (2**30, 10**4000),
        "out_channels": (2**16, 2**62),
        "latent_channels": (2**16, 2**62),
        "norm_num_groups": (10**4000,),
        "sample_size": (10**4000,),
    },
)
KINDS = (UNET, AUTOENCODER)

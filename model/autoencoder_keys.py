"""The names of the autoencoder's weights: ours, diffusers', those of its first releases, and CompVis'."""

from __future__ import annotations

import re

from .autoencoder import Autoencoder
from .keys import Slot

# Our names on the left, diffusers' on the right; applied in this order.
_RENAMES = (
    (r"^(encoder|decoder)\.down\.", r"\1.down_blocks."),
    (r"^(encoder|decoder)\.up\.", r"\1.up_blocks."),
    (r"^(encoder|decoder)\.middle\.", r"\1.mid_block."),
    (r"^(encoder|decoder)\.norm_out\.", r"\1.conv_norm_out."),
    (r"\.resblocks\.", ".resnets."),
    (r"\.shortcut\.", ".conv_shortcut."),
    (r"\.transformers\.(\d+)\.norm\.", r".attentions.\1.group_norm."),
    (r"\.transformers\.(\d+)\.proj_out\.", r".attentions.\1.to_out.0."),
    (r"\.transformers\.", ".attentions."),
    (r"\.downsample\.", ".downsamplers.0."),
    (r"\.upsample\.", ".upsamplers.0."),
)
_POINTWISE = re.compile(r"(.*\.shortcut|quant_conv|post_quant_conv)\.weight")
# Attention before diffusers 0.13: the same tensors under these names.
_FORMER = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}


def autoencoder_slots(autoencoder: Autoencoder) -> list[Slot]:
    """One slot for each tensor of the diffusers checkpoint of this network."""
    slots = []
    for name, parameter in autoencoder.named_parameters():
        shape = tuple(parameter.shape)
        if ".to_qkv." in name:
            keys = [_renamed(name.replace("to_qkv", part)) for part in ("to_q", "to_k", "to_v")]
        else:
            keys = [_renamed(name)]
        rows = shape[0] // len(keys)
        stored = (rows, *shape[1:], 1, 1) if _POINTWISE.fullmatch(name) else (rows, *shape[1:])
        slots += [Slot(key, stored, name, i * rows, rows) for i, key in enumerate(keys)]
    return slots


def _renamed(name: str) -> str:
    for pattern, replacement in _RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def former_key(key: str) -> str:
    """The name of a diffusers key before diffusers 0.13."""
    for now, then in _FORMER.items():
        key = key.replace(now, then) if ".attentions." in key else key
    return key


_COMPVIS = (
    (r"\.conv_norm_out\.", ".norm_out."),
    (r"\.down_blocks\.", ".down."),
    (r"\.mid_block\.resnets\.0\.", ".mid.block_1."),
    (r"\.mid_block\.resnets\.1\.", ".mid.block_2."),
    (r"\.mid_block\.attentions\.0\.", ".mid.attn_1."),
    (r"\.attn_1\.group_norm\.", ".attn_1.norm."),
    (r"\.attn_1\.to_([qkv])\.", r".attn_1.\1."),
    (r"\.attn_1\.to_out\.0\.", ".attn_1.proj_out."),
    (r"\.resnets\.", ".block."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
    (r"\.(down|up)samplers\.0\.", r".\1sample."),
)


def autoencoder_compvis_key(key: str, levels: int) -> str:
    """The CompVis name (without prefix) of a diffusers key; the decoder's levels are numbered from the image's."""
    key = re.sub(r"\.up_blocks\.(\d+)\.", lambda match: f".up.{levels - 1 - int(match[1])}.", key)
    for pattern, replacement in _COMPVIS:
        key = re.sub(pattern, replacement, key)
    return key

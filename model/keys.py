"""The names of the weights: ours, diffusers' and CompVis'.

The map between our parameters and diffusers' keys is one list of `Slot`s; CompVis keys are diffusers' renamed.
"""

import re
from dataclasses import dataclass

from .unet import UNet


@dataclass(frozen=True)
class Slot:
    """Where a diffusers tensor lives in ours: `rows` rows of `parameter` from `start`, stored as `shape` there."""

    key: str
    shape: tuple[int, ...]
    parameter: str
    start: int
    rows: int


# Our names on the left, diffusers' on the right; applied in this order.
_RENAMES = (
    (r"^down\.", "down_blocks."),
    (r"^up\.", "up_blocks."),
    (r"^middle\.", "mid_block."),
    (r"^norm_out\.", "conv_norm_out."),
    (r"\.resblocks\.", ".resnets."),
    (r"\.shortcut\.", ".conv_shortcut."),
    (r"\.transformers\.", ".attentions."),
    (r"\.downsample\.", ".downsamplers.0."),
    (r"\.upsample\.", ".upsamplers.0."),
    (r"\.blocks\.", ".transformer_blocks."),
    (r"\.first_q\.", ".attn1.to_q."),
    (r"\.to_out\.", ".attn1.to_out.0."),
    (r"\.cross_q\.", ".attn2.to_q."),
    (r"\.cross_out\.", ".attn2.to_out.0."),
    (r"\.ff_in\.", ".ff.net.0.proj."),
    (r"\.ff_out\.", ".ff.net.2."),
)
# One parameter of ours holds several of diffusers', row after row.
_PACKED = {
    ".to_qkv.": (".attn1.to_q.", ".attn1.to_k.", ".attn1.to_v."),
    ".first_kv.": (".attn1.to_k.", ".attn1.to_v."),
    ".cross_kv.": (".attn2.to_k.", ".attn2.to_v."),
}


def weight_slots(unet: UNet) -> list[Slot]:
    """One slot for each tensor of the diffusers checkpoint of this network."""
    shapes = {name: tuple(parameter.shape) for name, parameter in unet.named_parameters()}
    resblocks = [name.removesuffix(".conv1.weight") for name in shapes if name.endswith(".conv1.weight")]
    # Registration order is down, middle, up: the order in which they run.
    slots = []
    for name, shape in shapes.items():
        head, _, kind = name.rpartition(".")
        if head == "time_projection":
            keys = [_renamed(f"{resblock}.time_emb_proj.{kind}") for resblock in resblocks]
            sizes = unet.shift_channels
        else:
            packed = next((packed for packed in _PACKED if packed in name), None)
            keys = (
                [_renamed(name.replace(packed, part)) for part in _PACKED[packed]] if packed else [_renamed(name)]
            )
            sizes = [shape[0] // len(keys)] * len(keys)
        pointwise = ".shortcut." in name or (unet.config.conv_projection and ".proj_" in name)
        start = 0
        for key, rows in zip(keys, sizes, strict=True):
            stored = (rows, *shape[1:], 1, 1) if pointwise and kind == "weight" else (rows, *shape[1:])
            slots.append(Slot(key, stored, name, start, rows))
            start += rows
    return slots


def _renamed(name: str) -> str:
    for pattern, replacement in _RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


_COMPVIS_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_COMPVIS_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "time_embedding.cond_proj": "time_embed.cond_proj",
    "class_embedding": "label_emb",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_BLOCK_KEY = re.compile(
    r"(down_blocks|mid_block|up_blocks)\.(?:(\d+)\.)?(resnets|attentions|\w+samplers)\.(\d+)\.(.+)"
)


def compvis_key(key: str, layers_per_block: int, attention: tuple[bool, ...]) -> str:
    """The CompVis name (without prefix) of a diffusers key; `attention` by level from the full resolution down."""
    module, _, kind = key.rpartition(".")
    if module in _COMPVIS_ENDS:
        return f"{_COMPVIS_ENDS[module]}.{kind}"
    match = _BLOCK_KEY.fullmatch(key)
    if match is None:
        raise KeyError(key)
    part, level, group, index, rest = match.group(1), int(match.group(2) or 0), match.group(3), *match.group(4, 5)
    if group == "resnets":
        name, _, tail = rest.partition(".")
        rest = f"{_COMPVIS_RESNET[name]}.{tail}"
    position = 1 if group == "attentions" else 0
    if part == "mid_block":
        # ResBlock, transformer, ResBlock in a row.
        return f"middle_block.{2 * int(index) if group == 'resnets' else 1}.{rest}"
    if part == "down_blocks":
        if group == "downsamplers":
            return f"input_blocks.{(layers_per_block + 1) * (level + 1)}.0.op.{kind}"
        return f"input_blocks.{(layers_per_block + 1) * level + int(index) + 1}.{position}.{rest}"
    block = (layers_per_block + 1) * level + int(index)
    if group == "upsamplers":
        # After the last ResBlock of the level, and after its transformer where there is one.
        position = 2 if attention[len(attention) - 1 - level] else 1
        block += layers_per_block
    return f"output_blocks.{block}.{position}.{rest}"

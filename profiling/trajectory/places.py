"""Where in the network a module is, by its name in ours or in diffusers: the names of the ranges of a trace."""

from __future__ import annotations

import re

# Around each evaluation of the network: what it is given, and what becomes of its result.
CONDITION, SAMPLER = "condition", "sampler"

# diffusers' names, and those of ours that differ from what a range is called, as they are called there.
_RENAMED = (
    (r"^(down|up)_blocks\.", r"\1."),
    (r"^(?:middle|mid_block)\b", "mid"),
    (r"\.resblocks\.", ".resnets."),
    (r"\.transformers\.", ".attentions."),
    (r"\.transformer_blocks\.", ".blocks."),
    (r"\.(down|up)samplers\.0\b", r".\1sample"),
    (r"^conv_norm_out\b", "norm_out"),
    (r"^(?:time|add|class)_\w+", CONDITION),
)
_PLACE = re.compile(
    r"(?P<level>(?:down|up)\.\d+|mid)(?![^.])"
    r"(?:\.(?P<block>(?:resnets|attentions)\.\d+|downsample|upsample))?"
    r"(?:\.blocks(?:\.(?P<index>\d+))?)?(?:\.(?P<layer>\w+))?"
)
_OUTSIDE_LEVELS = re.compile(rf"conv_in|norm_out|conv_out|{CONDITION}")
_PARTS = {
    **dict.fromkeys(("norm", "proj_in"), "proj_in"),
    **dict.fromkeys(("norm1", "to_qkv", "first_q", "first_kv", "to_out", "attn1"), "self-attention"),
    **dict.fromkeys(("norm2", "cross_q", "cross_kv", "cross_out", "attn2"), "cross-attention"),
    **dict.fromkeys(("norm3", "ff_in", "ff_out", "ff"), "feed-forward"),
    "proj_out": "proj_out",
}


def place_of(name: str) -> tuple[str, ...]:
    """The ranges around a module or parameter, outermost first; empty for what is in no block.

    ("down.1", "down.1.attentions.0", "down.1.attentions.0.self-attention"): a level, a block, and of a transformer
    the part. In a transformer's blocks after the first, parts have the block's number before their own name:
    "down.1.attentions.0.1.self-attention".
    """
    for pattern, replacement in _RENAMED:
        name = re.sub(pattern, replacement, name)
    if (outside := _OUTSIDE_LEVELS.match(name)) is not None:
        return (outside[0],)
    if (found := _PLACE.match(name)) is None:
        return ()
    level, block, index, layer = found.group("level", "block", "index", "layer")
    if block is None:
        return (level,)
    whole = f"{level}.{block}"
    part = _PARTS.get(layer or "") if block.startswith("attentions") else None
    if part is None:
        return level, whole
    return level, whole, f"{whole}.{part}" if index in (None, "0") else f"{whole}.{index}.{part}"

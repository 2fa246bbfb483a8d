"""The fields of the configuration of diffusers' `UNet2DConditionModel`: which are read, and which refused."""

from collections.abc import Mapping
from typing import Any

from .fields import UnsupportedConfig, integer, integers, shown, strings, truths

_DOWN = {"CrossAttnDownBlock2D": True, "DownBlock2D": False}
_UP = {"CrossAttnUpBlock2D": True, "UpBlock2D": False}
MIDDLE = "UNetMidBlock2DCrossAttn"

# Read by `unet_arguments`, with the defaults of UNet2DConditionModel.
_READ: dict[str, Any] = {
    "sample_size": None,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "mid_block_type": MIDDLE,
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "cross_attention_dim": 1280,
    "attention_head_dim": 8,
    "use_linear_projection": False,
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "transformer_layers_per_block": 1,
    "addition_embed_type": None,
    "addition_time_embed_dim": None,
    "projection_class_embeddings_input_dim": None,
    "only_cross_attention": False,
    "num_class_embeds": None,
    "time_cond_proj_dim": None,
}

# Fields of that class with the only values that this network implements; the first is the class's default.
_ONLY: dict[str, tuple[Any, ...]] = {
    "center_input_sample": (False,),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "downsample_padding": (1,),
    "mid_block_scale_factor": (1,),
    "dropout": (0.0,),
    "act_fn": ("silu", "swish"),
    "reverse_transformer_layers_per_block": (None,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "num_attention_heads": (None,),
    "dual_cross_attention": (False,),
    "class_embed_type": (None,),
    "resnet_time_scale_shift": ("default",),
    "resnet_skip_time_act": (False,),
    "resnet_out_scale_factor": (1.0,),
    "time_embedding_type": ("positional",),
    "time_embedding_dim": (None,),
    "time_embedding_act_fn": (None,),
    "timestep_post_act": (None,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "attention_type": ("default",),
    "class_embeddings_concat": (False,),
    "cross_attention_norm": (None,),
}

# Fields that change nothing here: the softmax is float32 anyway; the others belong to what is refused.
_WITHOUT_EFFECT = {"upcast_attention", "addition_embed_type_num_heads", "mid_block_only_cross_attention"}

# State of diffusers' EMAModel, which it writes into the config of the averaged UNet.
_OF_AN_AVERAGE = {
    "decay",
    "inv_gamma",
    "min_decay",
    "optimization_step",
    "power",
    "update_after_step",
    "use_ema_warmup",
}


def unet_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of the `UNetConfig` that a config.json describes. Raises `UnsupportedConfig`."""
    problems = []

    def refuse(field: str, value: Any, only: str) -> None:
        problems.append(f"{shown(field)[1:-1]} = {shown(value)} ({only})")

    class_name = config.get("_class_name", "UNet2DConditionModel")
    if class_name != "UNet2DConditionModel":
        refuse("_class_name", class_name, "only 'UNet2DConditionModel'")
    for field, value in config.items():
        if field.startswith("_") or field in _READ or field in _WITHOUT_EFFECT or field in _OF_AN_AVERAGE:
            continue
        if field not in _ONLY:
            refuse(field, value, "unknown field")
        elif not any(_same(value, accepted) for accepted in _ONLY[field]):
            refuse(field, value, f"only {_ONLY[field][0]!r}")

    read = {field: config.get(field, default) for field, default in _READ.items()}
    for field in ("down_block_types", "up_block_types", "block_out_channels"):
        kind, accepts = ("integer", integers) if field == "block_out_channels" else ("string", strings)
        if not accepts(read[field]):
            refuse(field, read[field], f"only a list, one {kind} per level")
            read[field] = _READ[field]
    is_number = isinstance(read["norm_eps"], float) or integer(read["norm_eps"]) is not None
    if not is_number or not 0 < read["norm_eps"] < 1:
        refuse("norm_eps", read["norm_eps"], "only a small positive number")
    down, up = list(read["down_block_types"]), list(read["up_block_types"])
    problems += [f"down_block_types holds {shown(name)}" for name in down if name not in _DOWN]
    problems += [f"up_block_types holds {shown(name)}" for name in up if name not in _UP]
    if not problems and [_UP[name] for name in reversed(up)] != [_DOWN[name] for name in down]:
        problems.append("up_block_types does not mirror down_block_types")
    if read["mid_block_type"] not in (None, MIDDLE):
        refuse("mid_block_type", read["mid_block_type"], f"only {MIDDLE!r} or null")
    if read["addition_embed_type"] not in (None, "text_time"):
        refuse("addition_embed_type", read["addition_embed_type"], "only 'text_time' or null")
    is_xl = read["addition_embed_type"] == "text_time"
    for field in ("in_channels", "out_channels", "layers_per_block", "cross_attention_dim", "norm_num_groups"):
        if integer(read[field]) is None:
            refuse(field, read[field], "only one integer")
    for field in ("addition_time_embed_dim", "projection_class_embeddings_input_dim") if is_xl else ():
        if integer(read[field]) is None:
            refuse(field, read[field], "only one integer beside addition_embed_type = 'text_time'")
    for field in ("num_class_embeds", "time_cond_proj_dim"):
        if read[field] is not None and integer(read[field]) is None:
            refuse(field, read[field], "only one integer or null")
    only_cross = read["only_cross_attention"]
    if not isinstance(only_cross, bool) and not truths(only_cross):
        refuse("only_cross_attention", only_cross, "only true or false, or a list, one of them per level")
    sample_size = read["sample_size"]
    if isinstance(sample_size, list | tuple):
        square = integers(sample_size) and len(sample_size) <= 2 and len(set(map(int, sample_size))) == 1
        sample_size = sample_size[0] if square else "not square"
    if sample_size is not None and integer(sample_size) is None:
        refuse("sample_size", read["sample_size"], "only square")
    # diffusers' name is historic: the value is the number of heads.
    for field in ("attention_head_dim", "transformer_layers_per_block"):
        if integer(read[field]) is not None:
            read[field] = (read[field],) * len(down)
        if not integers(read[field]):
            refuse(field, read[field], "only an integer, or one per level")
    if problems:
        raise UnsupportedConfig(
            f"unsupported UNet config: {'; '.join(problems)}: "
            "use a UNet with the values told, or run this one in diffusers"
        )
    return {
        "block_channels": tuple(read["block_out_channels"]),
        "num_heads": tuple(read["attention_head_dim"]),
        "attention": tuple(_DOWN[name] for name in down),
        "layers_per_block": read["layers_per_block"],
        "has_middle": read["mid_block_type"] is not None,
        "in_channels": read["in_channels"],
        "out_channels": read["out_channels"],
        "context_dim": read["cross_attention_dim"],
        "conv_projection": not read["use_linear_projection"],
        "norm_groups": read["norm_num_groups"],
        "norm_eps": read["norm_eps"],
        "sample_size": 64 if sample_size is None else sample_size,
        "transformer_layers": tuple(read["transformer_layers_per_block"]),
        "added_time_dim": read["addition_time_embed_dim"] if is_xl else None,
        "added_dim": read["projection_class_embeddings_input_dim"] if is_xl else None,
        "only_cross_attention": only_cross if isinstance(only_cross, bool) else tuple(only_cross),
        "num_class_embeds": read["num_class_embeds"],
        "time_cond_proj_dim": read["time_cond_proj_dim"],
    }


def _same(value: Any, accepted: Any) -> bool:
    # A list of one value per level says the same as the value.
    values = value if isinstance(value, list | tuple) and value else [value]
    return all(
        one is accepted if isinstance(one, bool) or isinstance(accepted, bool) else bool(one == accepted)
        for one in values
    )

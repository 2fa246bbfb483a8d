"""What a UNet of the family is: `UNetConfig`, the paper's eleven sizes, and the fields of a diffusers config."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


class UnsupportedConfig(ValueError):
    """A UNet configuration that this network does not implement; the message names every field at fault."""


@dataclass(frozen=True)
class UNetConfig:
    """A text-conditioned latent-diffusion UNet. Levels run from the full resolution down.

    `block_channels`, `num_heads` and `attention` have one entry per level; the middle has those of the last level.
    `conv_projection` stores a transformer's input and output projections as 1x1 convolutions (Stable Diffusion 1)
    instead of linear layers (2): the same computation, another shape in checkpoints. Raises `UnsupportedConfig`.
    """

    block_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    num_heads: tuple[int, ...] = (8, 8, 8, 8)
    attention: tuple[bool, ...] = (True, True, True, False)
    layers_per_block: int = 2
    has_middle: bool = True
    in_channels: int = 4
    out_channels: int = 4
    context_dim: int = 1024
    conv_projection: bool = False
    norm_groups: int = 32
    norm_eps: float = 1e-5
    sample_size: int = 64

    def __post_init__(self) -> None:
        levels = len(self.block_channels)
        if not levels or len(self.num_heads) != levels or len(self.attention) != levels:
            raise UnsupportedConfig(
                f"block_channels, num_heads and attention need one entry per level; got {levels}, "
                f"{len(self.num_heads)} and {len(self.attention)}"
            )
        counts = ("layers_per_block", "in_channels", "out_channels", "context_dim", "norm_groups", "sample_size")
        for name in counts:
            if getattr(self, name) < 1:
                raise UnsupportedConfig(f"{name} must be at least 1; got {getattr(self, name)}")
        for level, (channels, heads) in enumerate(zip(self.block_channels, self.num_heads, strict=True)):
            if channels < 1 or channels % self.norm_groups:
                raise UnsupportedConfig(
                    f"block_channels: {channels} does not divide into norm_groups = {self.norm_groups}"
                )
            attends = self.attention[level] or (self.has_middle and level == levels - 1)
            if attends and (heads < 1 or channels % heads):
                raise UnsupportedConfig(f"num_heads: {heads} heads do not divide {channels} channels")

    @property
    def time_dim(self) -> int:
        """Width of the time embedding."""
        return 4 * self.block_channels[0]

    @classmethod
    def from_diffusers(cls, config: Mapping[str, Any]) -> "UNetConfig":
        """From the config.json of a diffusers `UNet2DConditionModel`; absent fields take that class's defaults.

        Raises `UnsupportedConfig` naming every field whose value this network does not implement, unknown fields
        included.
        """
        return _from_diffusers(config)


def _sized(base_channels: int) -> UNetConfig:
    return UNetConfig(block_channels=tuple(base_channels * m for m in (1, 2, 4, 4)))


# The paper's names by the width of the first level (arXiv 2404.01367, Table 1): heads stay 8, the rest scales.
FAMILY: dict[str, UNetConfig] = {
    name: _sized(base_channels)
    for name, base_channels in {
        "39M": 64,
        "83M": 96,
        "145M": 128,
        "223M": 160,
        "318M": 192,
        "430M": 224,
        "558M": 256,
        "704M": 288,
        "866M": 320,
        "2B": 512,
        "5B": 768,
    }.items()
}

_DOWN = {"CrossAttnDownBlock2D": True, "DownBlock2D": False}
_UP = {"CrossAttnUpBlock2D": True, "UpBlock2D": False}
_MIDDLE = "UNetMidBlock2DCrossAttn"

# Read by `_from_diffusers`, with the defaults of UNet2DConditionModel.
_READ: dict[str, Any] = {
    "sample_size": None,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "mid_block_type": _MIDDLE,
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "cross_attention_dim": 1280,
    "attention_head_dim": 8,
    "use_linear_projection": False,
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
}

# Fields of that class with the only values that this network implements; the first is the class's default.
_ONLY: dict[str, tuple[Any, ...]] = {
    "center_input_sample": (False,),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "only_cross_attention": (False,),
    "downsample_padding": (1,),
    "mid_block_scale_factor": (1,),
    "dropout": (0.0,),
    "act_fn": ("silu", "swish"),
    "transformer_layers_per_block": (1,),
    "reverse_transformer_layers_per_block": (None,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "num_attention_heads": (None,),
    "dual_cross_attention": (False,),
    "class_embed_type": (None,),
    "addition_embed_type": (None,),
    "num_class_embeds": (None,),
    "resnet_time_scale_shift": ("default",),
    "resnet_skip_time_act": (False,),
    "resnet_out_scale_factor": (1.0,),
    "time_embedding_type": ("positional",),
    "time_embedding_dim": (None,),
    "time_embedding_act_fn": (None,),
    "timestep_post_act": (None,),
    "time_cond_proj_dim": (None,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "attention_type": ("default",),
    "class_embeddings_concat": (False,),
    "mid_block_only_cross_attention": (None, False),
    "cross_attention_norm": (None,),
}

# Fields that change nothing here: the softmax is float32 anyway; the others belong to embeddings refused above.
_WITHOUT_EFFECT = {
    "upcast_attention",
    "addition_embed_type_num_heads",
    "addition_time_embed_dim",
    "projection_class_embeddings_input_dim",
}

# The state of an average of weights, which diffusers' EMAModel writes into the config of the averaged UNet.
_OF_AN_AVERAGE = {
    "decay",
    "inv_gamma",
    "min_decay",
    "optimization_step",
    "power",
    "update_after_step",
    "use_ema_warmup",
}


def _from_diffusers(config: Mapping[str, Any]) -> UNetConfig:
    problems = []
    class_name = config.get("_class_name", "UNet2DConditionModel")
    if class_name != "UNet2DConditionModel":
        problems.append(f"_class_name = {class_name!r} (only 'UNet2DConditionModel')")
    for field, value in config.items():
        if field.startswith("_") or field in _READ or field in _WITHOUT_EFFECT or field in _OF_AN_AVERAGE:
            continue
        if field not in _ONLY:
            problems.append(f"{field} = {value!r} (unknown field)")
        elif not any(_same(value, accepted) for accepted in _ONLY[field]):
            problems.append(f"{field} = {value!r} (only {_ONLY[field][0]!r})")

    read = {field: config.get(field, default) for field, default in _READ.items()}
    for field in ("down_block_types", "up_block_types", "block_out_channels"):
        entry = int if field == "block_out_channels" else str
        if not isinstance(read[field], list | tuple) or not all(_is(value, entry) for value in read[field]):
            problems.append(f"{field} = {read[field]!r} (only a list, one {entry.__name__} per level)")
            read[field] = _READ[field]
    if not _is(read["norm_eps"], float) or not 0 < read["norm_eps"] < 1:
        problems.append(f"norm_eps = {read['norm_eps']!r} (only a small positive number)")
    down, up = list(read["down_block_types"]), list(read["up_block_types"])
    problems += [f"down_block_types holds {name!r}" for name in down if name not in _DOWN]
    problems += [f"up_block_types holds {name!r}" for name in up if name not in _UP]
    if not problems and [_UP[name] for name in reversed(up)] != [_DOWN[name] for name in down]:
        problems.append("up_block_types does not mirror down_block_types")
    if read["mid_block_type"] not in (None, _MIDDLE):
        problems.append(f"mid_block_type = {read['mid_block_type']!r} (only {_MIDDLE!r} or null)")
    for field in ("in_channels", "out_channels", "layers_per_block", "cross_attention_dim", "norm_num_groups"):
        if not _is(read[field], int):
            problems.append(f"{field} = {read[field]!r} (only one integer)")
    sample_size = read["sample_size"]
    if isinstance(sample_size, list | tuple):
        sample_size = (
            sample_size[0] if sample_size and all(side == sample_size[0] for side in sample_size) else "not square"
        )
    if sample_size is not None and not _is(sample_size, int):
        problems.append(f"sample_size = {read['sample_size']!r} (only square)")
    # diffusers' name is historic: the value is the number of heads.
    heads = read["attention_head_dim"]
    heads = tuple(heads) if isinstance(heads, list | tuple) else (heads,) * len(down)
    if not all(_is(value, int) for value in heads):
        problems.append(f"attention_head_dim = {read['attention_head_dim']!r} (only integers)")
    if problems:
        raise UnsupportedConfig("unsupported UNet config: " + "; ".join(problems))
    return UNetConfig(
        block_channels=tuple(read["block_out_channels"]),
        num_heads=heads,
        attention=tuple(_DOWN[name] for name in down),
        layers_per_block=read["layers_per_block"],
        has_middle=read["mid_block_type"] is not None,
        in_channels=read["in_channels"],
        out_channels=read["out_channels"],
        context_dim=read["cross_attention_dim"],
        conv_projection=not read["use_linear_projection"],
        norm_groups=read["norm_num_groups"],
        norm_eps=read["norm_eps"],
        sample_size=sample_size or 64,
    )


def diffusers_config(config: UNetConfig) -> dict[str, Any]:
    """The arguments with which diffusers' `UNet2DConditionModel` builds the same network."""
    return {
        "sample_size": config.sample_size,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "down_block_types": tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in config.attention),
        "mid_block_type": _MIDDLE if config.has_middle else None,
        "up_block_types": tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(config.attention)),
        "block_out_channels": config.block_channels,
        "layers_per_block": config.layers_per_block,
        "cross_attention_dim": config.context_dim,
        "attention_head_dim": config.num_heads,
        "use_linear_projection": not config.conv_projection,
        "norm_num_groups": config.norm_groups,
        "norm_eps": config.norm_eps,
    }


def _is(value: Any, kind: type) -> bool:
    """isinstance, where a whole number is a float too and a bool is no number."""
    return isinstance(value, (int, float) if kind is float else kind) and not isinstance(value, bool)


def _same(value: Any, accepted: Any) -> bool:
    # A list of one value per level says the same as the value.
    if isinstance(value, list | tuple):
        return len(value) > 0 and all(_same(item, accepted) for item in value)
    if isinstance(value, bool) or isinstance(accepted, bool):
        return value is accepted
    return bool(value == accepted)

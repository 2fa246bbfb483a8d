"""`UNetConfig`: the sizes of a UNet; the paper's eleven sizes; the same as diffusers writes it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .diffusers_fields import MIDDLE, unet_arguments
from .fields import UnsupportedConfig, count, counts, each, integer, small, switches


@dataclass(frozen=True)
class UNetConfig:
    """A text-conditioned latent-diffusion UNet. Levels run from the full resolution down.

    `block_channels`, `num_heads`, `attention` and `transformer_layers` have one entry per level; the middle has
    those of the last level. `transformer_layers` counts the transformer blocks in a row, and may be given as one
    number for all levels. `conv_projection` stores a transformer's input and output projections as 1x1
    convolutions (Stable Diffusion 1) instead of linear layers (2): the same computation, another shape in
    checkpoints. `added_dim` is the width of the second embedding in Stable Diffusion XL: a pooled text embedding
    beside `added_time_dim` sinusoids for each number of an image's sizes. Both are None elsewhere.

    `only_cross_attention`: at these levels, never in the middle, the first attention of a transformer block reads
    the context too, as in Stable Diffusion's x4 upscaler; one entry per level, or one for all. `num_class_embeds`
    counts the classes (the upscaler's noise levels) of a table whose rows are added to the time embedding.
    `time_cond_proj_dim` is the width of a condition (the embedded guidance scale of latent consistency models)
    that is projected and added to the sinusoids. Both are None elsewhere.

    Integers of numpy and torch are integers. Raises `UnsupportedConfig`.
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
    transformer_layers: tuple[int, ...] = 1  # type: ignore[assignment]  # made a tuple below
    added_time_dim: int | None = None
    added_dim: int | None = None
    only_cross_attention: tuple[bool, ...] = False  # type: ignore[assignment]  # made a tuple below
    num_class_embeds: int | None = None
    time_cond_proj_dim: int | None = None

    def __post_init__(self) -> None:
        for name in _COUNTS:
            self._set(name, count(name, getattr(self, name)))
        for name in ("added_time_dim", "added_dim", "num_class_embeds", "time_cond_proj_dim"):
            if getattr(self, name) is not None:
                self._set(name, count(name, getattr(self, name)))
        if (self.added_time_dim is None) != (self.added_dim is None):
            raise UnsupportedConfig(
                f"added_time_dim = {self.added_time_dim} and added_dim = {self.added_dim} go together: "
                "give both (Stable Diffusion XL) or neither"
            )
        if self.added_dim is not None and (self.added_time_dim or 0) >= self.added_dim:
            raise UnsupportedConfig(
                f"added_time_dim = {self.added_time_dim} does not fit into added_dim = {self.added_dim}: "
                "give the width of one number's sinusoids, and that of all of them beside the text embedding"
            )
        self._set("block_channels", counts("block_channels", self.block_channels))
        levels = len(self.block_channels)
        layers: Any = self.transformer_layers
        if (of_all := integer(layers)) is not None:
            layers = (of_all,) * levels
        self._set("transformer_layers", counts("transformer_layers", layers))
        # A level without attention may give zero heads.
        self._set("num_heads", counts("num_heads", self.num_heads, least=0))
        self._set("attention", tuple(bool(one) for one in each("attention", self.attention)))
        self._set("has_middle", bool(self.has_middle))
        self._set("conv_projection", bool(self.conv_projection))
        self._set("only_cross_attention", switches("only_cross_attention", self.only_cross_attention, levels))
        for name in ("num_heads", "attention", "transformer_layers", "only_cross_attention"):
            if len(getattr(self, name)) != levels or not levels:
                raise UnsupportedConfig(
                    f"{name} has {len(getattr(self, name))} entries for the {levels} levels of block_channels: "
                    "give one entry per level to each, and at least one level"
                )
        self._set("norm_eps", small("norm_eps", self.norm_eps))
        for level, (channels, heads) in enumerate(zip(self.block_channels, self.num_heads, strict=True)):
            if channels % self.norm_groups:
                raise UnsupportedConfig(
                    f"block_channels: {channels} does not divide into norm_groups = {self.norm_groups}: "
                    f"give multiples of {self.norm_groups}, or other norm_groups"
                )
            attends = self.attention[level] or (self.has_middle and level == levels - 1)
            if attends and (heads < 1 or channels % heads):
                raise UnsupportedConfig(
                    f"num_heads: {heads} heads do not divide {channels} channels: give a divisor of {channels}"
                )

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

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
        return cls(**unet_arguments(config))


_COUNTS = ("layers_per_block", "in_channels", "out_channels", "context_dim", "norm_groups", "sample_size")


# The paper's names by the width of the first level (arXiv 2404.01367, Table 1): heads stay 8, the rest scales.
FAMILY: dict[str, UNetConfig] = {
    name: UNetConfig(block_channels=(width, 2 * width, 4 * width, 4 * width))
    for name, width in {
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


def diffusers_config(config: UNetConfig) -> dict[str, Any]:
    """The arguments with which diffusers' `UNet2DConditionModel` builds the same network."""
    return {
        "sample_size": config.sample_size,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "down_block_types": tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in config.attention),
        "mid_block_type": MIDDLE if config.has_middle else None,
        "up_block_types": tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(config.attention)),
        "block_out_channels": config.block_channels,
        "layers_per_block": config.layers_per_block,
        "cross_attention_dim": config.context_dim,
        "attention_head_dim": config.num_heads,
        "use_linear_projection": not config.conv_projection,
        "norm_num_groups": config.norm_groups,
        "norm_eps": config.norm_eps,
        "transformer_layers_per_block": config.transformer_layers,
        "addition_embed_type": None if config.added_dim is None else "text_time",
        "addition_time_embed_dim": config.added_time_dim,
        "projection_class_embeddings_input_dim": config.added_dim,
        # As files of networks without it say it, whatever their number of levels.
        "only_cross_attention": any(config.only_cross_attention) and config.only_cross_attention,
        "num_class_embeds": config.num_class_embeds,
        "time_cond_proj_dim": config.time_cond_proj_dim,
    }

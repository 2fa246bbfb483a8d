"""The autoencoder among the tensors of a checkpoint: its layout from names, its sizes from shapes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from .autoencoder_config import AutoencoderConfig
from .autoencoder_keys import autoencoder_compvis_key, former_key
from .fields import UnsupportedConfig
from .files import CheckpointError, some
from .loading import shortage
from .reader import Layout, Shape

# Prefixes of training code, of a pipeline, or of Stable Diffusion's whole checkpoint.
_PREFIXED = re.compile(
    r"((?:(?:module|_orig_mod|model|first_stage_model|autoencoder|vae)\.)*)decoder\.conv_in\.weight"
)
_ROOTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
_ATTENTION = re.compile(r".*\.(?:attentions\.\d+|attn_1)\.\w+(?:\.0)?\.weight")
_NUMBERED = re.compile(r"encoder\.(?:down_blocks|down)\.(\d{1,3})\.(?:resnets|block)\.(\d{1,4})\.conv1\.weight")
# A UNet beside the autoencoder in a whole checkpoint, and the widths that Stable Diffusion XL embeds besides.
_UNET = re.compile(r"(?:model\.)?diffusion_model\.(?:input_blocks\.0\.0|(label_emb\.0\.0))\.weight")
_XL_WIDTHS = (2816, 2560)
# Statistics of latents beside the UNet (Playground 2.5), whose factor is another.
_STATISTICS = {"edm_mean", "edm_std"}
# A released file tells no group count; every published autoencoder has this one.
_GROUPS = 32


@dataclass(frozen=True)
class AutoencoderLayout(Layout[AutoencoderConfig]):
    """The autoencoder's tensors.

    former: names of attention are those before diffusers 0.13. factor: of the latents, where a UNet in the file
    tells it. is_xl: whether that is Stable Diffusion XL's. Linear layers of attention are stored as [C, C], as
    1x1 convolutions or as [C, C, 1]: all are [C, C] here.
    """

    former: bool
    factor: float | None
    is_xl: bool

    def stored(self, key: str, config: AutoencoderConfig) -> str:
        if self.compvis:
            return self.prefix + autoencoder_compvis_key(key, len(config.block_channels))
        return self.prefix + (former_key(key) if self.former else key)

    def shape(self, name: str) -> Shape:
        """The shape under a name without prefix; () where there is no such tensor."""
        return self.shapes.get(self.prefix + name, ())

    def told(self) -> tuple[AutoencoderConfig | None, str]:
        return config_of_shapes(self), "its shapes"


def find_autoencoder(place: str, shapes: Mapping[str, Shape]) -> AutoencoderLayout:
    """The autoencoder among the tensors of a checkpoint; others, of its losses too, are left alone."""
    found = [match for key in shapes if (match := _PREFIXED.fullmatch(key))]
    if not found:
        raise CheckpointError(
            f"{place}: no autoencoder (decoder.conv_in.weight) among its {len(shapes)} tensors "
            f"({some(sorted(shapes), 3)}); give an autoencoder's file or folder"
        )
    if len(found) > 1:
        names = some(match[0] for match in found)
        raise CheckpointError(f"{place}: more than one autoencoder: {names}; keep one of them in the file")
    prefix = found[0][1]
    own = {
        key: shape[:2] if _ATTENTION.fullmatch(key) and set(shape[2:]) <= {1} else shape
        for key, shape in shapes.items()
        if key.startswith(prefix) and key.removeprefix(prefix).startswith(_ROOTS)
    }
    compvis = f"{prefix}decoder.norm_out.weight" in own
    former = not compvis and any(re.search(r"\.attentions\.0\.query\.weight$", key) for key in own)
    unets = [(match[1], shape) for key, shape in shapes.items() if (match := _UNET.fullmatch(key))]
    is_xl = any(name and shape[1:] in [(width,) for width in _XL_WIDTHS] for name, shape in unets)
    factor = None if not unets or _STATISTICS & shapes.keys() else 0.13025 if is_xl else 0.18215
    return AutoencoderLayout(own, prefix, compvis, former, factor, is_xl)


def config_of_shapes(layout: AutoencoderLayout) -> AutoencoderConfig | None:
    """The configuration that shapes and names tell; None where they are of no autoencoder with 32 groups.

    The factor of the latents is told by a UNet in the file, or by the three levels of Stable Diffusion's x4
    upscaler; else it is None.
    """
    widths, layers = dict[int, int](), 0
    for key, shape in layout.shapes.items():
        if (match := _NUMBERED.fullmatch(key.removeprefix(layout.prefix))) and shape:
            if match[2] == "0":
                widths[int(match[1])] = shape[0]
            layers = max(layers, int(match[2]) + 1)
    conv_in, conv_out = layout.shape("decoder.conv_in.weight"), layout.shape("decoder.conv_out.weight")
    image = layout.shape("encoder.conv_in.weight")
    if sorted(widths) != list(range(len(widths))) or not all(len(s) == 4 for s in (conv_in, conv_out, image)):
        return None
    scale = 2 ** (len(widths) - 1)
    is_upscalers = scale == 4 and conv_in[1] == 4
    attends = "mid.attn_1" if layout.compvis else "mid_block.attentions.0"
    try:
        return AutoencoderConfig(
            block_channels=tuple(widths[level] for level in sorted(widths)),
            layers_per_block=layers,
            in_channels=image[1],
            out_channels=conv_out[0],
            latent_channels=conv_in[1],
            norm_groups=_GROUPS,
            attention=any(key.startswith(f"{layout.prefix}decoder.{attends}.") for key in layout.shapes),
            quant_conv=bool(layout.shape("quant_conv.weight")),
            post_quant_conv=bool(layout.shape("post_quant_conv.weight")),
            sample_size=1024 if layout.is_xl else 64 * scale,
            scaling_factor=0.08333 if is_upscalers else layout.factor,
        )
    except UnsupportedConfig:
        return None


def beyond_tensors(config: AutoencoderConfig, shapes: Iterable[Shape]) -> str:
    """How far a configuration is beyond the tensors at hand; empty where a network of it may be built.

    The counts are lower bounds, by arithmetic: shortcuts, norms and biases are not counted in the parameters.
    """
    layers = 2 * config.layers_per_block + 1
    tensors = 8 * layers * len(config.block_channels)
    parameters = sum(layers * 9 * width**2 for width in config.block_channels)
    parameters += 9 * config.block_channels[0] * (config.in_channels + config.out_channels)
    parameters += 27 * config.block_channels[-1] * config.latent_channels
    return shortage(tensors, parameters, shapes)

"""Tiny random diffusers models and pipelines of every kind that `ldmperf.model.dropin` meets."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
import transformers
from hypothesis import strategies as st

_CROSS, _PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"
_UP = {
    _CROSS: "CrossAttnUpBlock2D",
    _PLAIN: "UpBlock2D",
    "AttnDownBlock2D": "AttnUpBlock2D",
    "ResnetDownsampleBlock2D": "ResnetUpsampleBlock2D",
    "SimpleCrossAttnDownBlock2D": "SimpleCrossAttnUpBlock2D",
}


def _unet(*down: str, **changes: Any) -> dict[str, Any]:
    return {
        "sample_size": 8,
        "block_out_channels": (32, 64, 64)[: len(down)],
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "cross_attention_dim": 16,
        "attention_head_dim": 8,
        "down_block_types": down,
        "up_block_types": tuple(_UP[kind] for kind in reversed(down)),
    } | changes


_SD21 = {"use_linear_projection": True, "attention_head_dim": (2, 4), "upcast_attention": True}
_DEEPFLOYD = {
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "attention_head_dim": 8,
    "resnet_time_scale_shift": "scale_shift",
    "resnet_skip_time_act": True,
    "resnet_out_scale_factor": 1.4,
    "mid_block_scale_factor": 1.4,
}

# What people have, at small widths. SDXL's conditioning is 16 (pooled text) + 6 sizes of 8.
UNETS: dict[str, dict[str, Any]] = {
    "sd15": _unet(_CROSS, _PLAIN, layers_per_block=2),
    "sd21": _unet(_CROSS, _PLAIN, layers_per_block=2, **_SD21),
    "bk_sdm_base": _unet(_CROSS, _PLAIN),
    "bk_sdm_small": _unet(_CROSS, _PLAIN, mid_block_type=None),
    "bk_sdm_tiny": _unet(_CROSS, _CROSS, mid_block_type=None),
    "tiny_sd": _unet(_CROSS, _CROSS, _CROSS, mid_block_type=None, block_out_channels=(32, 32, 64)),
    "sdxl": _unet(
        _PLAIN,
        _CROSS,
        attention_head_dim=(2, 4),
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=16 + 6 * 8,
    ),
    "inpaint": _unet(_CROSS, _PLAIN, in_channels=9),
    "upscale": _unet(
        _PLAIN,
        _CROSS,
        in_channels=7,
        num_class_embeds=1000,
        only_cross_attention=(True, True),
        use_linear_projection=True,
    ),
}

# What diffusers can build besides.
RARE_UNETS: dict[str, dict[str, Any]] = {
    "class_projection": _unet(
        _CROSS,
        _PLAIN,
        class_embed_type="projection",
        projection_class_embeddings_input_dim=12,
        class_embeddings_concat=True,
    ),
    "scale_shift": _unet(_CROSS, "ResnetDownsampleBlock2D", resnet_time_scale_shift="scale_shift"),
    "resnet_resamples": _unet("ResnetDownsampleBlock2D", _CROSS, resnet_out_scale_factor=1.4),
    "added_kv": _unet("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D", **_DEEPFLOYD),
    "added_kv_norm": _unet(
        "SimpleCrossAttnDownBlock2D",
        _PLAIN,
        cross_attention_norm="group_norm",
        cross_attention_dim=32,
        **_DEEPFLOYD,
    ),
    "attention_4d": _unet("AttnDownBlock2D", _PLAIN, mid_block_type="UNetMidBlock2D"),
    "gligen": _unet(_CROSS, _PLAIN, attention_type="gated"),
    "mish": _unet(_CROSS, _PLAIN, act_fn="mish"),
    "gelu": _unet(_CROSS, _PLAIN, act_fn="gelu"),
}

# What diffusers can build, and not run: it passes the two transformers an argument that they do not take.
DUAL_CROSS_ATTENTION = _unet(_CROSS, _PLAIN, dual_cross_attention=True)


def _vae(**changes: Any) -> dict[str, Any]:
    return {
        "block_out_channels": (16, 32),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "norm_num_groups": 8,
        "sample_size": 8,
    } | changes


VAES: dict[str, dict[str, Any]] = {
    "vae": _vae(),
    "vae_without_attention": _vae(mid_block_add_attention=False, layers_per_block=2),
    "vae_without_quant_convs": _vae(use_quant_conv=False, use_post_quant_conv=False),
    "vae_mish": _vae(act_fn="mish"),
}


def randomized(module: torch.nn.Module, dtype: torch.dtype, seed: int = 0) -> torch.nn.Module:
    """The module in evaluation mode; norms, biases and gates, which start at zero or one, take random values."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        if parameter.ndim <= 1:
            centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data.copy_(centre + 0.3 * noise)
    # Not diffusers' own `to`, which warns of every dtype.
    return torch.nn.Module.to(module, dtype).eval()


def make_unet(config: dict[str, Any] | str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """A random `UNet2DConditionModel`; the config may be a name of UNETS or RARE_UNETS."""
    config = (UNETS | RARE_UNETS)[config] if isinstance(config, str) else config
    torch.manual_seed(seed)
    return randomized(diffusers.UNet2DConditionModel(**config), dtype, seed)


def make_vae(config: dict[str, Any] | str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """A random `AutoencoderKL`; the config may be a name of VAES."""
    torch.manual_seed(seed)
    config = VAES[config] if isinstance(config, str) else config
    return randomized(diffusers.AutoencoderKL(**config), dtype, seed)


def make(kind: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """The model of that name among all."""
    return make_vae(kind, dtype, seed) if kind in VAES else make_unet(kind, dtype, seed)


def model_inputs(model: Any, batch: int = 2, size: int | tuple[int, int] = 8, seed: int = 1) -> dict[str, Any]:
    """All that the model's forward needs, in its dtype: {"sample": [batch, C, size, size], ...}."""
    generator = torch.Generator().manual_seed(seed)
    height, width = (size, size) if isinstance(size, int) else size

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(model.dtype)

    config = model.config
    sample = {"sample": random(batch, config.in_channels, height, width)}
    if isinstance(model, diffusers.AutoencoderKL):
        return sample
    cross = config.cross_attention_dim
    inputs: dict[str, Any] = sample | {
        "timestep": torch.tensor([501, 7] * batch)[:batch],
        "encoder_hidden_states": random(batch, 5, cross),
    }
    if config.num_class_embeds:
        inputs["class_labels"] = torch.arange(batch)
    if config.class_embed_type == "projection":
        inputs["class_labels"] = random(batch, config.projection_class_embeddings_input_dim)
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        inputs["added_cond_kwargs"] = {"text_embeds": random(batch, pooled), "time_ids": random(batch, 6) * 100}
    if config.attention_type == "gated":
        boxes = {"boxes": random(batch, 3, 4), "masks": torch.ones(batch, 3, dtype=model.dtype)}
        inputs["cross_attention_kwargs"] = {"gligen": boxes | {"positive_embeddings": random(batch, 3, cross)}}
    return inputs


@st.composite
def unet_configs(draw: st.DrawFn) -> dict[str, Any]:
    """Small configurations of any mix of blocks and options."""
    levels = draw(st.integers(1, 3))
    down = tuple(draw(st.sampled_from(sorted(_UP))) for _ in range(levels))
    simple = any(kind.startswith("Simple") for kind in down)
    mids = ["UNetMidBlock2D", None, "UNetMidBlock2DSimpleCrossAttn" if simple else "UNetMidBlock2DCrossAttn"]
    return _unet(
        *down,
        sample_size=4,
        block_out_channels=tuple(draw(st.sampled_from([8, 16, 24])) for _ in range(levels)),
        norm_num_groups=draw(st.sampled_from([1, 4, 8])),
        layers_per_block=tuple(draw(st.integers(1, 2)) for _ in range(levels)),
        transformer_layers_per_block=tuple(draw(st.integers(1, 2)) for _ in range(levels)),
        mid_block_type=draw(st.sampled_from(mids)),
        # Of a block's own attention the width of heads, of a transformer's their number.
        attention_head_dim=draw(st.sampled_from([2, 4, 8])),
        use_linear_projection=draw(st.booleans()),
        upcast_attention=draw(st.booleans()),
        only_cross_attention=draw(st.booleans()),
        act_fn=draw(st.sampled_from(["silu", "swish", "mish", "gelu", "relu"])),
        resnet_time_scale_shift=draw(st.sampled_from(["default", "scale_shift"])),
        resnet_skip_time_act=draw(st.booleans()),
        resnet_out_scale_factor=draw(st.sampled_from([1.0, 1.4])),
        mid_block_scale_factor=draw(st.sampled_from([1, 1.4])),
        norm_eps=draw(st.sampled_from([1e-5, 1e-3])),
        dropout=draw(st.sampled_from([0.0, 0.2])),
        attention_type=draw(st.sampled_from(["default"] if simple else ["default", "gated"])),
        downsample_padding=draw(st.integers(0, 1)),
        time_embedding_act_fn=draw(st.sampled_from([None, "silu"])),
    )


def _text(projection: bool = False) -> dict[str, Any]:
    """A tokenizer of eleven words and a text encoder for it, neither from the network."""
    words = ["<|startoftext|>", "<|endoftext|>", *(f"{letter}</w>" for letter in "abcdefghi")]
    tokenizer = transformers.CLIPTokenizer(
        vocab={word: number for number, word in enumerate(words)}, merges=[], model_max_length=8
    )
    config = transformers.CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=8,
        projection_dim=16,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    kind = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
    return {"tokenizer": tokenizer, "text_encoder": randomized(kind(config), torch.float32)}


_GUARD = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
_UPSCALING_VAE = _vae(scaling_factor=0.08333)


# Stable Diffusion's.
_SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def make_pipeline(kind: str) -> Any:
    """A random pipeline: "text", "img2img", "inpaint", "upscale" or "sdxl"."""
    torch.manual_seed(0)
    unet = {"text": "sd15", "img2img": "sd21"}.get(kind, kind)
    parts = {
        "unet": make_unet(unet),
        "vae": make_vae("vae"),
        "scheduler": diffusers.DDIMScheduler(**_SCHEDULE),
    } | _text()
    if kind == "sdxl":
        # The UNet attends to both encoders' states side by side.
        second = _text(projection=True)
        parts |= {"text_encoder_2": second["text_encoder"], "tokenizer_2": second["tokenizer"]}
        parts["unet"] = make_unet(UNETS["sdxl"] | {"cross_attention_dim": 32})
        pipeline = diffusers.StableDiffusionXLPipeline(**parts, add_watermarker=False)
    elif kind == "upscale":
        parts["vae"] = make_vae(_UPSCALING_VAE)
        pipeline = diffusers.StableDiffusionUpscalePipeline(
            **parts, low_res_scheduler=diffusers.DDPMScheduler(), max_noise_level=350
        )
    else:
        classes = {
            "text": diffusers.StableDiffusionPipeline,
            "img2img": diffusers.StableDiffusionImg2ImgPipeline,
            "inpaint": diffusers.StableDiffusionInpaintPipeline,
        }
        pipeline = classes[kind](**parts, **_GUARD)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def pipeline_inputs(kind: str) -> dict[str, Any]:
    """What the pipeline's call needs for one small image in numpy, with guidance."""
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    inputs: dict[str, Any] = {
        "prompt": "a b c",
        "negative_prompt": "d",
        "num_inference_steps": 2,
        "guidance_scale": 5.0,
        "generator": torch.Generator().manual_seed(3),
        "output_type": "np",
    }
    if kind in ("text", "sdxl"):
        return inputs | {"height": 16, "width": 16}
    if kind == "upscale":
        return inputs | {"image": image[:, :, :8, :8], "noise_level": 20}
    inputs["image"] = image
    if kind == "inpaint":
        inputs |= {"mask_image": (image[:, :1] > 0.5).float(), "height": 16, "width": 16}
    return inputs | {"strength": 1.0}


def unet_and_inputs() -> tuple[Any, dict[str, Any]]:
    """The smallest of Stable Diffusion's kind, and what it is called with."""
    unet = make_unet(UNETS["bk_sdm_small"])
    return unet, model_inputs(unet)

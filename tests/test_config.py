"""The family against the paper's table, and what a diffusers config may say."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel

from ldmperf.model import FAMILY, UNet, UNetConfig, UnsupportedConfig, diffusers_config
from ldmperf.model.diffusers_fields import _ONLY, _READ, _WITHOUT_EFFECT
from ldmperf.profiling.step.flops import count_gflop, count_parameters, flop_counter

PAPER = json.loads((Path(__file__).parents[1] / "profiling" / "paper.json").read_text())["sizes"]


@pytest.mark.parametrize("row", PAPER, ids=lambda row: row["name"])
def test_family_has_the_papers_parameters_and_flops(row):
    with torch.device("meta"), torch.no_grad(), flop_counter() as counter:
        unet = UNet(FAMILY[row["name"]], backend="torch")
        unet(torch.empty(1, 4, 64, 64), 1.0, torch.empty(1, 77, 1024))
    assert sum(parameter.numel() for parameter in unet.parameters()) == row["params_exact"]
    assert round(counter.get_total_flops() / 1e9, 1) == row["gflop"]
    assert FAMILY[row["name"]].block_channels[0] == row["base_channels"]


def test_family_is_the_papers_eleven_sizes_in_order():
    assert list(FAMILY) == [row["name"] for row in PAPER]


def test_flops_are_those_of_the_same_network_in_torchs_own_operators():
    config = FAMILY["39M"]
    with torch.device("meta"), torch.no_grad():
        reference = UNet2DConditionModel(**diffusers_config(config))
        with flop_counter() as theirs:
            reference(torch.empty(2, 4, 64, 64), 1.0, torch.empty(2, 77, 1024))
        with flop_counter() as ours:
            UNet(config, backend="torch")(torch.empty(2, 4, 64, 64), torch.empty(2), torch.empty(2, 77, 1024))
    assert ours.get_total_flops() == theirs.get_total_flops()


SD15 = {  # The config.json of Stable Diffusion 1.5's UNet.
    "_class_name": "UNet2DConditionModel",
    "_diffusers_version": "0.6.0",
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False,
    "cross_attention_dim": 768,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
}
SD21 = SD15 | {
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "dual_cross_attention": False,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "sample_size": 96,
    "use_linear_projection": True,
    "upcast_attention": True,
}
SDXL = SD21 | {  # Of base and turbo; turbo's sample_size is 64.
    "addition_embed_type": "text_time",
    "addition_embed_type_num_heads": 64,
    "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "cross_attention_dim": 2048,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "mid_block_only_cross_attention": None,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "projection_class_embeddings_input_dim": 2816,
    "sample_size": 128,
    "transformer_layers_per_block": [1, 2, 10],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "upcast_attention": None,
}
SDXL_REFINER = SDXL | {
    "attention_head_dim": [6, 12, 24, 24],
    "block_out_channels": [384, 768, 1536, 1536],
    "cross_attention_dim": 1280,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "projection_class_embeddings_input_dim": 2560,
    "transformer_layers_per_block": 4,
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
}
X4_UPSCALER = SD21 | {  # Of stabilityai/stable-diffusion-x4-upscaler.
    "attention_head_dim": 8,
    "block_out_channels": [256, 512, 512, 1024],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "in_channels": 7,
    "num_class_embeds": 1000,
    "only_cross_attention": [True, True, True, False],
    "sample_size": 128,
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
}
BK_SDM_BASE = SD15 | {"layers_per_block": 1}
BK_SDM_SMALL = BK_SDM_BASE | {"mid_block_type": None}
BK_SDM_TINY = BK_SDM_SMALL | {
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["CrossAttnDownBlock2D"] * 3,
    "up_block_types": ["CrossAttnUpBlock2D"] * 3,
}


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        (SD15, 859_520_964),
        (SD15 | {"time_cond_proj_dim": 256}, 859_520_964 + 256 * 320),
        (SD21, 865_910_724),
        (X4_UPSCALER, 473_398_020),
        (BK_SDM_BASE, 579_384_964),
        (BK_SDM_SMALL, 482_346_884),
        (BK_SDM_TINY, 323_384_964),
        (SDXL, 2_567_463_684),
        (SDXL_REFINER, 2_259_526_660),
    ],
    ids=[
        "sd15",
        "lcm",
        "sd21",
        "x4-upscaler",
        "bk-sdm-base",
        "bk-sdm-small",
        "bk-sdm-tiny",
        "sdxl",
        "sdxl-refiner",
    ],
)
def test_published_configs_have_their_published_size(config, parameters):
    with torch.device("meta"):
        unet = UNet(UNetConfig.from_diffusers(config))
    assert sum(parameter.numel() for parameter in unet.parameters()) == parameters


@pytest.mark.parametrize(
    ("published", "text"),
    [(SDXL, 1280), (SDXL_REFINER, 1280), (X4_UPSCALER, None), (SD15 | {"time_cond_proj_dim": 256}, None)],
    ids=["base", "refiner", "x4-upscaler", "lcm"],
)
def test_networks_that_take_more_than_a_context_cost_what_they_cost_in_diffusers(published, text):
    config = UNetConfig.from_diffusers(published)
    with torch.device("meta"), torch.no_grad(), flop_counter() as theirs:
        reference = UNet2DConditionModel.from_config(published)
        given = {}
        if text is not None:
            sizes = (published["projection_class_embeddings_input_dim"] - text) // 256
            given["added_cond_kwargs"] = {"text_embeds": torch.empty(1, text), "time_ids": torch.empty(1, sizes)}
        if config.num_class_embeds is not None:
            given["class_labels"] = torch.empty(1, dtype=torch.int64)
        if config.time_cond_proj_dim is not None:
            given["timestep_cond"] = torch.empty(1, config.time_cond_proj_dim)
        context = torch.empty(1, 77, config.context_dim)
        reference(torch.empty(1, config.in_channels, 128, 128), torch.empty(1), context, **given)
    assert count_parameters(config) == sum(parameter.numel() for parameter in reference.parameters())
    assert count_gflop(config, 128, 128, 77) * 1e9 == theirs.get_total_flops()


@pytest.mark.parametrize(
    "published", [SD21, X4_UPSCALER, SDXL, SDXL_REFINER], ids=["sd21", "x4-upscaler", "sdxl", "sdxl-refiner"]
)
def test_from_diffusers_reads_what_diffusers_class_writes(published):
    config = UNetConfig.from_diffusers(published)
    with torch.device("meta"):
        for other in (
            UNet2DConditionModel.from_config(published),
            UNet2DConditionModel(**diffusers_config(config)),
        ):
            assert UNetConfig.from_diffusers(dict(other.config)) == config
    heads = published["attention_head_dim"]
    assert config.num_heads == (tuple(heads) if isinstance(heads, list) else (heads,) * 4)
    assert config.sample_size == published["sample_size"]
    assert config.num_class_embeds == published["num_class_embeds"]


def test_absent_fields_take_diffusers_defaults():
    with torch.device("meta"):
        written = dict(UNet2DConditionModel().config)
    assert UNetConfig.from_diffusers({}) == UNetConfig.from_diffusers(written)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("addition_embed_type", "text"),
        ("addition_embed_type", "image_hint"),
        ("class_embed_type", "timestep"),
        ("act_fn", "gelu"),
        ("transformer_layers_per_block", [1, 2, [2, 1, 1], 10]),
        ("transformer_layers_per_block", "2"),
        ("transformer_layers_per_block", None),
        ("reverse_transformer_layers_per_block", [1, 1, 1, 1]),
        ("down_block_types", ["AttnDownBlock2D", "DownBlock2D", "DownBlock2D", "DownBlock2D"]),
        ("mid_block_type", "UNetMidBlock2D"),
        ("resnet_time_scale_shift", "scale_shift"),
        ("encoder_hid_dim", 4096),
        ("cross_attention_dim", [768, 1024, 1024, 1024]),
        ("flip_sin_to_cos", False),
        ("layers_per_block", [1, 2, 2, 2]),
        ("only_cross_attention", [True, False, False]),
        ("only_cross_attention", [True, 0, False, False]),
        ("only_cross_attention", None),
        ("only_cross_attention", []),
        ("norm_num_groups", None),
        ("_class_name", "UNet2DModel"),
        ("a_field_of_tomorrow", 1),
        ("block_out_channels", 320),
        ("block_out_channels", None),
        ("down_block_types", None),
        ("down_block_types", [["a"]]),
        ("sample_size", [[1], [2]]),
        ("norm_eps", "x"),
        ("norm_eps", None),
        ("layers_per_block", True),
        ("attention_head_dim", "8"),
        ("center_input_sample", True),
        ("freq_shift", 1),
        ("downsample_padding", 0),
        ("mid_block_scale_factor", 2),
        ("dropout", 0.1),
        ("reverse_transformer_layers_per_block", [[1], [1], [1], [1]]),
        ("encoder_hid_dim_type", "text_proj"),
        ("num_attention_heads", 8),
        ("dual_cross_attention", True),
        ("num_class_embeds", 0),
        ("num_class_embeds", True),
        ("num_class_embeds", [1000]),
        ("resnet_skip_time_act", True),
        ("resnet_out_scale_factor", 1.4),
        ("time_embedding_type", "fourier"),
        ("time_embedding_dim", 512),
        ("time_embedding_act_fn", "silu"),
        ("timestep_post_act", "silu"),
        ("time_cond_proj_dim", 0),
        ("time_cond_proj_dim", "256"),
        ("conv_in_kernel", 1),
        ("conv_out_kernel", 1),
        ("attention_type", "gated"),
        ("class_embeddings_concat", True),
        ("cross_attention_norm", "layer_norm"),
    ],
)
def test_unsupported_fields_are_refused_by_name(field, value):
    with pytest.raises(UnsupportedConfig, match=field) as refusal:
        UNetConfig.from_diffusers(SD15 | {field: value})
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("field", ["addition_time_embed_dim", "projection_class_embeddings_input_dim"])
def test_text_time_embeddings_need_both_widths(field):
    widths = {"addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816}
    with pytest.raises(UnsupportedConfig, match=f"{field} = None"):
        UNetConfig.from_diffusers(SD15 | {"addition_embed_type": "text_time"} | widths | {field: None})
    # Where nothing is added they say nothing, as in diffusers.
    assert UNetConfig.from_diffusers(SD15 | widths) == UNetConfig.from_diffusers(SD15)


def test_every_field_of_diffusers_class_is_known():
    with torch.device("meta"):
        fields = set(UNet2DConditionModel().config) - {"_use_default_values"}
    assert {field for field in fields if not field.startswith("_")} <= set(_READ) | set(_ONLY) | _WITHOUT_EFFECT


def test_every_unsupported_field_is_named_at_once():
    with pytest.raises(UnsupportedConfig) as refusal:
        UNetConfig.from_diffusers(
            SD15 | {"act_fn": "gelu", "time_embedding_type": "fourier", "a\nfield": "x" * 9999}
        )
    assert "act_fn" in str(refusal.value)
    assert "time_embedding_type" in str(refusal.value)
    assert str(refusal.value).endswith(": use a UNet with the values told, or run this one in diffusers")
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 500


@pytest.mark.parametrize(
    "wrong",
    [
        {"block_channels": (320, 640)},
        {"block_channels": (100, 640, 1280, 1280)},
        {"num_heads": (7, 8, 8, 8)},
        {"layers_per_block": 0},
        {"layers_per_block": True},
        {"layers_per_block": 2.0},
        {"context_dim": 0},
        {"in_channels": "4"},
        {"norm_eps": float("nan")},
        {"norm_eps": "1e-5"},
        {"num_heads": 8},
        {"transformer_layers": 0},
        {"transformer_layers": (1, 2, 10)},
        {"transformer_layers": (1, 2, (1, 1), 10)},
        {"transformer_layers": "1111"},
        {"added_time_dim": 256},
        {"added_dim": 2816},
        {"added_time_dim": 0, "added_dim": 2816},
        {"added_time_dim": 10**9, "added_dim": 2816},
        {"added_time_dim": 2816, "added_dim": 2816},
        {"only_cross_attention": (True, False)},
        {"only_cross_attention": (True, False, None, 1)},
        {"only_cross_attention": "True"},
        {"only_cross_attention": 1},
        {"num_class_embeds": 0},
        {"num_class_embeds": 10**5000},
        {"time_cond_proj_dim": 2.0},
        {"sample_size": 10**9},
        *({name: 10**5000} for name in ("sample_size", "layers_per_block", "transformer_layers", "norm_groups")),
        {"block_channels": (10**5000, 640, 1280, 1280)},
        {"num_heads": (10**5000, 8, 8, 8)},
    ],
)
def test_impossible_configs_are_refused(wrong):
    with pytest.raises(UnsupportedConfig, match=next(iter(wrong))) as refusal:
        UNetConfig(**wrong)
    assert re.search(r": (give|make) [^:]+$", str(refusal.value))
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 300


@pytest.mark.parametrize("field", ["sample_size", "layers_per_block", "attention_head_dim", "act_fn", "norm_eps"])
def test_an_integer_of_thousands_of_digits_is_refused_in_a_short_line(field):
    with pytest.raises(UnsupportedConfig) as refusal:
        UNetConfig.from_diffusers(SD15 | {field: 10**5000})
    assert "an integer of thousands of digits" in str(refusal.value)
    assert "set_int_max_str_digits" not in str(refusal.value)


def test_one_number_of_transformer_blocks_is_that_of_every_level():
    assert UNetConfig().transformer_layers == (1, 1, 1, 1)
    assert UNetConfig(transformer_layers=2) == UNetConfig(transformer_layers=(2, 2, 2, 2))


_TRUTHS = ("attention", "only_cross_attention", "has_middle", "conv_projection")


@pytest.mark.parametrize("number", [np.int64, np.int32, torch.tensor, np.array], ids=lambda kind: kind.__name__)
def test_integers_of_numpy_and_torch_are_integers(number):
    fields = dataclasses.asdict(UNetConfig.from_diffusers(SDXL))
    given = {
        name: tuple(map(number, value))
        if name in ("block_channels", "num_heads", "transformer_layers")
        else number(value)
        for name, value in fields.items()
        if isinstance(value, int | tuple) and name not in _TRUTHS
    }
    kept = {name: fields[name] for name in ("has_middle", "conv_projection")}
    kept |= {name: np.array(fields[name]) for name in ("attention", "only_cross_attention")}
    config = UNetConfig(**given, **kept, norm_eps=np.float64(1e-5))
    assert config == UNetConfig(**fields)
    assert hash(config) == hash(UNetConfig(**fields))
    assert {type(value) for value in dataclasses.asdict(config).values()} == {int, float, bool, tuple, type(None)}
    assert UNetConfig(only_cross_attention=np.bool_(True)).only_cross_attention == (True,) * 4
    assert UNetConfig(transformer_layers=number(3)).transformer_layers == (3, 3, 3, 3)
    written = {
        **SDXL,
        "layers_per_block": number(2),
        "transformer_layers_per_block": [number(n) for n in (1, 2, 10)],
    }
    assert UNetConfig.from_diffusers(written) == UNetConfig.from_diffusers(SDXL)

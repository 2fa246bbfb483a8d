"""Files without a configuration: published releases are known by their shapes, others are refused."""

import dataclasses
import json
import math
import re
from pathlib import Path

import pytest
import safetensors.torch
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, infer_diffusers_model_type

from ldmperf.model import FAMILY, CheckpointError, UNet, UNetConfig, diffusers_config, load_unet
from ldmperf.model.files import some
from ldmperf.model.keys import compvis_key, weight_slots
from ldmperf.model.loading import filled
from ldmperf.model.releases import RELEASES, find_layout, published

pytestmark = pytest.mark.usefixtures("_one_thread")

COMPVIS = "model.diffusion_model."
RELEASE = {release.name: release for release in RELEASES}
# From the config.json that each release has on the Hugging Face hub: (block_out_channels, attention_head_dim,
# transformer_layers_per_block, cross_attention_dim, projection_class_embeddings_input_dim).
PUBLISHED = {
    "Stable Diffusion 1": ((320, 640, 1280, 1280), 8, 1, 768, None),
    "Stable Diffusion 2": ((320, 640, 1280, 1280), (5, 10, 20, 20), 1, 1024, None),
    "Stable Diffusion x4 upscaler": ((256, 512, 512, 1024), 8, 1, 1024, None),
    "Stable Diffusion XL base": ((320, 640, 1280), (5, 10, 20), (1, 2, 10), 2048, 2816),
    "Stable Diffusion XL refiner": ((384, 768, 1536, 1536), (6, 12, 24, 24), 4, 1280, 2560),
}
# What diffusers calls them: it decides by two tensors of a CompVis file.
THEIR_TYPE = {
    "Stable Diffusion 1": "v1",
    "Stable Diffusion 2": "v2",
    "Stable Diffusion x4 upscaler": "upscale",
    "Stable Diffusion XL base": "xl_base",
    "Stable Diffusion XL refiner": "xl_refiner",
}
# Two tensors of the text encoders, by which diffusers tells the releases.
OF_TEXT_ENCODERS = {
    "Stable Diffusion XL base": {"conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias": (1280,)},
    "Stable Diffusion XL refiner": {
        "conditioner.embedders.0.model.transformer.resblocks.9.mlp.c_proj.bias": (1280,)
    },
}


def shapes_of(config):
    with torch.device("meta"):
        return {slot.key: slot.shape for slot in weight_slots(UNet(config))}


def in_compvis(config, values, prefix=COMPVIS):
    return {prefix + compvis_key(k, config.layers_per_block, config.attention): v for k, v in values.items()}


def write_sparse(file, shapes):
    """A file of float16 zeros that takes no room on disk."""
    header, end = {}, 0
    for key, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[key] = {"dtype": "F16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with open(file, "wb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        opened.truncate(8 + len(text) + end)


@pytest.mark.parametrize("name", RELEASE)
def test_releases_are_known_by_their_shapes(tmp_path, name):
    config = RELEASE[name].config
    channels, heads, layers, context, added = PUBLISHED[name]
    assert config.block_channels == channels
    assert config.num_heads == (heads if isinstance(heads, tuple) else (heads,) * len(channels))
    assert config.transformer_layers == (layers if isinstance(layers, tuple) else (layers,) * len(channels))
    assert (config.context_dim, config.added_dim) == (context, added)
    assert config.added_time_dim == (256 if added else None)
    with torch.device("meta"):
        theirs = UNet2DConditionModel(**diffusers_config(config))
    shapes = {key: tuple(value.shape) for key, value in theirs.state_dict().items()}
    file = tmp_path / "model.safetensors"
    others = {"first_stage_model.x": (1,), **OF_TEXT_ENCODERS.get(name, {})}
    stored = in_compvis(config, shapes) | others
    write_sparse(file, stored)
    loaded = load_unet(file, device="meta")
    assert loaded.config == config
    assert loaded.dtype == torch.float16
    with torch.device("meta"):
        assert infer_diffusers_model_type({key: torch.empty(s) for key, s in stored.items()}) == THEIR_TYPE[name]
    # In diffusers layout other UNets have the shapes of Stable Diffusion 2.
    release = published(find_layout(name, shapes))
    assert release is None if name == "Stable Diffusion 2" else release.config == config


@pytest.mark.parametrize("channels", [8, 9])
def test_releases_with_more_input_channels(tmp_path, channels):
    """InstructPix2Pix has eight, inpainting nine."""
    config = dataclasses.replace(RELEASE["Stable Diffusion 1"].config, in_channels=channels)
    write_sparse(tmp_path / "x.safetensors", in_compvis(config, shapes_of(config)))
    assert load_unet(tmp_path / "x.safetensors", device="meta").config == config


@pytest.mark.parametrize(
    "other",
    [
        {"only_cross_attention": False},
        {"num_class_embeds": None},
        {"num_class_embeds": 999},
    ],
)
def test_a_network_like_the_x4_upscaler_is_not_taken_for_it(tmp_path, other):
    release = RELEASE["Stable Diffusion x4 upscaler"].config
    config = dataclasses.replace(release, **other)
    file = tmp_path / "x.safetensors"
    for shapes in (shapes_of(config), in_compvis(config, shapes_of(config))):
        write_sparse(file, shapes)
        with pytest.raises(CheckpointError, match="how many heads"):
            load_unet(file, device="meta")
        assert load_unet(file, device="meta", config=config).config == config
        # It has none of the release's configurations, and tells what differs.
        with pytest.raises(CheckpointError, match=r"\(config=\): .*(missing|unexpected|misshapen)"):
            load_unet(file, device="meta", config=release)


class Unread:
    """A lazy slice that has no values to read."""

    def get_dtype(self):
        return "F16"


def test_on_the_meta_device_no_value_is_read():
    with torch.device("meta"):
        unet = UNet(SMALL["base"])
    slots = weight_slots(unet)
    unread = [Unread() for _ in slots]
    assert filled(unet, slots, unread, Path("x"), None, "meta").dtype == torch.float16
    with pytest.raises(TypeError, match="not subscriptable"):
        filled(unet, slots, unread, Path("x"), None, "cpu")


def test_our_866m_is_not_taken_for_stable_diffusion_2(tmp_path):
    shapes = shapes_of(FAMILY["866M"])
    assert shapes == shapes_of(RELEASE["Stable Diffusion 2"].config)
    file = tmp_path / "866M.safetensors"
    write_sparse(file, shapes)
    with pytest.raises(CheckpointError, match=r"put its config\.json beside it"):
        load_unet(file, device="meta")
    assert load_unet(file, device="meta", config=FAMILY["866M"]).config == FAMILY["866M"]
    (tmp_path / "config.json").write_text(json.dumps(diffusers_config(FAMILY["866M"])))
    assert load_unet(file, device="meta").config == FAMILY["866M"]
    assert load_unet(tmp_path, device="meta").config == FAMILY["866M"]


def test_a_config_beside_a_compvis_file(tmp_path):
    """It is read where it fits; where it fits and says other heads than the release, nothing is guessed."""
    file = tmp_path / "v2-1_768-ema-pruned.safetensors"
    config = RELEASE["Stable Diffusion 2"].config
    write_sparse(file, in_compvis(config, shapes_of(config)))
    beside = tmp_path / "config.json"
    for other in (FAMILY["39M"], RELEASE["Stable Diffusion XL base"].config, config):
        beside.write_text(json.dumps(diffusers_config(other)))
        assert load_unet(file, device="meta").config == config
    beside.write_text(json.dumps({"_class_name": "AutoencoderKL", "block_out_channels": [128, 256]}))
    assert load_unet(file, device="meta").config == config
    beside.write_text(json.dumps(diffusers_config(FAMILY["866M"])))
    with pytest.raises(CheckpointError, match=r"Stable Diffusion 2 .*config\.json.*folder of its own"):
        load_unet(file, device="meta")
    # config= chooses between configurations, and does not make a contradiction right.
    with pytest.raises(CheckpointError, match="folder of its own"):
        load_unet(file, device="meta", config=config)


def test_a_damaged_release_is_told_by_its_name(tmp_path):
    config = RELEASE["Stable Diffusion 1"].config
    shapes = in_compvis(config, shapes_of(config))
    gone = [key for key in shapes if "middle_block" in key]
    write_sparse(tmp_path / "x.safetensors", {key: shape for key, shape in shapes.items() if key not in gone})
    with pytest.raises(CheckpointError, match=rf"that of Stable Diffusion 1.*{len(gone)} missing") as caught:
        load_unet(tmp_path / "x.safetensors", device="meta")
    assert some(sorted(gone)) in str(caught.value)


# The levels, blocks and head widths of the releases at a tenth of their width.
SMALL = {
    "base": UNetConfig(
        block_channels=(32, 64, 128),
        num_heads=(1, 2, 4),
        attention=(False, True, True),
        context_dim=24,
        transformer_layers=(1, 2, 3),
        added_time_dim=8,
        added_dim=16 + 6 * 8,
    ),
    "refiner": UNetConfig(
        block_channels=(32, 64, 128, 128),
        num_heads=(1, 2, 4, 4),
        attention=(False, True, True, False),
        context_dim=24,
        transformer_layers=(2, 2, 2, 2),
        added_time_dim=8,
        added_dim=16 + 5 * 8,
    ),
}


@pytest.mark.parametrize("name", SMALL)
def test_xl_files_agree_with_diffusers_in_float64(tmp_path, name):
    config = SMALL[name]
    torch.manual_seed(0)
    theirs = UNet2DConditionModel(**diffusers_config(config)).eval().double()
    state = {key: value.contiguous() for key, value in theirs.state_dict().items()}
    compvis = in_compvis(config, state)
    # The oracle of the names: diffusers' own converter.
    converted = convert_ldm_unet_checkpoint(dict(compvis), dict(theirs.config))
    assert converted.keys() == state.keys()
    assert all(torch.equal(converted[key], value) for key, value in state.items())
    others = {"conditioner.embedders.0.x": torch.zeros(1), "first_stage_model.x": torch.zeros(1)}
    sample, context = torch.randn(2, 4, 8, 8).double(), torch.randn(2, 5, 24).double()
    added = {
        "text_embeds": torch.randn(2, 16).double(),
        "time_ids": torch.randint(0, 1024, (2, 6 if name == "base" else 5)).double(),
    }
    with torch.no_grad():
        expected = theirs(sample, 321.0, context, added_cond_kwargs=added).sample
    for number, tensors in enumerate((compvis | others, state)):
        file = tmp_path / f"{number}.safetensors"
        safetensors.torch.save_file(tensors, file)
        with pytest.raises(CheckpointError, match="how many heads"):
            load_unet(file)
        ours = load_unet(file, config=config)
        with torch.no_grad():
            error = (ours(sample, 321.0, context, **added) - expected).norm() / expected.norm()
        # The sinusoids of the time embedding are float32 in both.
        assert error.item() < 1e-6
    theirs.save_pretrained(tmp_path / "pipeline" / "unet")
    assert load_unet(tmp_path / "pipeline").config == config


def test_names_of_xl_are_those_published():
    """Literal keys of sd_xl_base_1.0.safetensors and sd_xl_refiner_1.0.safetensors."""
    base, refiner = (set(in_compvis(c, shapes_of(c))) for c in (SMALL["base"], SMALL["refiner"]))
    for key in (
        "label_emb.0.0.weight",
        "label_emb.0.2.bias",
        "input_blocks.3.0.op.weight",
        "input_blocks.4.0.skip_connection.weight",
        "input_blocks.4.1.transformer_blocks.1.attn2.to_k.weight",
        "input_blocks.8.1.proj_in.weight",
        "middle_block.1.transformer_blocks.0.ff.net.0.proj.weight",
        "output_blocks.2.2.conv.weight",
        "output_blocks.5.2.conv.bias",
        "output_blocks.8.0.skip_connection.weight",
    ):
        assert COMPVIS + key in base
    for key in ("output_blocks.2.1.conv.weight", "output_blocks.5.2.conv.weight", "output_blocks.8.2.conv.weight"):
        assert COMPVIS + key in refiner
    assert not [key for key in base if re.search(r"(input_blocks\.[12]|output_blocks\.[678])\.1", key)]

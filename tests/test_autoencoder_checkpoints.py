"""The autoencoder's checkpoints as others write them: diffusers' folders, CompVis' files, and broken ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from torch import Tensor

from ldmperf.model import (
    AutoencoderConfig,
    CheckpointError,
    UNetConfig,
    UnsupportedCheckpoint,
    UnsupportedConfig,
    autoencoder_diffusers_config,
    autoencoder_state_dict,
    diffusers_config,
    load_autoencoder,
    load_unet,
    save_autoencoder,
)

pytestmark = pytest.mark.usefixtures("_one_thread")

NAME = "diffusion_pytorch_model.safetensors"
CONFIGS = {
    "two levels": AutoencoderConfig((32, 64), 2, norm_groups=32, sample_size=128, scaling_factor=None),
    "no attention": AutoencoderConfig(
        (32,), 1, attention=False, quant_conv=False, post_quant_conv=False, sample_size=64, scaling_factor=None
    ),
    "other channels": AutoencoderConfig(
        (32, 32, 64), 1, 4, 2, 3, sample_size=256, quant_conv=False, scaling_factor=None
    ),
}
PLAIN = CONFIGS["two levels"]


def theirs_of(config: AutoencoderConfig) -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(**autoencoder_diffusers_config(config)).eval()


@pytest.fixture(scope="module", params=CONFIGS)
def theirs(request: pytest.FixtureRequest) -> AutoencoderKL:
    return theirs_of(CONFIGS[request.param])


@pytest.fixture(scope="module")
def plain() -> AutoencoderKL:
    return theirs_of(PLAIN)


def state_of(theirs: AutoencoderKL) -> dict[str, Tensor]:
    return {key: value.contiguous() for key, value in theirs.state_dict().items()}


def assert_loads(path: Path, theirs: AutoencoderKL, **options: Any) -> AutoencoderConfig:
    """diffusers' weights are the oracle: every tensor under its name, bit for bit."""
    ours = load_autoencoder(path, backend="torch", **options)
    found, expected = autoencoder_state_dict(ours), theirs.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    assert not ours.training
    assert not any(p.requires_grad for p in ours.parameters())
    return ours.config


def refusal(path: Path, **options: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_autoencoder(path, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def compvis_name(key: str, levels: int) -> str:
    """Written from CompVis' own classes: `Encoder` and `Decoder` of ldm/modules/diffusionmodules/model.py."""
    head, *rest = key.split(".")
    if head not in ("encoder", "decoder") or rest[0] in ("conv_in", "conv_out"):
        return key
    kind = rest[-1]
    if rest[0] == "conv_norm_out":
        return f"{head}.norm_out.{kind}"
    if rest[0] == "mid_block":
        names = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out": "proj_out", "group_norm": "norm"}
        place = f"block_{int(rest[2]) + 1}" if rest[1] == "resnets" else "attn_1"
        return f"{head}.mid.{place}.{names.get(rest[3], rest[3])}.{kind}"
    level = int(rest[1])
    if rest[0] == "up_blocks":
        level = levels - 1 - level
    way = rest[0].removesuffix("_blocks")
    if rest[2] == "resnets":
        return f"{head}.{way}.{level}.block.{rest[3]}.{rest[4].replace('conv_shortcut', 'nin_shortcut')}.{kind}"
    return f"{head}.{way}.{level}.{way}sample.conv.{kind}"


def as_compvis(theirs: AutoencoderKL, prefix: str = "first_stage_model.") -> dict[str, Tensor]:
    levels = len(theirs.config.block_out_channels)
    found = {}
    for key, value in state_of(theirs).items():
        # CompVis' attention is of 1x1 convolutions.
        is_linear = ".attentions." in key and value.ndim == 2
        found[prefix + compvis_name(key, levels)] = value[:, :, None, None].clone() if is_linear else value
    return found


def test_a_folder_written_by_diffusers(theirs: AutoencoderKL, tmp_path: Path) -> None:
    theirs.save_pretrained(tmp_path / "pipeline" / "vae")
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    expected = AutoencoderConfig.from_diffusers(theirs.config)
    for path in (tmp_path / "pipeline", tmp_path / "pipeline" / "vae", tmp_path / "pipeline" / "vae" / NAME):
        assert assert_loads(path, theirs) == expected


def test_a_folder_in_shards(plain: AutoencoderKL, tmp_path: Path) -> None:
    plain.save_pretrained(tmp_path, max_shard_size="200KB")
    shards = sorted(tmp_path.glob("*-of-*"))
    assert len(shards) > 1
    for path in (tmp_path, shards[0], tmp_path / f"{NAME}.index.json"):
        assert assert_loads(path, plain) == PLAIN
    raw = json.loads((tmp_path / f"{NAME}.index.json").read_text())
    raw["weight_map"]["decoder.conv_in.weight"] = f"../{shards[0].name}"
    (tmp_path / f"{NAME}.index.json").write_text(json.dumps(raw))
    assert "no .safetensors file of its folder" in refusal(tmp_path)


def test_the_sizes_are_read_from_shapes(theirs: AutoencoderKL, tmp_path: Path) -> None:
    safetensors.torch.save_file(state_of(theirs), tmp_path / "x.safetensors")
    expected = AutoencoderConfig.from_diffusers(theirs.config)
    assert assert_loads(tmp_path / "x.safetensors", theirs) == expected
    safetensors.torch.save_file(as_compvis(theirs, ""), tmp_path / "y.safetensors")
    assert assert_loads(tmp_path / "y.safetensors", theirs) == expected


def test_compvis_names_are_those_that_diffusers_reads(theirs: AutoencoderKL) -> None:
    found = as_compvis(theirs)
    levels = len(theirs.config.block_out_channels)
    config = {"down_block_types": [""] * levels, "up_block_types": [""] * levels}
    for key in ("quant_conv", "post_quant_conv"):
        # Its conversion takes both for granted.
        for kind in ("weight", "bias"):
            found.setdefault(f"first_stage_model.{key}.{kind}", torch.zeros(1))
    back = convert_ldm_vae_checkpoint(found, config)
    for key, value in state_of(theirs).items():
        assert torch.equal(back[key], value), key


BESIDE = {
    "alone": ({}, None, 128),
    "Stable Diffusion 1 or 2": ({"model.diffusion_model.input_blocks.0.0.weight": (4, 4, 3, 3)}, 0.18215, 128),
    "Stable Diffusion XL": (
        {
            "model.diffusion_model.input_blocks.0.0.weight": (4, 4, 3, 3),
            "model.diffusion_model.label_emb.0.0.weight": (8, 2816),
        },
        0.13025,
        1024,
    ),
    "Stable Diffusion XL's refiner": (
        {
            "model.diffusion_model.input_blocks.0.0.weight": (4, 4, 3, 3),
            "model.diffusion_model.label_emb.0.0.weight": (8, 2560),
        },
        0.13025,
        1024,
    ),
    "Stable unCLIP 2.1": (
        {
            "model.diffusion_model.input_blocks.0.0.weight": (4, 4, 3, 3),
            "model.diffusion_model.label_emb.0.0.weight": (8, 2048),
        },
        0.18215,
        128,
    ),
    "Playground 2.5": (
        {
            "model.diffusion_model.input_blocks.0.0.weight": (4, 4, 3, 3),
            "model.diffusion_model.label_emb.0.0.weight": (8, 2816),
            "edm_mean": (1, 4, 1, 1),
        },
        None,
        1024,
    ),
}


@pytest.mark.parametrize("beside", BESIDE)
def test_a_whole_checkpoint_of_compvis(plain: AutoencoderKL, tmp_path: Path, beside: str) -> None:
    others, factor, size = BESIDE[beside]
    tensors = as_compvis(plain) | {key: torch.zeros(shape) for key, shape in others.items()}
    # Losses, averages and text encoders lie beside.
    tensors |= dict.fromkeys(("first_stage_model.loss.logvar", "cond_stage_model.x", "betas"), torch.zeros(2))
    tensors = {key: value.clone() for key, value in tensors.items()}
    file = tmp_path / "model.safetensors"
    safetensors.torch.save_file(tensors, file)
    config = assert_loads(file, plain)
    assert (config.scaling_factor, config.sample_size) == (factor, size)
    # A UNet's config.json beside it is not its own, nor is another autoencoder's.
    unet = UNetConfig((8,), (1,), (False,), has_middle=False, norm_groups=4, context_dim=4)
    for raw in (
        {"_class_name": "UNet2DConditionModel", **diffusers_config(unet)},
        {"_class_name": "AutoencoderKL", **autoencoder_diffusers_config(CONFIGS["no attention"])},
    ):
        (tmp_path / "config.json").write_text(json.dumps(raw))
        assert assert_loads(file, plain).scaling_factor == factor
    # Its own is.
    stated = autoencoder_diffusers_config(PLAIN) | {"scaling_factor": 0.5}
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL", **stated}))
    assert assert_loads(file, plain).scaling_factor == 0.5


def test_the_x4_upscalers_factor(tmp_path: Path) -> None:
    theirs = theirs_of(AutoencoderConfig((32, 32, 64), 1, sample_size=256, scaling_factor=0.08333))
    safetensors.torch.save_file(as_compvis(theirs), tmp_path / "x.safetensors")
    assert assert_loads(tmp_path / "x.safetensors", theirs) == AutoencoderConfig.from_diffusers(theirs.config)


def former(key: str) -> str:
    for now, then in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
        key = key.replace(f"attentions.0.{now}.", f"attentions.0.{then}.")
    return key


@pytest.mark.parametrize("shape", ["linear", "conv1d", "conv2d"])
def test_the_names_of_attention_in_diffusers_first_releases(
    plain: AutoencoderKL, tmp_path: Path, shape: str
) -> None:
    tensors = {}
    for key, value in state_of(plain).items():
        name = former(key)
        tensors[name] = value
        if name != key and value.ndim == 2 and shape != "linear":
            tensors[name] = value[:, :, None, None] if shape == "conv2d" else value[:, :, None]
    assert sum(name not in state_of(plain) for name in tensors) == 16
    plain.save_config(tmp_path)
    safetensors.torch.save_file(tensors, tmp_path / NAME)
    if shape == "linear":
        # diffusers reads these.
        again = AutoencoderKL.from_pretrained(tmp_path)
        assert all(torch.equal(value, again.state_dict()[key]) for key, value in state_of(plain).items())
    assert assert_loads(tmp_path, plain) == PLAIN


@pytest.mark.parametrize("prefix", ["vae.", "module.", "_orig_mod.", "model.first_stage_model.", "module.vae."])
@pytest.mark.parametrize("layout", [state_of, lambda theirs: as_compvis(theirs, "")])
def test_prefixes(
    plain: AutoencoderKL, tmp_path: Path, prefix: str, layout: Callable[[AutoencoderKL], dict[str, Tensor]]
) -> None:
    file = tmp_path / "x.safetensors"
    safetensors.torch.save_file({prefix + key: value for key, value in layout(plain).items()}, file)
    assert_loads(file, plain)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, None])
def test_saved_and_loaded(theirs: AutoencoderKL, tmp_path: Path, dtype: torch.dtype | None) -> None:
    config = AutoencoderConfig.from_diffusers(theirs.config)
    first, file = tmp_path / "first.safetensors", tmp_path / "x.safetensors"
    safetensors.torch.save_file(state_of(theirs), first)
    ours = load_autoencoder(first, config=config)
    save_autoencoder(ours, file, dtype=dtype)
    again = load_autoencoder(file)
    assert again.config == config
    assert again.dtype == (dtype or torch.float32)
    expected = autoencoder_state_dict(ours)
    for key, value in autoencoder_state_dict(again).items():
        assert torch.equal(value, expected[key].to(dtype or torch.float32))
    assert load_autoencoder(file, dtype=torch.float64).dtype == torch.float64
    other = AutoencoderKL(**autoencoder_diffusers_config(config))
    other.load_state_dict(safetensors.torch.load_file(file), strict=True)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["first.safetensors", "x.safetensors"]


def test_a_file_holds_one_kind(plain: AutoencoderKL, tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    safetensors.torch.save_file(state_of(plain), file)
    with pytest.raises(CheckpointError, match="no UNet"):
        load_unet(file)
    config = UNetConfig((8,), (1,), (False,), has_middle=False, norm_groups=4, context_dim=4)
    UNet2DConditionModel(**diffusers_config(config)).save_pretrained(tmp_path / "unet")
    for path in (tmp_path / "unet" / NAME, tmp_path / "unet"):
        assert "no autoencoder" in refusal(path)
    assert "folder vae" in refusal(tmp_path)


FAULTS: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "missing": (lambda state: state.pop("decoder.conv_out.bias"), "1 missing: decoder.conv_out.bias"),
    "unexpected": (lambda state: state.update({"decoder.x": torch.zeros(1)}), "1 unexpected: decoder.x"),
    "misshapen": (
        lambda state: state.update({"quant_conv.weight": torch.zeros(8, 8, 3, 3)}),
        r"quant_conv.weight [8, 8, 3, 3] instead of [8, 8, 1, 1]",
    ),
    "integers": (lambda state: state.update({"quant_conv.bias": torch.zeros(8, dtype=torch.int8)}), "(I8)"),
    "mixed": (lambda state: state.update({"quant_conv.bias": torch.zeros(8).half()}), "mixed dtypes F16, F32"),
    "two": (lambda state: state.update({"vae.decoder.conv_in.weight": torch.zeros(1)}), "more than one"),
    "no convolution": (
        lambda state: state.update({"decoder.conv_in.weight": torch.zeros(())}),
        "nothing states its configuration",
    ),
    "no encoder": (
        lambda state: [state.pop(key) for key in list(state) if key.startswith("encoder.")],
        "nothing states its configuration",
    ),
    "other groups": (
        lambda state: state.update({"encoder.down_blocks.1.resnets.0.conv1.weight": torch.zeros(65, 32, 3, 3)}),
        "nothing states its configuration",
    ),
    "no level": (
        lambda state: [state.pop(key) for key in list(state) if key.startswith("encoder.down_blocks.0.")],
        "nothing states its configuration",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_named(plain: AutoencoderKL, tmp_path: Path, fault: str) -> None:
    state = state_of(plain)
    change, told = FAULTS[fault]
    change(state)
    safetensors.torch.save_file(state, tmp_path / NAME)
    assert told in refusal(tmp_path / NAME)


def test_what_metadata_and_config_say_must_agree(plain: AutoencoderKL, tmp_path: Path) -> None:
    plain.save_pretrained(tmp_path)
    save_autoencoder(load_autoencoder(tmp_path), tmp_path / NAME)
    assert assert_loads(tmp_path, plain) == PLAIN
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {"scaling_factor": 0.5}))
    assert "its metadata and" in refusal(tmp_path)
    # A file named is what it says itself.
    assert assert_loads(tmp_path / NAME, plain) == PLAIN


def test_pickles_are_not_read(plain: AutoencoderKL, tmp_path: Path) -> None:
    plain.save_pretrained(tmp_path, safe_serialization=False)
    assert "AutoencoderKL.from_pretrained(folder).save_pretrained(folder)" in refusal(tmp_path)
    for path in tmp_path.glob("*.bin"):
        assert "torch.save" in refusal(path)


def test_a_configuration_that_is_not_implemented(plain: AutoencoderKL, tmp_path: Path) -> None:
    plain.save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {"act_fn": "gelu", "norm_type": "spatial"}))
    message = refusal(tmp_path)
    assert "act_fn = 'gelu'" in message
    assert "norm_type = 'spatial'" in message
    with pytest.raises(UnsupportedCheckpoint) as caught:
        load_autoencoder(tmp_path)
    assert isinstance(caught.value, UnsupportedConfig)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"dtype": torch.int8}, "dtype must be one of"),
        ({"device": "nowhere"}, "is not there"),
        ({"config": UNetConfig()}, "config must be an AutoencoderConfig"),
        ({"backend": "cuda"}, "unknown backend"),
        ({"path": 3}, "path must be"),
    ],
)
def test_wrong_arguments_are_refused(tmp_path: Path, options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told) as caught:
        load_autoencoder(**({"path": tmp_path} | options))
    assert not isinstance(caught.value, CheckpointError)

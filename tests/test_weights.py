"""Checkpoints as others write them: diffusers folders, diffusers and CompVis files, and broken ones."""

import json

import pytest
import safetensors.torch
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ldmperf.model import CheckpointError, UNetConfig, UnsupportedConfig, diffusers_config, load_unet
from ldmperf.model.keys import compvis_key

CONFIGS = {
    "sd15": UNetConfig((32, 64, 64), (8, 8, 8), (True, True, False), context_dim=768, conv_projection=True),
    "sd21": UNetConfig((64, 128, 128), (1, 2, 2), (True, True, False), context_dim=1024),
    "one-layer": UNetConfig((32, 64), (8, 8), (True, False), layers_per_block=1, context_dim=768),
    "all-attention": UNetConfig((32, 64), (8, 8), (True, True), context_dim=768, has_middle=False),
}


@pytest.fixture(scope="module", params=CONFIGS)
def reference(request):
    torch.manual_seed(0)
    return CONFIGS[request.param], UNet2DConditionModel(**diffusers_config(CONFIGS[request.param])).eval()


@pytest.fixture
def small():
    torch.manual_seed(0)
    return UNet2DConditionModel(**diffusers_config(CONFIGS["one-layer"])).eval()


def assert_same_network(ours, theirs):
    sample = torch.randn(2, ours.config.in_channels, 8, 8)
    context = torch.randn(2, 3, ours.config.context_dim)
    with torch.no_grad():
        expected = theirs(sample, 321.0, context).sample
        assert ((ours(sample, 321.0, context) - expected).norm() / expected.norm()).item() < 1e-5


def as_compvis(unet, config, prefix="model.diffusion_model."):
    return {
        prefix + compvis_key(key, config.layers_per_block, config.attention): value.contiguous()
        for key, value in unet.state_dict().items()
    }


def test_a_folder_written_by_diffusers(reference, tmp_path):
    config, theirs = reference
    theirs.save_pretrained(tmp_path)
    ours = load_unet(tmp_path)
    assert ours.config == config
    assert_same_network(ours, theirs)


def test_shards_variants_and_pipeline_folders(small, tmp_path):
    small.save_pretrained(tmp_path / "sharded", max_shard_size="1MB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    assert_same_network(load_unet(tmp_path / "sharded"), small)
    small.save_pretrained(tmp_path / "variant", variant="fp16")
    assert_same_network(load_unet(tmp_path / "variant"), small)
    small.save_pretrained(tmp_path / "pipeline" / "unet")
    assert_same_network(load_unet(tmp_path / "pipeline"), small)


def test_a_stale_shard_is_refused(small, tmp_path):
    small.save_pretrained(tmp_path, max_shard_size="1MB")
    stale = {"conv_in.bias": torch.zeros(32)}
    safetensors.torch.save_file(stale, tmp_path / "diffusion_pytorch_model-00001-of-00099.safetensors")
    with pytest.raises(CheckpointError, match=r"conv_in\.bias is in another file"):
        load_unet(tmp_path)


def test_files_in_both_layouts(reference, tmp_path):
    config, theirs = reference
    file = tmp_path / "unet.safetensors"
    safetensors.torch.save_file({k: v.contiguous() for k, v in theirs.state_dict().items()}, file)
    ours = load_unet(file)
    assert ours.config == config
    assert_same_network(ours, theirs)
    if config.has_middle:
        others = {"first_stage_model.x": torch.zeros(1), "model_ema.diffusion_modelout0weight": torch.zeros(1)}
        safetensors.torch.save_file(as_compvis(theirs, config) | others, file)
        ours = load_unet(file)
        assert ours.config == config
        assert_same_network(ours, theirs)
        safetensors.torch.save_file(as_compvis(theirs, config, prefix=""), file)
        assert_same_network(load_unet(file), theirs)


def test_compvis_names_are_those_diffusers_converts_from():
    """The oracle is diffusers' own converter, from CompVis keys to its own."""
    config = UNetConfig((32, 64, 64, 64), (8,) * 4, (True, True, True, False), context_dim=16)
    with torch.device("meta"):
        theirs = UNet2DConditionModel(**diffusers_config(config))
    keys = list(theirs.state_dict())
    checkpoint = {
        "model.diffusion_model." + compvis_key(key, config.layers_per_block, config.attention): torch.tensor(i)
        for i, key in enumerate(keys)
    }
    assert len(checkpoint) == len(keys)
    converted = convert_ldm_unet_checkpoint(checkpoint, dict(theirs.config))
    assert {key: int(value) for key, value in converted.items()} == {key: i for i, key in enumerate(keys)}


@pytest.mark.parametrize(
    ("key", "published"),
    [
        ("conv_in.weight", "input_blocks.0.0.weight"),
        ("time_embedding.linear_2.bias", "time_embed.2.bias"),
        ("down_blocks.0.downsamplers.0.conv.weight", "input_blocks.3.0.op.weight"),
        ("down_blocks.1.resnets.0.conv_shortcut.weight", "input_blocks.4.0.skip_connection.weight"),
        ("down_blocks.3.resnets.1.time_emb_proj.bias", "input_blocks.11.0.emb_layers.1.bias"),
        ("mid_block.attentions.0.proj_in.weight", "middle_block.1.proj_in.weight"),
        ("mid_block.resnets.1.norm2.weight", "middle_block.2.out_layers.0.weight"),
        ("up_blocks.0.upsamplers.0.conv.weight", "output_blocks.2.1.conv.weight"),
        ("up_blocks.1.upsamplers.0.conv.weight", "output_blocks.5.2.conv.weight"),
        ("up_blocks.2.upsamplers.0.conv.bias", "output_blocks.8.2.conv.bias"),
        (
            "up_blocks.3.attentions.2.transformer_blocks.0.attn2.to_k.weight",
            "output_blocks.11.1.transformer_blocks.0.attn2.to_k.weight",
        ),
        ("conv_norm_out.bias", "out.0.bias"),
    ],
)
def test_compvis_names_are_those_of_stable_diffusion_1(key, published):
    """Literal keys of the released checkpoints: diffusers' converter takes an upsampler at any position."""
    assert compvis_key(key, 2, (True, True, True, False)) == published


def test_dtype_and_layout(small, tmp_path):
    small.half().save_pretrained(tmp_path)
    assert load_unet(tmp_path).dtype == torch.float16
    ours = load_unet(tmp_path, dtype=torch.float64)
    assert ours.dtype == torch.float64
    assert ours.conv_out.weight.is_contiguous(memory_format=torch.channels_last)
    assert not ours.training
    assert not any(parameter.is_meta for parameter in ours.parameters())


def test_heads_that_no_release_has_are_asked_for(tmp_path):
    config = UNetConfig((32, 64), (8, 8), (True, False), layers_per_block=1, context_dim=48)
    theirs = UNet2DConditionModel(**diffusers_config(config)).eval()
    file = tmp_path / "unet.safetensors"
    safetensors.torch.save_file({k: v.contiguous() for k, v in theirs.state_dict().items()}, file)
    with pytest.raises(CheckpointError, match="number of heads"):
        load_unet(file)
    assert_same_network(load_unet(file, config=config), theirs)


def refusal(path, monkeypatch, **options):
    """The message with which a load is refused, before any parameter has memory."""

    def no_memory(*args, **kwargs):
        raise AssertionError("memory was taken before the check")

    monkeypatch.setattr(torch, "empty_like", no_memory)
    with pytest.raises((CheckpointError, UnsupportedConfig)) as caught:
        load_unet(path, **options)
    monkeypatch.undo()
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_missing_unexpected_and_misshapen_tensors_are_named(small, tmp_path, monkeypatch):
    small.save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    whole = safetensors.torch.load_file(file)
    broken = dict(whole)
    del broken["conv_out.bias"]
    broken["mid_block.extra.weight"] = torch.zeros(2)
    broken["time_embedding.linear_1.bias"] = torch.zeros(7)
    safetensors.torch.save_file(broken, file)
    message = refusal(tmp_path, monkeypatch)
    assert "1 missing: conv_out.bias" in message
    assert "1 unexpected: mid_block.extra.weight" in message
    assert "1 misshapen: time_embedding.linear_1.bias [7] instead of [128]" in message


def test_broken_files_and_folders_are_named(small, tmp_path, monkeypatch):
    small.save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    whole = file.read_bytes()
    for content in (b"", whole[:7], whole[:1000], whole[:-1], b"\xff" * 64):
        file.write_bytes(content)
        assert str(file) in refusal(tmp_path, monkeypatch)
        assert str(file) in refusal(file, monkeypatch)
    file.unlink()
    assert "no .safetensors" in refusal(tmp_path, monkeypatch)
    (tmp_path / "config.json").write_text("{")
    assert "config.json" in refusal(tmp_path, monkeypatch)
    (tmp_path / "config.json").write_text(json.dumps({"addition_embed_type": "text_time"}))
    message = refusal(tmp_path, monkeypatch)
    assert "addition_embed_type" in message
    assert "config.json" in message
    assert "no such file" in refusal(tmp_path / "nowhere", monkeypatch)
    (tmp_path / "model.ckpt").write_bytes(b"x")
    assert "only .safetensors" in refusal(tmp_path / "model.ckpt", monkeypatch)
    safetensors.torch.save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    assert "no UNet" in refusal(tmp_path / "other.safetensors", monkeypatch)


def test_integer_and_mixed_dtypes_are_refused(small, tmp_path, monkeypatch):
    small.save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    whole = safetensors.torch.load_file(file)
    safetensors.torch.save_file(whole | {"conv_in.bias": whole["conv_in.bias"].half()}, file)
    assert "mixed dtypes F16, F32" in refusal(tmp_path, monkeypatch)
    assert load_unet(tmp_path, dtype=torch.float32).dtype == torch.float32
    safetensors.torch.save_file(whole | {"conv_in.bias": whole["conv_in.bias"].int()}, file)
    assert "not a float dtype in conv_in.bias" in refusal(tmp_path, monkeypatch)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_header_never_loads_wrong_and_never_crashes(tmp_path, data):
    """Any change of the header either leaves the network as it was or is refused in one line."""
    file = tmp_path / "unet.safetensors"
    unet = tiny()
    safetensors.torch.save_file(unet, file)
    content = bytearray(file.read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    position = data.draw(st.integers(0, header - 1))
    content[position] ^= data.draw(st.integers(1, 255))
    file.write_bytes(content)
    try:
        loaded = load_unet(file, config=TINY)
    except (CheckpointError, UnsupportedConfig) as error:
        loaded, message = None, str(error)
    if loaded is None:
        assert "\n" not in message
    else:
        assert sum(p.numel() for p in loaded.parameters()) == sum(v.numel() for v in unet.values())


TINY = UNetConfig((8,), (1,), (False,), layers_per_block=1, has_middle=False, norm_groups=4, context_dim=4)


def tiny():
    return {k: v.contiguous() for k, v in UNet2DConditionModel(**diffusers_config(TINY)).state_dict().items()}

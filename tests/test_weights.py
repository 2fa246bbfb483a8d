"""Checkpoints as others write them: diffusers folders, diffusers and CompVis files, and broken ones."""

import json

import pytest
import safetensors.torch
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

from ldmperf.model import CheckpointError, UNet, UNetConfig, diffusers_config, load_unet, save_unet
from ldmperf.model.keys import compvis_key
from ldmperf.model.weights import METADATA_KEY

pytestmark = pytest.mark.usefixtures("_one_thread")

CONFIGS = {
    "sd15": UNetConfig((32, 64, 64), (8, 8, 8), (True, True, False), context_dim=768, conv_projection=True),
    "sd21": UNetConfig((64, 128, 128), (1, 2, 2), (True, True, False), context_dim=1024),
    "one-layer": UNetConfig((32, 64), (8, 8), (True, False), layers_per_block=1, context_dim=768),
    "all-attention": UNetConfig((32, 64), (8, 8), (True, True), context_dim=768, has_middle=False),
    "classes": UNetConfig(
        (16, 32, 32),
        (2, 4, 4),
        (False, True, True),
        layers_per_block=1,
        in_channels=7,
        context_dim=24,
        norm_groups=8,
        only_cross_attention=(True, True, False),
        num_class_embeds=10,
        time_cond_proj_dim=6,
    ),
}

TINY = UNetConfig((8,), (1,), (False,), layers_per_block=1, has_middle=False, norm_groups=4, context_dim=4)


def tiny():
    return {k: v.contiguous() for k, v in UNet2DConditionModel(**diffusers_config(TINY)).state_dict().items()}


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
    given = {}
    if ours.config.num_class_embeds:
        given = {"class_labels": torch.tensor([9, 3]), "timestep_cond": torch.randn(2, 6)}
    with torch.no_grad():
        expected = theirs(sample, 321.0, context, **given).sample
        assert ((ours(sample, 321.0, context, **given) - expected).norm() / expected.norm()).item() < 1e-5


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


def test_files_in_both_layouts_beside_their_config(reference, tmp_path):
    config, theirs = reference
    theirs.save_config(tmp_path)
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


@pytest.mark.parametrize("features", [{}, {"only_cross_attention": True, "num_class_embeds": 3}])
def test_compvis_names_are_those_diffusers_converts_from(features):
    """The oracle is diffusers' own converter, from CompVis keys to its own."""
    config = UNetConfig((32, 64, 64, 64), (8,) * 4, (True, True, True, False), context_dim=16, **features)
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


# The shapes of Stable Diffusion 1 and 2 at a fifth of the width, with the family's eight heads.
@pytest.mark.parametrize(("context_dim", "conv_projection"), [(1024, False), (768, True), (48, False)])
def test_heads_are_not_guessed(tmp_path, context_dim, conv_projection):
    config = UNetConfig(
        (64, 128), (8, 8), (True, False), 1, context_dim=context_dim, conv_projection=conv_projection
    )
    theirs = UNet2DConditionModel(**diffusers_config(config)).eval()
    file = tmp_path / "unet.safetensors"
    safetensors.torch.save_file({k: v.contiguous() for k, v in theirs.state_dict().items()}, file)
    with pytest.raises(CheckpointError, match=r"how many heads.*put its config\.json beside it") as caught:
        load_unet(file)
    assert "save_unet" in str(caught.value)
    # Each way out that the message names works.
    assert_same_network(load_unet(file, config=config), theirs)
    theirs.save_config(tmp_path)
    assert_same_network(load_unet(file), theirs)
    assert_same_network(load_unet(tmp_path), theirs)
    saved = tmp_path / "elsewhere" / "saved.safetensors"
    saved.parent.mkdir()
    save_unet(load_unet(file), saved)
    assert_same_network(load_unet(saved), theirs)


def test_a_saved_unet_is_loaded_with_the_same_bits(reference, tmp_path):
    config, theirs = reference
    theirs.double().save_pretrained(tmp_path / "theirs")
    ours = load_unet(tmp_path / "theirs")
    file = tmp_path / "ours.safetensors"
    save_unet(ours, file)
    again = load_unet(file)
    assert again.config == config
    assert again.dtype == torch.float64
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), again.parameters(), strict=True))
    # diffusers reads it too.
    theirs.load_state_dict(safetensors.torch.load_file(file))
    save_unet(ours, file, dtype=torch.bfloat16)
    assert load_unet(file).dtype == torch.bfloat16
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == [file.name]


def test_a_config_beside_may_differ_where_nothing_does(tmp_path):
    """Only cross-attention at a level without any changes nothing; at another level it does."""
    config = UNetConfig((8, 8), (2, 2), (True, False), layers_per_block=1, norm_groups=4, context_dim=8)
    save_unet(UNet(config), tmp_path / "diffusion_pytorch_model.safetensors")
    for only_cross, loads in (([False, True], True), ([True, False], False)):
        raw = diffusers_config(config) | {"only_cross_attention": only_cross}
        (tmp_path / "config.json").write_text(json.dumps(raw))
        if loads:
            assert load_unet(tmp_path).config.only_cross_attention == tuple(only_cross)
        else:
            with pytest.raises(CheckpointError, match=r"differ; remove config\.json"):
                load_unet(tmp_path)


def test_no_global_state_of_torch_changes_what_is_loaded(tmp_path):
    ours = UNet(TINY)
    save_unet(ours, tmp_path / "x.safetensors")
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    try:
        again = load_unet(tmp_path / "x.safetensors")
        save_unet(again, tmp_path / "y.safetensors")
    finally:
        torch.set_default_dtype(dtype)
        torch.set_default_device(None)
    assert again.dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), again.parameters(), strict=True))
    saved, saved_again = (safetensors.torch.load_file(tmp_path / f"{name}.safetensors") for name in "xy")
    assert saved.keys() == saved_again.keys()
    assert all(torch.equal(saved[key], value) for key, value in saved_again.items())


def test_what_is_loaded_in_inference_mode_has_gradients(tmp_path):
    save_unet(UNet(TINY), tmp_path / "x.safetensors")
    with torch.inference_mode():
        unet = load_unet(tmp_path / "x.safetensors")
    sample = torch.randn(1, 4, 4, 4, requires_grad=True)
    unet(sample, 1.0, torch.randn(1, 2, 4)).square().sum().backward()
    plain = sample.detach().clone().requires_grad_()
    unet(plain, 1.0, torch.randn(1, 2, 4)).square().sum().backward()
    assert sample.grad.abs().sum() > 0
    torch.testing.assert_close(sample.grad, plain.grad)
    assert not any(parameter.is_inference() for parameter in unet.parameters())


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"path": None}, "path must be .*: give"),
        ({"path": 3}, "path must be .*: give"),
        (
            {"config": {"in_channels": 4}},
            r"config must be a UNetConfig; got a dict: pass UNetConfig\.from_diffusers",
        ),
        ({"device": "cuda:9"}, "device 'cuda:9' is not there: .*; give 'cpu'"),
        ({"device": "nonsense"}, "device 'nonsense' is not there: .*; give 'cpu'"),
        ({"device": None}, "device None is not there: .*; give 'cpu'"),
        ({"backend": "zzz"}, "unknown backend 'zzz': choose one of"),
        ({"dtype": torch.int8}, "dtype must be one of"),
        ({"dtype": "float16"}, "dtype must be torch's own, as torch.float16; got the string 'float16'"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_read(tmp_path, monkeypatch, wrong, told):
    monkeypatch.setattr("ldmperf.model.reader.find", lambda path, kind: pytest.fail("read"))
    with pytest.raises(ValueError, match=rf"{told}[^\n]*\Z"):
        load_unet(**{"path": tmp_path / "x.safetensors", **wrong})


def test_a_file_that_cannot_be_saved_is_refused(tmp_path):
    ours = UNet(TINY)
    with pytest.raises(ValueError, match=r"must end in \.safetensors"):
        save_unet(ours, tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match="dtype must be one of"):
        save_unet(ours, tmp_path / "x.safetensors", dtype=torch.int8)
    with pytest.raises(ValueError, match="dtype must be one of"):
        load_unet(tmp_path, dtype=torch.float8_e4m3fn)
    with pytest.raises(OSError, match="cannot be written"):
        save_unet(ours, tmp_path / "nowhere" / "x.safetensors")
    assert not list(tmp_path.iterdir())


def refusal(path, monkeypatch, **options):
    """The message with which a load is refused, before any parameter has memory."""

    def no_memory(*args, **kwargs):
        raise AssertionError("memory was taken before the check")

    monkeypatch.setattr(torch, "empty_like", no_memory)
    with pytest.raises(CheckpointError) as caught:
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
    file.write_bytes(whole)
    (tmp_path / "config.json").write_text("{")
    assert "config.json" in refusal(tmp_path, monkeypatch)
    (tmp_path / "config.json").write_text(json.dumps({"addition_embed_type": "image"}))
    message = refusal(tmp_path, monkeypatch)
    assert "addition_embed_type" in message
    assert "config.json" in message
    file.unlink()
    assert "no .safetensors" in refusal(tmp_path, monkeypatch)
    assert "no such file" in refusal(tmp_path / "nowhere", monkeypatch)
    (tmp_path / "model.ckpt").write_bytes(b"x")
    assert "only .safetensors" in refusal(tmp_path / "model.ckpt", monkeypatch)
    safetensors.torch.save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    assert "no UNet" in refusal(tmp_path / "other.safetensors", monkeypatch)


def test_mixed_dtypes_are_refused(small, tmp_path, monkeypatch):
    small.save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    whole = safetensors.torch.load_file(file)
    safetensors.torch.save_file(whole | {"conv_in.bias": whole["conv_in.bias"].half()}, file)
    assert "mixed dtypes F16, F32" in refusal(tmp_path, monkeypatch)
    assert load_unet(tmp_path, dtype=torch.float32).dtype == torch.float32


OPTIONS = {
    "none": {},
    "dtype": {"dtype": torch.float32},
    "config": {"config": TINY},
    "device": {"device": "meta"},
    "all": {"dtype": torch.float16, "config": TINY, "device": "meta", "backend": "torch"},
}
# Every dtype that a header can name, with its bits.
BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8}
BITS |= {"F8_E5M2FNUZ": 8, "BOOL": 8, "U8": 8, "I8": 8, "I16": 16, "U16": 16, "I32": 32, "U32": 32}
BITS |= {"I64": 64, "U64": 64, "C64": 64}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", BITS)
def test_no_option_lets_another_dtype_through(tmp_path, monkeypatch, dtype, options):
    file = tmp_path / "unet.safetensors"
    header, data, position = {}, 0, 0
    for key, value in tiny().items():
        name, bits = (dtype, BITS[dtype]) if key == "conv_in.weight" else ("F32", 32)
        data = position + value.numel() * bits // 8
        header[key] = {"dtype": name, "shape": list(value.shape), "data_offsets": [position, data]}
        position = data
    header["__metadata__"] = {METADATA_KEY: json.dumps(diffusers_config(TINY))}
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(data))
    message = refusal(file, monkeypatch, **options)
    assert dtype in message


WRONG = ("missing", "misshapen", "unexpected", "prefixes", "truncated")


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("wrong", WRONG)
def test_no_option_lets_wrong_tensors_through(tmp_path, monkeypatch, wrong, options):
    file = tmp_path / "unet.safetensors"
    (tmp_path / "config.json").write_text(json.dumps(diffusers_config(TINY)))
    tensors = tiny()
    if wrong == "missing":
        del tensors["conv_out.bias"]
    elif wrong == "unexpected":
        tensors["conv_out.scale"] = torch.ones(1)
    elif wrong == "misshapen":
        tensors["conv_out.bias"] = torch.ones(5)
    elif wrong == "prefixes":
        tensors |= {f"unet.{key}": value for key, value in tiny().items()}
    safetensors.torch.save_file(tensors, file)
    if wrong == "truncated":
        file.write_bytes(file.read_bytes()[:-4])
    message = refusal(file, monkeypatch, **options)
    assert {"prefixes": "unet.conv_in.weight", "truncated": "truncated"}.get(
        wrong, f"1 {wrong}: conv_out"
    ) in message

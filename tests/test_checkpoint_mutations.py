"""Mutated headers, configurations and index files: refused in one line, or loaded as by others."""

import functools
import json

import pytest
import safetensors.torch
import torch
from diffusers import UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st

from ldmperf.model import UNetConfig, diffusers_config, diffusers_state_dict, load_unet
from ldmperf.model.weights import METADATA_KEY

from .mutations import (
    FUZZ,
    NAME,
    Bytes,
    Quiet,
    Work,
    assert_bounded,
    mutated_header,
    mutated_tensors,
    mutated_text,
)

pytestmark = pytest.mark.usefixtures("_one_thread")

CONFIG = UNetConfig(
    (8,),
    (2,),
    (True,),
    layers_per_block=1,
    has_middle=False,
    norm_groups=4,
    context_dim=8,
    num_class_embeds=3,
    time_cond_proj_dim=4,
)


@pytest.fixture(scope="module")
def state():
    torch.manual_seed(0)
    theirs = UNet2DConditionModel(**diffusers_config(CONFIG))
    return Quiet({key: value.contiguous() for key, value in theirs.state_dict().items()})


@pytest.fixture(scope="module")
def content(state):
    """The network as a file of safetensors, with its configuration beside."""
    metadata = {"format": "pt", METADATA_KEY: json.dumps(diffusers_config(CONFIG))}
    return Bytes(safetensors.torch.save(state, metadata))


@functools.cache
def theirs_of(text):
    """diffusers' network, without weights, of a configuration as JSON."""
    with torch.device("meta"):
        return UNet2DConditionModel.from_config(json.loads(text))


@pytest.fixture
def work():
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield Work(monkeypatch, load_unet)


def assert_as_others_load(ours, raw, tensors):
    """The oracles: diffusers for what the configuration means, safetensors for what the file holds."""
    theirs = theirs_of(json.dumps(raw))
    levels = len(ours.config.block_channels)
    for field, value in diffusers_config(ours.config).items():
        their_value = theirs.config[field]
        if field in ("addition_time_embed_dim", "projection_class_embeddings_input_dim") and value is None:
            assert theirs.config.addition_embed_type is None
            continue
        if field == "use_linear_projection":
            their_value = bool(their_value)
        if field == "sample_size":
            their_value = 64 if their_value is None else their_value
            value = their_value if their_value in ([value], [value] * 2) else value
        per_level = ("attention_head_dim", "transformer_layers_per_block", "only_cross_attention")
        if field in per_level:
            value, their_value = (
                (one,) * levels if isinstance(one, int) else tuple(one) for one in (value, their_value)
            )
        assert value == (tuple(their_value) if isinstance(value, tuple) else their_value), field
    found = diffusers_state_dict(ours)
    assert found.keys() == theirs.state_dict().keys()
    prefix = next(key for key in tensors if key.endswith("conv_in.weight")).removesuffix("conv_in.weight")
    for key, value in found.items():
        assert value.shape == tensors[prefix + key].shape
        torch.testing.assert_close(value, tensors[prefix + key].to(value.dtype), rtol=0, atol=0, equal_nan=True)


@settings(FUZZ, max_examples=300)
@given(data=st.data())
def test_mutated_headers(state, content, work, tmp_path_factory, data):
    file = tmp_path_factory.getbasetemp() / "header.safetensors"
    content = mutated_header(data.draw, content, METADATA_KEY, diffusers_config(CONFIG))
    file.write_bytes(content)
    loaded = work.load(file)
    assert_bounded(work, len(state), len(content))
    if loaded is not None:
        with safetensors.safe_open(file, framework="pt") as opened:
            metadata = opened.metadata()
        assert_as_others_load(loaded, json.loads(metadata[METADATA_KEY]), safetensors.torch.load_file(file))


@settings(FUZZ, max_examples=250)
@given(data=st.data())
def test_mutated_tensors(state, work, tmp_path_factory, data):
    file = tmp_path_factory.getbasetemp() / "tensors.safetensors"
    raw_config = diffusers_config(CONFIG)
    content = mutated_tensors(data.draw, state, {METADATA_KEY: json.dumps(raw_config)})
    file.write_bytes(content)
    dtype = data.draw(st.sampled_from((None, torch.float64)))
    loaded = work.load(file, dtype=dtype)
    assert_bounded(work, len(state), len(content) * (1 if dtype is None else 2))
    if loaded is not None:
        assert_as_others_load(loaded, raw_config, safetensors.torch.load_file(file))


@settings(FUZZ, max_examples=250)
@given(data=st.data())
def test_mutated_configurations(state, work, tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "config"
    folder.mkdir(exist_ok=True)
    file = folder / f"{NAME}.safetensors"
    if not file.exists():
        safetensors.torch.save_file(state, file)
    raw = {"_class_name": "UNet2DConditionModel", **diffusers_config(CONFIG)}
    text = mutated_text(data.draw, raw)
    (folder / "config.json").write_bytes(text)
    loaded = work.load(folder)
    assert_bounded(work, len(state), file.stat().st_size + len(text))
    if loaded is not None:
        assert_as_others_load(loaded, json.loads(text), state)


@settings(FUZZ, max_examples=200)
@given(data=st.data())
def test_mutated_index_files(state, work, tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "index"
    folder.mkdir(exist_ok=True)
    raw_config = diffusers_config(CONFIG)
    (folder / "config.json").write_text(json.dumps(raw_config))
    keys = sorted(state)
    weight_map, size = {}, 0
    for number, part in enumerate((keys[:30], keys[30:]), 1):
        file = folder / f"{NAME}-{number:05d}-of-00002.safetensors"
        if not file.exists():
            safetensors.torch.save_file({key: state[key] for key in part}, file)
        weight_map |= dict.fromkeys(part, file.name)
        size += file.stat().st_size
    raw = {"metadata": {"total_size": size}, "weight_map": weight_map}
    text = mutated_text(data.draw, raw)
    index = folder / f"{NAME}.safetensors.index.json"
    index.write_bytes(text)
    loaded = work.load(data.draw(st.sampled_from((folder, index))))
    assert_bounded(work, len(state), size + len(text))
    if loaded is not None:
        assert json.loads(text)["weight_map"] == weight_map
        assert_as_others_load(loaded, raw_config, state)


HUGE = {
    "layers_per_block": (10_000, 10**9, 10**4000),
    "block_out_channels": ([2**30, 2**30], [2**40] * 2, [4 * 10**4000], [8] * 100_000, [2**16] * 3),
    "num_class_embeds": (2**16, 2**62, 10**4000),
    "cross_attention_dim": (2**30, 2**62, 10**4000),
    "in_channels": (2**30, 2**62, 10**4000),
    "out_channels": (2**30, 2**62, 10**4000),
    "transformer_layers_per_block": (10_000, 10**4000),
    "attention_head_dim": (10**4000,),
    "norm_num_groups": (10**4000,),
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field in HUGE for value in HUGE[field]])
@pytest.mark.parametrize("where", ["config.json", "metadata"])
def test_a_configuration_far_beyond_its_file_builds_nothing(state, work, tmp_path, field, value, where):
    raw = {**diffusers_config(CONFIG), field: value}
    if field == "block_out_channels":
        raw |= {
            "down_block_types": ["CrossAttnDownBlock2D"] * len(value),
            "up_block_types": ["CrossAttnUpBlock2D"] * len(value),
            "attention_head_dim": 1,
            "transformer_layers_per_block": 1,
        }
    file = tmp_path / f"{NAME}.safetensors"
    metadata = {"format": "pt"} | ({METADATA_KEY: json.dumps(raw)} if where == "metadata" else {})
    safetensors.torch.save_file(state, file, metadata)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert work.load(file if where == "metadata" else tmp_path) is None
    assert work.modules == 0


def test_a_given_configuration_far_beyond_its_file_builds_nothing(state, work, tmp_path):
    file = tmp_path / f"{NAME}.safetensors"
    safetensors.torch.save_file(state, file)
    for changes in (
        {"layers_per_block": 2**16},
        {"context_dim": 2**16},
        {"added_dim": 2**16, "added_time_dim": 8},
        {"num_class_embeds": 2**16},
        {"time_cond_proj_dim": 2**16},
        {"only_cross_attention": True, "context_dim": 2**12},
    ):
        config = UNetConfig((8,), (2,), (True,), norm_groups=4, **({"context_dim": 8} | changes))
        assert work.load(file, config=config) is None
        assert work.modules == 0

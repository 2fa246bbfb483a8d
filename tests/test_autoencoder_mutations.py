"""Mutated headers, tensors and configurations of autoencoders: refused in one line, or loaded as by others."""

import functools
import json

import pytest
import safetensors.torch
import torch
from diffusers import AutoencoderKL
from hypothesis import given, settings
from hypothesis import strategies as st

from ldmperf.model import (
    AutoencoderConfig,
    autoencoder_diffusers_config,
    autoencoder_state_dict,
    load_autoencoder,
)
from ldmperf.model.autoencoder_weights import AUTOENCODER_METADATA_KEY

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

CONFIG = AutoencoderConfig((4,), layers_per_block=1, latent_channels=2, norm_groups=4, sample_size=8)


@pytest.fixture(scope="module")
def state():
    torch.manual_seed(0)
    theirs = AutoencoderKL(**autoencoder_diffusers_config(CONFIG))
    return Quiet({key: value.contiguous() for key, value in theirs.state_dict().items()})


@pytest.fixture(scope="module")
def content(state):
    """The network as a file of safetensors, with its configuration beside."""
    metadata = {"format": "pt", AUTOENCODER_METADATA_KEY: json.dumps(autoencoder_diffusers_config(CONFIG))}
    return Bytes(safetensors.torch.save(state, metadata))


@functools.cache
def theirs_of(text):
    """diffusers' network, without weights, of a configuration as JSON."""
    with torch.device("meta"):
        return AutoencoderKL.from_config(json.loads(text))


@pytest.fixture
def work():
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield Work(monkeypatch, load_autoencoder)


def assert_as_others_load(ours, raw, tensors):
    """The oracles: diffusers for what the configuration means, safetensors for what the file holds."""
    theirs = theirs_of(json.dumps(raw))
    for field, value in autoencoder_diffusers_config(ours.config).items():
        their_value = theirs.config[field]
        if field == "sample_size" and isinstance(their_value, list):
            their_value = their_value[0]
        if field == "act_fn":
            assert their_value in ("silu", "swish")
            continue
        assert value == (tuple(their_value) if isinstance(value, tuple) else their_value), field
    found = autoencoder_state_dict(ours)
    assert found.keys() == theirs.state_dict().keys()
    place = next(key for key in tensors if key.endswith("decoder.conv_in.weight"))
    prefix = place.removesuffix("decoder.conv_in.weight")
    for key, value in found.items():
        # Attention may be stored as 1x1 convolutions, in this layout too.
        expected = tensors[prefix + key].reshape(value.shape).to(value.dtype)
        assert ((value == expected) | (value.isnan() & expected.isnan())).all()


@settings(FUZZ, max_examples=400)
@given(data=st.data())
def test_mutated_headers(state, content, work, tmp_path_factory, data):
    file = tmp_path_factory.getbasetemp() / "autoencoder-header.safetensors"
    raw_config = autoencoder_diffusers_config(CONFIG)
    content = mutated_header(data.draw, content, AUTOENCODER_METADATA_KEY, raw_config)
    file.write_bytes(content)
    loaded = work.load(file)
    assert_bounded(work, len(state), len(content))
    if loaded is not None:
        with safetensors.safe_open(file, framework="pt") as opened:
            raw_config = json.loads(opened.metadata()[AUTOENCODER_METADATA_KEY])
        assert_as_others_load(loaded, raw_config, safetensors.torch.load_file(file))


@settings(FUZZ, max_examples=300)
@given(data=st.data())
def test_mutated_tensors(state, work, tmp_path_factory, data):
    file = tmp_path_factory.getbasetemp() / "autoencoder-tensors.safetensors"
    raw_config = autoencoder_diffusers_config(CONFIG)
    content = mutated_tensors(data.draw, state, {AUTOENCODER_METADATA_KEY: json.dumps(raw_config)})
    file.write_bytes(content)
    dtype = data.draw(st.sampled_from((None, torch.float64)))
    loaded = work.load(file, dtype=dtype)
    assert_bounded(work, len(state), len(content) * (1 if dtype is None else 2))
    if loaded is not None:
        assert_as_others_load(loaded, raw_config, safetensors.torch.load_file(file))


@settings(FUZZ, max_examples=300)
@given(data=st.data())
def test_mutated_configurations(state, work, tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "autoencoder-config"
    folder.mkdir(exist_ok=True)
    file = folder / f"{NAME}.safetensors"
    if not file.exists():
        safetensors.torch.save_file(state, file)
    raw = {"_class_name": "AutoencoderKL", **autoencoder_diffusers_config(CONFIG)}
    text = mutated_text(data.draw, raw)
    (folder / "config.json").write_bytes(text)
    loaded = work.load(folder)
    assert_bounded(work, len(state), file.stat().st_size + len(text))
    if loaded is not None:
        assert_as_others_load(loaded, json.loads(text), state)


HUGE = {
    "layers_per_block": (10_000, 10**9, 10**4000),
    "block_out_channels": ([2**30] * 2, [4 * 10**4000], [4] * 100_000, [4] * 17, [2**16] * 3),
    "in_channels": (2**30, 10**4000),
    "out_channels": (2**16, 2**62),
    "latent_channels": (2**16, 2**62),
    "norm_num_groups": (10**4000,),
    "sample_size": (10**4000,),
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field in HUGE for value in HUGE[field]])
@pytest.mark.parametrize("where", ["config.json", "metadata"])
def test_a_configuration_far_beyond_its_file_builds_nothing(state, work, tmp_path, field, value, where):
    raw = {**autoencoder_diffusers_config(CONFIG), field: value}
    if field == "block_out_channels":
        raw |= {
            "down_block_types": ["DownEncoderBlock2D"] * len(value),
            "up_block_types": ["UpDecoderBlock2D"] * len(value),
        }
    file = tmp_path / f"{NAME}.safetensors"
    metadata = {"format": "pt"} | ({AUTOENCODER_METADATA_KEY: json.dumps(raw)} if where == "metadata" else {})
    safetensors.torch.save_file(state, file, metadata)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert work.load(file if where == "metadata" else tmp_path) is None
    assert work.modules == 0


@settings(FUZZ, max_examples=100)
@given(data=st.data())
def test_shapes_alone_bound_the_work(work, tmp_path_factory, data):
    """A file without configuration: any names and shapes, of which its sizes are read."""
    file = tmp_path_factory.getbasetemp() / "shapes.safetensors"
    names = st.sampled_from(
        (
            "decoder.conv_in.weight",
            "decoder.conv_out.weight",
            "encoder.conv_in.weight",
            "decoder.norm_out.weight",
            "quant_conv.weight",
            "decoder.mid.attn_1.q.weight",
            *(f"encoder.down.{i}.block.{j}.conv1.weight" for i in (0, 1, 9, 999) for j in (0, 1, 9999)),
            "encoder.down_blocks.0.resnets.0.conv1.weight",
        )
    )
    shapes = st.lists(st.sampled_from((0, 1, 3, 32)), max_size=4).map(tuple)
    drawn = data.draw(st.dictionaries(names, shapes, max_size=8))
    tensors = {key: torch.zeros(shape, dtype=torch.float16) for key, shape in drawn.items()}
    file.write_bytes(safetensors.torch.save(tensors))
    assert work.load(file) is None
    assert work.modules <= 4 * len(tensors) + 20

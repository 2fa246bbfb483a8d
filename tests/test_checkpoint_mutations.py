"""Mutated headers, tensors, configurations and index files: refused in one line, or loaded as by others."""

import functools
import json

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ldmperf.model import UNetConfig

from .mutated_kinds import AUTOENCODER, KINDS, UNET
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


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: kind.name)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def state(kind):
    torch.manual_seed(0)
    theirs = kind.theirs(**kind.fields)
    return Quiet({key: value.contiguous() for key, value in theirs.state_dict().items()})


@pytest.fixture(scope="module")
def content(kind, state):
    """The network as a file of safetensors, with its configuration beside."""
    metadata = {"format": "pt", kind.metadata_key: json.dumps(kind.fields)}
    return Bytes(safetensors.torch.save(state, metadata))


@functools.cache
def theirs_of(theirs, text):
    """diffusers' network, without weights, of a configuration as JSON."""
    with torch.device("meta"):
        return theirs.from_config(json.loads(text))


@pytest.fixture
def work(kind):
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield Work(monkeypatch, kind.load)


@pytest.fixture
def folder(kind, tmp_path_factory, request):
    """One folder for all examples of a test."""
    folder = tmp_path_factory.getbasetemp() / f"{kind.name}-{request.node.originalname}"
    folder.mkdir(exist_ok=True)
    return folder


def assert_as_others_load(kind, ours, raw, tensors):
    """The oracles: diffusers for what the configuration means, safetensors for what the file holds."""
    theirs = theirs_of(kind.theirs, json.dumps(raw))
    for field, value in kind.fields_of(ours.config).items():
        kind.assert_same_field(field, value, theirs, levels=len(ours.config.block_channels))
    found = kind.state_of(ours)
    assert found.keys() == theirs.state_dict().keys()
    prefix = next(key for key in tensors if key.endswith(kind.first)).removesuffix(kind.first)
    for key, value in found.items():
        stored = tensors[prefix + key]
        if any(part in key for part in kind.reshaped):
            stored = stored.reshape(value.shape)
        assert value.shape == stored.shape
        torch.testing.assert_close(value, stored.to(value.dtype), rtol=0, atol=0, equal_nan=True)


@settings(FUZZ, max_examples=400)
@given(data=st.data())
def test_mutated_headers(kind, state, content, work, folder, data):
    file = folder / "x.safetensors"
    content = mutated_header(data.draw, content, kind.metadata_key, kind.fields)
    file.write_bytes(content)
    loaded = work.load(file)
    assert_bounded(work, len(state), len(content))
    if loaded is not None:
        with safetensors.safe_open(file, framework="pt") as opened:
            raw = json.loads(opened.metadata()[kind.metadata_key])
        assert_as_others_load(kind, loaded, raw, safetensors.torch.load_file(file))


@settings(FUZZ, max_examples=300)
@given(data=st.data())
def test_mutated_tensors(kind, state, work, folder, data):
    file = folder / "x.safetensors"
    content = mutated_tensors(data.draw, state, {kind.metadata_key: json.dumps(kind.fields)})
    file.write_bytes(content)
    dtype = data.draw(st.sampled_from((None, torch.float64)))
    loaded = work.load(file, dtype=dtype)
    assert_bounded(work, len(state), len(content) * (1 if dtype is None else 2))
    if loaded is not None:
        assert_as_others_load(kind, loaded, kind.fields, safetensors.torch.load_file(file))


@settings(FUZZ, max_examples=300)
@given(data=st.data())
def test_mutated_configurations(kind, state, work, folder, data):
    file = folder / f"{NAME}.safetensors"
    if not file.exists():
        safetensors.torch.save_file(state, file)
    text = mutated_text(data.draw, {"_class_name": kind.theirs.__name__, **kind.fields})
    (folder / "config.json").write_bytes(text)
    loaded = work.load(folder)
    assert_bounded(work, len(state), file.stat().st_size + len(text))
    if loaded is not None:
        assert_as_others_load(kind, loaded, json.loads(text), state)


@settings(FUZZ, max_examples=200)
@given(data=st.data())
def test_mutated_index_files(kind, state, work, folder, data):
    (folder / "config.json").write_text(json.dumps(kind.fields))
    keys = sorted(state)
    weight_map, size = {}, 0
    for number, part in enumerate((keys[:30], keys[30:]), 1):
        file = folder / f"{NAME}-{number:05d}-of-00002.safetensors"
        if not file.exists():
            safetensors.torch.save_file({key: state[key] for key in part}, file)
        weight_map |= dict.fromkeys(part, file.name)
        size += file.stat().st_size
    text = mutated_text(data.draw, {"metadata": {"total_size": size}, "weight_map": weight_map})
    index = folder / f"{NAME}.safetensors.index.json"
    index.write_bytes(text)
    loaded = work.load(data.draw(st.sampled_from((folder, index))))
    assert_bounded(work, len(state), size + len(text))
    if loaded is not None:
        assert json.loads(text)["weight_map"] == weight_map
        assert_as_others_load(kind, loaded, kind.fields, state)


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        pytest.param(kind, field, value, id=f"{kind.name}-{field}-{number}")
        for kind in KINDS
        for field, values in kind.huge.items()
        for number, value in enumerate(values)
    ],
    indirect=["kind"],
)
@pytest.mark.parametrize("where", ["config.json", "metadata"])
def test_a_configuration_far_beyond_its_file_builds_nothing(kind, state, work, tmp_path, field, value, where):
    raw = {**kind.fields, field: value}
    if field == "block_out_channels":
        raw |= {name: [block] * len(value) for name, block in kind.per_level.items()} | kind.one_for_all
    file = tmp_path / f"{NAME}.safetensors"
    metadata = {"format": "pt"} | ({kind.metadata_key: json.dumps(raw)} if where == "metadata" else {})
    safetensors.torch.save_file(state, file, metadata)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert work.load(file if where == "metadata" else tmp_path) is None
    assert work.modules == 0


@pytest.mark.parametrize("kind", [UNET], indirect=True, ids=lambda kind: kind.name)
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


@pytest.mark.parametrize("kind", [AUTOENCODER], indirect=True, ids=lambda kind: kind.name)
@settings(FUZZ, max_examples=100)
@given(data=st.data())
def test_shapes_alone_bound_the_work(work, folder, data):
    """A file without configuration: any names and shapes, of which its sizes are read."""
    file = folder / "x.safetensors"
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

"""Mutated headers, configurations and index files: refused in one line, or loaded as by others."""

import functools
import json
import math
import tracemalloc

import pytest
import safetensors.torch
import torch
from diffusers import UNet2DConditionModel
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ldmperf.model import CheckpointError, UNetConfig, diffusers_config, diffusers_state_dict, load_unet
from ldmperf.model.weights import METADATA_KEY

pytestmark = pytest.mark.usefixtures("_one_thread")

CONFIG = UNetConfig((8,), (2,), (True,), layers_per_block=1, norm_groups=4, context_dim=8)
NAME = "diffusion_pytorch_model"
FUZZ = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


class Quiet(dict):
    """hypothesis prints what an example was given."""

    def __repr__(self):
        return "state"


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


class Bytes(bytes):
    """The same for bytes."""

    def __repr__(self):
        return "content"


@functools.cache
def theirs_of(text):
    """diffusers' network, without weights, of a configuration as JSON."""
    with torch.device("meta"):
        return UNet2DConditionModel.from_config(json.loads(text))


class Work:
    """Counts what a load does: modules that are built, bytes of parameters, the peak of Python's memory."""

    def __init__(self, monkeypatch):
        self.modules = self.parameter_bytes = self.peak = self.loads = 0
        init, empty_like = torch.nn.Module.__init__, torch.empty_like

        def counted_init(module, *args, **kwargs):
            self.modules += 1
            init(module, *args, **kwargs)

        def counted_empty_like(tensor, **options):
            self.parameter_bytes += tensor.numel() * torch.finfo(options["dtype"]).bits // 8
            return empty_like(tensor, **options)

        monkeypatch.setattr(torch.nn.Module, "__init__", counted_init)
        monkeypatch.setattr(torch, "empty_like", counted_empty_like)

    def load(self, path, **options):
        """The network, or None with a checked message."""
        self.modules = self.parameter_bytes = self.peak = 0
        # Every fourth time: to trace memory makes a load several times slower.
        self.loads += 1
        if self.loads % 4 == 1:
            tracemalloc.start()
        try:
            return load_unet(path, **options)
        except CheckpointError as error:
            message = str(error)
            assert message.isprintable()
            assert len(message) <= 2500
            assert self.parameter_bytes == 0
            return None
        finally:
            if tracemalloc.is_tracing():
                self.peak = tracemalloc.get_traced_memory()[1]
                tracemalloc.stop()


@pytest.fixture
def work():
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield Work(monkeypatch)


def assert_bounded(work, tensors, size):
    """Work goes with the tensors that are there, memory with the size of the files."""
    assert work.modules <= 4 * tensors + 20
    assert work.parameter_bytes <= size
    # Python's objects for JSON and modules are larger than what they stand for, by a factor that is no input's.
    assert work.peak <= 50 * size + 10_000 * tensors


# A number of so many digits, or a list so deep, is put in as text: Python's own JSON writes neither.
DIGITS, DEEP = "@digits@", "@deep@"
NASTY = (
    *(0, -1, 1, 2, 3, 4, 8, 16, 10_000, 2**30, 2**31, 2**62, 2**63, 2**64, 10**30, 1e308, -0.0, 0.5),
    *(math.nan, math.inf, True, False, None, "", "x", "\n\x1b", "F16", "F32", "I32", "BF16", "F8_E4M3", "\udcff"),
    *([], {}, [8], [2], [0], [8, 8], [2**30, 2**30], [True], [[8]], [None], {"a": 1}, [8] * 1000),
    *("../x.safetensors", f"{NAME}.safetensors", "UNet2DModel", "DownBlock2D", ["DownBlock2D"], "text_time"),
    *(DIGITS, DEEP),
)


def as_text(raw):
    text = json.dumps(raw)
    return text.replace(f'"{DIGITS}"', "9" * 4000).replace(f'"{DEEP}"', "[" * 50_000 + "]" * 50_000).encode()


def places(raw, path=()):
    """Every place in a JSON value."""
    yield path
    items = raw.items() if isinstance(raw, dict) else enumerate(raw) if isinstance(raw, list) else ()
    for key, value in items:
        yield from places(value, (*path, key))


def changed(draw, raw):
    """A copy of a JSON value with one to three places replaced, removed, renamed or exchanged."""
    for _ in range(draw(st.integers(1, 3))):
        # A copy each time: no value may come to hold itself.
        raw = json.loads(json.dumps(raw))
        found = [path for path in places(raw) if path]
        if not found:
            break
        *path, key = draw(st.sampled_from(found))
        parent = raw
        for step in path:
            parent = parent[step]
        how = draw(st.sampled_from(("replace", "replace", "replace", "remove", "rename", "exchange", "add")))
        if how == "replace":
            parent[key] = draw(st.sampled_from(NASTY))
        elif how == "remove":
            del parent[key]
        elif isinstance(parent, dict):
            other = draw(st.sampled_from(sorted(parent)))
            if how == "exchange":
                parent[key], parent[other] = parent[other], parent[key]
            elif how == "rename":
                parent[draw(st.sampled_from((other, f"{key}x", "", "module." + key)))] = parent.pop(key)
            else:
                parent[draw(st.sampled_from((f"{key}x", "\n", "dropout", "decay")))] = parent[key]
    return raw


def damaged(draw, content):
    """Bytes with one changed, some left out, or cut short."""
    content = bytearray(content)
    position = draw(st.integers(0, len(content) - 1))
    how = draw(st.sampled_from(("flip", "cut", "leave out")))
    if how == "flip":
        content[position] ^= draw(st.integers(1, 255))
    elif how == "cut":
        del content[position:]
    else:
        del content[position : position + draw(st.integers(1, 40))]
    return bytes(content)


def mutated_text(draw, raw):
    return as_text(changed(draw, raw)) if draw(st.integers(0, 4)) else damaged(draw, as_text(raw))


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
        if field in ("attention_head_dim", "transformer_layers_per_block") and isinstance(their_value, int):
            their_value = (their_value,) * levels
        assert value == (tuple(their_value) if isinstance(value, tuple) else their_value), field
    found = diffusers_state_dict(ours)
    assert found.keys() == theirs.state_dict().keys()
    prefix = next(key for key in tensors if key.endswith("conv_in.weight")).removesuffix("conv_in.weight")
    for key, value in found.items():
        assert torch.equal(value.nan_to_num(), tensors[prefix + key].reshape(value.shape).nan_to_num())


@settings(FUZZ, max_examples=400)
@given(data=st.data())
def test_mutated_headers(state, content, work, tmp_path_factory, data):
    file = tmp_path_factory.getbasetemp() / "header.safetensors"
    raw_config = diffusers_config(CONFIG)
    end = 8 + int.from_bytes(content[:8], "little")
    header, values = content[8:end], content[end:]
    if data.draw(st.booleans()):
        raw = json.loads(header)
        if data.draw(st.integers(0, 2)) == 0:
            raw["__metadata__"][METADATA_KEY] = as_text(changed(data.draw, raw_config)).decode()
        else:
            raw = changed(data.draw, raw)
        header = as_text(raw)
        content = len(header).to_bytes(8, "little") + header + values
    else:
        content = damaged(data.draw, content[:end]) + values
    file.write_bytes(content)
    loaded = work.load(file)
    assert_bounded(work, len(state), len(content))
    if loaded is not None:
        with safetensors.safe_open(file, framework="pt") as opened:
            metadata = opened.metadata()
        assert_as_others_load(loaded, json.loads(metadata[METADATA_KEY]), safetensors.torch.load_file(file))


@settings(FUZZ, max_examples=350)
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


@settings(FUZZ, max_examples=250)
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
    ):
        config = UNetConfig((8,), (2,), (True,), norm_groups=4, **({"context_dim": 8} | changes))
        assert work.load(file, config=config) is None
        assert work.modules == 0

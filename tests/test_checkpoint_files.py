"""Which files a path stands for: folders, sets of shards, index files, links; and what else may lie there."""

import itertools
import json
import os
import pickle
import re
import shutil
import socket
import zipfile

import pytest
import safetensors.torch
import torch
from diffusers import UNet2DConditionModel
from diffusers.training_utils import EMAModel
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ldmperf.model import CheckpointError, UNetConfig, diffusers_config, diffusers_state_dict, load_unet, save_unet
from ldmperf.model.files import LARGEST_CONFIG
from ldmperf.model.keys import compvis_key

pytestmark = pytest.mark.usefixtures("_one_thread")

CONFIG = UNetConfig((8, 16), (2, 4), (True, False), layers_per_block=1, norm_groups=4, context_dim=8)
NAME = "diffusion_pytorch_model"


@pytest.fixture(scope="module")
def theirs():
    torch.manual_seed(0)
    return UNet2DConditionModel(**diffusers_config(CONFIG)).eval()


@pytest.fixture
def sharded(theirs, tmp_path):
    """A folder of diffusers' with three shards."""
    size = sum(p.numel() * 4 for p in theirs.parameters())
    theirs.save_pretrained(tmp_path, max_shard_size=size // 2)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) == 3
    return tmp_path


def state_of(theirs):
    return {key: value.contiguous() for key, value in theirs.state_dict().items()}


def assert_loads(path, theirs, **options):
    """diffusers' weights are the oracle: every tensor under its name, bit for bit."""
    ours = load_unet(path, **options)
    found, expected = diffusers_state_dict(ours), theirs.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key].reshape(value.shape), value) for key, value in expected.items())
    assert ours.config.num_heads == CONFIG.num_heads


def refusal(path, **options):
    with pytest.raises(CheckpointError) as caught:
        load_unet(path, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def renamed(folder, rename):
    """The names of files changed, in the index too; nothing stays under the old ones."""
    index = folder / f"{NAME}.safetensors.index.json"
    raw = json.loads(index.read_text())
    raw["weight_map"] = {key: rename(name) for key, name in raw["weight_map"].items()}
    for file in list(folder.glob("*.safetensors")):
        file.rename(folder / rename(file.name))
    index.unlink()
    return raw


VARIANTS = {
    "newer": lambda name: name.replace(NAME, f"{NAME}.fp16"),
    "older": lambda name: name.replace(".safetensors", ".fp16.safetensors"),
}


@pytest.mark.parametrize("with_index", [True, False])
@pytest.mark.parametrize("naming", VARIANTS)
def test_a_variant_in_shards_is_loaded_where_it_stands_alone(sharded, theirs, naming, with_index):
    raw = renamed(sharded, VARIANTS[naming])
    index = sharded / f"{NAME}.safetensors.index.fp16.json"
    if with_index:
        index.write_text(json.dumps(raw))
        # diffusers takes this folder for the variant too.
        again = UNet2DConditionModel.from_pretrained(sharded, variant="fp16")
        assert all(torch.equal(a, b) for a, b in zip(again.parameters(), theirs.parameters(), strict=True))
        assert_loads(index, theirs)
    assert_loads(sharded, theirs)
    for shard in sharded.glob("*.safetensors"):
        assert_loads(shard, theirs)


def test_diffusers_own_names_of_a_variant_in_shards(theirs, tmp_path):
    size = sum(p.numel() * 4 for p in theirs.parameters())
    theirs.save_pretrained(tmp_path, variant="fp16", max_shard_size=size // 2)
    assert len(list(tmp_path.glob("*fp16*"))) == 4
    assert_loads(tmp_path, theirs)
    # An index of the plain weights comes along where only a variant's weights are downloaded.
    shutil.copy(tmp_path / f"{NAME}.safetensors.index.fp16.json", tmp_path / f"{NAME}.safetensors.index.json")
    assert_loads(tmp_path, theirs)


def test_several_variants_are_told_apart_by_paths_that_work(sharded, theirs):
    renamed(sharded, VARIANTS["newer"])
    safetensors.torch.save_file(state_of(theirs), sharded / f"{NAME}.non_ema.safetensors")
    message = refusal(sharded)
    named = re.findall(rf"{NAME}\S*?\.safetensors", message)
    assert len(named) == 2
    for name in named:
        assert_loads(sharded / name, theirs)
    # The plain weights are preferred to variants; files of other names are not diffusers'.
    shutil.copy(sharded / f"{NAME}.non_ema.safetensors", sharded / f"{NAME}.safetensors")
    safetensors.torch.save_file({"x": torch.zeros(1)}, sharded / "pytorch_lora_weights.safetensors")
    assert_loads(sharded, theirs)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_an_incomplete_set_is_named_by_every_path_of_it(theirs, tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("set")
    size = sum(p.numel() * 4 for p in theirs.parameters())
    theirs.save_pretrained(folder, max_shard_size=size // data.draw(st.integers(2, 4)))
    raw = renamed(folder, VARIANTS[data.draw(st.sampled_from(sorted(VARIANTS)))])
    files = sorted(folder.glob("*.safetensors"))
    gone = data.draw(st.sets(st.sampled_from(files), min_size=1, max_size=len(files) - 1))
    paths = [folder, *(file for file in files if file not in gone)]
    if data.draw(st.booleans()):
        index = folder / f"{NAME}.safetensors.index.fp16.json"
        index.write_text(json.dumps(raw))
        paths.append(index)
    for file in gone:
        file.unlink()
    for path in paths:
        message = refusal(path)
        assert "download the whole set" in message
        for file in gone:
            assert re.search(r"-(\d{5})-of-", file.name)[1] in message


def test_stale_shards_are_refused_and_the_index_file_is_the_way_out(sharded, theirs):
    stale = sharded / f"{NAME}-00001-of-00099.safetensors"
    safetensors.torch.save_file({"conv_in.bias": torch.zeros(8)}, stale)
    index = sharded / f"{NAME}.safetensors.index.json"
    for path in (sharded, stale):
        assert f"does not list {stale.name}" in refusal(path)
    assert_loads(index, theirs)
    index.unlink()
    for path in (sharded, stale):
        assert "remove stale shards" in refusal(path)
    stale.unlink()
    assert_loads(sharded, theirs)
    again = sharded / f"{NAME}-00002-of-00003.fp16.safetensors"
    shutil.copy(sharded / f"{NAME}-00002-of-00003.safetensors", again)
    assert_loads(sharded, theirs)
    shutil.copy(again, sharded / f"{NAME}-00004-of-00003.safetensors")
    assert "too many shards" in refusal(sharded)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda m: m | {"conv_in.bias": "../elsewhere.safetensors"}, "no .safetensors file of its folder"),
        (lambda m: m | {"conv_in.bias": "/etc/passwd"}, "no .safetensors file of its folder"),
        (lambda m: m | {"conv_in.bias": ".."}, "no .safetensors file of its folder"),
        (lambda m: m | {"conv_in.bias": f"./{m['conv_in.bias']}"}, "no .safetensors file of its folder"),
        (lambda m: m | {"conv_in.bias": f"x/../{m['conv_in.bias']}"}, "no .safetensors file of its folder"),
        (lambda m: m | {"conv_in.bias": f"{m['conv_in.bias']}\0"}, "no .safetensors file of its folder"),
        (lambda m: m | {"conv_in.bias": f"\0{m['conv_in.bias']}"}, "missing"),
        (lambda m: m | {"conv_in.bias": "\udcff.safetensors"}, "missing"),
        (
            lambda m: m | {"conv_in.bias": "https://example.org/x.safetensors"},
            "no .safetensors file of its folder",
        ),
        (lambda m: m | {"conv_in.bias": 7}, "no .safetensors file of its folder"),
        (lambda m: m | {"conv_in.bias": f"{NAME}-00009-of-00003.safetensors"}, "missing"),
        (lambda m: m | {"conv_in.bias": next(n for n in m.values() if n != m["conv_in.bias"])}, "conv_in.bias"),
        (lambda m: m | {"made.up": m["conv_in.bias"]}, "made.up"),
        (lambda m: {k: v for k, v in m.items() if k != "conv_in.bias"}, "conv_in.bias"),
        (lambda m: {}, "no weight_map"),
        (lambda m: list(m), "no weight_map"),
    ],
)
def test_an_index_file_is_checked_against_its_shards(sharded, change, told):
    index = sharded / f"{NAME}.safetensors.index.json"
    raw = json.loads(index.read_text())
    index.write_text(json.dumps(raw | {"weight_map": change(raw["weight_map"])}))
    safetensors.torch.save_file({"x": torch.zeros(1)}, sharded.parent / "elsewhere.safetensors")
    for path in (sharded, index):
        assert told in refusal(path)


def test_a_link_is_not_followed_for_its_name(theirs, tmp_path):
    """The Hugging Face cache: names are links to blobs named by their hash."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "main"
    theirs.save_pretrained(snapshot)
    blobs.mkdir()
    for number, file in enumerate(list(snapshot.iterdir())):
        file.rename(blobs / f"{number:064x}")
        file.symlink_to(os.path.relpath(blobs / f"{number:064x}", snapshot))
    file = snapshot / f"{NAME}.safetensors"
    assert_loads(snapshot, theirs)
    assert_loads(file, theirs)
    # The blob itself is a .safetensors file by content, without its config.json.
    assert_loads(file.resolve(), theirs, config=CONFIG)
    assert "config.json beside it" in refusal(file.resolve())
    dangling = tmp_path / "dangling.safetensors"
    dangling.symlink_to("nowhere")
    assert "no such file" in refusal(dangling)


def test_a_set_of_links_out_of_its_folder_is_loaded_and_an_index_that_leads_out_is_not(sharded, theirs):
    """In the Hugging Face cache every shard is a link; a path in the index file is none of the owner's making."""
    outside = sharded.parent / "blobs"
    outside.mkdir()
    for number, shard in enumerate(sorted(sharded.glob("*.safetensors"))):
        shard.rename(outside / f"{number}.safetensors")
        shard.symlink_to(outside / f"{number}.safetensors" if number else f"../blobs/{number}.safetensors")
    index = sharded / f"{NAME}.safetensors.index.json"
    for path in (sharded, index, sharded / f"{NAME}-00002-of-00003.safetensors"):
        assert_loads(path, theirs)
    raw = json.loads(index.read_text())
    for leading_out in (str(outside), "../blobs"):
        moved = {
            key: f"{leading_out}/{int(name[24:29]) - 1}.safetensors" for key, name in raw["weight_map"].items()
        }
        assert (sharded / next(iter(moved.values()))).exists()
        index.write_text(json.dumps(raw | {"weight_map": moved}))
        for path in (sharded, index):
            assert "no .safetensors file of its folder" in refusal(path)


def test_a_pipe_is_not_waited_for(theirs, tmp_path):
    theirs.save_config(tmp_path)
    os.mkfifo(tmp_path / f"{NAME}.safetensors")
    assert "no such file" in refusal(tmp_path / f"{NAME}.safetensors")
    assert "no .safetensors file" in refusal(tmp_path)
    (tmp_path / "config.json").unlink()
    os.mkfifo(tmp_path / "config.json")
    assert "no config.json" in refusal(tmp_path)


def test_nothing_is_unpickled_and_nothing_fetched(sharded, theirs, tmp_path, monkeypatch):
    def forbidden(*args, **kwargs):
        raise AssertionError("a loader unpickled or reached for the network")

    # As they lie where only pickles were downloaded: nobody opens them.
    pickled = tmp_path / "pickled"
    theirs.save_pretrained(pickled, safe_serialization=False)
    assert list(pickled.glob("*.bin"))
    for place, name in (
        (torch, "load"),
        (pickle, "load"),
        (pickle, "loads"),
        (pickle, "Unpickler"),
        (socket, "socket"),
        (socket, "getaddrinfo"),
    ):
        monkeypatch.setattr(place, name, forbidden)
    assert_loads(sharded, theirs)
    assert "pickle weights are not read" in refusal(pickled)
    assert "zip archive" in refusal(next(pickled.glob("*.bin")))
    (sharded / f"{NAME}-00002-of-00003.safetensors").unlink()
    assert "missing" in refusal(sharded)
    for name in ("stabilityai/stable-diffusion-2", "https://huggingface.co/x/y"):
        assert "no such file or folder" in refusal(name)


def test_a_header_of_many_tensors_is_read_in_its_own_time(theirs, tmp_path):
    """A name of a hundred thousand words, and ten thousand names."""
    state = state_of(theirs)
    nothing = torch.zeros(0)
    others = {"model." * 100_000 + "conv_in": nothing} | {f"model.{i}": nothing for i in range(10_000)}
    file = tmp_path / "x.safetensors"
    safetensors.torch.save_file({key: value.clone() for key, value in (state | others).items()}, file)
    assert "10001 unexpected" in refusal(file, config=CONFIG)


def test_an_averaged_unet_is_loaded(theirs, tmp_path):
    """diffusers' EMAModel writes its own state into the config.json."""
    averaged = EMAModel(theirs.parameters(), model_cls=UNet2DConditionModel, model_config=theirs.config)
    averaged.save_pretrained(tmp_path)
    added = {
        "decay",
        "inv_gamma",
        "min_decay",
        "optimization_step",
        "power",
        "update_after_step",
        "use_ema_warmup",
    }
    assert added <= json.loads((tmp_path / "config.json").read_text()).keys()
    assert_loads(tmp_path, theirs)


OTHERS = {
    "empty": "{}",
    "another class": '{"_class_name": "AutoencoderKL", "block_out_channels": [8]}',
    "transformers": '{"architectures": ["CLIPTextModel"], "hidden_size": 8}',
    "broken": "{",
    "list": "[]",
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_config_that_is_no_unets_is_passed_over(theirs, tmp_path, other):
    theirs.save_pretrained(tmp_path / "unet")
    (tmp_path / "config.json").write_text(OTHERS[other])
    assert_loads(tmp_path, theirs)
    # Where the folder has no UNet below it, its own config.json is at fault.
    (tmp_path / "unet" / f"{NAME}.safetensors").rename(tmp_path / f"{NAME}.safetensors")
    shutil.rmtree(tmp_path / "unet")
    assert f"{tmp_path / 'config.json'}" in refusal(tmp_path)


def test_metadata_goes_before_a_config_beside_and_must_agree_with_a_folders(theirs, tmp_path):
    theirs.save_pretrained(tmp_path)
    file = tmp_path / f"{NAME}.safetensors"
    save_unet(load_unet(tmp_path), file)
    assert_loads(tmp_path, theirs)
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {"sample_size": 96}))
    assert_loads(tmp_path, theirs)
    (tmp_path / "config.json").write_text(json.dumps(raw | {"attention_head_dim": 1}))
    assert_loads(file, theirs)
    assert "differ; remove config.json, or write the file again with save_unet" in refusal(tmp_path)


TOKENS = ("module.", "_orig_mod.", "diffusion_model.", "model.", "unet.")


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tokens=st.lists(st.sampled_from(TOKENS), max_size=4), metadata=st.booleans())
def test_prefixes_of_training_code_are_understood(theirs, tmp_path_factory, tokens, metadata):
    prefix = "".join(tokens)
    file = tmp_path_factory.mktemp("prefixed") / "x.safetensors"
    others = {"first_stage_model.decoder.conv_in.weight": torch.zeros(1)} if prefix else {}
    safetensors.torch.save_file({prefix + key: value for key, value in state_of(theirs).items()} | others, file)
    assert_loads(file, theirs, config=CONFIG)


@pytest.mark.parametrize("compvis", [False, True])
@pytest.mark.parametrize("prefix", ["net.", "ema.", "model.ema.net."])
def test_a_prefix_that_is_not_known_is_named(theirs, tmp_path, prefix, compvis):
    state = state_of(theirs)
    if compvis:
        state = {compvis_key(key, CONFIG.layers_per_block, CONFIG.attention): v for key, v in state.items()}
    # An autoencoder has a conv_in too, and begins with no prefix of a UNet.
    others = {f"{part}.conv_in.weight": torch.zeros(1) for part in ("encoder", "vae.decoder")}
    file = tmp_path / "x.safetensors"
    safetensors.torch.save_file(others | {prefix + key: value for key, value in state.items()}, file)
    message = refusal(file)
    assert f"begin with {prefix!r}" in message
    assert f"removeprefix({prefix!r})" in message
    safetensors.torch.save_file(others, file)
    assert "no UNet in diffusers" in refusal(file)


@pytest.mark.parametrize(("one", "two"), list(itertools.combinations(("", *TOKENS, "module.unet."), 2)))
def test_two_unets_in_a_file_are_refused_by_name(theirs, tmp_path, one, two):
    state = state_of(theirs)
    file = tmp_path / "x.safetensors"
    twice = {one + key: value for key, value in state.items()} | {two + key: v for key, v in state.items()}
    safetensors.torch.save_file({key: value.clone() for key, value in twice.items()}, file)
    message = refusal(file, config=CONFIG)
    assert f"{one}conv_in.weight" in message
    assert f"{two}conv_in.weight" in message


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"  # noqa: E501
# What may lie under the name of weights, with the words that tell it and what to do.
KINDS = {
    "lfs": (LFS, r"git-lfs pointer.*git lfs pull"),
    "html": (b"<!DOCTYPE html>\n<html><body>Sign in</body></html>", r"web page.*download"),
    "html, other case": (b"\n  <HTML>" + b"x" * 99, r"web page.*download"),
    "pickle": (b"\x80\x02}q\x00." + bytes(99), r"pickle.*\.safetensors"),
    "pickle 5": (b"\x80\x05\x95" + bytes(99), r"pickle.*\.safetensors"),
    "gzip": (b"\x1f\x8b\x08" + bytes(99), "archive; unpack"),
    "gguf": (b"GGUF" + bytes(99), "GGUF.*take"),
    "json": (b'{"error": "Repository not found"}', "JSON text; give"),
    "zeros": (bytes(4096), "unfinished download; download it again"),
    "empty": (b"", "empty file; download"),
    "noise": (b"\xff" * 4096, "truncated or damaged; download"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_weights_is_told_in_plain_words(theirs, tmp_path, kind):
    content, words = KINDS[kind]
    theirs.save_config(tmp_path)
    file = tmp_path / f"{NAME}.safetensors"
    file.write_bytes(content)
    for path in (file, tmp_path):
        assert re.search(words, refusal(path))


def test_archives_and_unfinished_downloads_are_told_in_plain_words(theirs, tmp_path):
    theirs.save_pretrained(tmp_path)
    file = tmp_path / f"{NAME}.safetensors"
    torch.save({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    assert zipfile.is_zipfile(tmp_path / "x.safetensors")
    assert re.search(r"zip archive.*save the weights as \.safetensors", refusal(tmp_path / "x.safetensors"))
    half = file.read_bytes()[: file.stat().st_size // 2]
    for name in ("blob.incomplete", "x.safetensors.part", "x.safetensors.crdownload"):
        (tmp_path / name).write_bytes(half)
        assert "unfinished download" in refusal(tmp_path / name)
    file.write_bytes(half)
    assert "truncated" in refusal(file)
    (tmp_path / f"{NAME}.safetensors.aria2").write_bytes(b"")
    assert "unfinished download" in refusal(file)


@pytest.mark.parametrize("name", ["config.json", f"{NAME}.safetensors.index.json"])
def test_json_of_other_kinds_is_told_in_plain_words(sharded, name):
    (sharded / name).write_bytes(LFS)
    assert "git lfs pull" in refusal(sharded)
    with open(sharded / name, "wb") as file:
        file.truncate(1 << 40)
    assert re.search("more than (1|16) MB", refusal(sharded))
    for content in (
        b"\xff\xfe",
        b"[" * 900_000,
        b'{"a":' * 100_000,
        b"1" * 900_000,
        b'{"a": ' + b"9" * 5000 + b"}",
    ):
        assert len(content) < LARGEST_CONFIG
        (sharded / name).write_bytes(content)
        message = refusal(sharded)
        assert "not readable as JSON" in message
        assert "set_int_max_str_digits" not in message
        assert len(message) < 2500


def test_names_in_a_message_are_bounded_and_on_one_line(theirs, tmp_path):
    folder = tmp_path / "new\nline\x1b[31m"
    folder.mkdir()
    file = folder / "x.safetensors"
    safetensors.torch.save_file(
        state_of(theirs) | {"a\nb" * 100_000: torch.zeros(1), "\x1b[2J": torch.zeros(1)}, file
    )
    message = refusal(file, config=CONFIG)
    assert message.isprintable()
    assert len(message) < 2500
    assert r"\x1b[2J" in message
    assert r"new\nline" in message


def test_a_path_that_is_no_utf_8_is_told(theirs, tmp_path):
    """safetensors does not open such a path."""
    folder = os.fsencode(tmp_path) + b"/\xff"
    try:
        os.mkdir(folder)
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    theirs.save_pretrained(tmp_path / "plain")
    for file in (tmp_path / "plain").iterdir():
        shutil.copy(file, os.fsdecode(folder))
    assert "UTF-8; rename" in refusal(os.fsdecode(folder))

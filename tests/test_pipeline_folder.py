"""`PipelineFolder.read`: every fault of a folder before anything big is read; mutated folders never surprise."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dropin_models import make_unet
from pipeline_folders import diffusers_pipeline, edit_json, write_pipeline
from safetensors.torch import load_file, save_file

from ldmperf.model.pipeline import PipelineError, PipelineFolder, TextToImage

pytestmark = pytest.mark.usefixtures("_one_thread")
INDEX, UNET, VAE = "model_index.json", "unet/config.json", "vae/config.json"
TEXT, TOKENIZER = "text_encoder/config.json", "tokenizer/tokenizer_config.json"
SCHEDULER = "scheduler/scheduler_config.json"
UNET_WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pipelines")
    return {kind: write_pipeline(folder / kind, kind) for kind in ("sd15", "sdxl")}


@pytest.fixture
def copied(sound: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    return lambda kind: shutil.copytree(sound[kind], tmp_path / kind)


def set_to(**values: Any) -> Callable[[Path], None]:
    return lambda file: edit_json(file, lambda raw: raw.update(values))


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def emptied(file: Path) -> None:
    os.truncate(file, 0)


def gone(file: Path) -> None:
    shutil.rmtree(file) if file.is_dir() else file.unlink()


def pickled(file: Path) -> None:
    """A pickle in place of weights; to open it would end the process."""
    file.rename(file.with_name("pytorch_model.bin"))
    file.with_name("pytorch_model.bin").write_bytes(b"cposix\n_exit\n(I3\ntR.")


def huge(file: Path) -> None:
    with file.open("wb") as stream:
        stream.truncate((1 << 26) + 1)


def as_two_variants(file: Path) -> None:
    shutil.copy(file, file.with_name("model.a.safetensors"))
    file.rename(file.with_name("model.b.safetensors"))


def of_integers(file: Path) -> None:
    state = load_file(file)
    name = sorted(state)[0]
    save_file(state | {name: state[name].to(torch.int32)}, file, {"format": "pt"})


def with_a_word_more(file: Path) -> None:
    edit_json(file, lambda raw: raw["model"]["vocab"].update({"z</w>": 11}))


def index_of_shards(*names: str) -> Callable[[Path], None]:
    def change(file: Path) -> None:
        gone(file)
        index = {"metadata": {}, "weight_map": {f"tensor{n}": name for n, name in enumerate(names)}}
        file.with_name(file.name + ".index.json").write_text(json.dumps(index))

    return change


FAULTS: list[tuple[str, str, Callable[[Path], None], str]] = [
    ("sd15", INDEX, gone, "no model_index.json in it; give a folder that diffusers'"),
    ("sd15", INDEX, cut, "model_index.json: not readable as JSON"),
    ("sd15", INDEX, set_to(_class_name="FluxPipeline"), "class 'FluxPipeline'; only StableDiffusionPipeline"),
    ("sd15", INDEX, set_to(_class_name=["x"]), "a pipeline of the class"),
    (
        "sd15",
        INDEX,
        set_to(unet=["custom.py", "UNet"]),
        "unet is ['custom.py', 'UNet']; only UNet2D",
    ),
    ("sd15", INDEX, set_to(unet=["mine", "UNet2DConditionModel"]), "only UNet2DConditionModel of diffusers"),
    ("sd15", INDEX, set_to(text_encoder=["transformers", "T5EncoderModel"]), "only CLIPTextModel of"),
    ("sd15", INDEX, set_to(tokenizer=None), "no tokenizer; give a folder with every part"),
    (
        "sd15",
        INDEX,
        set_to(scheduler=["code", "Mine"]),
        "scheduler is ['code', 'Mine']; give a class",
    ),
    ("sd15", INDEX, set_to(scheduler=["diffusers", "LMSDiscreteScheduler"]), "'LMSDiscreteScheduler' is not"),
    ("sdxl", INDEX, set_to(text_encoder=[None, None]), "no text_encoder (a refiner has none"),
    ("sdxl", INDEX, set_to(requires_aesthetics_score=True), "a refiner; give the base's folder"),
    ("sd15", "vae", gone, "vae: no such folder; download the whole pipeline"),
    ("sd15", UNET_WEIGHTS, cut, "truncated or damaged; download or copy it again"),
    ("sd15", UNET_WEIGHTS, pickled, "pickle weights are not read"),
    ("sd15", "vae/diffusion_pytorch_model.safetensors", pickled, "pickle weights are not read"),
    (
        "sd15",
        "text_encoder/model.safetensors",
        pickled,
        "pytorch_model.bin is a pickle, which is not opened",
    ),
    ("sd15", "text_encoder/model.safetensors", gone, "no weights in it; save them as .safetensors"),
    ("sd15", "text_encoder/model.safetensors", emptied, "an empty file"),
    ("sd15", "text_encoder/model.safetensors", index_of_shards("../unet/x.safetensors"), "file of its folder"),
    (
        "sd15",
        "text_encoder/model.safetensors",
        index_of_shards("/etc/passwd"),
        "no .safetensors file of its folder",
    ),
    ("sd15", "text_encoder/model.safetensors", as_two_variants, "several sets of weights, model.a.safetensors"),
    ("sd15", "text_encoder/model.safetensors", of_integers, "1 not of a float dtype: "),
    ("sd15", UNET_WEIGHTS, index_of_shards("../x.safetensors"), "no .safetensors file of its folder"),
    ("sd15", UNET, set_to(cross_attention_dim=24), "the tensors are not those of the configuration"),
    ("sd15", UNET, set_to(act_fn="mish"), "act_fn = 'mish'"),
    ("sd15", VAE, set_to(latent_channels=8), "the tensors are not those of the configuration"),
    ("sd15", VAE, set_to(scaling_factor=None), "scaling_factor is null"),
    ("sd15", TEXT, set_to(hidden_size=24), "misshapen"),
    ("sd15", TEXT, set_to(num_hidden_layers=1), "unexpected: encoder.layers.1"),
    ("sd15", TEXT, set_to(num_hidden_layers=900), "too few for the 900 layers"),
    ("sd15", TEXT, set_to(num_hidden_layers=10**30), "num_hidden_layers = 1000"),
    ("sd15", TEXT, set_to(vocab_size=-1), "vocab_size = -1 is not a whole number"),
    ("sd15", TEXT, set_to(num_attention_heads=3), "3 heads do not divide hidden_size = 16"),
    ("sd15", TEXT, set_to(hidden_act="exec"), "hidden_act = 'exec' is not supported"),
    ("sd15", TEXT, set_to(hidden_act=["x"]), "hidden_act = ['x'] is not supported"),
    ("sd15", TEXT, set_to(layer_norm_eps="x"), "layer_norm_eps = 'x' is not a small positive number"),
    ("sd15", TEXT, set_to(eos_token_id=1.5), "eos_token_id = 1.5 is not a token's number"),
    ("sd15", TOKENIZER, set_to(model_max_length=77), "model_max_length = 77 does not fit the 8 positions"),
    ("sd15", TOKENIZER, set_to(model_max_length=10**30), "does not fit the 8 positions"),
    ("sd15", TOKENIZER, set_to(tokenizer_file="/etc/passwd"), "tokenizer_file names another file, '/etc/passwd'"),
    ("sd15", TOKENIZER, set_to(vocab_file="../../vocab.json"), "vocab_file names another file"),
    ("sd15", "tokenizer/tokenizer.json", with_a_word_more, "tokens run to 11, beyond the 11"),
    ("sd15", "tokenizer/tokenizer.json", gone, "neither tokenizer.json nor vocab.json and merges.txt"),
    ("sd15", "tokenizer/merges.txt", huge, "merges.txt: more than 64 MB"),
    ("sd15", "tokenizer/added_tokens.json", huge, "added_tokens.json: "),
    ("sd15", "tokenizer/tokenizer.json", cut, "tokenizer.json: not readable as JSON"),
    ("sd15", "tokenizer/tokenizer.json", set_to(model=3), "transformers cannot read the tokenizer"),
    ("sd15", SCHEDULER, gone, "scheduler_config.json: no such file"),
    ("sd15", SCHEDULER, set_to(beta_schedule="odd"), "beta_schedule 'odd' is not supported"),
    ("sd15", SCHEDULER, set_to(timestep_spacing="odd"), "timestep_spacing='odd' is not supported"),
    (
        "sd15",
        SCHEDULER,
        set_to(num_train_timesteps=20),
        "50 steps of ddim: num_steps must be",
    ),
]


@pytest.mark.parametrize(("kind", "place", "change", "told"), FAULTS, ids=[f"{f[1]}-{f[3][:30]}" for f in FAULTS])
def test_a_fault_is_one_line_with_the_file(
    copied: Callable[[str], Path], kind: str, place: str, change: Callable[[Path], None], told: str
) -> None:
    folder = copied(kind)
    change(folder / place)
    with pytest.raises(PipelineError) as error:
        PipelineFolder.read(folder, steps=50)
    (fault,) = error.value.faults
    assert told in fault
    assert fault.startswith(str(folder))
    assert fault.isprintable()
    assert len(fault) <= 2000
    # Of every part the folder or the file is named, and what is to be done.
    assert place.partition("/")[0] in fault or place == INDEX


def test_several_faults_are_told_together(copied: Callable[[str], Path]) -> None:
    folder = copied("sdxl")
    for place, change in (
        (UNET_WEIGHTS, cut), ("text_encoder_2/model.safetensors", gone), (SCHEDULER, set_to(beta_start="x")),
        (VAE, set_to(act_fn="mish")), (TOKENIZER, gone),
    ):  # fmt: skip
        change(folder / place)
    with pytest.raises(PipelineError) as error:
        PipelineFolder.read(folder)
    named = ["tokenizer", "text_encoder_2", "unet", "vae", "scheduler"]
    assert [
        fault.removeprefix(f"{folder}/").partition("/")[0].partition(":")[0] for fault in error.value.faults
    ] == named
    assert str(error.value) == "; ".join(error.value.faults)


def test_parts_of_different_pipelines_do_not_fit(sound: dict[str, Path], copied: Callable[[str], Path]) -> None:
    folder = copied("sd15")
    shutil.rmtree(folder / "unet")
    shutil.copytree(sound["sdxl"] / "unet", folder / "unet")
    with pytest.raises(PipelineError) as error:
        PipelineFolder.read(folder)
    first, second = error.value.faults
    assert "cross_attention_dim = 32, but the text encoders give 16" in first
    assert "addition_embed_type = 'text_time' is Stable Diffusion XL's" in second


@pytest.mark.parametrize(
    ("kind", "changes", "told"),
    [
        ("sd15", {"in_channels": 9}, "in_channels = 9 for 4 latent channels: an inpainting UNet"),
        ("sdxl", {"projection_class_embeddings_input_dim": 56}, "6 sizes give 64 (a refiner takes 5"),
    ],
)
def test_a_unet_for_something_else(
    copied: Callable[[str], Path], kind: str, changes: dict[str, Any], told: str
) -> None:
    folder = copied(kind)
    config = {key: v for key, v in json.loads((folder / UNET).read_text()).items() if not key.startswith("_")}
    shutil.rmtree(folder / "unet")
    make_unet(config | changes).save_pretrained(folder / "unet")
    with pytest.raises(PipelineError) as error:
        PipelineFolder.read(folder)
    (fault,) = error.value.faults
    assert told in fault


def test_other_pipelines_of_the_same_parts_and_a_named_sampler(copied: Callable[[str], Path]) -> None:
    folder = copied("sdxl")
    edit_json(folder / INDEX, lambda raw: raw.update(_class_name="StableDiffusionXLInpaintPipeline"))
    edit_json(folder / INDEX, lambda raw: raw.update(scheduler=["diffusers", "KDPM2DiscreteScheduler"]))
    edit_json(folder / INDEX, lambda raw: raw.update(image_encoder=["transformers", "AnyEncoder"]))
    assert TextToImage.load(folder, sampler="euler").sampler == "euler"


@pytest.mark.filterwarnings("ignore:The configuration file of the unet has set:FutureWarning")
@pytest.mark.parametrize("version", ["0.8.1", "0.8.0.dev0", "0.9.0.dev0", "0.9.0", "0.10.2", "1.0"])
@pytest.mark.parametrize("size", [16, 96, [16, 16]])
def test_the_usual_size_is_that_of_diffusers_for_files_of_any_age(
    copied: Callable[[str], Path], version: str, size: Any
) -> None:
    folder = copied("sd15")
    set_to(_diffusers_version=version, sample_size=size)(folder / UNET)
    theirs = diffusers_pipeline(folder).unet.config.sample_size
    ours = PipelineFolder.read(folder)
    assert ours.usual_size == ours.autoencoder.scale * (theirs if isinstance(theirs, int) else theirs[0])


def test_what_is_no_folder(sound: dict[str, Path], tmp_path: Path) -> None:
    for path, told in (
        (tmp_path / "none", "no such folder"),
        (sound["sd15"] / UNET_WEIGHTS, "one file has no tokenizer"),
        (sound["sd15"] / "unet", "no model_index.json in it"),
        (Path("/dev/null"), "no such folder"),
    ):
        with pytest.raises(PipelineError, match=told):
            PipelineFolder.read(path)


def test_weights_are_not_read_before_the_folder_is_sound(
    copied: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No tensor with memory is made for weights: every copy goes to the meta device."""
    folder = copied("sdxl")
    made = []
    copy = torch.Tensor.copy_

    def noted(self: torch.Tensor, *given: Any, **options: Any) -> torch.Tensor:
        made.append(self.device.type)
        return copy(self, *given, **options)

    monkeypatch.setattr(torch.Tensor, "copy_", noted)
    PipelineFolder.read(folder)
    assert "cpu" not in made


def test_a_link_of_the_hubs_cache_is_a_file(copied: Callable[[str], Path], tmp_path: Path) -> None:
    """A snapshot's files are links to blobs beside the snapshots."""
    folder = copied("sd15")
    for number, file in enumerate(sorted(path for path in folder.rglob("*") if path.is_file())):
        blob = tmp_path / "blobs" / str(number)
        blob.parent.mkdir(exist_ok=True)
        file.rename(blob)
        file.symlink_to(os.path.relpath(blob, file.parent))
    assert PipelineFolder.read(folder).sampler == "ddim"


# Of each kind of pipeline; LDMPERF_MUTANTS for more.
MUTANTS = int(os.environ.get("LDMPERF_MUTANTS", "8"))
ODD = [None, True, -1, 0, 3, 10**400, 1e308, 0.5, "", "x" * 5000, "a\nb\x1b", [], [1] * 50, {}, {"a": [{}]}]


def mutate(folder: Path, chance: random.Random) -> str:
    """Changes one thing of the folder; what it was."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    file = chance.choice(files)
    kind = chance.choice(["json"] * 12 + ["gone", "cut", "bytes", "link", "swap", "folder"])
    if kind == "json" and file.suffix == ".json":
        raw = json.loads(file.read_text())
        inside = raw
        while chance.random() < 0.6 and (nested := _nested(inside)):
            inside = chance.choice(nested)
        key = chance.choice(sorted(inside) if isinstance(inside, dict) else range(len(inside)))
        how = chance.choice(["value", "value", "value", "rename", "remove"])
        value = inside[key]
        if how == "rename" and isinstance(inside, dict):
            inside[f"{key}_"] = inside.pop(key)
        elif how == "remove":
            del inside[key]
        else:
            inside[key] = chance.choice([*ODD, value * 2 if type(value) is int else value, [value]])
        file.write_text(json.dumps(raw))
        return f"{file.relative_to(folder)} {how} {key}"
    if kind == "gone":
        file.unlink()
    elif kind == "cut":
        os.truncate(file, chance.randrange(file.stat().st_size))
    elif kind == "bytes":
        content = bytearray(file.read_bytes())
        # The header of weights, or the text of a configuration.
        content[chance.randrange(min(len(content), 4000))] = chance.randrange(256)
        file.write_bytes(content)
    elif kind == "link":
        file.unlink()
        file.symlink_to(file.name)
    elif kind == "swap":
        file.write_bytes(chance.choice(files).read_bytes())
    else:
        file.unlink()
        file.mkdir()
    return f"{file.relative_to(folder)} {kind}"


def _nested(inside: Any) -> list[Any]:
    values = inside.values() if isinstance(inside, dict) else inside
    return [value for value in values if isinstance(value, dict | list) and value]


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_mutated_folders_are_refused_in_one_line_or_make_an_image(
    sound: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    chance = random.Random(7)
    refused = 0
    for number in range(MUTANTS):
        folder = shutil.copytree(sound[kind], tmp_path / "p")
        what = f"{number}: {mutate(folder, chance)}"
        faults: Any = None
        try:
            made = TextToImage.load(folder, backend="torch")("a b c", 1, steps=1, height=4, width=4)
        except PipelineError as error:
            faults = error.faults
        except ValueError as error:
            # What only the call's steps show.
            assert "\n" not in str(error), what  # noqa: PT017
        else:
            assert made.pixels.shape == (1, 3, 4, 4), what
        if faults is not None:
            refused += 1
            assert all(fault.isprintable() and str(folder) in fault for fault in faults), what
        shutil.rmtree(folder)
    assert refused > MUTANTS // 3

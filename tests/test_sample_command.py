"""`ldmperf sample`: an image from a prompt by the command alone, its settings read back, and wrong calls."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from pipeline_folders import edit_json, write_pipeline
from safetensors.torch import load_file, save_file

from ldmperf.model.pipeline import TextToImage, as_bytes
from ldmperf.profiling.commands import sample_run
from ldmperf.profiling.commands.sample_settings import sampler_options_of, seeds_of, settings_of
from ldmperf.profiling.options import CaseError

pytestmark = pytest.mark.usefixtures("_one_thread")
Run = Callable[..., Any]
SMALL = ("--height", 16, "--width", 24, "--steps", 2, "--device", "cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pipeline(tmp_path_factory.mktemp("pipelines") / "tiny-sd", "sd15")


@pytest.fixture
def make(run: Run, folder: Path, tmp_path: Path) -> Run:
    """make("name.png", options...): the outcome of a call with small sizes."""

    def make(name: str, *options: Any, prompt: str | None = "a b c") -> Any:
        given = () if prompt is None else ("--prompt", prompt)
        return run("sample", "--pipeline", folder, *given, *SMALL, *options, "--out", tmp_path / name)

    return make


def pixels(path: Path) -> torch.Tensor:
    image = Image.open(path)
    image.load()
    assert image.mode == "RGB"
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(image.height, image.width, 3)


def texts(path: Path) -> dict[str, str]:
    image = Image.open(path)
    image.load()
    return image.text  # type: ignore[attr-defined,no-any-return]


def test_an_image_of_a_prompt_and_its_settings_read_back(make: Run, folder: Path, tmp_path: Path) -> None:
    done = make("out.png", "--seed", 7, "--negative-prompt", "d", "--guidance-scale", 5.5)
    assert done.code == 0, done.err
    out = tmp_path / "out.png"
    assert re.fullmatch(
        rf"{re.escape(str(out))}: 1 image of 24x16, 2 steps of ddim, [\d.]+ s "
        r"\(text [\d.]+, steps [\d.]+, decode [\d.]+\)\n",
        done.out,
    )
    made = TextToImage.load(folder, backend="torch")(
        "a b c", 7, negative_prompt="d", guidance_scale=5.5, steps=2, height=16, width=24
    )
    assert torch.equal(pixels(out), as_bytes(made.pixels)[0])
    assert list(tmp_path.iterdir()) == [out]
    told = json.loads(texts(out)["ldmperf"])
    assert {name: told[name] for name in ("prompts", "negative_prompt", "seeds", "steps", "guidance_scale")} == {
        "prompts": ["a b c"], "negative_prompt": "d", "seeds": [7], "steps": 2, "guidance_scale": 5.5,
    }  # fmt: skip
    assert (told["height"], told["width"], told["dtype"], told["device"]) == (16, 24, "float32", "cpu")
    assert (told["sampler"], told["backend"], told["pipeline"]) == ("ddim", "torch", "tiny-sd")
    assert told["plan"]["options"]["timestep_spacing"] == "leading"
    assert told["weights_sha256"].keys() == {"unet", "vae", "text_encoder"}
    assert told["seconds"].keys() == {"text", "steps", "decode"}
    # As web UIs read it.
    first, second, last = texts(out)["parameters"].split("\n")
    assert (first, second) == ("a b c", "Negative prompt: d")
    digest = told["weights_sha256"]["unet"][:10]
    assert last.startswith("Steps: 2, Sampler: DDIM, CFG scale: 5.5, Seed: 7, Size: 24x16, ")
    assert f"Model hash: {digest}, Model: tiny-sd, Version: ldmperf" in last


def test_again_makes_the_image_again_with_what_is_told_changed(make: Run, tmp_path: Path) -> None:
    options = ("--sampler", "dpmpp_2m", "--sampler-option", "use_karras_sigmas=true", "--clip-skip", 1)
    assert make("one.png", "--seed", "1,4", *options).code == 0
    assert (
        texts(tmp_path / "one.png")["parameters"].split("\n")[1].startswith("Steps: 2, Sampler: DPM++ 2M Karras")
    )
    assert make("two.png", "--again", tmp_path / "one.png", prompt=None).code == 0
    assert torch.equal(pixels(tmp_path / "one.png"), pixels(tmp_path / "two.png"))
    first, second = (json.loads(texts(tmp_path / name)["ldmperf"]) for name in ("one.png", "two.png"))
    assert {**first, "seconds": 0} == {**second, "seconds": 0}
    done = make("three.png", "--again", tmp_path / "one.png", "--seed", 4, "--sampler", "euler", prompt="h")
    assert done.code == 0, done.err
    third = json.loads(texts(tmp_path / "three.png")["ldmperf"])
    changed = {name for name in first if first[name] != third[name]}
    assert changed == {"prompts", "seeds", "sampler", "sampler_options", "plan", "seconds"}


def test_the_settings_of_a_grid_beyond_pillows_limit_are_read(
    make: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert make("one.png").code == 0
    with monkeypatch.context() as patch:
        patch.setattr(Image, "MAX_IMAGE_PIXELS", 16)
        with pytest.raises(Image.DecompressionBombError):
            Image.open(tmp_path / "one.png")
        assert make("two.png", "--again", tmp_path / "one.png", prompt=None).code == 0
    assert torch.equal(pixels(tmp_path / "one.png"), pixels(tmp_path / "two.png"))


def test_other_weights_than_those_of_the_image_are_told(
    make: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert make("one.png").code == 0
    monkeypatch.setattr(sample_run, "weights_sha256", lambda path, told, option: "0" * 64)
    done = make("two.png", "--again", tmp_path / "one.png")
    assert "tiny-sd: other weights than those of the image that --again names" in done.err


def test_several_seeds_are_a_grid_and_a_name_with_seed_is_a_file_each(make: Run, tmp_path: Path) -> None:
    assert make("grid.png", "--seed", "1-3", "--batch", 2).code == 0
    grid = pixels(tmp_path / "grid.png")
    assert grid.shape == (32, 48, 3)
    assert make("one-{seed}.png", "--seed", "1-2,3").code == 0
    for seed, (top, left) in zip((1, 2, 3), ((0, 0), (0, 24), (16, 0)), strict=True):
        single = pixels(tmp_path / f"one-{seed}.png").int()
        # Alone and in a batch of two: equal but for rounding.
        assert (grid[top : top + 16, left : left + 24].int() - single).abs().max() <= 1
        assert json.loads(texts(tmp_path / f"one-{seed}.png")["ldmperf"])["seeds"] == [seed]
    assert not grid[16:, 24:].any()
    assert json.loads(texts(tmp_path / "grid.png")["ldmperf"])["seeds"] == [1, 2, 3]


def test_prompts_are_rows_and_seeds_columns(make: Run, tmp_path: Path) -> None:
    assert make("grid.png", "--prompt", "h i", "--seed", "5,6,9,2").code == 0
    grid = pixels(tmp_path / "grid.png")
    assert grid.shape == (32, 96, 3)
    done = make("{prompt}-{seed}.png", "--prompt", "h i", "--seed", "5,6,9,2", "--batch", 4)
    assert done.code == 0
    assert "8 files: 8 images of 24x16" in done.out
    assert (grid[16:, 24:48].int() - pixels(tmp_path / "2-6.png").int()).abs().max() <= 1
    assert texts(tmp_path / "2-6.png")["parameters"].startswith("h i\nSteps: 2")
    done = make("{seed}.png", "--prompt", "h i", "--seed", "5,6,9")
    assert (done.code, list(tmp_path.glob("5.png"))) == (2, [])
    assert "names several images alike; put {prompt} into the name too" in done.err
    done = make("{prompt}.png", "--prompt", "h i", "--seed", "5,6")
    assert "names several images alike; put {seed} into the name too" in done.err
    done = make(
        "{prompt}{seed}.png", *["--prompt", "b"] * 2, *(f"--prompt={n}" for n in range(9)), "--seed", "1,11"
    )
    assert "names several images alike; write {prompt}-{seed} in the name" in done.err


def test_a_prompt_given_twice_is_drawn_once(make: Run, tmp_path: Path) -> None:
    assert make("a.png", "--prompt", "a b c").code == 0
    assert pixels(tmp_path / "a.png").shape == (16, 24, 3)


@pytest.mark.parametrize(("part", "who"), [("unet", "the UNet"), ("vae", "the autoencoder")])
def test_an_image_that_is_not_finite_is_told_and_not_written(
    run: Run, folder: Path, tmp_path: Path, part: str, who: str
) -> None:
    broken = tmp_path / "p"
    shutil.copytree(folder, broken)
    file = broken / part / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["conv_out.bias" if part == "unet" else "decoder.conv_in.bias"].fill_(float("nan"))
    save_file(tensors, file, {"format": "pt"})
    done = run("sample", "--pipeline", broken, "--prompt", "a", "--seed", 7, *SMALL, "-o", tmp_path / "a.png")
    assert (done.code, done.err.count("\n")) == (1, 1)
    assert f"seed 7: {who} gives what is not finite in float32; take another dtype" in done.err
    assert not (tmp_path / "a.png").exists()


def _interrupted_at_the_second(decode: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    calls = []

    def failing(*given: Any, **options: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return decode(*given, **options)

    return failing


def test_previews_are_written_beside_the_image_and_go_with_it(
    make: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    replace = os.replace

    def noted(source: Any, target: Any) -> None:
        # What a viewer meets is a whole image.
        seen.append((Path(target).name, pixels(Path(source)).shape, list(tmp_path.iterdir())))
        replace(source, target)

    monkeypatch.setattr(os, "replace", noted)
    assert make("a.png", "--preview", 2, "--steps", 5, "--seed", "1,2", "--batch", 2).code == 0
    assert [(name, shape) for name, shape, _ in seen] == [
        ("a.preview.png", (16, 48, 3)), ("a.preview.png", (16, 48, 3)), ("a.png", (16, 48, 3)),
    ]  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    for _ in range(2):
        with monkeypatch.context() as patch:
            patch.setattr(TextToImage, "decode", _interrupted_at_the_second(TextToImage.decode))
            assert make("c.png", "--preview", 1, "--steps", 3).code == 130
        assert [path.name for path in tmp_path.glob("c*")] == ["c.preview.png"]
    # A preview that a stopped call left is replaced, what a user put there is not.
    assert make("c.png", "--preview", 1, "--steps", 3).code == 0
    assert [path.name for path in tmp_path.glob("c*")] == ["c.png"]
    (tmp_path / "b.preview.png").write_text("the user's")
    assert "b.preview.png is there already" in make("b.png", "--preview", 2).err
    assert make("b.png").code == 0
    assert (tmp_path / "b.preview.png").read_text() == "the user's"


def test_a_file_that_is_there_is_replaced_only_by_force(make: Run, tmp_path: Path) -> None:
    out = tmp_path / "a.png"
    out.write_text("precious")
    done = make("a.png")
    assert (done.code, out.read_text()) == (2, "precious")
    assert (
        done.err == f"ldmperf: --out: {out} is there already; name another file, or give --force to replace it\n"
    )
    assert make("a.png", "--force").code == 0
    assert pixels(out).shape == (16, 24, 3)
    # A link to nothing is there too.
    (tmp_path / "b.png").symlink_to(tmp_path / "nowhere")
    assert "b.png is there already" in make("b.png").err


@pytest.mark.parametrize("failure", [KeyboardInterrupt, MemoryError, torch.OutOfMemoryError, RuntimeError])
def test_what_ends_a_run_leaves_nothing_half_written(
    make: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: type[BaseException]
) -> None:
    decode = TextToImage.decode
    calls = []

    def failing(self: Any, *given: Any, **options: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) > 1:
            raise failure("no\nmore")
        return decode(self, *given, **options)

    monkeypatch.setattr(TextToImage, "decode", failing)
    done = make("{seed}.png", "--seed", "1-3")
    assert [path.name for path in tmp_path.iterdir()] == ["1.png"]
    assert pixels(tmp_path / "1.png").shape == (16, 24, 3)
    *_, last = done.err.splitlines()
    if failure is KeyboardInterrupt:
        assert (done.code, last) == (130, "ldmperf: stopped; 1 file of 3 written")
    else:
        assert done.code == 1
        assert last.startswith(f"ldmperf: {failure.__name__}: no")
        assert ("give a smaller --batch" in last) == (failure is not RuntimeError)


def test_a_full_disk_leaves_the_old_file(make: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.png").write_text("old")

    def full(self: Path, content: bytes) -> int:
        with self.open("wb") as file:
            file.write(content[:10])
        raise OSError(28, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_bytes", full)
    done = make("a.png", "--force")
    assert done.code == 1
    assert "No space left on device" in done.err
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


ODD_PROMPTS = [
    "a 漢字 🌊 \u202e b",
    "two\nlines\n\nNegative prompt: none\tof it",
    "é",
    " ",
    "a " * 20_000,
    '"quoted", \\ {seed} %s',
]


@pytest.mark.parametrize("prompt", ODD_PROMPTS, ids=range(len(ODD_PROMPTS)))
def test_prompts_of_any_text_are_kept_whole(make: Run, tmp_path: Path, prompt: str) -> None:
    done = make("a.png", "--steps", 1, "--negative-prompt", prompt, prompt=prompt)
    assert done.code == 0, done.err
    told = json.loads(texts(tmp_path / "a.png")["ldmperf"])
    assert (told["prompts"], told["negative_prompt"]) == ([prompt], prompt)
    assert texts(tmp_path / "a.png")["parameters"].startswith(f"{prompt}\nNegative prompt: {prompt}\nSteps: 1, ")


def test_a_long_prompt_is_told_once(make: Run) -> None:
    done = make("{seed}.png", "--seed", "1,2", prompt="a b c d e f g h i")
    assert done.err == "prompt cut at 8 tokens; left out: 'g h i'\n"


def test_what_is_cut_from_a_prompt_is_quoted_in_part(make: Run) -> None:
    done = make("a.png", "--steps", 1, prompt="a " * 20_000)
    assert re.fullmatch(r"prompt cut at 8 tokens; left out: '(a ){100}' and \d{5} more characters\n", done.err), (
        done.err[:400]
    )


WRONG: list[tuple[tuple[Any, ...], str]] = [
    (("--seed", "x"), "--seed: 'x' is no seed; give whole numbers from 0"),
    (("--seed", "5-1"), "--seed: '5-1' is no seed"),
    (("--seed", "-1"), "--seed: '-1' is no seed"),
    (("--seed", "0-99999999999"), "are too many for one call; give at most 1024"),
    (("--seed", ","), "--seed: no seed"),
    (("--seed", str(2**64)), "is no seed"),
    (("--height", 15), "--height must be a multiple of 2 from 2 to 8192, not 15"),
    (("--steps", 0), "'0' is not a whole number of at least 1; see: ldmperf sample --help"),
    (("--steps", 1001), "1001 steps of ddim: num_steps must be an integer from 1 to 1000"),
    (("--guidance-scale", "nan"), "--guidance-scale: 'nan' is not a number of at least 0"),
    (("--guidance-scale", "-1"), "--guidance-scale: '-1' is not a number of at least 0"),
    (("--sampler", "k_lms"), "unknown sampler 'k_lms'; choose one of ddim"),
    (("--sampler-option", "eta"), "--sampler-option: 'eta' is none; give NAME=VALUE"),
    (("--sampler-option", "eta=x"), "option eta must be a number"),
    (("--sampler-option", "nothing=1"), "ddim takes no option 'nothing'"),
    (("--sampler-option", "steps=1"), "ddim takes no option 'steps'"),
    (("--sampler-option", "begin=1"), "begin is no option of a sampler"),
    (("--clip-skip", 5), "--clip-skip: clip_skip must be a whole number from 0 to 1, not 5"),
    (("--dtype", "int8"), "--dtype: no dtype 'int8'; choose from float32, bfloat16, float16"),
    (("--device", "tpu"), "--device: no device 'tpu'; choose from cpu, cuda"),
    (("--device", "cuda:9"), "--device: cuda:9 is not here"),
    (("--tile", 3), "--tile must be a multiple of 2"),
    (("--again", "/dev/null"), "--again: /dev/null: no PNG file that can be read"),
    (("--again", "/nowhere.png"), "--again: /nowhere.png: no such file"),
]


@pytest.mark.parametrize(("options", "told"), WRONG, ids=[f"{' '.join(map(str, o))}"[:40] for o, _ in WRONG])
def test_a_wrong_call_is_one_line(make: Run, tmp_path: Path, options: tuple[Any, ...], told: str) -> None:
    done = make("a.png", *options)
    assert done.code == 2, (done.out, done.err)
    assert told in done.err
    assert done.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("a.jpg", "the name must end in .png"),
        ("none/a.png", "no such folder; make it"),
        ("x" * 250 + ".png", "the name is too long"),
        ("folder.png", "is a folder; name a file in it"),
    ],
)
def test_where_nothing_can_be_written(make: Run, tmp_path: Path, name: str, told: str) -> None:
    (tmp_path / "folder.png").mkdir()
    done = make(name)
    assert done.code == 2
    assert told in done.err


def test_every_fault_of_the_folder_is_a_line(run: Run, tmp_path: Path) -> None:
    folder = write_pipeline(tmp_path / "p", "sd15")
    edit_json(folder / "vae/config.json", lambda raw: raw.update(act_fn="mish"))
    (folder / "unet/diffusion_pytorch_model.safetensors").write_bytes(b"")
    done = run("sample", "--pipeline", folder, "--prompt", "a", *SMALL, "-o", tmp_path / "a.png")
    assert done.code == 2
    assert done.out == ""
    first, second = done.err.splitlines()
    assert first.startswith(f"ldmperf: {folder}/unet/")
    assert second.startswith(f"ldmperf: {folder}/vae/")


@pytest.mark.parametrize("module", ["transformers", "PIL"])
def test_without_the_extra_the_line_says_what_to_install(
    make: Run, monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    for name in [name for name in sys.modules if name.startswith("ldmperf.model.pipeline")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    done = make("a.png")
    assert done.code == 1
    assert "needs transformers and pillow: pip install transformers pillow" in done.err
    assert done.err.count("\n") == 1


def test_no_prompt_and_a_foreign_png(make: Run, tmp_path: Path) -> None:
    assert "--prompt: no prompt; give one, or --again" in make("a.png", prompt=None).err
    foreign = tmp_path / "foreign.png"
    for kept in (None, "no json", "[1]", "{}", '{"prompts": 3}', '{"prompts": ["a"], "seeds": ["x"]}'):
        from PIL import PngImagePlugin

        info = PngImagePlugin.PngInfo()
        if kept is not None:
            info.add_text("ldmperf", kept)
        Image.new("RGB", (2, 2)).save(foreign, pnginfo=info)
        done = make("a.png", "--again", foreign, prompt=None)
        assert done.code == 2
        assert done.err.startswith("ldmperf: --")
        assert done.err.count("\n") == 1


def test_a_safety_checker_is_named_as_not_run(run: Run, tmp_path: Path) -> None:
    folder = write_pipeline(tmp_path / "p", "sd15")
    checker = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    edit_json(folder / "model_index.json", lambda raw: raw.update(safety_checker=checker))
    done = run("sample", "--pipeline", folder, "--prompt", "a", *SMALL, "-o", tmp_path / "a.png")
    assert (done.code, done.err) == (0, "p: its safety checker is not run\n")


def test_texts_of_seeds_and_options() -> None:
    assert seeds_of(["1-3,2", "7"]) == [1, 2, 3, 7]
    assert sampler_options_of(["a=true", "b=0.5", "c=zero", "d=null", "e=2"]) == {
        "a": True, "b": 0.5, "c": "zero", "d": None, "e": 2,
    }  # fmt: skip
    with pytest.raises(CaseError, match="not UTF-8"):
        settings_of({"prompts": ["\udcff"]}, {})
    with pytest.raises(CaseError, match="2000 images are too many"):
        settings_of({"prompts": ["a", "b"], "seeds": list(range(1000))}, {})

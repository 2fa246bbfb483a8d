"""What a PNG file of `ldmperf sample` says: the image that the options ask for, its weights, times and labels."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from pipeline_folders import write_pipeline

from ldmperf.model.pipeline import TextToImage, as_bytes
from ldmperf.profiling.commands import sample_run
from ldmperf.profiling.commands.sample_settings import SampleSettings
from ldmperf.profiling.commands.sample_texts import texts_of
from ldmperf.samplers import NoiseSchedule, make_plan

pytestmark = pytest.mark.usefixtures("_one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pipeline(tmp_path_factory.mktemp("pipelines") / "tiny-sd", "sd15")


@pytest.fixture
def make(run: Callable[..., Any], folder: Path, tmp_path: Path) -> Callable[..., Any]:
    def make(name: str, *options: Any) -> None:
        sizes = ("--height", 8, "--width", 16, "--steps", 3, "--device", "cpu")
        done = run("sample", "--pipeline", folder, "--prompt", "a b", *sizes, *options, "-o", tmp_path / name)
        assert done.code == 0, done.err

    return make


def read(path: Path) -> tuple[torch.Tensor, dict[str, Any], str]:
    """Pixels, settings and the text of web UIs."""
    image = Image.open(path)
    image.load()
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(image.height, image.width, 3)
    return pixels, json.loads(image.info["ldmperf"]), image.info["parameters"]


OPTIONS: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
    (("--clip-skip", 1), {"clip_skip": 1}),
    (("--sampler", "dpmpp_2m"), {"sampler": "dpmpp_2m"}),
    (
        ("--sampler", "dpmpp_2m", "--sampler-option", "use_karras_sigmas=true"),
        {"sampler": "dpmpp_2m", "options": {"use_karras_sigmas": True}},
    ),
    (("--tile", 4), {"tile": 4}),
    (("--negative-prompt", "d"), {"negative_prompt": "d"}),
    (("--guidance-scale", 3), {"guidance_scale": 3.0}),
    (("--seed", 3), {"seeds": 3}),
]


def test_every_option_reaches_the_image(make: Callable[..., Any], folder: Path, tmp_path: Path) -> None:
    pipeline = TextToImage.load(folder, backend="torch")
    images = []
    for number, (options, changes) in enumerate([((), {}), *OPTIONS]):
        make(f"{number}.png", *options)
        given = {"seeds": 0, "steps": 3, "height": 8, "width": 16} | changes
        expected = as_bytes(pipeline("a b", given.pop("seeds"), **given).pixels)[0]
        images.append(read(tmp_path / f"{number}.png")[0])
        assert torch.equal(images[-1], expected), options
        assert not any(torch.equal(images[-1], other) for other in images[:-1]), options


def test_digests_are_those_of_each_parts_file(make: Callable[..., Any], folder: Path, tmp_path: Path) -> None:
    make("a.png")
    files = {
        "unet": "unet/diffusion_pytorch_model.safetensors",
        "vae": "vae/diffusion_pytorch_model.safetensors",
        "text_encoder": "text_encoder/model.safetensors",
    }
    expected = {name: hashlib.sha256((folder / file).read_bytes()).hexdigest() for name, file in files.items()}
    assert read(tmp_path / "a.png")[1]["weights_sha256"] == expected


def test_the_dtype_is_the_unets(run: Callable[..., Any], tmp_path: Path) -> None:
    """XL's autoencoder decodes in float32 then; --again is to run the UNet in float16 again."""
    folder, out = write_pipeline(tmp_path / "p", "sdxl"), tmp_path / "a.png"
    sizes = ("--height", 4, "--width", 4, "--steps", 1, "--device", "cpu", "--dtype", "float16")
    done = run("sample", "--pipeline", folder, "--prompt", "a", *sizes, "-o", out)
    assert done.code == 0, done.err
    assert read(out)[1]["dtype"] == "float16"


def test_seconds_are_those_of_the_files_own_images(
    make: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every call of the pipeline takes 1, 10 and 100 times its number."""
    call, numbers = TextToImage.__call__, []

    def timed(*given: Any, **options: Any) -> Any:
        made = call(*given, **options)
        numbers.append(len(numbers) + 1)
        made.seconds.update(text=numbers[-1], steps=10 * numbers[-1], decode=100 * numbers[-1])
        return made

    monkeypatch.setattr(TextToImage, "__call__", timed)
    for name, expected in (("{seed}.png", {1: 1, 2: 1, 3: 2}), ("grid.png", {"grid": 7})):
        make(name, "--seed", "1-3", "--batch", 2)
        for stem, times in expected.items():
            told = read(tmp_path / f"{stem}.png")[1]["seconds"]
            assert told == {"text": times, "steps": 10 * times, "decode": 100 * times}


def test_progress_counts_the_evaluations_of_all_batches(
    make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Any] = []

    @contextmanager
    def counting(_: Any, total: int, what: str) -> Any:
        told.append((total, what))
        yield told.append

    monkeypatch.setattr(sample_run, "counting", counting)
    # Heun evaluates the network twice in every step but the last.
    make("grid.png", "--seed", "1-3", "--batch", 2, "--sampler", "heun", "--steps", 2)
    assert told == [
        (6, "steps"),
        *(f"images 1 to 2 of 3: step {step} of 3" for step in (1, 2, 3)),
        *(f"image 3 of 3: step {step} of 3" for step in (1, 2, 3)),
    ]


LABELS = [
    ("ddim", {}, "DDIM"),
    ("euler_a", {}, "Euler a"),
    ("dpmpp_2m", {"use_karras_sigmas": True}, "DPM++ 2M Karras"),
    ("dpmpp_2m", {"solver_order": 3}, "DPM++ 3M"),
    ("dpmpp_2m", {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True}, "DPM++ 2M SDE Karras"),
]


@pytest.mark.parametrize(("sampler", "options", "label"), LABELS)
def test_the_web_uis_text(sampler: str, options: dict[str, Any], label: str) -> None:
    schedule = NoiseSchedule.from_diffusers({"beta_schedule": "scaled_linear", "steps_offset": 1})
    settings = SampleSettings(
        prompts=["a", "b"], seeds=[4, 5], steps=9, guidance_scale=7.5, height=8, width=16, clip_skip=1
    )
    made = {"weights_sha256": {"unet": "0123456789ab", "vae": "f" * 12}, "pipeline": "x, y", "version": "1"}
    texts = texts_of(settings, make_plan(sampler, schedule, 9, **options), made, {})
    # In web UIs 1 is the usual last layer; a comma would end the name.
    assert texts["parameters"] == (
        f"a\nSteps: 9, Sampler: {label}, CFG scale: 7.5, Seed: 4, Size: 16x8, Model hash: 0123456789, "
        "Model: x  y, Clip skip: 2, Version: ldmperf 1"
    )

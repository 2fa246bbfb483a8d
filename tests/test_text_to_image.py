"""`TextToImage` against diffusers' own pipelines from the same folder and latents, and what it does beside."""

from __future__ import annotations

import importlib
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from pipeline_folders import KINDS, diffusers_pipeline, edit_json, write_pipeline
from tapes import Tapes

from ldmperf.kernels import philox_normal, seed_tensor
from ldmperf.model.pipeline import PipelineFolder, TextToImage, as_bytes
from ldmperf.samplers import DIFFUSERS_CLASSES, initial_noise

pytestmark = pytest.mark.usefixtures("_one_thread")

SIZE = {"height": 16, "width": 24}
PROMPTS, SEEDS = ["a b c", "h i", ""], [3, 2**63 + 5, 0]
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: write_pipeline(tmp_path_factory.mktemp("pipelines") / kind, kind) for kind in KINDS}


@pytest.fixture(scope="module")
def ours(folders: dict[str, Path]) -> dict[str, TextToImage]:
    return {kind: TextToImage.load(folder, backend="torch") for kind, folder in folders.items()}


@pytest.fixture(scope="module")
def theirs(folders: dict[str, Path]) -> dict[str, Any]:
    return {kind: diffusers_pipeline(folder) for kind, folder in folders.items()}


def diffused(pipeline: Any, prompts: list[str], seeds: list[int], steps: int = 3, **options: Any) -> Any:
    """(latents, pixels) of diffusers' pipeline on our noise."""
    last = []

    def noted(_: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        last[:] = [tensors["latents"]]
        return tensors

    noise = initial_noise(seeds, (4, SIZE["height"] // 2, SIZE["width"] // 2))
    images = pipeline(
        prompts,
        latents=noise,
        num_inference_steps=steps,
        output_type="pt",
        callback_on_step_end=noted,
        **SIZE,
        **options,
    ).images
    return last[0], images


def check_same(sampled: Any, latents: torch.Tensor, pixels: torch.Tensor) -> None:
    error = (sampled.latents - latents).abs().max() / latents.abs().max()
    assert error < TOLERANCE
    assert (sampled.pixels - pixels).abs().max() < TOLERANCE
    assert pixels.std() > 0.05
    apart = (as_bytes(sampled.pixels).int() - (pixels * 255).round().permute(0, 2, 3, 1).int()).abs()
    # Where rounding ties break.
    assert apart.max() <= 1
    assert apart.float().mean() < 0.01


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("against", [None, "d e", ["d", "", "e f g"]])
def test_latents_and_images_are_diffusers(ours: Any, theirs: Any, kind: str, against: Any) -> None:
    batch = ours[kind](PROMPTS, SEEDS, negative_prompt=against, steps=3, **SIZE)
    negative = [against] * 3 if isinstance(against, str) else against
    check_same(batch, *diffused(theirs[kind], PROMPTS, SEEDS, negative_prompt=negative))
    # The usual guidance differs between kinds; it is the pipelines'.
    assert batch.seconds.keys() == {"text", "steps", "decode"}


@pytest.mark.parametrize("kind", KINDS)
def test_without_guidance_and_alone(ours: Any, theirs: Any, kind: str) -> None:
    for scale in (1.0, 0.0):
        with pytest.warns(UserWarning, match=f"negative_prompt has no effect: guidance_scale = {scale:g}"):
            made = ours[kind](PROMPTS[0], SEEDS[1], guidance_scale=scale, negative_prompt="d", steps=3, **SIZE)
        check_same(made, *diffused(theirs[kind], PROMPTS[:1], SEEDS[1:2], guidance_scale=scale))
    batch = ours[kind](PROMPTS, SEEDS, steps=3, **SIZE)
    for at, (prompt, seed) in enumerate(zip(PROMPTS, SEEDS, strict=True)):
        alone = ours[kind](prompt, seed, steps=3, **SIZE)
        assert (alone.pixels[0] - batch.pixels[at]).abs().max() < TOLERANCE


# Options that a user's scheduler_config.json may hold.
OPTIONS: dict[str, dict[str, Any]] = {
    "dpmpp_2m": {"use_karras_sigmas": True, "algorithm_type": "sde-dpmsolver++"},
    "euler": {"timestep_spacing": "trailing"},
    "pndm": {"skip_prk_steps": True},
    "ddim": {"set_alpha_to_one": False},
}


@pytest.mark.parametrize("sampler", DIFFUSERS_CLASSES)
def test_every_sampler_by_its_scheduler_config(
    folders: dict[str, Path], theirs: Any, sampler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """steps_offset and clip_sample are as in old files, which diffusers' pipeline corrects."""
    scheduler = getattr(diffusers, DIFFUSERS_CLASSES[sampler])(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", **OPTIONS.get(sampler, {})
    )
    folder = shutil.copytree(folders["sd15"], tmp_path / "p")
    scheduler.save_pretrained(folder / "scheduler")
    named = ["diffusers", type(scheduler).__name__]
    edit_json(folder / "model_index.json", lambda raw: raw.update(scheduler=named))
    pipeline = TextToImage.load(folder, backend="torch")
    assert pipeline.sampler == sampler
    steps = 5
    made = pipeline(PROMPTS[:2], SEEDS[:2], steps=steps, **SIZE)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        other = diffusers_pipeline(folder)
    module = importlib.import_module(type(scheduler).__module__)
    evaluations = iter(range(100))

    def step_noise(shape: Any, **_: Any) -> torch.Tensor:
        return philox_normal(seed_tensor(SEEDS[:2], "cpu"), shape[1:], next(evaluations), stream=1)

    if hasattr(module, "randn_tensor"):
        monkeypatch.setattr(module, "randn_tensor", step_noise)
    check_same(made, *diffused(other, PROMPTS[:2], SEEDS[:2], steps=steps))


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_another_sampler_and_its_options(ours: Any, theirs: Any, kind: str) -> None:
    made = ours[kind](
        "a b", 1, steps=4, sampler="dpmpp_2m", options={"use_karras_sigmas": True, "solver_order": 3}, **SIZE
    )
    other = theirs[kind]
    before = other.scheduler
    other.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(
        before.config, use_karras_sigmas=True, solver_order=3
    )
    try:
        check_same(made, *diffused(other, ["a b"], [1], steps=4))
    finally:
        other.scheduler = before


def test_layers_of_the_text_encoder_are_skipped_as_diffusers_does(
    ours: Any, theirs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_same(
        ours["sdxl"]("a b c", 1, clip_skip=0, steps=2, negative_prompt="d", **SIZE),
        *diffused(theirs["sdxl"], ["a b c"], [1], steps=2, clip_skip=0, negative_prompt=["d"]),
    )
    # This transformers has no `text_model`, by which diffusers finds the norm behind the layers.
    encoder = theirs["sd15"].text_encoder
    if not hasattr(encoder, "text_model"):
        monkeypatch.setattr(type(encoder), "text_model", property(lambda self: self), raising=False)
    expected = diffused(theirs["sd15"], ["a b c"], [1], steps=2, clip_skip=1)
    monkeypatch.undo()
    made = ours["sd15"]("a b c", 1, clip_skip=1, steps=2, **SIZE)
    check_same(made, *expected)
    assert (made.latents - ours["sd15"]("a b c", 1, steps=2, **SIZE).latents).abs().max() > 1e-3
    with pytest.raises(ValueError, match="clip_skip must be a whole number from 0 to 1"):
        ours["sd15"]("a", 1, clip_skip=2, steps=2)


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_a_long_prompt_is_cut_with_a_line_that_quotes_the_rest(ours: Any, theirs: Any, kind: str) -> None:
    long = "a b c d e f g h i"
    with pytest.warns(UserWarning, match="cut at 8 tokens; left out: 'g h i'"):
        made = ours[kind](long, 1, steps=2, **SIZE)
    check_same(made, *diffused(theirs[kind], [long], [1], steps=2))
    told: list[str] = []
    ours[kind](["a", "a b c d e f"], [1, 2], steps=1, told=told.append, **SIZE)
    assert told == []


def test_xl_takes_zeros_or_an_empty_prompt_and_statistics_of_latents(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(folders["sdxl"], tmp_path / "p")
    edit_json(folder / "model_index.json", lambda raw: raw.update(force_zeros_for_empty_prompt=False))
    statistics = {"latents_mean": [0.5, -1.0, 0.0, 2.0], "latents_std": [1.5, 0.5, 1.0, 2.0]}
    edit_json(folder / "vae" / "config.json", lambda raw: raw.update(statistics))
    made = TextToImage.load(folder, backend="torch")("a b c", 1, steps=2, **SIZE)
    check_same(made, *diffused(diffusers_pipeline(folder), ["a b c"], [1], steps=2))
    zeros = TextToImage.load(folders["sdxl"], backend="torch")("a b c", 1, steps=2, **SIZE)
    assert (made.latents - zeros.latents).abs().max() > 1e-3


def test_in_half_only_xl_decodes_in_float32(folders: dict[str, Path]) -> None:
    for kind, wide in (("sd15", torch.float16), ("sdxl", torch.float32)):
        pipeline = TextToImage.load(folders[kind], dtype=torch.float16, backend="torch")
        assert (pipeline.unet.dtype, pipeline.autoencoder.dtype) == (torch.float16, wide)
        made = pipeline("a b c", 1, steps=1, height=4, width=4)
        exact = TextToImage.load(folders[kind], backend="torch")("a b c", 1, steps=1, height=4, width=4)
        assert 0 < (made.pixels - exact.pixels).abs().max() < 0.05


def test_replayed_steps_give_the_same_bits(ours: Any, folders: dict[str, Path]) -> None:
    tapes = Tapes()
    graphed = TextToImage.load(folders["sd21"], backend="torch", graphs=tapes)
    counted: list[tuple[str, int, int]] = []
    for prompt, seed in (("a b", 1), ("c", 2)):
        counted.clear()
        made = graphed(prompt, seed, steps=3, progress=lambda *told: counted.append(told), **SIZE)
        assert torch.equal(made.latents, ours["sd21"](prompt, seed, steps=3, **SIZE).latents)
        assert counted[0] == ("text", 0, 1)
        assert [told for told in counted if told[0] == "steps"] == [("steps", n, 3) for n in range(4)]
        assert counted[-1] == ("decode", 1, 1)
    assert sum(line.startswith("capture") for line in tapes.log) == 1


@pytest.mark.parametrize("kind", ["sd15", "sd21"])
@pytest.mark.parametrize("sampler", ["ddim", "euler"])
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_a_preview_is_the_estimate_of_the_clean_image(
    ours: Any, theirs: Any, kind: str, sampler: str, scale: float
) -> None:
    """The oracle is the `pred_original_sample` of diffusers' schedulers."""
    seen: dict[int, torch.Tensor] = {}
    made = ours[kind](
        "a b", 1, steps=4, sampler=sampler, guidance_scale=scale, preview_every=2, **SIZE,
        preview=lambda step, pixels: seen.update({step.index: pixels}),
    )  # fmt: skip
    assert list(seen) == [1]
    other = theirs[kind]
    before = other.scheduler
    other.scheduler = getattr(diffusers, DIFFUSERS_CLASSES[sampler]).from_config(before.config)
    step = other.scheduler.step
    estimates = []

    def noted(*arguments: Any, **options: Any) -> Any:
        out = step(*arguments, **(options | {"return_dict": True}))
        estimates.append(out.pred_original_sample)
        return (out.prev_sample,)

    other.scheduler.step = noted
    try:
        latents, _ = diffused(other, ["a b"], [1], steps=4, guidance_scale=scale)
    finally:
        other.scheduler = before
    assert (made.latents - latents).abs().max() < TOLERANCE * latents.abs().max()
    expected = other.vae.decode(estimates[1] / other.vae.config.scaling_factor).sample
    assert (seen[1] - (expected.detach() / 2 + 0.5).clamp(0, 1)).abs().max() < 1e-4
    # Not the noisy latents, which are what a lazy preview shows.
    assert (seen[1] - made.pixels).abs().max() > 1e-3


def test_tiles_that_hold_the_image_are_the_image(ours: Any) -> None:
    whole = ours["sd15"]("a", 1, steps=2, **SIZE)
    assert torch.equal(ours["sd15"]("a", 1, steps=2, tile=32, **SIZE).pixels, whole.pixels)
    tiled = ours["sd15"]("a", 1, steps=2, tile=16, **SIZE)
    assert torch.equal(tiled.latents, whole.latents)
    assert 0 < (tiled.pixels - whole.pixels).abs().max() < 0.5


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"height": 15}, "height must be a multiple of 2 from 2 to 8192, not 15"),
        ({"width": 0}, "width must be a multiple of 2"),
        ({"width": "64"}, "width must be a multiple of 2"),
        ({"tile": 3}, "tile must be a multiple of 2"),
        ({"steps": 0}, "num_steps must be an integer from 1"),
        ({"sampler": "k_lms"}, "unknown sampler 'k_lms'"),
        ({"options": {"eta": "x"}}, "option eta must be a number"),
        ({"guidance_scale": float("nan")}, "guidance_scale must be a number of at least 0"),
        ({"guidance_scale": "7"}, "guidance_scale must be a number of at least 0"),
        ({"negative_prompt": ["a", "b"]}, "negative_prompt must be one text, or one for each of the 1 seeds"),
        ({"prompts": ["a", "b"]}, "prompts must be one text"),
        ({"prompts": [3]}, "prompts must be one text"),
        ({"seeds": [1.5]}, "seeds"),
        ({"seeds": []}, "seeds must be a list of integers, one per image, not \\[\\]"),
    ],
)
def test_a_wrong_call_is_refused_in_one_line(ours: Any, changes: dict[str, Any], told: str) -> None:
    given = {"prompts": "a", "seeds": [1], "steps": 1} | changes
    with pytest.raises(ValueError, match=told) as error:
        ours["sd15"](given.pop("prompts"), given.pop("seeds"), **given)
    assert "\n" not in str(error.value)


def test_graphs_and_devices_are_checked(folders: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="graphs must be 'auto', 'off' or a Graphs"):
        TextToImage.load(folders["sd15"], graphs="on")
    with pytest.raises(ValueError, match="device 'nowhere' is not there"):
        TextToImage.load(folders["sd15"], device="nowhere")
    with pytest.raises(ValueError, match="unknown sampler"):
        TextToImage.load(folders["sd15"], sampler="none")


def test_a_tokenizer_as_older_releases_write_it(folders: dict[str, Path], ours: Any, tmp_path: Path) -> None:
    """vocab.json and merges.txt in place of tokenizer.json; weights under the names of transformers 4."""
    folder = shutil.copytree(folders["sd15"], tmp_path / "p")
    place = folder / "tokenizer"
    model = json.loads((place / "tokenizer.json").read_text())["model"]
    (place / "vocab.json").write_text(json.dumps(model["vocab"]))
    (place / "merges.txt").write_text("#version: 0.2\n")
    (place / "tokenizer.json").unlink()
    safetensors = importlib.import_module("safetensors.torch")
    file = folder / "text_encoder" / "model.safetensors"
    state = safetensors.load_file(file)
    old = {f"text_model.{key}": tensor for key, tensor in state.items()}
    old["text_model.embeddings.position_ids"] = torch.arange(8)[None]
    safetensors.save_file(old, file)
    made = TextToImage.load(folder, backend="torch")("a b c", 1, steps=2, **SIZE)
    assert torch.equal(made.latents, ours["sd15"]("a b c", 1, steps=2, **SIZE).latents)


@pytest.fixture
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any, **__: Any) -> Any:
        raise AssertionError("a socket was opened")

    for name in ("socket", "create_connection", "getaddrinfo"):
        monkeypatch.setattr(f"socket.{name}", refused)


@pytest.mark.usefixtures("_no_network")
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_fetched_and_no_code_of_the_folder_is_run(
    folders: dict[str, Path], kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not by adapters, code, kernels or another repository that files of the folder name either."""
    folder = shutil.copytree(folders[kind], tmp_path / "p")
    (folder / "code.py").write_text("raise SystemExit('code of the folder was run')")
    lures = {
        "auto_map": {"AutoModel": "code.Model", "AutoTokenizer": ["code.Tokenizer", None]},
        "_name_or_path": "openai/clip-vit-large-patch14",
        "name_or_path": "openai/clip-vit-large-patch14",
        "_attn_implementation": "kernels-community/flash-attn",
        "attn_implementation": "kernels-community/flash-attn",
        "quantization_config": {"quant_method": "gptq"},
    }
    for place in ("text_encoder/config.json", "tokenizer/tokenizer_config.json"):
        edit_json(folder / place, lambda raw: raw.update(lures))
        (folder / place).with_name("code.py").write_text("raise SystemExit('code of the folder was run')")
        adapter = {"base_model_name_or_path": "somebody/elses", "peft_type": "LORA"}
        (folder / place).with_name("adapter_config.json").write_text(json.dumps(adapter))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    made = TextToImage.load(folder, backend="torch")("a b c", 1, steps=1, **SIZE)
    assert made.pixels.shape == (1, 3, 16, 24)


def test_the_folder_tells_what_it_is(folders: dict[str, Path]) -> None:
    found = PipelineFolder.read(folders["sdxl"])
    assert (found.name, found.class_name, found.sampler) == ("sdxl", "StableDiffusionXLPipeline", "ddim")
    assert (found.usual_size, found.usual_guidance, found.has_checker) == (16, 5.0, False)
    assert found.schedule.prediction_type == "epsilon"
    assert TextToImage.load(found, backend="torch", sampler="euler").sampler == "euler"
    assert PipelineFolder.read(folders["sd21"]).schedule.prediction_type == "v_prediction"

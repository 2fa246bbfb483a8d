"""`PipelineFolder`: what diffusers' `pipeline.save_pretrained` wrote, checked before anything big is read.

Configurations, tokenizers and the headers of weights are read. Nothing is fetched, no pickle is opened and no code
of the folder is run.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ldmperf.samplers import NoiseSchedule, SamplingPlan, make_plan, sampler_of

from ..autoencoder_config import AutoencoderConfig
from ..autoencoder_weights import load_autoencoder
from ..config import UNetConfig
from ..fields import shown
from ..files import CheckpointError, read_json
from ..weights import load_unet
from .misfits import misfits
from .text_part import TextPart, read_text_part

INDEX_NAME = "model_index.json"
# Pipelines of the same parts: what they do with an image besides is not read from the folder.
_CLASSES = {
    **dict.fromkeys(
        ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline"), False
    ),
    **dict.fromkeys(
        ("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLInpaintPipeline"), True
    ),
}
# The library and the classes of each part.
_PARTS = {
    "tokenizer": ("transformers", ("CLIPTokenizer", "CLIPTokenizerFast")),
    "text_encoder": ("transformers", ("CLIPTextModel",)),
    "tokenizer_2": ("transformers", ("CLIPTokenizer", "CLIPTokenizerFast")),
    "text_encoder_2": ("transformers", ("CLIPTextModelWithProjection",)),
    "unet": ("diffusers", ("UNet2DConditionModel",)),
    "vae": ("diffusers", ("AutoencoderKL",)),
}
# In latent pixels: an image of 32768.
_LARGEST_SIDE = 4096


class PipelineError(ValueError):
    """A folder that makes no image; `faults` are lines, each with the file, what is wrong and what to do."""

    def __init__(self, faults: list[str]) -> None:
        self.faults = tuple(dict.fromkeys(faults))
        super().__init__("; ".join(self.faults))


@dataclass(frozen=True)
class PipelineFolder:
    """What a folder holds, as its configurations say.

    is_xl              Stable Diffusion XL, with two text encoders
    zeros_for_nothing  of XL: without a negative prompt its embedding is zeros, not that of ""
    has_checker        a safety checker is among the parts; it is not run here
    """

    path: Path
    class_name: str
    is_xl: bool
    zeros_for_nothing: bool
    has_checker: bool
    text: tuple[TextPart, ...]
    unet: UNetConfig
    autoencoder: AutoencoderConfig
    sampler: str
    schedule: NoiseSchedule

    @classmethod
    def read(
        cls,
        path: str | Path,
        *,
        sampler: str | None = None,
        steps: int | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> PipelineFolder:
        """The folder's contents. Raises PipelineError with every fault that is found.

        sampler, steps, options: checked as by `plan`, beside the folder's own faults. Without a sampler the
        folder's own is taken, by the class in its scheduler_config.json.
        """
        return _read(Path(path), sampler, steps, options or {})

    def plan(
        self, steps: int, sampler: str | None = None, options: Mapping[str, Any] | None = None
    ) -> SamplingPlan:
        """The plan of so many steps on the folder's noise schedule; options and errors as of `make_plan`."""
        return _plan(sampler or self.sampler, self.schedule, steps, options or {})

    @property
    def name(self) -> str:
        """The folder's own name."""
        return Path(os.path.abspath(self.path)).name

    @property
    def scaling_factor(self) -> float:
        """The autoencoder's latents are those of the UNet divided by it."""
        assert self.autoencoder.scaling_factor is not None
        return self.autoencoder.scaling_factor

    @property
    def usual_size(self) -> int:
        """Side, in pixels, of the images that the network was trained for."""
        return self.unet.sample_size * self.autoencoder.scale

    @property
    def usual_guidance(self) -> float:
        """The guidance scale that diffusers takes unless told."""
        return 5.0 if self.is_xl else 7.5

    def side(self, name: str, given: int | None) -> int:
        """A height or width in pixels, the network's own unless given; raises ValueError where it cannot be."""
        scale = self.autoencoder.scale
        side = self.usual_size if given is None else given
        if type(side) is not int or side % scale or not scale <= side <= scale * _LARGEST_SIDE:
            raise ValueError(
                f"{name} must be a multiple of {scale} from {scale} to {scale * _LARGEST_SIDE}, not {shown(given)}"
            )
        return side

    def check_clip_skip(self, clip_skip: int) -> None:
        """Raises ValueError for more layers to leave out than the text encoders have."""
        most = min(part.layers for part in self.text) - (2 if self.is_xl else 1)
        if type(clip_skip) is not int or not 0 <= clip_skip <= most:
            raise ValueError(f"clip_skip must be a whole number from 0 to {most}, not {shown(clip_skip)}")


class _Faults(list[str]):
    @contextmanager
    def noted(self, place: Path | None = None) -> Iterator[None]:
        """Keeps the line of a CheckpointError, or any ValueError of `place`, and goes on."""
        try:
            yield
        except CheckpointError as fault:
            self.append(str(fault))
        except ValueError as fault:
            if place is None:
                raise
            self.append(_line(f"{place}: {fault}"))


def _read(path: Path, sampler: str | None, steps: int | None, options: Mapping[str, Any]) -> PipelineFolder:
    faults = _Faults()
    index = _index(path)
    is_xl = _CLASSES[index["_class_name"]]
    _check_parts(path, index, is_xl, faults)
    if faults:
        raise PipelineError(faults)
    unet = autoencoder = schedule = None
    text = []
    for suffix in ("", "_2") if is_xl else ("",):
        with faults.noted():
            text.append(read_text_part(path, suffix, index[f"tokenizer{suffix}"][1]))
    with faults.noted():
        # On the meta device: headers and configurations are read, tensors are not.
        unet = load_unet(path / "unet", dtype=torch.float32, device="meta", backend="torch").config
        if not is_xl and unet.sample_size < 64 and _is_of_2022(path / "unet" / "config.json"):
            # As diffusers: these files tell 32 of networks trained at 64.
            unet = replace(unet, sample_size=64)
    with faults.noted():
        autoencoder = load_autoencoder(path / "vae", dtype=torch.float32, device="meta", backend="torch").config
    scheduler_file = path / "scheduler" / "scheduler_config.json"
    with faults.noted(scheduler_file):
        # diffusers takes the class that the index names, whatever class wrote the file.
        told = {"_class_name": index["scheduler"][1]}
        raw = _corrected(read_json(scheduler_file), is_xl) | told
        own = sampler or sampler_of(raw)
        schedule = NoiseSchedule.from_diffusers(raw)
        if steps is not None:
            try:
                _plan(own, schedule, steps, options)
            except ValueError as wrong:
                raise ValueError(f"{steps} steps of {own}: {wrong}") from None
    if unet is not None and autoencoder is not None and len(text) == 1 + is_xl:
        faults += misfits(path, is_xl, unet, autoencoder, text)
    if faults or unet is None or autoencoder is None or schedule is None:
        raise PipelineError(faults)
    zeros = is_xl and bool(index.get("force_zeros_for_empty_prompt", True))
    has_checker = bool(index.get("safety_checker")) and index["safety_checker"] != [None, None]
    return PipelineFolder(
        path=path,
        class_name=index["_class_name"],
        is_xl=is_xl,
        zeros_for_nothing=zeros,
        has_checker=has_checker,
        text=tuple(text),
        unet=unet,
        autoencoder=autoencoder,
        sampler=own,
        schedule=schedule,
    )


def _line(text: str) -> str:
    """The text as one line of bounded length, whatever a file has brought into it."""
    return str(CheckpointError(text))


def _is_of_2022(file: Path) -> bool:
    """Whether diffusers before 0.9 wrote the configuration, with one number for its sample_size."""
    config = read_json(file) if os.path.isfile(file) else {}
    if not isinstance(config.get("sample_size"), int):
        return False
    version = re.match(r"(\d{1,9})\.(\d{1,9})", str(config.get("_diffusers_version", "")))
    return version is not None and (int(version[1]), int(version[2])) < (0, 9)


def _index(path: Path) -> dict[str, Any]:
    """model_index.json; raises PipelineError where it is none, or of another kind of pipeline."""
    if not os.path.isdir(path):
        is_file = os.path.isfile(path)
        raise PipelineError(
            [
                f"{path}: one file has no tokenizer and no text encoder; give a pipeline's folder, which "
                "StableDiffusionPipeline.from_single_file(file).save_pretrained(folder) of diffusers writes"
                if is_file
                else f"{path}: no such folder; give one that diffusers' pipeline.save_pretrained wrote"
            ]
        )
    if not os.path.isfile(path / INDEX_NAME):
        raise PipelineError(
            [f"{path}: no {INDEX_NAME} in it; give a folder that diffusers' pipeline.save_pretrained wrote"]
        )
    try:
        index = read_json(path / INDEX_NAME)
    except CheckpointError as fault:
        raise PipelineError([str(fault)]) from None
    name = index.get("_class_name")
    if not isinstance(name, str) or name not in _CLASSES:
        unknown = _line(
            f"{path / INDEX_NAME}: a pipeline of the class {shown(name)}; only {', '.join(_CLASSES)} make images "
            "here: run this one in diffusers"
        )
        raise PipelineError([unknown])
    return index


def _check_parts(path: Path, index: Mapping[str, Any], is_xl: bool, faults: list[str]) -> None:
    """Notes parts that are missing, or of classes that are not supported."""
    for name, (library, classes) in _PARTS.items():
        if name.endswith("_2") and not is_xl:
            continue
        told = index.get(name)
        if told is None or (isinstance(told, list) and not any(told)):
            hint = " (a refiner has none: give the base's folder)" if name == "text_encoder" and is_xl else ""
            faults.append(f"{path / INDEX_NAME}: no {name}{hint}; give a folder with every part of a pipeline")
        elif not isinstance(told, list) or len(told) != 2 or told[0] != library or told[1] not in classes:
            faults.append(
                _line(
                    f"{path / INDEX_NAME}: {name} is {shown(told)}; only {' or '.join(classes)} of {library} "
                    "is supported: run this pipeline in diffusers"
                )
            )
        elif not os.path.isdir(path / name):
            faults.append(f"{path / name}: no such folder; download the whole pipeline")
    told = index.get("scheduler")
    if not isinstance(told, list) or len(told) != 2 or told[0] != "diffusers":
        faults.append(_line(f"{path / INDEX_NAME}: scheduler is {shown(told)}; give a class of diffusers"))
    if not os.path.isfile(path / "scheduler" / "scheduler_config.json"):
        faults.append(f"{path / 'scheduler' / 'scheduler_config.json'}: no such file; download the whole pipeline")
    if index.get("requires_aesthetics_score"):
        faults.append(f"{path / INDEX_NAME}: requires_aesthetics_score: a refiner; give the base's folder")


def _plan(sampler: str, schedule: NoiseSchedule, steps: int, options: Mapping[str, Any]) -> SamplingPlan:
    # What `make_plan` takes beside options of samplers.
    if taken := sorted({"name", "schedule", "num_steps", "begin"} & options.keys()):
        raise ValueError(f"{taken[0]} is no option of a sampler; leave it out")
    return make_plan(sampler, schedule, steps, **options)


def _corrected(config: Mapping[str, Any], is_xl: bool) -> dict[str, Any]:
    """The configuration as diffusers' StableDiffusionPipeline corrects it; that of XL corrects nothing.

    Files from before 2023 lack steps_offset = 1 and clip_sample = false.
    """
    return dict(config) if is_xl else {**config, "steps_offset": 1, "clip_sample": False}

"""What to measure: a case, the presets, and the sweep from options."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import re
import urllib.parse
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat

from .timing import RepetitionRule

Task = Literal["t2i", "sr"]
DType = Literal["float32", "bfloat16", "float16"]

TASKS: tuple[Task, ...] = get_args(Task)
DTYPES: tuple[DType, ...] = get_args(DType)
# In the order of the ladder: the peer, eager and compiled, then ours, each with more than the one before.
BACKENDS = (
    "diffusers",
    "diffusers-compile",
    "diffusers-compile-max",
    "torch",
    "triton",
    "triton+hoist",
    "triton+hoist+merge",
    "graph+separate",
    "graph",
)
# What is measured unless told.
DEFAULT_BACKENDS = ("torch", "diffusers")
# The guidance of a task unless told: super-resolution samples without.
DEFAULT_GUIDANCE: dict[Task, float] = {"t2i": 7.5, "sr": 1.0}

DEVICE_PATTERN = r"^(cpu|cuda(:\d+)?)$"


# The largest batch: far above what fits, and low enough that no figure of a record leaves the range of a float.
MOST_IMAGES = 1_000_000
# A side, in latent pixels: an image of 32768.
LARGEST_LATENT = 4096
# In front of a path that is no UTF-8: JSON has no way to hold such a text.
_ENCODED = "file://"


class CaseError(ValueError):
    """A wrong value for a case; its text is one line that lists the valid ones."""


def path_text(path: Path) -> str:
    """An absolute path as text that JSON can hold: where it is no UTF-8, a file: URI."""
    raw = os.fsencode(path)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return _ENCODED + urllib.parse.quote_from_bytes(raw)


def short_id(content: Mapping[str, object]) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of the content as JSON, keys sorted, without spaces."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def device_kind(device: str) -> str:
    """ "cpu" or "cuda", without the number."""
    return device.partition(":")[0]


class Case(BaseModel):
    """One trajectory to measure: hashable, and equal when all that is measured is equal.

    `unet` is a name of the family ("39M" ... "5B") or the absolute path of a checkpoint (`path_text`); in a record
    a checkpoint has its name alone. `weights_sha256` is of a checkpoint's files, null for the family's seeded
    random weights and before the files have been read. `guidance_scale` 1 is none; above 1 every model evaluation
    takes 2 x `batch` inputs. Latent sizes are in latent pixels (an eighth of the image's), `context_tokens` is the
    length of the text context.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    unet: Annotated[str, Field(min_length=1)]
    weights_sha256: Annotated[str | None, Field(pattern=r"^[0-9a-f]{64}$")] = None
    task: Task = "t2i"
    sampler: str = "ddim"
    steps: Annotated[int, Field(ge=1, le=1000)] = 50
    batch: Annotated[int, Field(ge=1, le=MOST_IMAGES)] = 1
    guidance_scale: Annotated[FiniteFloat, Field(ge=1)] = 7.5
    dtype: DType = "float32"
    device: Annotated[str, Field(pattern=DEVICE_PATTERN)] = "cpu"
    latent_height: Annotated[int, Field(ge=1, lt=2**32)] = 64
    latent_width: Annotated[int, Field(ge=1, lt=2**32)] = 64
    context_tokens: Annotated[int, Field(ge=1, lt=2**32)] = 77
    seed: Annotated[int, Field(ge=0, lt=2**64)] = 0
    backend: str = "torch"

    @property
    def network(self) -> str:
        """What tells networks apart: a size, or a checkpoint's name and the first digits of its weights' SHA-256.

        Of a checkpoint whose weights are not known, as in records of schema version 1, the path.
        """
        return self.unet if self.weights_sha256 is None else f"{self.label} weights={self.weights_sha256[:16]}"

    @property
    def group_key(self) -> str:
        """All but the backend: cases that share it are measured interleaved, on the same weights and inputs."""
        return (
            f"unet={self.network} task={self.task} sampler={self.sampler} steps={self.steps} batch={self.batch} "
            f"guidance={self.guidance_scale:g} dtype={self.dtype} device={self.device} "
            f"latent={self.latent_height}x{self.latent_width} tokens={self.context_tokens} seed={self.seed}"
        )

    @property
    def key(self) -> str:
        """A readable name, the same in every version of this schema: resuming and comparing go by it."""
        return f"{self.group_key} backend={self.backend}"

    @property
    def case_id(self) -> str:
        """16 hexadecimal digits, the same on every commit and machine, wherever a checkpoint lies.

        Of the SHA-256 of the fields that are not null, as JSON: the device without its number, the weights' digest
        in place of a checkpoint's name.
        """
        fields = self.model_dump(exclude_none=True) | {"device": device_kind(self.device)}
        if self.weights_sha256 is not None:
            del fields["unet"]
        return short_id(fields)

    @property
    def is_checkpoint(self) -> bool:
        """Whether the network is a checkpoint; sizes of the family have no slash, and paths are absolute."""
        return self.weights_sha256 is not None or "/" in self.unet

    @property
    def path(self) -> Path:
        """Where a checkpoint lies."""
        if self.unet.startswith(_ENCODED):
            return Path(os.fsdecode(urllib.parse.unquote_to_bytes(self.unet.removeprefix(_ENCODED))))
        return Path(self.unet)

    @property
    def label(self) -> str:
        """A short name of the network: the size, or the last part of the checkpoint's path.

        The names that diffusers gives to folders and files of every checkpoint come with the folder above them:
        "my-model/unet". A snapshot in the Hugging Face cache has its repository's name. Bytes that are no UTF-8
        are written as escapes.
        """
        if not self.unet.startswith(("/", _ENCODED)):
            return self.unet if self.weights_sha256 is not None else self.unet.rpartition("/")[2] or self.unet
        parts = [os.fsencode(part).decode(errors="backslashreplace") for part in self.path.parts[1:]] or ["/"]
        first = len(parts) - 1
        while first and (parts[first] == "unet" or parts[first].startswith("diffusion_pytorch_model.")):
            first -= 1
        if parts[max(first - 1, 0)] == "snapshots" and parts[first - 2].startswith("models--"):
            # The Hugging Face cache: models--ORGANIZATION--NAME/snapshots/COMMIT.
            return "/".join((*parts[first - 2].split("--")[1:], *parts[first + 1 :]))
        return "/".join(parts[first:])

    def recorded(self) -> Case:
        """The case as a record has it: a checkpoint by its name, not by where it lies. Its key is the same."""
        return self.model_copy(update={"unet": self.label}) if self.weights_sha256 is not None else self

    @property
    def guided(self) -> bool:
        """Whether the model sees an unconditional half too."""
        return self.guidance_scale > 1.0

    @property
    def model_batch(self) -> int:
        """Inputs of one model evaluation."""
        return self.batch * (2 if self.guided else 1)


@dataclass(frozen=True)
class Sweep:
    """Lists of values whose product is measured; `guidance_scales` None takes each task's own."""

    unets: tuple[str, ...]
    steps: tuple[int, ...]
    dtypes: tuple[DType, ...]
    devices: tuple[str, ...]
    batches: tuple[int, ...] = (1,)
    samplers: tuple[str, ...] = ("ddim",)
    tasks: tuple[Task, ...] = ("t2i",)
    guidance_scales: tuple[float, ...] | None = None
    backends: tuple[str, ...] = DEFAULT_BACKENDS
    latents: tuple[tuple[int, int], ...] = ((64, 64),)

    def cases(self) -> Iterator[Case]:
        """The product: networks outermost, as they are dear to build; backends innermost, as they interleave."""
        for unet, task, dtype, device in itertools.product(self.unets, self.tasks, self.dtypes, self.devices):
            scales = (DEFAULT_GUIDANCE[task],) if self.guidance_scales is None else self.guidance_scales
            for (height, width), batch, scale, sampler, steps, backend in itertools.product(
                self.latents, self.batches, scales, self.samplers, self.steps, self.backends
            ):
                yield Case(
                    unet=unet,
                    task=task,
                    sampler=sampler,
                    steps=steps,
                    batch=batch,
                    guidance_scale=float(scale),
                    dtype=dtype,
                    device=device,
                    latent_height=height,
                    latent_width=width,
                    backend=backend,
                )


@dataclass(frozen=True)
class Preset:
    """A named set of sweeps, and how often each trajectory is repeated."""

    sweeps: tuple[Sweep, ...]
    rule: RepetitionRule


_FAMILY = ("39M", "83M", "145M", "223M", "318M", "430M", "558M", "704M", "866M", "2B", "5B")
# Stable Diffusion's own size, then the ends of the cost curve, then its middle: a run may be cut short anywhere.
_FAMILY_TELLING_FIRST = tuple(dict.fromkeys(("866M", "39M", "5B", "318M", "2B", *_FAMILY)))
_CPU = Sweep(unets=_FAMILY[:3], steps=(2,), dtypes=("float32",), devices=("cpu",))
_GPU = Sweep(unets=_FAMILY, steps=(50,), dtypes=("bfloat16",), devices=("cuda",), backends=("graph", "diffusers"))
PRESETS: dict[str, Preset] = {
    # Under five minutes on two cores: one step count for the cost of sizes, two more at 39M for the cost of steps.
    "cpu": Preset((_CPU, replace(_CPU, unets=("39M",), steps=(1, 3))), RepetitionRule(3, 0.0)),
    "gpu": Preset(
        (replace(_GPU, batches=(1, 8), backends=("graph", "torch", "diffusers")),),
        RepetitionRule(5, 2.0),
    ),
    # The family by size, then by steps, sampler and batch: first what tells most, then all there is.
    "family": Preset(
        (
            replace(_GPU, unets=_FAMILY_TELLING_FIRST, steps=(20,)),
            replace(_GPU, unets=("39M", "866M"), steps=(4, 50)),
            replace(_GPU, unets=("39M", "866M"), steps=(20,), samplers=("ddpm", "dpmpp_2m")),
            replace(_GPU, unets=("39M", "866M"), steps=(4,), batches=(4, 16)),
        ),
        RepetitionRule(3, 0.5),
    ),
    "family-all": Preset(
        (
            replace(
                _GPU,
                unets=_FAMILY_TELLING_FIRST,
                steps=(4, 20, 50),
                batches=(1, 4, 16),
                samplers=("ddim", "ddpm", "dpmpp_2m"),
            ),
        ),
        RepetitionRule(3, 0.5),
    ),
    # Every backend at four sizes across the family, for what each rung is worth.
    "ladder": Preset(
        (replace(_GPU, unets=("866M", "39M", "145M", "5B"), steps=(20,), backends=BACKENDS),),
        RepetitionRule(5, 2.0),
    ),
}


@dataclass(frozen=True)
class Choices:
    """What the command's options say, as typed (values may be comma separated); empty leaves the preset's."""

    size: Sequence[str] = ()
    unet: Sequence[str] = ()
    sampler: Sequence[str] = ()
    steps: Sequence[str] = ()
    batch: Sequence[str] = ()
    guidance: Sequence[str] = ()
    dtype: Sequence[str] = ()
    device: Sequence[str] = ()
    backend: Sequence[str] = ()
    task: Sequence[str] = ()
    latent: Sequence[str] = ()

    def __bool__(self) -> bool:
        return any(vars(self).values())


def select_cases(preset: str, choices: Choices) -> list[Case]:
    """The preset's cases with its lists replaced by those chosen; each case once.

    Raises CaseError for an unknown name, a number out of range, a checkpoint or device that is not there.
    """
    # The names of sizes and samplers belong to the packages that define them, and those load torch.
    from ldmperf.model import FAMILY
    from ldmperf.samplers import SAMPLERS

    for option, values in vars(choices).items():
        if values and not split_values(values):
            raise CaseError(f"--{option}: no value given; leave the option out to take the preset's")
    overrides: dict[str, object] = {
        "samplers": known_names("sampler", choices.sampler, SAMPLERS),
        "steps": tuple(whole_number("steps", text, 1000) for text in split_values(choices.steps)),
        "batches": tuple(whole_number("batch", text, MOST_IMAGES) for text in split_values(choices.batch)),
        "guidance_scales": tuple(_number("guidance", text) for text in split_values(choices.guidance)),
        "dtypes": known_names("dtype", [_DTYPE_ALIASES.get(d, d) for d in split_values(choices.dtype)], DTYPES),
        "devices": tuple(device_named(text) for text in split_values(choices.device)),
        "backends": known_names("backend", choices.backend, BACKENDS),
        "tasks": known_names("task", choices.task, TASKS),
        "latents": tuple(_latent(text) for text in split_values(choices.latent)),
        "unets": known_names("size", choices.size, FAMILY) + tuple(_checkpoint(path) for path in choices.unet),
    }
    given: dict[str, Any] = {name: values for name, values in overrides.items() if values}
    sweeps = preset_named(preset).sweeps
    # dict.fromkeys: a preset's second sweep may repeat cases of the first once its lists are replaced.
    return list(dict.fromkeys(case for sweep in sweeps for case in replace(sweep, **given).cases()))


def preset_named(name: str) -> Preset:
    """The preset of that name, or CaseError."""
    known_names("preset", [name], PRESETS)
    return PRESETS[name]


_DTYPE_ALIASES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def split_values(values: Iterable[str]) -> list[str]:
    """What a repeated option was given, its commas taken apart."""
    return [part.strip() for value in values for part in value.split(",") if part.strip()]


def known_names(option: str, values: Iterable[str], valid: Iterable[str]) -> tuple[str, ...]:
    """The names given, or CaseError for one that is not valid."""
    known = tuple(valid)
    chosen = split_values(values)
    for name in chosen:
        if name not in known:
            raise CaseError(f"--{option}: no {option} {name!r}; choose from {', '.join(known)}")
    return tuple(chosen)


def whole(text: str) -> int | None:
    """The number that ASCII digits write; None for any other text, a sign or an underscore in it included."""
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else None


def real(text: str) -> float:
    """The number that ASCII text writes, as python does but without underscores; NaN for any other text."""
    try:
        return float(text) if text.isascii() and "_" not in text else math.nan
    except ValueError:
        return math.nan


def whole_number(option: str, text: str, most: int | None = None) -> int:
    """The number of at least 1 and at most `most`, or CaseError."""
    limits = "of at least 1" if most is None else f"from 1 to {most}"
    value = whole(text)
    if value is None or value < 1 or (most is not None and value > most):
        raise CaseError(f"--{option}: {text!r} is not a whole number {limits}")
    return value


def _number(option: str, text: str) -> float:
    value = real(text)
    if not (math.isfinite(value) and value >= 1):
        raise CaseError(f"--{option}: {text!r} is not a number of at least 1 (1: without guidance)")
    return value


def _latent(text: str) -> tuple[int, int]:
    """Height and width of "64x96", or of a square "64"."""
    sides = text.split("x")
    if len(sides) > 2:
        raise CaseError(f"--latent: {text!r} is no size; give height x width in latent pixels, as in 64x96")
    height, width = (whole_number("latent", side, LARGEST_LATENT) for side in (sides[0], sides[-1]))
    return height, width


def dtype_named(text: str) -> DType:
    """The dtype of that name or short name, or CaseError."""
    name = _DTYPE_ALIASES.get(text, text)
    if name not in DTYPES:
        raise CaseError(f"--dtype: no dtype {text!r}; choose from {', '.join(DTYPES)}")
    return name


def best_device() -> str:
    """ "cuda" where there is one, else "cpu"."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def device_named(text: str) -> str:
    """The device, if it is here; else CaseError."""
    import torch

    if re.fullmatch(DEVICE_PATTERN, text) is None:
        raise CaseError(f"--device: no device {text!r}; choose from cpu, cuda, cuda:N")
    if text != "cpu" and (torch.device(text).index or 0) >= torch.cuda.device_count():
        raise CaseError(f"--device: {text} is not here ({torch.cuda.device_count()} CUDA devices); choose cpu")
    return text


def check_devices(preset: str, cases: Iterable[Case]) -> None:
    """Raises CaseError where a device of the preset's cases is not here, before anything runs."""
    for name in dict.fromkeys(case.device for case in cases):
        try:
            device_named(name)
        except CaseError:
            raise CaseError(
                f"--preset {preset} needs a GPU and {name} is not here; on this machine name --preset cpu, "
                "or --device cpu"
            ) from None


def _checkpoint(text: str) -> str:
    """The absolute path, no link followed: of a file in the Hugging Face cache the link has the name."""
    try:
        path = Path(text).expanduser().absolute()
        if ".." in path.parts:
            # What ".." means is known to the file system alone.
            path = path.resolve() if path.name == ".." else path.parent.resolve() / path.name
        is_there = path.exists()
    except (OSError, RuntimeError):
        # A name that is too long, a loop of links, the home folder of an unknown user.
        path, is_there = Path(text), False
    if not is_there:
        raise CaseError(f"--unet: nothing at {path}; give a diffusers folder or a .safetensors file")
    return path_text(path)

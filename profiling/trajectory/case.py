"""What to measure: one trajectory, as a value."""

from __future__ import annotations

import os
import urllib.parse
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, model_validator

from ..measure.recorded import short_id
from ..options import DEVICE_PATTERN, DType, device_kind

Task = Literal["t2i", "sr", "rival", "pipeline"]

# What --task takes; a rival's task is its name.
TASKS: tuple[Task, ...] = ("t2i", "sr", "pipeline")
# Published networks, measured with random weights as the family's sizes are (`ldmperf.model.RELEASED`).
RELEASED_NAMES = ("SD1.5", "SDXL")
# Those of them that the task "pipeline" runs, with a text encoder and a decoder of their own.
PIPELINE_NAMES = ("SD1.5",)
# Rungs that are `graph+separate` and one idea, wherever it can serve: what it is worth alone.
IDEAS = ("graph+products", "graph+statistics", "graph+convolutions", "graph+tails")
# In the order of the ladder: the peer eager, with our kernels, and compiled; then ours, each with more than the
# one before, but for IDEAS.
RUNGS = (
    "diffusers",
    "diffusers-accelerated",
    "diffusers-compile",
    "diffusers-accelerated-compile",
    "diffusers-compile-max",
    "torch",
    "triton",
    "triton+hoist",
    "triton+hoist+merge",
    "graph+separate",
    *IDEAS,
    "graph",
    "graph+pdl",
)
# By backend, the rung that it stands beside: the same with every image evaluated alone, or, less exact, with wide
# transformers' matmuls in float8.
BESIDE = {
    "torch-invariant": "torch",
    "triton-invariant": "triton+hoist+merge",
    "graph-invariant": "graph",
    "triton+fp8": "triton+hoist+merge",
    "graph+fp8": "graph",
}
BACKENDS = (*RUNGS, *BESIDE)
# Of the task "pipeline": diffusers' pipeline as it is, with our kernels, compiled, and on our networks; then ours
# alone, eager, and each step a graph.
PIPELINE_BACKENDS = ("pipe", "pipe-accelerated", "pipe-compile", "pipe-rebuilt", "sample", "sample-graph")
# The backends that are measured unless told.
DEFAULT_BACKENDS = ("torch", "diffusers")
# The guidance of a task unless told: super-resolution samples without.
DEFAULT_GUIDANCE: Mapping[Task, float] = {"t2i": 7.5, "sr": 1.0, "pipeline": 7.5}
# The largest batch: far above what fits, and low enough that no figure of a record leaves the range of a float.
MOST_IMAGES = 1_000_000
# Stands before a path that is not UTF-8, which JSON cannot hold.
_ENCODED = "file://"


def path_text(path: Path) -> str:
    """An absolute path as text that JSON can hold: a file: URI where it is not UTF-8."""
    raw = os.fsencode(path)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return _ENCODED + urllib.parse.quote_from_bytes(raw)


class Case(BaseModel):
    """One trajectory to measure: hashable, and equal when all that is measured is equal.

    `unet` is a name of the family ("39M" ... "5B"), of a published network ("SD1.5") or the absolute path of a
    checkpoint (`path_text`); in a record a checkpoint has its name alone. `weights_sha256` is of a checkpoint's
    files, null for seeded random weights and before the files have been read. `guidance_scale` 1 is none; above 1
    every model evaluation takes 2 x `batch` inputs. Latent sizes are in latent pixels (an eighth of the image's),
    `context_tokens` is the length of the text context.

    A rival, a generator of another kind (task "rival"), has its name in `unet`, its own number of steps, the
    sampler "none", and no context tokens and no guidance where it takes no text. A pipeline (task "pipeline") goes
    from a prompt to an image, by a text encoder, the network in `unet` and a decoder.
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
    context_tokens: Annotated[int, Field(ge=0, lt=2**32)] = 77
    seed: Annotated[int, Field(ge=0, lt=2**64)] = 0
    backend: str = "torch"

    @model_validator(mode="after")
    def _a_text_for_the_family(self) -> Self:
        if not self.context_tokens and self.task != "rival":
            raise ValueError("context_tokens is at least 1, but for a rival that takes no text")
        return self

    @property
    def network(self) -> str:
        """The network's identity: a size, or a checkpoint's name and the first digits of its weights' SHA-256.

        The path of a checkpoint whose weights are not known, as in records of schema version 1.
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

        They begin the SHA-256 of the fields that are not null, as JSON: the device without its number, the digest
        of its weights in place of a checkpoint's name.
        """
        fields = self.model_dump(exclude_none=True) | {"device": device_kind(self.device)}
        if self.weights_sha256 is not None:
            del fields["unet"]
        return short_id(fields)

    @property
    def is_checkpoint(self) -> bool:
        """Whether the network is a checkpoint; names of sizes have no slash, and paths are absolute."""
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

    def as_recorded(self) -> Case:
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

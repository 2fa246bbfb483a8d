"""The record of how good the samples of one network are under one sampler, and the file of such records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, FiniteFloat, computed_field, model_validator

from ..measure.environment import Environment
from ..measure.recorded import SCHEMA_VERSION, Count, RecordModel, SchemaVersion, schema_of, short_id
from ..measure.store import Store

QUALITY_NAME: Final = "quality.jsonl"
# Fewer replicates do not tell a spread.
FEWEST_REPLICATES: Final = 20

QualityStatus = Literal["ok", "unsupported", "error"]
QualityTask = Literal["t2i", "sr"]
Generator = Literal["diffusion", "scratch", "distilled", "stitched", "gan", "vae", "masked-transformer", "real"]
Name = Annotated[str, Field(min_length=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Takes = tuple[tuple[Name, Annotated[int, Field(ge=1)]], ...]


class QualityEstimate(RecordModel):
    """A figure of all samples, and the same of resamples of them (bootstrap over the samples).

    Records with the same number of samples used the same resamples, in this order: differences and ratios of two
    records pair replicate by replicate. There are 20 replicates at least, or none.
    """

    value: float
    replicates: tuple[float, ...] = ()

    @model_validator(mode="after")
    def _enough_or_none(self) -> Self:
        if 0 < len(self.replicates) < FEWEST_REPLICATES:
            raise ValueError(f"give at least {FEWEST_REPLICATES} replicates, or none")
        return self


class QualityCase(BaseModel):
    """What was sampled: hashable, and equal when all that is judged is equal.

    world             the distribution, with the size of its latents and its version: "scenes-8x8-v1"
    kind              of generator; "scratch" is a diffusion network that began with drawn weights where others
                      begin with pre-trained ones; "real" is real samples against real: the floor of every distance
                      and the ceiling of the judge
    network           the label that trajectory records of the same network have (`Record.case.label`); of
                      "stitched" `stitched_label` of what it takes; "real", or "real-tokens" of real samples that
                      went through the tokens of a masked transformer
    training_seed, training_steps    of the network; 0 of "real". One seed is the same data in the same order for
                      every network, so that differences of two networks pair by it
    sampler           "none" for generators of one pass and for "real"
    steps             evaluations of the model for an image, a guided pair counts one; 1 of "real"
    guidance_scale    1 is none
    split             of the prompts; the guidance is chosen on held-out ones
    samples           how many
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    world: Name
    task: QualityTask = "t2i"
    kind: Generator
    network: Name
    training_seed: Annotated[int, Field(ge=0, lt=2**64)] = 0
    training_steps: Count
    sampler: Name = "ddim"
    steps: Annotated[int, Field(ge=1, le=1000)]
    guidance_scale: Annotated[FiniteFloat, Field(ge=1)] = 1.0
    split: Literal["test", "held-out"] = "test"
    samples: Annotated[int, Field(ge=1, le=2**53)]

    @property
    def label(self) -> str:
        """A short name, without the world and the number of samples."""
        parts = [self.network]
        if self.kind in ("scratch", "distilled"):
            # It has the label of another case's network.
            parts.append(self.kind)
        if self.kind != "real":
            guidance = f"guidance {self.guidance_scale:g}" if self.guided else "no guidance"
            parts += [self.sampler, f"{self.steps} steps", guidance, f"seed {self.training_seed}"]
            parts += [f"{self.training_steps} training steps"]
        return " ".join([*parts, self.split])

    @property
    def key(self) -> str:
        """A readable name, the same in every version of this schema."""
        return (
            f"world={self.world} task={self.task} kind={self.kind} network={self.network} "
            f"seed={self.training_seed} trained={self.training_steps} sampler={self.sampler} steps={self.steps} "
            f"guidance={self.guidance_scale:g} split={self.split} samples={self.samples}"
        )

    @property
    def case_id(self) -> str:
        """16 hexadecimal digits of all fields (`short_id`)."""
        return short_id(self.model_dump())

    @property
    def guided(self) -> bool:
        """Whether the model sees an unconditional half too."""
        return self.guidance_scale > 1.0


class QualityRecord(RecordModel):
    """How good the samples of a case are, or the reason why that is not known.

    tuned               whether this guidance was the best of its network, sampler and steps on held-out prompts
    takes               which network takes how many steps, in this order; empty of "real"
    gflop_per_image     of all forwards, guidance counted as two; without what is computed once for all steps, of
                        timesteps and captions
    training_gflop      of the whole training, by the same forwards, and backwards of twice their cost
    frechet             Frechet distance to real samples, in the judge's features
    kid                 kernel distance there, unbiased: it may lie below zero
    sliced_wasserstein  squared sliced Wasserstein-2 distance, of latents
    alignment           mean share of a caption's factors that the judge reads right
    factors             the same of each factor
    all_right           share of the samples of which all factors are right
    """

    schema_version: SchemaVersion = SCHEMA_VERSION
    run_id: Annotated[str | None, Field(min_length=1)] = None
    case_key: str
    case: QualityCase
    status: QualityStatus = "ok"
    message: Annotated[str | None, Field(pattern=r"^[^\r\n]+$")] = None
    tuned: bool = False
    takes: Takes = ()
    parameters: Count | None = None
    gflop_per_image: Annotated[float | None, Field(ge=0)] = None
    training_gflop: Annotated[float | None, Field(ge=0)] = None
    frechet: QualityEstimate | None = None
    kid: QualityEstimate | None = None
    sliced_wasserstein: QualityEstimate | None = None
    alignment: QualityEstimate | None = None
    factors: Mapping[str, Share] = Field(default_factory=dict)
    all_right: Share | None = None
    environment: Environment
    started_at: AwareDatetime

    @model_validator(mode="after")
    def _figures_or_why_not(self) -> Self:
        if self.case_key != self.case.key:
            raise ValueError("case_key is not the key of the case")
        if self.started_at.utcoffset() != UTC.utcoffset(None):
            raise ValueError("started_at must be in UTC")
        figures = [figure for figure in self.estimates.values() if figure is not None]
        if self.status == "ok" and (self.message is not None or not figures):
            raise ValueError("an ok record has a figure, and no message")
        if self.status != "ok" and (self.message is None or figures or self.factors):
            raise ValueError(f"a record with status {self.status} has a message and no figures")
        if self.alignment is not None and not 0 <= self.alignment.value <= 1:
            raise ValueError("alignment is a share, 0 to 1")
        return self

    @model_validator(mode="after")
    def _takes_are_those_of_the_case(self) -> Self:
        case = self.case
        if (case.kind == "real") != (not self.takes):
            raise ValueError('takes are empty of "real", and of nothing else')
        if self.takes and sum(steps for _, steps in self.takes) != case.steps:
            raise ValueError("the steps of takes do not add up to those of the case")
        if case.kind == "stitched" and case.network != stitched_label(self.takes):
            raise ValueError(f"the network of a stitched case is called {stitched_label(self.takes)!r} here")
        if case.kind not in ("real", "stitched") and [name for name, _ in self.takes] != [case.network]:
            raise ValueError("all steps are the network's own, but of a stitched case")
        return self

    @computed_field  # type: ignore[prop-decorator]
    @property
    def case_id(self) -> str:
        """As `QualityCase.case_id`."""
        return self.case.case_id

    @property
    def estimates(self) -> dict[str, QualityEstimate | None]:
        """All figures that have replicates, by their fields' names."""
        return {name: getattr(self, name) for name in ("frechet", "kid", "sliced_wasserstein", "alignment")}


def stitched_label(takes: Sequence[tuple[str, int]]) -> str:
    """ "w8x20+w32x30": the name of a trajectory that several networks share."""
    return "+".join(f"{name}x{steps}" for name, steps in takes)


def quality_schema() -> dict[str, Any]:
    """The JSON Schema of a line of quality.jsonl."""
    return schema_of(QualityRecord, "quality")


class QualityStore(Store[QualityRecord]):
    """The file of qualities."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, QualityRecord)

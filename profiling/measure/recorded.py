"""What all records are made of: samples, errors, kernels' times, the schema's version."""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Annotated, Any, Final, Literal, Protocol, Self, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from .timing import quantile

Status = Literal["ok", "incorrect", "impossible", "oom", "unsupported", "error"]
# What is wrong with what was measured, or with the measuring; `oom` and `unsupported` are findings.
FAILED: tuple[Status, ...] = ("error", "incorrect", "impossible")
Milliseconds = Annotated[float, Field(ge=0)]
# What a float holds exactly: beyond it a figure derived from a count could not be computed.
Count = Annotated[int, Field(ge=0, le=2**53)]
# Version 2 has what tells runs, machines and weights apart (run_id, case_id, machine_id, commit_time,
# weights_sha256) and checkpoints by their names. Of version 1 these are null, and checkpoints are paths. Version 3
# has the status `impossible`, floors, energy, the decoder's time and rivals; of older ones these are null.
SCHEMA_VERSION: Final = 3
READABLE_VERSIONS = (1, 2, 3)


def _readable(version: object) -> object:
    return SCHEMA_VERSION if type(version) is int and version in READABLE_VERSIONS else version


# Read, a record of an older version is one of this version without what came later.
SchemaVersion = Annotated[Literal[3], BeforeValidator(_readable)]


class RecordModel(BaseModel):
    """A part of a record."""

    # Ignoring extra fields skips the derived figures of a written record, and lets an older reader take records
    # that a newer writer of the same schema version has added fields to.
    model_config = ConfigDict(frozen=True, extra="ignore", strict=True, allow_inf_nan=False)


class Samples(RecordModel):
    """Raw samples in milliseconds, in the order taken, none dropped, and their (linear) quantiles."""

    samples: Annotated[tuple[Milliseconds, ...], Field(min_length=1)]
    p20: Milliseconds
    p50: Milliseconds
    p80: Milliseconds
    min: Milliseconds
    n: int

    @classmethod
    def of(cls, samples_ms: Sequence[float]) -> Self:
        """Samples (milliseconds) with their statistics; ValueError when there are none or one is not finite."""
        if not samples_ms:
            raise ValueError("there are no samples")
        p20, p50, p80 = (quantile(samples_ms, q) for q in (0.2, 0.5, 0.8))
        return cls(samples=tuple(samples_ms), p20=p20, p50=p50, p80=p80, min=min(samples_ms), n=len(samples_ms))

    @model_validator(mode="after")
    def _statistics_fit_the_samples(self) -> Self:
        ordered = self.min <= self.p20 <= self.p50 <= self.p80 <= max(self.samples)
        if self.n != len(self.samples) or self.min != min(self.samples) or not ordered:
            raise ValueError("the statistics are not those of the samples")
        return self


class Correctness(RecordModel):
    """How far a result is from the reference's: relative RMS error, before and after timing.

    An error is null when it was not reached or is not finite. `reference` names what was compared with.
    `tolerance`: the one applied, which in a half dtype the rounding of the other implementation may have raised.
    """

    error_before: float | None = None
    error_after: float | None = None
    tolerance: float
    reference: str

    @property
    def passed(self) -> bool:
        errors = (self.error_before, self.error_after)
        return all(error is not None and error <= self.tolerance for error in errors)


class KernelTime(RecordModel):
    """A kernel, copy or fill in the mean step: how often it is launched, and how long it runs in all."""

    name: str
    launches: Annotated[float, Field(ge=0)]
    ms: Milliseconds


class Ended(Protocol):
    """A record that says how its case ended."""

    @property
    def status(self) -> Status: ...


E = TypeVar("E", bound=Ended)


def since_defect(records: Sequence[E]) -> Sequence[E]:
    """The records from the last defect (`FAILED`) on, out of those of a case in the order in which they were made.

    A defect is shown until the case is measured again.
    """
    defects = [place for place, record in enumerate(records) if record.status in FAILED]
    return records[defects[-1] :] if defects else records


def utc_now() -> datetime:
    """The time now, aware, in UTC, to the second."""
    return datetime.now(UTC).replace(microsecond=0)


def short_id(content: Mapping[str, object]) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of the content as JSON, keys sorted, without spaces."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def new_run_id() -> str:
    """32 hexadecimal digits, random: no two runs share them."""
    return uuid.uuid4().hex


def schema_of(model: type[BaseModel], name: str) -> dict[str, Any]:
    """The JSON Schema of a model's lines as they are written, under a name that has the schema version."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"urn:ldmperf:schema:{name}:{SCHEMA_VERSION}",
    } | model.model_json_schema(mode="serialization")

"""classes.json: what a step takes by class of operator, as `ldmperf trace` measured it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from ..measure.environment import Environment
from ..measure.folders import RunError
from ..measure.recorded import SCHEMA_VERSION, Milliseconds, RecordModel, SchemaVersion
from ..measure.store import parsed
from .classes import CLASSES, OperatorClass

CLASSES_NAME = "classes.json"


class ClassTime(RecordModel):
    """A class in the mean step: milliseconds, and launches (on a CPU: calls of operators)."""

    ms: Milliseconds
    launches: Annotated[float, Field(ge=0)]


class ClassTimes(RecordModel):
    """The mean step of an eager run by class.

    clock    "device": the time of each kernel, by the device's own clock. "host": of each operator on a CPU, with
             what the profiler itself takes
    backend  the eager backend that ran; `case_key` is that of the case that was asked for
    steps    over which the mean is
    step_ms  the sum of `classes` and `other`: of all kernels ("device"), or the whole step ("host")
    other    what no class explains: kernels of no operator; on a CPU what runs between the operators
    """

    schema_version: SchemaVersion = SCHEMA_VERSION
    case_key: str
    unet: str
    backend: str
    clock: Literal["device", "host"]
    steps: Annotated[int, Field(ge=1)]
    step_ms: Milliseconds
    classes: dict[OperatorClass, ClassTime]
    other: ClassTime
    environment: Environment

    @model_validator(mode="after")
    def _adds_up(self) -> Self:
        if set(self.classes) != set(CLASSES):
            raise ValueError(f"classes must be {', '.join(CLASSES)}")
        total = sum(of.ms for of in self.classes.values()) + self.other.ms
        if not math.isclose(total, self.step_ms, rel_tol=1e-6, abs_tol=1e-6):
            raise ValueError(f"the classes add up to {total:g} ms, and the step is {self.step_ms:g} ms")
        return self


def read_class_times(path: Path) -> ClassTimes:
    """What the folder of a trace, or its classes.json, says. Raises RunError where that cannot be read."""
    file = path / CLASSES_NAME if path.is_dir() else path
    try:
        found = parsed(file.read_bytes(), ClassTimes)
    except OSError as failure:
        found = str(failure.strerror)
    if isinstance(found, str):
        raise RunError(f"{file} cannot be read ({found}); name a folder that `ldmperf trace` wrote")
    return found

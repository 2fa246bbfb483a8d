"""The record of one case, and the file of such records."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import AwareDatetime, Field, computed_field, model_validator

from ..measure.environment import DeviceState, Environment
from ..measure.recorded import (
    SCHEMA_VERSION,
    Correctness,
    Count,
    RecordModel,
    Samples,
    SchemaVersion,
    Status,
    schema_of,
)
from ..measure.store import Store, read_lines
from .case import Case
from .record_parts import Energy, Floor, Harness, Parts, Phases, Trace

RECORDS_NAME = "records.jsonl"


class Record(RecordModel):
    """One measured case, or the reason why there is no time: only `ok` has one.

    `run_id` is the same in all records of a run, those of --resume included; `case_id` is the same for the same
    case on every commit and machine. `case.weights_sha256` tells checkpoints apart; `environment` has `machine_id`
    and `commit_time`.

    `wall_ms` and `gpu_ms` are of whole trajectories, from noise to latents, the text conditioning included;
    `gpu_ms` is null on the CPU. `evaluations` counts model evaluations of a trajectory (a guided one, with its two
    halves in one batch, is one). `gflop_per_forward` is of one forward at batch 1. `peak_memory_bytes` is the most
    that torch held on the GPU in a trajectory, weights and what captured graphs set aside included; null on the
    CPU, where torch does not count. `trace` is of a short trajectory, untimed, under torch's profiler; null on the
    CPU, where that failed, and where time ran out before it. `settings`: those that the backend states of itself.
    `decoder_ms`: decoding the batch's latents to images by an autoencoder of Stable Diffusion's shape, on request.
    `parts`: of a pipeline, whose trajectory goes from a prompt to an image; null for others.
    `energy`: null where a run ended before it. `device_during`: the last reading in the energy window; its
    `throttle_reasons` are all that were seen there or right after a timed sample.
    """

    schema_version: SchemaVersion = SCHEMA_VERSION
    run_id: Annotated[str | None, Field(min_length=1)] = None
    case_key: str
    case: Case
    status: Status
    message: Annotated[str | None, Field(pattern=r"^[^\r\n]+$")] = None
    correctness: Correctness | None = None
    wall_ms: Samples | None = None
    gpu_ms: Samples | None = None
    parts: Parts | None = None
    phases: Phases = Phases()
    parameters: Count | None = None
    gflop_per_forward: float | None = None
    evaluations: Count | None = None
    peak_memory_bytes: Count | None = None
    trace: Trace | None = None
    floor: Floor | None = None
    energy: Energy | None = None
    decoder_ms: Samples | None = None
    settings: tuple[str, ...] = ()
    device_before: DeviceState = DeviceState()
    device_during: DeviceState = DeviceState()
    device_after: DeviceState = DeviceState()
    environment: Environment
    harness: Harness
    started_at: AwareDatetime

    @model_validator(mode="after")
    def _a_time_only_on_a_correct_result(self) -> Self:
        if self.case_key != self.case.key:
            raise ValueError("case_key is not the key of the case")
        if self.started_at.utcoffset() != UTC.utcoffset(None):
            raise ValueError("started_at must be in UTC")
        if self.status == "ok":
            if self.message is not None or self.wall_ms is None or not self.evaluations:
                raise ValueError("an ok record has wall_ms and evaluations, and no message")
            if self.correctness is None or not self.correctness.passed:
                raise ValueError("an ok record has passed its check before and after timing")
        elif self.message is None or self.wall_ms or self.gpu_ms or self.parts:
            raise ValueError(f"a record with status {self.status} has a message and no time")
        return self

    @computed_field  # type: ignore[prop-decorator]
    @property
    def case_id(self) -> str:
        """What dashboards group by: the case, whatever the commit, the machine and the place of a checkpoint."""
        return self.case.case_id

    @computed_field  # type: ignore[prop-decorator]
    @property
    def ms_per_step(self) -> float | None:
        """Median wall time of a trajectory over its model evaluations, for the whole batch, sampler included.

        Of a pipeline that of its steps alone, on the clock of its parts.
        """
        whole = self.wall_ms if self.parts is None else self.parts.steps
        return None if whole is None or not self.evaluations else whole.p50 / self.evaluations

    @computed_field  # type: ignore[prop-decorator]
    @property
    def host_gap(self) -> float | None:
        """The share of the median wall time in which the device did nothing; null without a trace.

        The two come from different trajectories, so that a gap of nothing may come out slightly negative.
        """
        if self.wall_ms is None or self.trace is None or not self.wall_ms.p50 or not self.evaluations:
            return None
        busy = self.trace.busy_in(self.evaluations)
        return None if busy is None else 1.0 - busy / self.wall_ms.p50

    @computed_field  # type: ignore[prop-decorator]
    @property
    def percent_of_floor(self) -> float | None:
        """The floor of a step in percent of `ms_per_step`; above 100 where caches serve what the floor moves."""
        return None if self.floor is None or not self.ms_per_step else 1e2 * self.floor.step_ms / self.ms_per_step

    @computed_field  # type: ignore[prop-decorator]
    @property
    def ms_per_image(self) -> float | None:
        """Median wall time of a trajectory over the images it makes (its batch)."""
        return None if self.wall_ms is None else self.wall_ms.p50 / self.case.batch

    @computed_field  # type: ignore[prop-decorator]
    @property
    def images_per_s(self) -> float | None:
        """Images a second at the median wall time; null when that is zero."""
        return 1e3 / self.ms_per_image if self.ms_per_image else None

    @computed_field  # type: ignore[prop-decorator]
    @property
    def joules_per_image(self) -> float | None:
        """The GPU's energy for an image: that of the window over its trajectories and their batch."""
        return None if (joules := self._joules_per_trajectory) is None else joules / self.case.batch

    @computed_field  # type: ignore[prop-decorator]
    @property
    def joules_per_step(self) -> float | None:
        """The GPU's energy for a model evaluation of the whole batch, sampler included."""
        joules = self._joules_per_trajectory
        return None if joules is None or not self.evaluations else joules / self.evaluations

    @computed_field  # type: ignore[prop-decorator]
    @property
    def mean_power_w(self) -> float | None:
        """The GPU's mean power in the window of its energy."""
        energy = self.energy
        return None if energy is None or energy.joules is None else energy.joules / energy.window_s

    @property
    def _joules_per_trajectory(self) -> float | None:
        energy = self.energy
        return None if energy is None or energy.joules is None else energy.joules / energy.trajectories


def record_schema() -> dict[str, Any]:
    """The JSON Schema of a line of records.jsonl."""
    return schema_of(Record, "record")


def load_records(path: Path) -> tuple[list[Record], int]:
    """The records of a file (or of a run folder's), and how many lines were set aside. Changes nothing on disk.

    A record is written before its energy and its trace are measured, and once more with each: these are one
    record, the last. Raises OSError when it cannot be read. `record_files.gather` tells which lines those are, and
    why.
    """
    records, aside = read_lines(path / RECORDS_NAME if path.is_dir() else path, Record)
    return without_completed(records), aside.count


def without_completed(records: Sequence[Record]) -> list[Record]:
    """The records, but those that were written again with their energy or their trace."""
    most: dict[Record, int] = {}
    for record in records:
        if extent := _extent(record):
            measured = _as_timed(record)
            most[measured] = max(extent, most.get(measured, 0))
    return [record for record in records if not most or _extent(record) >= most.get(_as_timed(record), 0)]


def _extent(record: Record) -> int:
    """How much was measured after timing."""
    return (record.energy is not None) + (record.trace is not None)


def _as_timed(record: Record) -> Record:
    """The record as it was when its timing was done."""
    return record.model_copy(update={"energy": None, "trace": None, "device_during": DeviceState()})


class RecordStore(Store[Record]):
    """The file of a profile's records."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, Record)

    def load(self) -> list[Record]:
        """The records on disk; a case that was completed appears once."""
        return load_records(self.path)[0]

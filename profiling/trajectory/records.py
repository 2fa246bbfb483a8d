"""The record of one case, and the file of such records."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AwareDatetime, Field, computed_field, model_validator

from ..measure.environment import DeviceState, Environment
from ..measure.recorded import (
    SCHEMA_VERSION,
    Correctness,
    Count,
    KernelTime,
    Milliseconds,
    RecordModel,
    Samples,
    SchemaVersion,
    Status,
    schema_of,
)
from ..measure.store import Aside, Store, read_lines
from .case import Case

RECORDS_NAME = "records.jsonl"


class Phases(RecordModel):
    """What happens once, each part timed apart on the wall clock, in milliseconds; null when it was not done.

    weights: making or loading the network, shared by the backends of a group. build: the backend's own.
    first_call: its first trajectory. warmup: the trajectories between that and timing. reference: the reference
    trajectory, where it was computed apart. graph_warmup and capture: of the steps that were captured as CUDA
    graphs, a part of first_call.
    """

    weights_ms: Milliseconds | None = None
    build_ms: Milliseconds | None = None
    first_call_ms: Milliseconds | None = None
    warmup_ms: Milliseconds | None = None
    graph_warmup_ms: Milliseconds | None = None
    capture_ms: Milliseconds | None = None
    reference_ms: Milliseconds | None = None


class Harness(RecordModel):
    """How the samples were taken: timing of a backend ended when both minima were reached.

    `interleaved`: the backends that were timed in turn with this one, itself included. `order`: for each sample
    who ran in its round, in that order; empty in older records. `stopped_by`: "seconds" where the time given to
    the whole profile ran out first, so that there are fewer samples than the minima ask for.
    """

    min_count: int
    min_seconds: float
    warmup_count: int
    interleaved: tuple[str, ...]
    order: tuple[tuple[str, ...], ...] = ()
    stopped_by: Literal["seconds"] | None = None


class Trace(RecordModel):
    """What the device did in one trajectory.

    `evaluations`: model evaluations of that trajectory, which is shorter than the one that was timed; null in
    older records, where it was as long. `launches`: kernels, copies and fills. `launches_per_step`: those from one
    model evaluation to the next, null where that could not be told. `busy_ms`: how long at least one of them ran.
    `step_busy_ms`: the same within a step, in the mean. `step`: the mean over such steps, by kernel, the longest
    first; empty where they could not be told.
    """

    evaluations: Annotated[int | None, Field(ge=1)] = None
    launches: Annotated[int, Field(ge=0)]
    launches_per_step: Annotated[int | None, Field(ge=0)] = None
    busy_ms: Milliseconds
    step_busy_ms: Milliseconds | None = None
    step: tuple[KernelTime, ...] = ()

    def busy_in(self, evaluations: int) -> float | None:
        """How long the device is busy in a trajectory of so many evaluations, in ms, each further one a mean step.

        Null where that is another number than was traced and the steps could not be told.
        """
        further = 0 if self.evaluations is None else evaluations - self.evaluations
        if not further:
            return self.busy_ms
        return None if self.step_busy_ms is None else self.busy_ms + further * self.step_busy_ms


class Floor(RecordModel):
    """The least times of a step on this machine, from what it computes and moves and the ceilings measured here.

    step_ms        the roofline: each launch at the longest of its bytes, FLOPs and exponentials, summed
    least_step_ms  what no implementation undercuts: all FLOPs of the step, those of 3x3 convolutions counted at a
                   quarter (Winograd's algorithm), and no bytes (a cache may hold them)
    nbytes, flops, exponentials    of a step; a multiply-add is two FLOPs
    *_per_s        the ceilings: reads and writes of a copy, matmuls in the case's dtype, exponentials
    """

    step_ms: Milliseconds
    least_step_ms: Milliseconds
    nbytes: Count
    flops: Count
    exponentials: Count
    bytes_per_s: Annotated[float, Field(gt=0)]
    flop_per_s: Annotated[float, Field(gt=0)]
    exponentials_per_s: Annotated[float, Field(gt=0)]


class Energy(RecordModel):
    """The GPU's energy over a window of whole trajectories, untimed, after timing: by NVML's counter.

    `joules` is null where it cannot be told, and `message` says why. `window_s` is at least two seconds, as the
    counter is updated every 20 to 100 ms. `trajectories`: how many ran in the window. `counted_s`: from the first
    to the last update of the counter within it; the mean power between them counts for all of the window.
    `relative_error`: the most by which the unknown moments of these two updates change the joules; the sensor's
    own error comes on top. What an idle GPU takes is not subtracted.
    """

    joules: Annotated[float | None, Field(ge=0)] = None
    window_s: Annotated[float, Field(ge=0)] = 0.0
    trajectories: Annotated[int, Field(ge=0)] = 0
    counted_s: Annotated[float, Field(ge=0)] = 0.0
    relative_error: Annotated[float | None, Field(ge=0)] = None
    message: Annotated[str | None, Field(pattern=r"^[^\r\n]+$")] = None

    @model_validator(mode="after")
    def _joules_or_why_not(self) -> Self:
        if (self.joules is None) == (self.message is None):
            raise ValueError("energy has joules or a message, and not both")
        if self.joules is not None and not (self.window_s and self.trajectories):
            raise ValueError("joules are of a window and of trajectories")
        return self


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
        elif self.message is None or self.wall_ms is not None or self.gpu_ms is not None:
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
        """Median wall time of a trajectory over its model evaluations, for the whole batch, sampler included."""
        if self.wall_ms is None or not self.evaluations:
            return None
        return self.wall_ms.p50 / self.evaluations

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
    record, the last. Raises OSError when it cannot be read. `read_records` tells which lines those are, and why.
    """
    records, aside = read_records(path)
    return records, aside.count


def read_records(path: Path) -> tuple[list[Record], Aside]:
    """As `load_records`, with the first of the lines set aside and the reason of each."""
    records, aside = read_lines(path / RECORDS_NAME if path.is_dir() else path, Record)
    return without_completed(records), aside


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

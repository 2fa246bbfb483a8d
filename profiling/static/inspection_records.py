"""The record of one compiled launch, and the file of such records."""

from __future__ import annotations

from datetime import UTC
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AwareDatetime, Field, computed_field, model_validator

from ..measure.environment import Environment
from ..measure.recorded import SCHEMA_VERSION, Count, RecordModel, SchemaVersion, schema_of, short_id
from ..measure.store import Store

InspectionStatus = Literal["ok", "unsupported", "error"]


class Overlap(RecordModel):
    """Of attention's exponentials in the hot loop: those issued between q k^T and its wait, and all."""

    beside_scores: Count
    exponentials: Count

    @property
    def share(self) -> float:
        return self.beside_scores / max(self.exponentials, 1)


class InspectionRecord(RecordModel):
    """What the compiler made of one launch, or the reason why there is no code. Nothing in it was measured.

    `run_id` is the same in all records of a folder; `case_id` is the same for the same launch on every commit.

    size, batch         the call: a size of the family and the model's batch, or a shape ("64x64 context=77")
    constants           the kernel's constants in capitals, as "BLOCK_M=64", sorted: its tile and its switches
    number              tells launches apart of which all that is the same, in the order of the step
    registers           of a thread; on an AMD chip vector registers
    spills              loads and stores of spilled registers, of which `spill_loads` and `spill_stores` are null
                        where only their sum is known; on an AMD chip spilled registers
    shared_bytes        of a program
    warps_per_multiprocessor, occupancy_limit    how many warps fit at once, and what limits them; null on AMD
    loop                whether there is a hot loop; `hot_instructions` are those of it, or else all
    serialized          ptxas' codes C75xx: each asynchronous matmul waits for the one before
    overlap             null where no asynchronous matmuls are in a loop, and for all but attention
    faults              what no kernel may have, in words; null where nobody looked
    """

    schema_version: SchemaVersion = SCHEMA_VERSION
    run_id: Annotated[str | None, Field(min_length=1)] = None
    case_key: str
    arch: str
    kernel: str
    size: str
    batch: int | None = None
    dtype: str
    constants: tuple[str, ...] = ()
    num_warps: Annotated[int, Field(ge=1)]
    number: Annotated[int, Field(ge=1)] = 1
    status: InspectionStatus
    message: Annotated[str | None, Field(pattern=r"^[^\r\n]+$")] = None
    registers: Count | None = None
    spills: Count | None = None
    spill_loads: Count | None = None
    spill_stores: Count | None = None
    shared_bytes: Count | None = None
    warps_per_multiprocessor: Count | None = None
    occupancy_limit: str | None = None
    loop: bool | None = None
    instructions: Count | None = None
    hot_instructions: Count | None = None
    serialized: tuple[str, ...] | None = None
    overlap: Overlap | None = None
    faults: tuple[str, ...] | None = None
    environment: Environment
    started_at: AwareDatetime

    @model_validator(mode="after")
    def _code_or_why_not(self) -> Self:
        if self.case_key != launch_key(self):
            raise ValueError("case_key is not the key of the launch")
        if self.started_at.utcoffset() != UTC.utcoffset(None):
            raise ValueError("started_at must be in UTC")
        counted = (self.registers, self.spills, self.shared_bytes)
        if self.status == "ok" and (self.message is not None or None in counted):
            raise ValueError("an ok record has registers, spills and shared_bytes, and no message")
        if self.status != "ok" and (self.message is None or counted != (None, None, None)):
            raise ValueError(f"a record with status {self.status} has a message and no figures")
        parts = (self.spill_loads, self.spill_stores)
        if None not in parts and self.spills != sum(part or 0 for part in parts):
            raise ValueError("spills are not the sum of spill_loads and spill_stores")
        return self

    @computed_field  # type: ignore[prop-decorator]
    @property
    def case_id(self) -> str:
        """16 hexadecimal digits of kernel, call, dtype, architecture, constants and warps (`short_id`)."""
        names = ("arch", "kernel", "size", "batch", "dtype", "constants", "num_warps")
        of = {name: getattr(self, name) for name in names}
        return short_id(of | {"number": self.number} if self.number > 1 else of)

    @property
    def label(self) -> str:
        """The launch without its architecture."""
        call = f"{self.kernel} {self.dtype} {self.size}"
        batch = [] if self.batch is None else [f"batch={self.batch}"]
        number = [f"number={self.number}"] if self.number > 1 else []
        return " ".join([call, *batch, *self.constants, f"warps={self.num_warps}", *number])


def launch_key(record: InspectionRecord) -> str:
    """What tells a record from others, as text."""
    return f"{record.label} arch={record.arch}"


def inspection_schema() -> dict[str, Any]:
    """The JSON Schema of a line of inspections.jsonl."""
    return schema_of(InspectionRecord, "inspection")


class InspectionStore(Store[InspectionRecord]):
    """The file of inspections."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, InspectionRecord)

"""The record of one compiled launch, and the file of such records."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AwareDatetime, Field, computed_field, model_validator

from ..measure.environment import Environment, collect_environment
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
    tensors             those that the kernel is given, as "x", "skip": which of the optional ones
    constants           the kernel's constants in capitals, as "BLOCK_M=64", sorted: its tile and its switches
    number              tells launches apart of which all that is the same (their sizes divide otherwise), in the
                        order of the step
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
    tensors: tuple[str, ...] = ()
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
        """16 hexadecimal digits of the architecture and all that `label` has (`short_id`)."""
        names = ("arch", "kernel", "size", "batch", "dtype", "tensors", "constants", "num_warps")
        of = {name: getattr(self, name) for name in names}
        return short_id(of | {"number": self.number} if self.number > 1 else of)

    @property
    def label(self) -> str:
        """The launch without its architecture."""
        call = f"{self.kernel} {self.dtype} {self.size}"
        batch = [] if self.batch is None else [f"batch={self.batch}"]
        tensors = [f"tensors={','.join(self.tensors)}"] if self.tensors else []
        number = [f"number={self.number}"] if self.number > 1 else []
        return " ".join([call, *batch, *tensors, *self.constants, f"warps={self.num_warps}", *number])

    @classmethod
    def of(
        cls, told: Mapping[str, Any], environment: Environment, started_at: datetime, run_id: str | None = None
    ) -> InspectionRecord:
        """The record of `Inspection.as_json` with the size, batch and dtype of its call beside it.

        Of `launch_as_json` with an `error`, in one line, in place of figures: the record of a launch that the
        compiler refused.
        """
        common = {"run_id": run_id, **_launch_of(told), "environment": environment, "started_at": started_at}
        if "error" in told:
            return _keyed(**common, status="error", message=told["error"])
        resources, region = told["resources"], told.get("region")
        figures: dict[str, Any]
        if region is None:
            # Scalar registers without scratch are kept in lanes of a vector register, not in memory.
            spills = resources["vgpr_spills"] + (resources["sgpr_spills"] if resources["scratch"] else 0)
            figures = {"registers": resources["vgprs"], "spills": spills}
        else:
            loads, stores = resources["spill_loads"], resources["spill_stores"]
            figures = {
                "registers": resources["registers"],
                "spills": loads + stores,
                "spill_loads": loads,
                "spill_stores": stores,
                "warps_per_multiprocessor": told["occupancy"]["warps"],
                "occupancy_limit": told["occupancy"]["limit"],
                "loop": region["loop"],
                "instructions": told["instructions"],
                "hot_instructions": region["instructions"],
                "serialized": tuple(told["serialized"]),
                "overlap": told.get("attention", {}).get("overlap"),
            }
        return _keyed(
            **common,
            status="ok",
            shared_bytes=told["shared_bytes"],
            faults=tuple(told["faults"]),
            **figures,
        )


def launch_key(record: InspectionRecord) -> str:
    """What tells a record from others, as text."""
    return f"{record.label} arch={record.arch}"


def _launch_of(told: Mapping[str, Any]) -> dict[str, Any]:
    # Only a dependent launch tells of PDL: the others have the code, and the key, that they have without it.
    return {name: told[name] for name in ("arch", "kernel", "size", "batch", "dtype", "num_warps")} | {
        "tensors": tuple(name.removesuffix("_ptr") for name in told["tensor_bytes"]),
        "constants": tuple(
            f"{name}={value}"
            for name, value in sorted(told["constants"].items())
            if name.isupper() and (name, value) != ("PDL", "False")
        ),
    }


def _keyed(**fields: Any) -> InspectionRecord:
    """A record with the key of its launch."""
    return InspectionRecord(case_key=launch_key(InspectionRecord.model_construct(**fields)), **fields)


def numbered(records: Iterable[InspectionRecord]) -> Iterator[InspectionRecord]:
    """The records as they come; those of one key are told apart by `number`."""
    seen: Counter[str] = Counter()
    for record in records:
        seen[record.case_key] += 1
        if (number := seen[record.case_key]) > 1:
            fields = {name: getattr(record, name) for name in InspectionRecord.model_fields if name != "case_key"}
            record = _keyed(**(fields | {"number": number}))
        yield record


def compiler_environment() -> Environment:
    """What decides the code: versions and the commit. The machine does not, and is left out."""
    found = collect_environment()
    names = ("os", "python", "ldmperf", "torch", "triton", "ptxas", "git_commit", "git_dirty", "commit_time")
    return Environment(**{name: getattr(found, name) for name in names})


def inspection_schema() -> dict[str, Any]:
    """The JSON Schema of a line of inspections.jsonl."""
    return schema_of(InspectionRecord, "inspection")


class InspectionStore(Store[InspectionRecord]):
    """The file of inspections."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, InspectionRecord)

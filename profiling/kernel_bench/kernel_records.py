"""The record of one kernel, one peer and one way of launching, and the file of such records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AwareDatetime, Field, computed_field, model_validator

from ..machines import Bound, attention_bound
from ..measure.environment import DeviceState, Environment
from ..measure.rates import CopyBandwidth, UnitRates
from ..measure.recorded import (
    SCHEMA_VERSION,
    Correctness,
    Milliseconds,
    RecordModel,
    Samples,
    SchemaVersion,
    Status,
    schema_of,
    short_id,
    since_defect,
)
from ..measure.store import Aside, Store, read_lines
from ..options import DEVICE_PATTERN, device_kind
from ..step.call import OperatorCall

Mode = Literal["eager", "graph"]
# How calls are made in a mode, as tables say it: "eager" is the name of a peer, too.
MODES: Mapping[Mode, str] = {"eager": "one by one", "graph": "as a graph"}


class KernelRecord(RecordModel):
    """One measured call, or the reason why there is no time: only `ok` has one.

    `run_id` is the same in all records of a folder, those of --resume included; `case_id` is the same for the same
    call, peer and mode on every commit and machine.

    `ms` is of one call; each sample is the mean over `calls_per_sample` calls in a row. `clock` "device": CUDA
    events around them; "host": the host's clock, on the CPU. `mode` "eager": launched one by one, so that a call
    shorter than its launch shows the launch; "graph": `input_sets` calls captured and replayed as a CUDA graph.
    Before a sample the device waits for `delay_cycles`, so that the host's way to the first launch is not in it.
    `l2` "cold": inputs and results together are at least twice the L2 cache, and are used in turn. `size` is the
    family's, or "vae", or "head_dim 40"; the same call in a later size is not measured again. `polynomial`: how
    many of every eight exponentials our kernel evaluates on other units, which makes its bound a shorter time.
    `seed`: of the random inputs. `case`: the call. `device_during`: the throttle reasons seen right after samples.
    `in_turns`: between rounds processes of other sides had theirs (`ldmperf compare --commits`), so that caches
    are colder than in a bench alone; false in older records.
    """

    schema_version: SchemaVersion = SCHEMA_VERSION
    run_id: Annotated[str | None, Field(min_length=1)] = None
    case_key: str
    size: str
    batch: int
    case: OperatorCall
    peer: str
    mode: Mode
    device: Annotated[str, Field(pattern=DEVICE_PATTERN)]
    seed: Annotated[int, Field(ge=0, lt=2**64)] = 0
    status: Status
    message: Annotated[str | None, Field(pattern=r"^[^\r\n]+$")] = None
    correctness: Correctness | None = None
    ms: Samples | None = None
    clock: Literal["device", "host"] | None = None
    calls_per_sample: int | None = None
    delay_cycles: int | None = None
    input_sets: int | None = None
    l2: Literal["cold", "warm"] | None = None
    first_call_ms: Milliseconds | None = None
    copy_bandwidth: CopyBandwidth | None = None
    unit_rates: UnitRates | None = None
    polynomial: int | None = None
    device_before: DeviceState = DeviceState()
    device_during: DeviceState = DeviceState()
    device_after: DeviceState = DeviceState()
    environment: Environment
    interleaved: tuple[str, ...] = ()
    in_turns: bool = False
    started_at: AwareDatetime

    @model_validator(mode="after")
    def _a_time_only_on_a_correct_result(self) -> Self:
        if self.case_key != record_key(self.case, self.device, self.peer, self.mode, self.seed):
            raise ValueError("case_key is not the key of the case, device, peer, mode and seed")
        if self.started_at.utcoffset() != UTC.utcoffset(None):
            raise ValueError("started_at must be in UTC")
        if self.status == "ok":
            timed = self.ms and self.clock and self.calls_per_sample and self.input_sets and self.l2
            if self.message is not None or not timed:
                raise ValueError("an ok record has ms and how they were taken, and no message")
            if self.correctness is None or not self.correctness.passed:
                raise ValueError("an ok record has passed its check before and after timing")
        elif self.message is None or self.ms is not None:
            raise ValueError(f"a record with status {self.status} has a message and no time")
        try:
            # Computed once, so that no table fails on what is derived from the case and the times.
            _ = (self.case.label, self.percent_of_copy, self.tflops, self.percent_of_bound)
        except Exception as error:
            raise ValueError(f"no call of an operator ({type(error).__name__}: {error})") from None
        return self

    @computed_field  # type: ignore[prop-decorator]
    @property
    def case_id(self) -> str:
        """16 hexadecimal digits of the call, the device without its number, peer, mode and seed (`short_id`)."""
        case = self.case.model_dump(mode="json", exclude_none=True)
        of = {"case": case, "device": device_kind(self.device), "peer": self.peer, "mode": self.mode}
        return short_id(of | {"seed": self.seed} if self.seed else of)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def bytes_moved(self) -> int:
        """Every argument read once and every result written once, whatever the peer really moves."""
        return self.case.bytes_moved

    @computed_field  # type: ignore[prop-decorator]
    @property
    def gb_per_s(self) -> float | None:
        """`bytes_moved` over the median time, in 1e9 bytes a second."""
        return None if self.ms is None or not self.ms.p50 else self.bytes_moved / self.ms.p50 / 1e6

    @computed_field  # type: ignore[prop-decorator]
    @property
    def percent_of_copy(self) -> float | None:
        """`gb_per_s` in percent of a copy's in the same run; above 100 where a cache serves."""
        if self.gb_per_s is None or self.copy_bandwidth is None:
            return None
        return 100 * self.gb_per_s / self.copy_bandwidth.gb_per_s

    @computed_field  # type: ignore[prop-decorator]
    @property
    def tflops(self) -> float | None:
        """1e12 FLOP a second of its matmuls without padding; None for an operator that matmuls do not limit."""
        if self.ms is None or not self.ms.p50 or self.case.flops is None:
            return None
        return self.case.flops / self.ms.p50 / 1e9

    @property
    def bound(self) -> Bound | None:
        """The least time that the matrix and exponential units allow, where their rates are known."""
        if self.unit_rates is None or (sizes := self.case.attention) is None:
            return None
        if (rates := self.unit_rates.rates) is None:
            return None
        heads, polynomial = sizes.batch * sizes.heads, self.polynomial or 0
        return attention_bound(heads, sizes.queries, sizes.keys, sizes.head_dim, rates, polynomial)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def percent_of_bound(self) -> float | None:
        """The bound's time in percent of the median."""
        bound = self.bound
        return None if bound is None or self.ms is None or not self.ms.p50 else 100 * bound.ms / self.ms.p50


def record_key(call: OperatorCall, device: str, peer: str, mode: Mode, seed: int = 0) -> str:
    """What tells a record from others, as text."""
    return f"{call.key} device={device} peer={peer} mode={mode}" + (f" seed={seed}" if seed else "")


def best_kernel(records: Sequence[KernelRecord]) -> KernelRecord:
    """The record to show of a call, out of those in the order in which they were made.

    That is the last with a time, or else the last; what was measured before a defect does not count.
    """
    since = since_defect(records)
    return next((record for record in reversed(since) if record.ms is not None), since[-1])


def kernel_schema() -> dict[str, Any]:
    """The JSON Schema of a line of kernels.jsonl."""
    return schema_of(KernelRecord, "kernel")


class KernelStore(Store[KernelRecord]):
    """The file of a bench's records."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, KernelRecord)


def read_kernels(path: Path) -> tuple[list[KernelRecord], Aside]:
    """The last record of each key, and the lines that were set aside. Raises OSError when it cannot be read."""
    records, aside = read_lines(path, KernelRecord)
    return list({record.case_key: record for record in records}.values()), aside

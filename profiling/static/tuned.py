"""The launches that a tuned table chooses (kernels/tuned/<gpu>.json), as items to compile and inspect."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from ldmperf.kernels import OPERATORS, Launch
from ldmperf.model import FAMILY

from ..machines import MACHINES, Machine
from ..options import DType
from ..step.call import OperatorCall, TensorSpec
from ..step.calls import FAMILY_HEAD_DIMS, attention_calls, family_calls, vae_calls
from .inspection import inspect_launches
from .planned import planned

# Architectures of the GPUs that a table can be of, by a part of their name.
_ARCHS = {"GH200": "sm_90", "H200": "sm_90", "H100": "sm_90", "H20": "sm_90", "A100": "sm_80", "MI300": "gfx942"}
# What a search may be asked for, its own defaults first: batches of the UNet; of attention also tokens, at the
# family's head dimensions. The calls of other keys would not be found again.
TUNED_BATCHES = (2, 16, 1, 4, 8, 32, 64)
TUNED_TOKENS = (4096, 1024, 256, 64)
_OTHER_16_BITS: dict[str, DType] = {"bfloat16": "float16", "float16": "bfloat16"}


@dataclass(frozen=True)
class TunedItem:
    """A launch that an entry of a tuned table comes to: of a call that has its key, the `number`-th launch.

    `config` holds (field, value).
    """

    key: str
    call: OperatorCall
    config: tuple[tuple[str, Any], ...]
    arch: str
    number: int

    @property
    def launch(self) -> Launch:
        return _launches(self.call, self.config, MACHINES[self.arch])[self.number]


def tuned_items(path: Path) -> list[TunedItem]:
    """An item for each launch of each entry that is not the kernel's default.

    A 16-bit entry serves the other 16-bit dtype too, where that has none of its own; those launches are included.
    Raises ValueError for a GPU of unknown architecture, and for a key that no call of the family has.
    """
    document = json.loads(path.read_text())
    arch = next((arch for name, arch in _ARCHS.items() if name in document["gpu"]), None)
    if arch is None:
        raise ValueError(f"{path.name}: the architecture of {document['gpu']} is not known; add it to _ARCHS")
    items = []
    for operator, entries in document["kernels"].items():
        wanted = {key: config for key, config in entries.items() if config is not None}
        calls = _calls_by_key(operator, wanted)
        if calls.keys() != wanted.keys():
            missing = ", ".join(sorted(wanted.keys() - calls.keys()))
            raise ValueError(f"{path.name}: no call of {operator} has these keys: {missing}")
        for key, config in wanted.items():
            fields = tuple(config.items())
            for call in calls_served(calls[key]):
                its_key = OPERATORS[operator].tuning_key(call.bound("meta"))
                if its_key == key or its_key not in entries:
                    count = len(_launches(call, fields, MACHINES[arch]))
                    items += [TunedItem(its_key, call, fields, arch, number) for number in range(count)]
    return items


def calls_served(call: OperatorCall) -> list[OperatorCall]:
    """The calls that a tuned entry of this call serves: of a 16-bit one both the call and its 16-bit sibling."""
    other = _OTHER_16_BITS.get(call.dtype)
    if other is None:
        return [call]

    def swapped(specs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
        return tuple(t.model_copy(update={"dtype": other}) if t.dtype == call.dtype else t for t in specs)

    update = {"dtype": other, "tensors": swapped(call.tensors), "results": swapped(call.results)}
    return [call, call.model_copy(update=update)]


def faults_of(call: OperatorCall, config: Any, machine: Machine) -> list[str]:
    """The faults (`Inspection.faults`) of all launches that an entry of this call would serve; compiles them."""
    fields = tuple(dataclasses.asdict(config).items())
    served = [(one, launch) for one in calls_served(call) for launch in _launches(one, fields, machine)]
    inspections = inspect_launches([(launch, machine) for _, launch in served])
    return [
        f"{one.dtype}, {launch.name}: {fault}"
        for (one, launch), inspection in zip(served, inspections, strict=True)
        for fault in inspection.faults
    ]


def _launches(call: OperatorCall, fields: tuple[tuple[str, Any], ...], machine: Machine) -> list[Launch]:
    config = type(OPERATORS[call.operator].candidates(call.bound("meta"))[0])(**dict(fields))
    return planned(call.operator, call.arguments("meta"), machine, config)


def _calls_by_key(operator: str, keys: Mapping[str, Any]) -> dict[str, OperatorCall]:
    """A call for each of the keys that some call of the family has."""
    found: dict[str, OperatorCall] = {}
    # A key names the dtype; finding the calls of one takes seconds.
    dtypes: tuple[DType, ...] = get_args(DType)
    dtypes = tuple(dtype for dtype in dtypes if any(dtype in key for key in keys)) or dtypes
    for call in _calls(operator, dtypes) if keys else ():
        key = OPERATORS[operator].tuning_key(call.bound("meta"))
        if key in keys:
            found.setdefault(key, call)
            if len(found) == len(keys):
                break
    return found


def _calls(operator: str, dtypes: tuple[DType, ...]) -> Iterator[OperatorCall]:
    for batch, dtype in itertools.product(TUNED_BATCHES, dtypes):
        for size in FAMILY:
            yield from (call for call in family_calls(size, batch, dtype) if call.operator == operator)
        if operator == "attention":
            for dim, tokens in itertools.product(FAMILY_HEAD_DIMS, TUNED_TOKENS):
                yield from attention_calls(dim, tokens, batch, dtype)
    for dtype in dtypes:
        yield from (call for call in vae_calls(dtype) if call.operator == operator)

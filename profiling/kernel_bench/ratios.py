"""How many times as long as ours a peer takes, over many calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import geometric_mean

from .kernel_records import KernelRecord, Mode


@dataclass(frozen=True)
class Ratio:
    """The geometric mean over the calls where both have a time, and the least with its call."""

    operator: str
    peer: str
    mode: Mode
    mean: float
    worst: float
    worst_call: str
    calls: int


def ratios(records: Sequence[KernelRecord]) -> list[Ratio]:
    """Peers against our kernel, by operator and mode, in the order in which they first appear."""
    ours = {_call(r): r.ms.p50 for r in records if r.peer == "triton" and r.ms is not None}
    found: dict[tuple[str, str, Mode], list[tuple[float, str]]] = {}
    for record in records:
        if record.peer != "triton" and record.ms is not None and ours.get(_call(record)):
            ratio = record.ms.p50 / ours[_call(record)]
            group = (record.case.operator, record.peer, record.mode)
            found.setdefault(group, []).append((ratio, f"{record.size} batch {record.batch} {record.case.label}"))
    return [
        Ratio(*group, geometric_mean(ratio for ratio, _ in of), *min(of), len(of))
        for group, of in found.items()
        if all(ratio > 0 for ratio, _ in of)
    ]


def _call(record: KernelRecord) -> tuple[str, str, Mode]:
    return record.case.key, record.device, record.mode

"""A bench from choices to records on disk, within a time bound."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..cases import DType
from ..environment import Environment
from ..timing import Deadline
from .bench import KernelBench
from .device import PACES, copy_bandwidth
from .peers import PEERS
from .records import MODES, KernelRecord, KernelStore
from .selection import BATCHES, SIZES, Job, jobs

# Compiling for the CPU takes much longer than what it measures: only on request there.
SLOW_ON_CPU = ("compile", "diffusers-compile")


@dataclass(frozen=True)
class BenchChoices:
    """What to measure; empty takes what suits the device."""

    operators: tuple[str, ...]
    sizes: tuple[str, ...] = ()
    batches: tuple[int, ...] = ()
    peers: tuple[str, ...] = ()
    dtype: DType = "bfloat16"
    device: str = "cuda"

    @property
    def jobs(self) -> Iterable[Job]:
        return jobs(self.operators, self.sizes or SIZES, self.batches or BATCHES, self.dtype)

    def bench(self, environment: Environment) -> KernelBench:
        """The bench, its copy bandwidth measured now."""
        is_cpu = self.device == "cpu"
        names = self.peers or tuple(name for name in PEERS if not (is_cpu and name in SLOW_ON_CPU))
        device = torch.device(self.device)
        return KernelBench(
            self.device,
            [PEERS[name] for name in PEERS if name in names],
            ("eager",) if is_cpu else MODES,
            PACES[device.type],
            environment,
            copy_bandwidth(device),
        )


def run_jobs(
    bench: KernelBench,
    jobs: Iterable[Job],
    store: KernelStore | None,
    deadline: Deadline,
    told: Callable[[Sequence[KernelRecord]], None],
) -> tuple[list[KernelRecord], bool]:
    """The records, a job's on disk before the next begins, and whether every job was reached in time."""
    records: list[KernelRecord] = []
    for job in jobs:
        if deadline.passed:
            return records, False
        done = bench.measure(job)
        if store is not None:
            store.append(*done)
        records += done
        told(done)
    return records, True


def write_markdown(folder: Path, text: str) -> Path:
    """Writes the table beside the records."""
    path = folder / "kernels.md"
    path.write_text(text)
    return path

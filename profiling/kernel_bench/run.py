"""A bench from choices to records on disk, within a time bound."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..measure.environment import Environment
from ..measure.folders import RunError, check_environment
from ..measure.rates import copy_bandwidth, unit_rates
from ..measure.recorded import new_run_id
from ..measure.store import write_whole
from ..measure.timing import Deadline
from ..options import DType
from . import KERNELS_NAME
from .bench import KernelBench
from .device import PACES
from .kernel_records import MODES, KernelRecord, KernelStore, read_kernels
from .peers import PEERS, usual_peers
from .selection import BATCHES, CONTEXTS, LATENTS, SIZES, TOKENS, Job, head_dim_jobs, jobs


@dataclass(frozen=True)
class BenchChoices:
    """What to measure; empty is what suits the device. With `head_dims` attention at these and at `tokens`, else
    the family's calls at `latents` (height, width) and at contexts of `tokens`."""

    operators: tuple[str, ...]
    sizes: tuple[str, ...] = ()
    batches: tuple[int, ...] = ()
    peers: tuple[str, ...] = ()
    dtype: DType = "bfloat16"
    device: str = "cuda"
    head_dims: tuple[int, ...] = ()
    tokens: tuple[int, ...] = ()
    latents: tuple[tuple[int, int], ...] = ()
    seed: int = 0

    @property
    def jobs(self) -> Iterable[Job]:
        batches = self.batches or BATCHES
        if self.head_dims:
            return head_dim_jobs(self.head_dims, self.tokens or TOKENS, batches, self.dtype)
        latents, contexts = self.latents or LATENTS, self.tokens or CONTEXTS
        return jobs(self.operators, self.sizes or SIZES, batches, self.dtype, latents, contexts)

    def bench(self, environment: Environment) -> KernelBench:
        """The bench, the device's copy bandwidth and, for attention, unit rates measured now."""
        is_cpu = self.device == "cpu"
        device = torch.device(self.device)
        names = self.peers or usual_peers(self.device)
        return KernelBench(
            self.device,
            [PEERS[name] for name in PEERS if name in names],
            ("eager",) if is_cpu else tuple(MODES),
            PACES[device.type],
            environment,
            copy_bandwidth(device),
            unit_rates(getattr(torch, self.dtype), device) if "attention" in self.operators else None,
            self.seed,
        )


def run_jobs(
    bench: KernelBench,
    jobs: Iterable[Job],
    store: KernelStore | None,
    deadline: Deadline,
    told: Callable[[Sequence[KernelRecord]], None],
    earlier: Sequence[KernelRecord] = (),
) -> tuple[list[KernelRecord], bool]:
    """The records, a job's on disk before the next begins, and whether every job was reached in time.

    A job of which `earlier` has all records is not measured again; of each key the last record is returned.
    """
    records = {record.case_key: record for record in earlier}
    # All records of a folder have the same.
    run_id = next((record.run_id for record in earlier if record.run_id is not None), new_run_id())
    for job in jobs:
        if bench.keys(job) <= records.keys():
            bench.skip(job)
            continue
        if deadline.passed:
            return list(records.values()), False
        done = [record.model_copy(update={"run_id": run_id}) for record in bench.measure(job)]
        if store is not None:
            store.append(*done)
        records |= {record.case_key: record for record in done}
        told(done)
    return list(records.values()), True


def earlier_records(
    folder: Path, environment: Environment, dtype: DType, device: str, seed: int = 0
) -> list[KernelRecord]:
    """The records in a bench's folder, of each key the last. Raises RunError where they cannot be added to.

    Times from two environments in one folder would pass for a comparison, two dtypes, devices or seeds too.
    """
    path = folder / KERNELS_NAME
    if not path.exists():
        raise RunError(f"{folder} is no folder of a bench: it has no {KERNELS_NAME}; start one without --resume")
    records = read_kernels(path)[0]
    for record in records:
        check_environment(folder, record.environment, environment, "folder")
        there, now = (record.case.dtype, record.device, record.seed), (dtype, device, seed)
        for option, theirs, given in zip(("dtype", "device", "seed"), there, now, strict=True):
            if theirs != given:
                raise RunError(
                    f"{folder} is of {theirs}, and this call of {given}: give --{option} {theirs}, "
                    "or start a new folder without --resume"
                )
    return records


def write_markdown(folder: Path, text: str) -> Path:
    """Writes the table beside the records."""
    path = folder / "kernels.md"
    write_whole(path, text.encode())
    return path

"""Search launch configurations on this GPU: kernels/tuned/<gpu>.json, which the kernels read.

For each tuning key of the family's calls, the most important first, every candidate is compared with the float64
reference and then timed in CUDA-graph replays, with inputs rotated past the L2 cache; the fastest few are timed
again in turn, with what is used now and with torch's own operator. An entry is written, at once, where one is
faster than what is used now by more than the noise; the table names the keys where torch's operator is faster than
the best of ours, which "auto" then takes.

    python bench/tune.py group_norm_silu
    python bench/tune.py geglu --size 39M,866M --batch 2 --seconds 120
    python bench/tune.py attention --head-dim 40,64 --tokens 4096 --batch 16
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ldmperf.kernels import OPERATORS
from ldmperf.kernels._launch import TUNED_FOLDER, chip_of
from ldmperf.profiling.cases import CaseError, dtype_named, known_names, split_values, whole_number
from ldmperf.profiling.environment import collect_environment
from ldmperf.profiling.group import measuring_settings
from ldmperf.profiling.kernel_bench.device import (
    GraphCalls,
    device_ms,
    input_sets,
    l2_cache_bytes,
    runs_per_sample,
)
from ldmperf.profiling.kernel_bench.inputs import Inputs, tolerance_of
from ldmperf.profiling.kernel_bench.selection import BATCHES, SIZES, TOKENS, Job, head_dim_jobs, jobs
from ldmperf.profiling.kernel_case import KernelCase
from ldmperf.profiling.lane import release_memory
from ldmperf.profiling.store import write_whole
from ldmperf.profiling.timing import Deadline, timed

# A candidate replaces what is used now when it is faster by more than runs differ.
WORTHWHILE = 0.98
FINALISTS = 4
# None stands for what the kernel uses now: its tuned entry, or its default; TORCH for torch's own operator.
Config = Any
TORCH = "torch"


class Wrong(Exception):
    """A candidate whose result is not the reference's."""


@dataclass(frozen=True)
class Found:
    """`best` is None where nothing beats what is used now; times in ms, `now` that of what is used now.

    `torch`: the time of torch's operator; None where it is wrong, cannot run or was not asked for.
    """

    best: Config
    ms: float
    now: float
    tried: int
    failures: tuple[str, ...]
    torch: float | None = None

    @property
    def torch_is_faster(self) -> bool:
        """Whether "auto" is to take torch's operator."""
        return self.torch is not None and self.torch < self.ms


def search(
    candidates: Sequence[Config],
    time_one: Callable[[Config], float],
    deadline: Deadline,
    seed: str = "",
    *,
    with_torch: bool = False,
) -> Found:
    """The fastest of the candidates that the time allows; `time_one` raises for one that is wrong or cannot run.

    They are tried in a random but fixed order, so that a search that is cut short has seen some of each kind. What
    is used now is timed first, and must be right: what it raises is raised.
    """
    time_one(None)
    order = list(candidates)
    random.Random(seed).shuffle(order)
    times: list[tuple[float, int]] = []
    failures: list[str] = []

    def attempt(config: Config) -> float | None:
        try:
            return time_one(config)
        except Exception as failure:
            if is_fatal(failure):
                raise
            failures.append(f"{config}: {first_line(failure)}")
            return None

    tried = 0
    for number, config in enumerate(order):
        if deadline.passed:
            break
        tried += 1
        ms = attempt(config)
        if ms is not None:
            times.append((ms, number))
    # Once more, in turn with what is used now: the first times met different clocks and temperatures.
    finalists = [order[number] for _, number in sorted(times)[:FINALISTS]]
    others = [None, TORCH] if with_torch and attempt(TORCH) is not None else [None]
    again: dict[Config, list[float]] = {config: [] for config in [*finalists, *others]}
    for _ in range(3):
        for config, taken in again.items():
            taken.append(time_one(config))
    medians = {config: statistics.median(taken) for config, taken in again.items()}
    now = medians[None]
    best = min(finalists, key=lambda config: medians[config], default=None)
    if medians[best] > WORTHWHILE * now:
        best = None
    return Found(best, medians[best], now, tried, tuple(failures), medians.get(TORCH))


def is_fatal(error: Exception) -> bool:
    """Whether the device is lost to this process: after an illegal access every later call fails too."""
    return "CUDA error" in str(error) and "out of memory" not in str(error)


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def merged(document: dict[str, Any], head: dict[str, Any], kernel: str, key: str, found: Found) -> dict[str, Any]:
    """The table after a search, its head that of the latest writer; other kernels and keys stay.

    Where nothing beats what is used now, the entry stays, or is null for the kernel's default; whether torch's
    operator is faster is told where it was timed.
    """
    kernels = {name: dict(entries) for name, entries in document.get("kernels", {}).items()}
    entries = kernels.setdefault(kernel, {})
    if found.best is not None:
        entries[key] = dataclasses.asdict(found.best)
    elif found.torch is not None:
        entries.setdefault(key, None)
    torch_keys = {name: set(keys) for name, keys in document.get("torch", {}).items()}
    if found.torch is not None:
        of_kernel = torch_keys.setdefault(kernel, set())
        (of_kernel.add if found.torch_is_faster else of_kernel.discard)(key)
    return {
        "schema_version": 1,
        **head,
        "kernels": {name: dict(sorted(entries.items())) for name, entries in sorted(kernels.items())},
        "torch": {name: sorted(keys) for name, keys in sorted(torch_keys.items()) if keys},
    }


def load_table(path: Path, gpu: str) -> dict[str, Any]:
    """The table that is there. SystemExit for one of another schema or GPU, which merging would spoil."""
    if not path.exists():
        return {}
    try:
        document: dict[str, Any] = json.loads(path.read_text())
    except ValueError:
        raise SystemExit(f"tune.py: {path} is no JSON; move it away") from None
    if document.get("schema_version") != 1 or document.get("gpu") != gpu:
        raise SystemExit(f"tune.py: {path} is of another GPU or schema; move it away")
    return document


def by_key(found: Iterable[Job]) -> Iterable[tuple[str, Job]]:
    """One call for each tuning key, the first: the most important."""
    seen: set[str] = set()
    for job in found:
        key = OPERATORS[job.case.operator].tuning_key(**job.case.arguments("meta"))
        if key not in seen:
            seen.add(key)
            yield key, job


class GpuTimer:
    """Times configurations of one case; a configuration is compared with the reference before its first time."""

    def __init__(self, case: KernelCase, device: torch.device) -> None:
        self.case, self.device = case, device
        sets, _ = input_sets(case.bytes_moved, l2_cache_bytes(device))
        self.inputs = Inputs(case, sets, device, seed=0)
        self.reference = self.inputs.reference()
        self._right: set[Config] = set()

    def __call__(self, config: Config) -> float:
        """Median ms of a call."""
        if config not in self._right:
            self._check(config)
        calls = [lambda arguments=arguments: self._call(config, arguments) for arguments in self.inputs.sets]
        graph = GraphCalls(calls, self.device)
        graph.run(1)
        once = device_ms(timed(lambda: graph.run(1), self.device))
        runs = runs_per_sample(once, 0.5)
        samples = [device_ms(timed(lambda: graph.run(runs), self.device)) for _ in range(5)]
        return statistics.median(samples) / (runs * graph.calls_per_run)

    def _check(self, config: Config) -> None:
        self.inputs.restore()
        error = self.inputs.error(self._call(config, self.inputs.sets[0]), self.reference)
        if error > tolerance_of(self.case):
            raise Wrong(f"off by {error:.3g} (relative RMS)")
        self._right.add(config)

    def _call(self, config: Config, arguments: dict[str, Any]) -> Any:
        if config == TORCH:
            torchs_own = OPERATORS[self.case.operator].torchs_own
            assert torchs_own is not None
            return torchs_own(**arguments)
        chosen = {} if config is None else {"config": config}
        result, launches = OPERATORS[self.case.operator].plan(**arguments, **chosen)
        for launch in launches:
            launch.run()
        return result


def tune(
    given: Iterable[tuple[str, Job]],
    timer_of: Callable[[KernelCase], Callable[[Config], float]],
    path: Path,
    head: dict[str, Any],
    deadline: Deadline,
    key_seconds: float,
) -> int:
    """Searches key by key until the deadline, writing each entry as it is found; returns how many were written."""
    document = load_table(path, head["gpu"])
    written = 0
    for key, job in given:
        if deadline.passed:
            break
        operator = OPERATORS[job.case.operator]
        candidates = operator.candidates(**job.case.arguments("meta"))
        limit = Deadline(min(deadline.left, key_seconds))
        try:
            with_torch = operator.torchs_own is not None
            found = search(candidates, timer_of(job.case), limit, seed=key, with_torch=with_torch)
        except Exception as failure:
            if is_fatal(failure):
                raise
            tell(f"{operator.name} {key}: {first_line(failure)}")
            release_memory()
            continue
        told = f"{found.now:.4g} ms now, {found.tried} of {len(candidates)} tried, {len(found.failures)} failed"
        told += ": nothing better" if found.best is None else f": {found.ms:.4g} ms with {found.best}"
        if found.torch is not None:
            told += f"; torch {found.torch:.4g} ms" + (", which auto will take" if found.torch_is_faster else "")
        if found.best is not None or found.torch is not None:
            document = merged(document, head, operator.name, key, found)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, (json.dumps(document, indent=1) + "\n").encode())
            written += 1
        tell(f"{operator.name} {key}: {told}")
        for failure in found.failures[:3]:
            tell(f"    {failure}")
        release_memory()
    return written


def tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="tune.py"
    )
    parser.add_argument("kernel", help=f"One of {', '.join(OPERATORS)}.")
    parser.add_argument(
        "--size", action="append", default=[], help="Sizes of the family, or vae; all unless told."
    )
    parser.add_argument("--batch", action="append", default=[], help="The UNet's batch: 2 and 16 unless told.")
    parser.add_argument(
        "--head-dim", action="append", default=[], help="Attention of 8 heads of these, not the family's calls."
    )
    parser.add_argument(
        "--tokens", action="append", default=[], help="With --head-dim: 4096, 1024, 256, 64 unless told."
    )
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--seconds", type=float, default=540.0, help="No search begins after so long.")
    parser.add_argument("--key-seconds", type=float, default=45.0, help="For the candidates of one key.")
    parser.add_argument("--out", type=Path, default=TUNED_FOLDER, help="The folder of the tables.")
    return parser.parse_args(given)


@torch.inference_mode()
def main(given: Sequence[str] | None = None) -> int:
    options = arguments(given)
    try:
        (kernel,) = known_names("kernel", [options.kernel], OPERATORS)
        sizes = known_names("size", options.size, SIZES) or SIZES
        batches = tuple(sorted({whole_number("batch", b) for b in split_values(options.batch)})) or BATCHES
        dtype = dtype_named(options.dtype)
        head_dims = [whole_number("head-dim", text, 1024) for text in split_values(options.head_dim)]
        tokens = [whole_number("tokens", text, 2**20) for text in split_values(options.tokens)] or TOKENS
        if head_dims and kernel != "attention":
            raise CaseError("--head-dim chooses attention's calls; tune attention with it")
    except (CaseError, ValueError) as wrong:
        tell(f"tune.py: {wrong}")
        return 2
    if not torch.cuda.is_available():
        tell("tune.py: there is no GPU here, and configurations are chosen by measuring on one")
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    chip = chip_of(device)
    environment = collect_environment("cuda")
    head = {
        "gpu": chip.name,
        "commit": environment.git_commit,
        "versions": {"torch": environment.torch, "triton": environment.triton, "cuda": environment.cuda},
    }
    path = options.out / f"{chip.file_name}.json"
    calls = (
        head_dim_jobs(head_dims, tokens, batches, dtype) if head_dims else jobs((kernel,), sizes, batches, dtype)
    )
    found = by_key(calls)
    with measuring_settings():
        deadline = Deadline(options.seconds)
        written = tune(found, lambda case: GpuTimer(case, device), path, head, deadline, options.key_seconds)
    tell(f"{path}: {written} entries written")
    return 0


if __name__ == "__main__":
    sys.exit(main())

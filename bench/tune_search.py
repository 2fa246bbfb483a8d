"""The search for the fastest configuration of a call, and the table that holds what searches found.

Nothing here needs a GPU: `search` is given what times a configuration.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ldmperf.profiling.measure.timing import Deadline

# A candidate replaces what is used now when it is faster by more than runs differ.
WORTHWHILE = 0.98
FINALISTS = 4
# So many of an operator's list are tried in its order: the default and what its author recommends.
HEAD = 8
# What lies in the caches before a call.
L2 = Literal["cold", "step"]
# None stands for what the kernel uses now: its tuned entry, or its default; TORCH for torch's own operator.
Config = Any
TORCH = "torch"


@dataclass(frozen=True)
class Found:
    """`best` is None where nothing beats what is used now; times in ms, `now` that of what is used now.

    `torch`: the time of torch's operator; None where it is wrong, cannot run or was not asked for.
    `passed_over`: the configurations that were faster than `best`, and the faults of their code.
    """

    best: Config
    ms: float
    now: float
    tried: int
    failures: tuple[str, ...]
    torch: float | None = None
    passed_over: tuple[str, ...] = ()

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
    faults: Callable[[Config], Sequence[str]] = lambda config: (),
) -> Found:
    """The fastest of the candidates that the time allows; `time_one` raises for one that is wrong or cannot run.

    They are tried in `search_order`. What is used now is timed first, and must be right: what it raises is raised.
    A finalist with `faults` is passed over for the next best; only those that would be chosen are asked for them.
    """
    time_one(None)
    order = search_order(candidates, seed)
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
    best: Config = None
    passed_over: list[str] = []
    for config in sorted(finalists, key=lambda config: medians[config]):
        if medians[config] > WORTHWHILE * now:
            break
        if not (found := faults(config)):
            best = config
            break
        passed_over.append(f"{config}, {medians[config]:.4g} ms: {'; '.join(found)}")
    return Found(best, medians[best], now, tried, tuple(failures), medians.get(TORCH), tuple(passed_over))


def search_order(candidates: Sequence[Config], seed: str) -> list[Config]:
    """The first of the list, then the others in a random but fixed order.

    So a search that is cut short has seen what is recommended, and some of each kind.
    """
    rest = list(candidates[HEAD:])
    random.Random(seed).shuffle(rest)
    return [*candidates[:HEAD], *rest]


def is_fatal(error: Exception) -> bool:
    """Whether the device is lost to this process: after an illegal access every later call fails too.

    torch says "CUDA error", triton "Triton Error [CUDA]". Running out of the device's memory, or of what a program
    may have ("out of resource"), loses nothing.
    """
    text = str(error)
    told = "CUDA error" in text or "Triton Error [CUDA]" in text
    return told and "out of memory" not in text and "out of resource" not in text


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def merged(
    document: dict[str, Any], head: dict[str, Any], kernel: str, key: str, found: Found, l2: L2 = "cold"
) -> dict[str, Any]:
    """The table after a search, its head that of the latest writer; other kernels and keys stay.

    Where nothing beats what is used now, the entry stays, or is null for the kernel's default; whether torch's
    operator is faster is told where it was timed. "l2" tells of every entry in what state of the cache it was
    measured; of entries without, it was cold.
    """
    kernels, torch_keys, states = (copy.deepcopy(document.get(part, {})) for part in ("kernels", "torch", "l2"))
    entries = kernels.setdefault(kernel, {})
    if found.best is not None:
        entries[key] = dataclasses.asdict(found.best)
    elif found.torch is not None:
        entries.setdefault(key, None)
    if found.torch is not None:
        others = set(torch_keys.get(kernel, ())) - {key}
        torch_keys[kernel] = others | {key} if found.torch_is_faster else others
    states.setdefault(kernel, {})[key] = l2
    return {
        "schema_version": 1,
        **head,
        "kernels": {name: dict(sorted(entries.items())) for name, entries in sorted(kernels.items())},
        "torch": {name: sorted(keys) for name, keys in sorted(torch_keys.items()) if keys},
        "l2": {name: dict(sorted(entries.items())) for name, entries in sorted(states.items())},
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

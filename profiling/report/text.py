"""Numbers and conditions as people read them. Nothing here prints a missing value as a number, or as "None"."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ..measure.environment import Environment
from ..measure.recorded import Status
from ..terminal.layout import MISSING as MISSING
from ..terminal.visible import counted, visible
from ..trajectory.case import Case
from ..trajectory.records import Record
from .figures import Overview

TASKS = {"t2i": "text-to-image", "sr": "super-resolution"}


@dataclass(frozen=True)
class Conditions:
    """Phrases for the conditions of the cases: `shared` by all, and the names of those that vary."""

    environments: tuple[Environment, ...]
    shared: tuple[str, ...]
    varying: frozenset[str]

    def heading(self, environment: int, case: Case, without: Collection[str] = ()) -> str:
        """What sets the cases of a section apart; empty when nothing does."""
        phrases = _phrases(environment, case, self.environments)
        return joined(phrases[name] for name in phrases if name in self.varying and name not in without)


def conditions(shown: Overview) -> Conditions:
    """What the cases have in common and what not."""
    phrases = [_phrases(section.environment, section.case, shown.environments) for section in shown.sections]
    first = phrases[0] if phrases else {}
    varying = frozenset(name for name in first if len({of[name] for of in phrases}) > 1)
    shared = tuple(phrase for name, phrase in first.items() if name not in varying and phrase)
    return Conditions(shown.environments, shared, varying)


def short_ratio(value: float | None) -> str:
    """Two decimals, or two significant digits where those are more."""
    if value is None:
        return MISSING
    if abs(value) >= 0.1 or not value:
        return f"{value:.2f}" if abs(value) < 1e6 else f"{value:.2e}"
    return f"{value:#.2g}"


def gflop(value: float | None) -> str:
    """To one decimal, as the paper's table has it."""
    return MISSING if value is None else f"{value:.1f}"


def count(value: int | None) -> str:
    """A parameter count: 38.8M, 4.90B."""
    if value is None:
        return MISSING
    for limit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            scaled = value / limit
            return f"{scaled:.2f}{letter}" if scaled < 10 else f"{scaled:.1f}{letter}"
    return str(value)


def device(case: Case, environment: Environment) -> str:
    """The GPU's or the CPU's name, with the threads torch used on a CPU."""
    if case.device != "cpu":
        gpu = environment.gpu.name if environment.gpu else "GPU of unknown name"
        return f"{gpu} ({case.device})" if ":" in case.device else gpu
    name = environment.cpu or "CPU of unknown name"
    threads = environment.torch_threads
    return name if threads is None else f"{name}, {counted(threads, 'thread')}"


def environment_name(index: int) -> str:
    """A, B, ... Z, A2, ..."""
    return chr(ord("A") + index % 26) + (str(index // 26 + 1) if index >= 26 else "")


def differences(first: Environment, other: Environment) -> list[str]:
    """What differs between two environments, as "field: first's, other's"."""
    mine, theirs = (
        _flat(e.model_dump(exclude={"git_commit", "commit_time"}) | {"commit": (e.git_commit or "unknown")[:12]})
        for e in (first, other)
    )
    fields = list(dict.fromkeys([*mine, *theirs]))
    return [
        f"{field.replace('_', ' ').replace('.', ' ')}: {value_of(mine.get(field))}, {value_of(theirs.get(field))}"
        for field in fields
        if mine.get(field) != theirs.get(field)
    ]


def joined(parts: Iterable[str]) -> str:
    return ", ".join(part for part in parts if part)


def statuses_in_words(statuses: Iterable[Status]) -> str:
    """ "2 failed (1 error, 1 incorrect), 1 unsupported": unsupported and oom are findings, and no failures."""
    counts = Counter(statuses)
    failed = {name: counts.pop(name) for name in ("error", "incorrect") if name in counts}
    of_failed = ", ".join(f"{count} {name}" for name, count in failed.items())
    said = [f"{sum(failed.values())} failed ({of_failed})"] if failed else []
    words = {"oom": "out of memory"}
    return joined((*said, *(f"{count} {words.get(name, name)}" for name, count in sorted(counts.items()))))


def failure(record: Record) -> str:
    """Status and message of a failed case, on one line."""
    return visible(f"{record.status}: {record.message or 'no message'}")


def _phrases(index: int, case: Case, environments: Sequence[Environment]) -> dict[str, str]:
    known = {
        "environment": f"environment {environment_name(index)}" if len(environments) > 1 else "",
        "device": device(case, environments[index]),
        "dtype": case.dtype,
        "task": TASKS.get(case.task, case.task),
        "sampler": case.sampler,
        "steps": counted(case.steps, "step"),
        "batch": f"batch {case.batch}",
        "guidance_scale": f"guidance {case.guidance_scale:g}" if case.guided else "no guidance",
        "latent": f"latent {case.latent_height}x{case.latent_width}",
        "context_tokens": counted(case.context_tokens, "text token"),
        "seed": f"seed {case.seed}",
    }
    said = {*known, "latent_height", "latent_width", "unet", "weights_sha256", "backend"}
    others = case.model_dump(exclude=said)
    return known | {name: f"{name.replace('_', ' ')} {value_of(value)}" for name, value in others.items()}


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return {name: value for name, value in flat.items() if value is not None}


def value_of(value: object) -> str:
    if value is None:
        return "unknown"
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)

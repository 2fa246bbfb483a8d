"""The conditions of cases in words: what all of them share, and what sets some of them apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from ..measure.environment import Environment
from ..terminal.visible import counted
from ..trajectory.case import Case
from .text import first_of, joined, value_of

TASKS = {"t2i": "text-to-image", "sr": "super-resolution", "pipeline": "from a prompt to an image"}


class Placed(Protocol):
    """Anything measured: the index of its environment, and its case."""

    @property
    def environment(self) -> int: ...
    @property
    def case(self) -> Case: ...


@dataclass(frozen=True)
class Conditions:
    """Phrases for the conditions of the cases: `shared` by all, and the names of those that vary."""

    environments: tuple[Environment, ...]
    shared: tuple[str, ...]
    varying: frozenset[str]

    @classmethod
    def of(cls, environments: tuple[Environment, ...], sections: Sequence[Placed]) -> Conditions:
        """What all sections share, and what differs."""
        phrases = [phrases_of(section, environments) for section in sections]
        first = phrases[0] if phrases else {}
        varying = frozenset(name for name in first if len({of[name] for of in phrases}) > 1)
        shared = tuple(phrase for name, phrase in first.items() if name not in varying and phrase)
        return cls(environments, shared, varying)

    def heading(self, of: Placed, *without: str) -> str:
        """What sets it apart from the others; empty when nothing does."""
        phrases = phrases_of(of, self.environments)
        return joined(phrases[name] for name in phrases if name in self.varying and name not in without)


def environment_name(index: int) -> str:
    """A, B, ... Z, A2, ..."""
    return chr(ord("A") + index % 26) + (str(index // 26 + 1) if index >= 26 else "")


def environment_notes(environments: Sequence[Environment]) -> list[str]:
    """How each kind of environment differs from the first; nothing where there is one."""
    return [
        f"Environment {environment_name(index)} is not environment A "
        f"({'; '.join(differences(environments[0], environment))}). Nothing is compared across environments."
        for index, environment in enumerate(environments[1:], 1)
    ]


def machine_notes(measured_in: Sequence[Sequence[Environment]]) -> list[str]:
    """A note for each kind of environment that several machines are of, or may be of.

    measured_in: of each kind the different environments.
    """
    notes = []
    for index, environments in enumerate(measured_in):
        ids = {environment.machine_id for environment in environments}
        if len(ids) == 1 and (None not in ids or len(environments) == 1):
            continue
        place = f"Environment {environment_name(index)} was measured" if len(measured_in) > 1 else "Measured"
        known = sorted(name for name in ids if name is not None)
        which = f"{len(known)} machines of one kind ({first_of(known)})"
        if None in ids:
            which = "what may be several machines of one kind (no machine_id in some records)"
        notes.append(f"{place} on {which}: ratios between their cases include what tells the machines apart.")
    return notes


def differences(first: Environment, other: Environment) -> list[str]:
    """What differs between two environments of different kinds, as "field: first's, other's"."""
    mine, theirs = (
        {name: value for name, value in e.kind if value is not None and name != "git_commit"}
        | {"commit": (e.git_commit or "unknown")[:12]}
        for e in (first, other)
    )
    fields = list(dict.fromkeys([*mine, *theirs]))
    return [
        f"{field.replace('_', ' ').replace('.', ' ')}: {value_of(mine.get(field))}, {value_of(theirs.get(field))}"
        for field in fields
        if mine.get(field) != theirs.get(field)
    ]


def phrases_of(of: Placed, environments: Sequence[Environment]) -> dict[str, str]:
    """The name of each condition and its phrase, empty where there is nothing to say of it."""
    case = of.case
    known = {
        "environment": f"environment {environment_name(of.environment)}" if len(environments) > 1 else "",
        "device": _device(case, environments[of.environment]),
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


def _device(case: Case, environment: Environment) -> str:
    """The GPU's or the CPU's name, with the threads torch used on a CPU."""
    if case.device != "cpu":
        gpu = environment.gpu.name if environment.gpu else "GPU of unknown name"
        return f"{gpu} ({case.device})" if ":" in case.device else gpu
    return processor_name(environment)


def machine_name(environment: Environment) -> str:
    """The GPU's name, or the CPU's where none was measured on."""
    return environment.gpu.name if environment.gpu is not None else processor_name(environment)


def processor_name(environment: Environment) -> str:
    """The CPU's name, with the threads that torch used."""
    name = environment.cpu or "CPU of unknown name"
    threads = environment.torch_threads
    return name if threads is None else f"{name}, {counted(threads, 'thread')}"

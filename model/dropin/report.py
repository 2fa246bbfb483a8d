"""What was replaced in a model, what was left and why, as the model is now."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import nn

from ldmperf.kernels import chip_of, tuned_table

from .stand_ins import HOSTS, give_back
from .survey import USUAL, Place, places

BACKENDS = ("auto", "torch", "triton")


@dataclass(frozen=True)
class Replaced:
    """A module that a stand-in computes: its path from the target, its class, its kind, what is fused."""

    path: str
    class_name: str
    kind: str
    what: str


@dataclass(frozen=True)
class Left:
    """A module that runs as it did before: its path from the target, its class, and why."""

    path: str
    class_name: str
    reason: str


class Report:
    """What `accelerate` did, read from the models as they are now; a context manager that undoes it at its exit.

    A processor set since, an adapter loaded, a hook added: all show. str() is a table.
    """

    def __init__(
        self,
        models: Mapping[str, nn.Module],
        others: Sequence[Left],
        options: Mapping[str, bool],
        backend: str,
        before: Mapping[nn.Module, str | None],
    ) -> None:
        """models by their path from the target ("" for the target itself); others: its components that are none;
        before: the modules that the call changed, with the backend that a stand-in had, None for a host's."""
        self._models = models
        self._others = tuple(others)
        self._options = options
        self._backend = backend
        self._before = dict(before)

    @property
    def replaced(self) -> tuple[Replaced, ...]:
        """What the kernels compute now, whichever call of `accelerate` replaced it."""
        return tuple(
            Replaced(place.path, type(place.module).__name__, place.kind.name, place.kind.what)
            for place in self._places()
            if place.kind is not None and place.stands and place.reason is None
        )

    @property
    def left(self) -> tuple[Left, ...]:
        """What runs as it did before, and why; containers and dropout, which compute nothing, are not listed."""
        places_left = (place for place in self._places() if not place.stands or place.reason is not None)
        return self._others + tuple(
            Left(place.path, type(place.module).__name__, self._reason(place)) for place in places_left
        )

    def undo(self) -> None:
        """Gives every module that the call took over its class back, unless someone changed the class since.

        What an earlier call had taken over keeps its class, and has its backend again. Once for each module: what
        a later call takes over is that call's to undo.
        """
        module: Any
        for module in [module for module in self._before if type(module) in HOSTS]:
            backend = self._before.pop(module)
            if backend is None:
                give_back(module)
            elif module.ldmperf_backend == self._backend:
                module.ldmperf_backend = backend

    def __enter__(self) -> Report:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.undo()

    def __repr__(self) -> str:
        return f"<Report: {len(self.replaced)} modules replaced, {len(self.left)} left; print it for the table>"

    def __str__(self) -> str:
        """A table by kind and class, and which backend serves on the devices of the models."""
        replaced = Counter((entry.kind, entry.what) for entry in self.replaced)
        left = Counter((entry.reason in USUAL, entry.class_name, entry.reason) for entry in self.left)
        rows = [("replaced", "", "")]
        rows += [(f"  {kind}", str(replaced[kind, what]), what) for kind, what in sorted(replaced)]
        rows += [("left", "", "")]
        rows += [(f"  {key[1]}", str(left[key]), key[2]) for key in sorted(left)]
        wide = max(len(name) for name, _, _ in rows)
        table = [f"{name:<{wide}} {count:>5}  {text}".rstrip() for name, count, text in rows]
        return "\n".join([*table, *self._serving()])

    def _places(self) -> list[Place]:
        return [
            Place(".".join(filter(None, (prefix, p.path))), p.module, p.kind, p.reason)
            for prefix, model in self._models.items()
            for p in places(model)
        ]

    def _reason(self, place: Place) -> str:
        if place.reason is not None:
            return place.reason
        assert place.kind is not None
        option = place.kind.option
        return "no stand-in is set: undone, or put in since" if self._options[option] else f"{option}=False"

    def _serving(self) -> list[str]:
        """Which backend serves on the devices of the models."""
        devices = {p.device for model in self._models.values() for p in model.parameters()}
        return [f"{device}: {serving(device, self._backend)}" for device in sorted(devices, key=str)]


def serving(device: torch.device, backend: str) -> str:
    """What `backend` means on a device, in words."""
    if backend != "auto":
        return {"torch": "the references in torch", "triton": "the kernels, or an error where they cannot serve"}[
            backend
        ]
    if device.type != "cuda":
        return "the references in torch, as the kernels need a GPU"
    if tuned_table(chip_of(device)).exists():
        return "the kernels, each where it was not measured to be slower on this GPU"
    return (
        "kernels for norms and gates; attention: torch's, as no measurement says that ours is faster on this GPU"
    )

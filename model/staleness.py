"""Whether a network's weights have changed since a value was computed from them."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from itertools import chain
from operator import attrgetter, is_
from typing import Any

from torch import Tensor, nn

_version = attrgetter("_version")


class Structure:
    """The modules of a network as they are now: which module is where."""

    def __init__(self, network: nn.Module) -> None:
        # Lists for loops in C: every eager step compares about 400 modules.
        self._children = [module._modules for module in network.modules() if module._modules]
        self._modules = self._current()

    def is_kept(self) -> bool:
        """Whether the same modules are in the same places still."""
        current = self._current()
        return len(current) == len(self._modules) and all(map(is_, current, self._modules))

    def _current(self) -> list[nn.Module | None]:
        return list(chain.from_iterable(map(dict.values, self._children)))


class Snapshot:
    """Parameters of a network as they are now: of every module whose last name is in `names`, the ones listed.

    `change` compares identities, addresses and torch's version counters. It misses writes that no counter counts:
    through `.data`, by a kernel that torch does not know, and to a tensor that was made in inference mode.
    """

    def __init__(self, network: nn.Module, names: Mapping[str, Iterable[str]]) -> None:
        self._structure = Structure(network)
        found = [
            (module._parameters, name, f"{place}.{name}")
            for place, module in network.named_modules()
            for name in names.get(place.rpartition(".")[2], ())
        ]
        # Lists for loops in C: every eager step compares about 200 parameters.
        self._dicts, self._names, self._full_names = map(list, zip(*found, strict=True))
        self._tensors = self._current_tensors()
        there = [tensor for tensor in self._tensors if tensor is not None]
        # A subclass may have no address.
        self._placed = [tensor for tensor in there if type(tensor) in (Tensor, nn.Parameter)]
        self._counted = [tensor for tensor in there if not tensor.is_inference()]
        self._addresses = list(map(Tensor.data_ptr, self._placed))
        self._versions = list(map(_version, self._counted))

    def change(self) -> str | None:
        """The first change since, in a few words; None for no change."""
        if not self._structure.is_kept():
            return "a module was replaced"
        tensors = self._current_tensors()
        if not all(map(is_, tensors, self._tensors)):
            at = next(i for i, tensor in enumerate(tensors) if tensor is not self._tensors[i])
            return f"{self._full_names[at]} was replaced"
        if list(map(Tensor.data_ptr, self._placed)) != self._addresses:
            return "parameters were moved"
        versions = list(map(_version, self._counted))
        if versions != self._versions:
            written = next(i for i, version in enumerate(versions) if version != self._versions[i])
            at = next(i for i, tensor in enumerate(tensors) if tensor is self._counted[written])
            return f"{self._full_names[at]} was written"
        return None

    def _current_tensors(self) -> list[Tensor | None]:
        return list(map(dict.get, self._dicts, self._names))


class MadeFrom:
    """Marks a value as computed from a network whose weights were those of `snapshot`.

    The mark keeps neither alive. The network holds the snapshot until its weights have changed and it takes
    another. A pickled mark knows of no network, and never raises.
    """

    def __init__(self, network: nn.Module | None = None, snapshot: Snapshot | None = None) -> None:
        self._network = None if network is None else weakref.ref(network)
        self._snapshot = None if snapshot is None else weakref.ref(snapshot)

    def check(self, what: str, remedy: str) -> None:
        """Raises ValueError, in one line, where the network's weights have changed since."""
        if self._network is None or self._snapshot is None or self._network() is None:
            return
        snapshot = self._snapshot()
        change = "its weights have changed" if snapshot is None else snapshot.change()
        if change is not None:
            raise ValueError(f"{what} are not those of the network's weights as they are now ({change}): {remedy}")

    def __deepcopy__(self, memo: dict[int, Any]) -> MadeFrom:
        return self

    def __reduce__(self) -> tuple[type[MadeFrom], tuple[()]]:
        return MadeFrom, ()

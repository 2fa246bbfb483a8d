"""What a captured step reads: memory to keep alive, and modules whose changes make the capture stale."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Reads(TorchDispatchMode):
    """The tensors that operators read in this mode, without those that operators made in it.

    memory      storages of these tensors, and of tensors made in the mode that are alive at its end (the next call
                may read them); kept alive by this object
    parameters  these tensors that are parameters of a module
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.memory: dict[int, torch.UntypedStorage] = {}
        self.parameters: list[nn.Parameter] = []
        # Weak references keep no activations alive, but keep the address of a storage from being used again.
        self._made: dict[int, StorageWeakRef] = {}

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        for number, made in self._made.items():
            storage = torch.UntypedStorage._new_with_weak_ptr(made.cdata)
            if storage is not None:
                self.memory[number] = storage

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for tensor in _strided((args, kwargs)):
            storage = tensor.untyped_storage()
            if storage._cdata in self._made:
                continue
            self.memory.setdefault(storage._cdata, storage)
            if isinstance(tensor, nn.Parameter):
                self.parameters.append(tensor)
        out = func(*args, **(kwargs or {}))
        for tensor in _strided(out):
            storage = tensor.untyped_storage()
            if storage._cdata not in self.memory and storage._cdata not in self._made:
                self._made[storage._cdata] = StorageWeakRef(storage)
        return out


class Watch:
    """The parameters, buffers, submodules and forward hooks of modules at one moment."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._roots = list(modules)
        every = dict.fromkeys(module for root in self._roots for module in root.modules())
        kinds = ("_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks")
        dicts: list[dict[Any, Any]] = [getattr(module, kind) for module in every for kind in kinds]
        # Flat lists, compared by loops in C: every run checks a network of 400 modules.
        self._full = [entries for entries in dicts if entries]
        self._empty = [entries for entries in dicts if not entries]
        self._entries = self._current()
        self._tensors = [entry for entry in self._entries if type(entry) in (Tensor, nn.Parameter)]
        self._addresses = list(map(Tensor.data_ptr, self._tensors))

    def is_same(self, modules: Iterable[nn.Module]) -> bool:
        """Whether `modules` are the watched ones, with nothing in them replaced or moved. Values may differ."""
        roots, entries = list(modules), self._current()
        return (
            len(roots) == len(self._roots)
            and all(map(is_, roots, self._roots))
            and not any(self._empty)
            and len(entries) == len(self._entries)
            and all(map(is_, entries, self._entries))
            and list(map(Tensor.data_ptr, self._tensors)) == self._addresses
        )

    def _current(self) -> list[Any]:
        return list(chain.from_iterable(map(dict.values, self._full)))


def modules_of(call: Callable[..., Any]) -> list[nn.Module]:
    """The modules that can be found in a callable, each once.

    These are the callable itself, the owner of a bound method or the owner's attributes, the variables that a
    function reads from outside, and the parts of a partial.
    """
    return list(dict.fromkeys(_modules_of(call)))


def _modules_of(value: Any) -> Iterator[nn.Module]:
    if isinstance(value, nn.Module):
        yield value
    elif isinstance(value, functools.partial):
        for part in (value.func, *value.args, *value.keywords.values()):
            yield from _modules_of(part)
    elif inspect.ismethod(value):
        owner = value.__self__
        yield from [owner] if isinstance(owner, nn.Module) else _modules_among(getattr(owner, "__dict__", {}))
    elif inspect.isfunction(value):
        outside = inspect.getclosurevars(value)
        yield from _modules_among({**outside.globals, **outside.nonlocals})
    elif callable(value):
        yield from _modules_among(getattr(value, "__dict__", {}))


def _modules_among(named: dict[str, Any]) -> Iterator[nn.Module]:
    """Modules, and owners of bound methods that are modules."""
    for value in named.values():
        found = value.__self__ if inspect.ismethod(value) else value
        if isinstance(found, nn.Module):
            yield found


def _strided(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.layout is torch.strided]

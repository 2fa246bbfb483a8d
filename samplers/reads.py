"""What a captured step reads: memory to keep alive, and modules whose changes make the capture stale."""

from __future__ import annotations

import functools
import inspect
import types
from collections import OrderedDict
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
    left        whether tensors made in the mode are alive at its end
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.memory: dict[int, torch.UntypedStorage] = {}
        self.parameters: list[nn.Parameter] = []
        self.left = False
        # Weak references keep no activations alive, but keep the address of a storage from being used again.
        self._made: dict[int, StorageWeakRef] = {}

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        for number, made in self._made.items():
            storage = torch.UntypedStorage._new_with_weak_ptr(made.cdata)
            if storage is not None:
                self.memory[number] = storage
                self.left = True

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
    """What a captured step depends on in modules, at one moment.

    Compared are the classes of the modules and everything that their attributes lead to: parameters, buffers,
    submodules, hooks, and Python values, which a capture reads once (an adapter's scaling, its active adapters, an
    attention processor and the processor's own attributes). Attributes lead through dicts, lists, tuples and sets,
    and one step into other objects.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._roots = list(modules)
        found = _Reach(self._roots)
        self._owners = found.owners
        self._classes = list(map(type, found.owners))
        self._attributes = [dict(vars(owner)) for owner in found.owners]
        # Compared by loops in C: every run checks a network of 400 modules with 9,000 attributes. Flat lists by
        # identity, as equality of tensors is a tensor; attributes by equality, as all but few hold no tensor.
        self._dicts = [one for one in found.dicts if one]
        self._lists = [one for one in found.lists if one]
        self._empty = [one for one in (*found.dicts, *found.lists) if not one]
        self._sets = found.sets
        self._elements = list(map(frozenset, found.sets))
        self._keys = self._current_keys()
        self._values = self._current_values()
        self._tensors = found.tensors
        self._addresses = list(map(Tensor.data_ptr, self._tensors))
        self._strides = list(map(Tensor.stride, self._tensors))

    def is_same(self, modules: Iterable[nn.Module]) -> bool:
        """Whether `modules` are the watched ones, with nothing in them replaced, moved or set to another value.

        Values of tensors may differ.
        """
        roots = list(modules)
        return (
            len(roots) == len(self._roots)
            and all(map(is_, roots, self._roots))
            and list(map(type, self._owners)) == self._classes
            and not any(self._empty)
            and self._current_keys() == self._keys
            and self._has_same_values()
            and self._sets == self._elements
            and self._has_same_attributes()
            and list(map(Tensor.data_ptr, self._tensors)) == self._addresses
            and list(map(Tensor.stride, self._tensors)) == self._strides
        )

    def _has_same_values(self) -> bool:
        values = self._current_values()
        return all(map(is_, values, self._values)) or all(map(_is_same_value, values, self._values))

    def _has_same_attributes(self) -> bool:
        try:
            return list(map(vars, self._owners)) == self._attributes
        except (RuntimeError, ValueError, TypeError):
            # An array or a tensor in the place of another value: whether they are equal is not one answer.
            return False

    def _current_keys(self) -> list[Any]:
        """Sizes, which tell what container a value is of, and names."""
        return [*map(len, self._dicts), *map(len, self._lists), *chain.from_iterable(self._dicts)]

    def _current_values(self) -> list[Any]:
        return [*chain.from_iterable(map(dict.values, self._dicts)), *chain.from_iterable(self._lists)]


# Values that cannot change; one that is set anew to an equal value is the same.
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
# Not followed: what may lead to all of a program.
_CLOSED = (*_PLAIN, type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, types.MethodType)
# torch's own, in every module: no forward reads them, or they say more of hooks that are followed.
_UNREAD = frozenset(
    {
        "_non_persistent_buffers_set", "_backward_pre_hooks", "_backward_hooks", "_is_full_backward_hook",
        "_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks",
        "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs",
    }
)  # fmt: skip


def _is_same_value(value: Any, other: Any) -> bool:
    if value is other:
        return True
    if type(value) is not type(other):
        return False
    if isinstance(value, tuple):
        return len(value) == len(other) and all(map(_is_same_value, value, other))
    return isinstance(value, _PLAIN) and value == other


class _Reach:
    """Where the attributes of modules lead, each place once.

    owners   modules, and other objects that these hold
    dicts    dicts among their values, and the attributes of owners that hold a tensor
    lists    lists among their values
    sets     sets among their values
    tensors  tensors among their values that have an address
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.owners: list[Any] = []
        self.dicts: list[dict[Any, Any]] = []
        self.lists: list[list[Any]] = []
        self.sets: list[set[Any] | frozenset[Any]] = []
        self.tensors: list[Tensor] = []
        self._seen: set[tuple[int, bool]] = set()
        # Not recursive: networks may be deeper than Python's stack. True: of a module.
        self._ahead: list[tuple[Any, bool]] = [(module, True) for module in modules]
        while self._ahead:
            self._look(*self._ahead.pop())

    def _look(self, value: Any, is_modules: bool) -> None:
        if isinstance(value, _CLOSED) or (id(value), is_modules) in self._seen:
            return
        self._seen.add((id(value), is_modules))
        if isinstance(value, Tensor):
            # Others may have no address.
            if type(value) in (Tensor, nn.Parameter) and value.layout is torch.strided:
                self.tensors.append(value)
            return
        if isinstance(value, dict):
            self.dicts.append(value)
        elif isinstance(value, list):
            self.lists.append(value)
        elif isinstance(value, set | frozenset):
            self.sets.append(value)
        if isinstance(value, dict | list | tuple | set | frozenset):
            self._follow(value.values() if isinstance(value, dict) else value, is_modules)
        # Subclasses of these have attributes too: diffusers' configs are both. An OrderedDict could have some;
        # every module holds a dozen that have none.
        if is_modules and type(value) is not OrderedDict and isinstance(getattr(value, "__dict__", None), dict):
            attributes = vars(value)
            self.owners.append(value)
            if any(isinstance(held, Tensor) for held in attributes.values()):
                self.dicts.append(attributes)
            self._follow(
                (attributes[name] for name in attributes.keys() - _UNREAD), is_modules=isinstance(value, nn.Module)
            )

    def _follow(self, values: Iterable[Any], is_modules: bool) -> None:
        self._ahead.extend((value, is_modules) for value in values)


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

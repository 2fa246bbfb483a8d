"""A conditioning as a tree: tensors in tuples, lists, dicts and dataclasses, beside None."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

# Every capture has room for plans of this size, at least: room costs kilobytes, another capture seconds.
MIN_STEPS = 128


def padded(tree: Any, steps: int) -> Any:
    """The tree with room for `steps` steps, made by the method padded(steps) of the parts that have one."""
    if hasattr(tree, "padded"):
        return tree.padded(steps)
    if isinstance(tree, tuple | list):
        return _like(tree, (padded(part, steps) for part in tree))
    return {key: padded(part, steps) for key, part in tree.items()} if isinstance(tree, dict) else tree


def num_steps(tree: Any) -> int | None:
    """The most steps that a part says to hold by its attribute num_steps; None if no part does."""
    if hasattr(tree, "num_steps"):
        return int(tree.num_steps)
    parts = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, tuple | list) else ()
    return max((count for count in map(num_steps, parts) if count is not None), default=None)


def room(steps: int) -> int:
    """For how many steps a capture has room that is made for `steps`."""
    return max(MIN_STEPS, 1 << max(steps - 1, 0).bit_length())


def check(tree: Any) -> None:
    """Calls the method check() of the parts that have one."""
    if hasattr(tree, "check"):
        tree.check()
    elif isinstance(tree, tuple | list | dict):
        for part in tree.values() if isinstance(tree, dict) else tree:
            check(part)


def leaves(tree: Any) -> list[Tensor]:
    """The tree's tensors, in order. Raises ValueError as `map_tensors`."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(tree, note)
    return found


def map_tensors(tree: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The tree with every tensor changed. Raises ValueError for what is neither a tensor, None nor a tree."""
    if isinstance(tree, Tensor):
        return change(tree)
    if tree is None:
        return None
    if isinstance(tree, tuple | list):
        return _like(tree, (map_tensors(part, change) for part in tree))
    if isinstance(tree, dict):
        return {key: map_tensors(part, change) for key, part in tree.items()}
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        return dataclasses.replace(
            tree, **{name: map_tensors(getattr(tree, name), change) for name in _tensor_fields(tree)}
        )
    raise ValueError(
        f"conditioning must be tensors in tuples, lists, dicts or dataclasses; it holds a {type(tree).__name__}"
    )


def structure(tree: Any) -> object:
    """What a capture depends on, as a key: a tree's layouts, types, names and places of None."""
    if isinstance(tree, Tensor):
        return tree.shape, tree.stride(), tree.dtype
    if isinstance(tree, tuple | list):
        return type(tree), tuple(map(structure, tree))
    if isinstance(tree, dict):
        return dict, tuple((name, structure(part)) for name, part in tree.items())
    if tree is None:
        return None
    return type(tree), tuple(structure(getattr(tree, name)) for name in _tensor_fields(tree))


def buffer(tensor: Tensor) -> Tensor:
    """A copy of the tensor with the same strides, on which the choice of kernels may depend.

    The copy of an expanded tensor is contiguous: every element has memory, so that values can be copied in.
    """
    if any(size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)):
        return tensor.contiguous().clone()
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device).copy_(
        tensor
    )


def _tensor_fields(tree: Any) -> list[str]:
    """The fields of a dataclass, without those whose metadata says {"tensors": False}."""
    return [field.name for field in dataclasses.fields(tree) if field.metadata.get("tensors", True)]


def _like(tree: Any, parts: Iterable[Any]) -> Any:
    """A tuple or list of the type of `tree`, a named tuple too."""
    return tree._make(parts) if hasattr(tree, "_make") else type(tree)(parts)

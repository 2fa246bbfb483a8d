"""Uninitialised memory told by what it holds: bits that nothing computes.

`torch.empty` inside `poisoned_allocations` holds them. What writes an element removes them, a kernel or torch; a
copy of what nobody wrote keeps them. Integers have no such bits: their memory counts as written.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

# By dtype: an integer dtype of its size and a NaN's bits in it, of a payload that no arithmetic yields.
_BITS: Mapping[torch.dtype, tuple[torch.dtype, int]] = {
    torch.float64: (torch.int64, 0x7FF4_DEAD_BEEF_DEAD),
    torch.float32: (torch.int32, 0x7FA0_DEAD),
    torch.bfloat16: (torch.int16, 0x7FAD),
    torch.float16: (torch.int16, 0x7DAD),
}
_ALLOCATORS = ((torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (Tensor, "new_empty"))


def poison(tensor: Tensor) -> Tensor:
    """The tensor, every element of which is uninitialised from here on; of integers nothing changes."""
    if type(tensor) is Tensor and tensor.device.type == "cpu" and tensor.dtype in _BITS:
        integer, bits = _BITS[tensor.dtype]
        tensor.detach().view(integer).fill_(bits)
    return tensor


def poisoned(tensor: Tensor) -> Tensor:
    """Of the tensor's shape: which elements nothing has written."""
    if tensor.dtype not in _BITS:
        return torch.zeros(tensor.shape, dtype=torch.bool)
    integer, bits = _BITS[tensor.dtype]
    return tensor.detach().view(integer) == bits


@contextlib.contextmanager
def poisoned_allocations() -> Iterator[None]:
    """Inside, torch.empty and its like give memory that is told to be uninitialised."""
    saved = [(owner, name, getattr(owner, name)) for owner, name in _ALLOCATORS]
    for owner, name, allocate in saved:
        setattr(owner, name, _poisoning(allocate))
    try:
        yield
    finally:
        for owner, name, allocate in saved:
            setattr(owner, name, allocate)


def _poisoning(allocate: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(allocate)
    def poisoning(*arguments: Any, **options: Any) -> Any:
        return poison(allocate(*arguments, **options))

    return poisoning

"""Autocast's rules for the tensors of an operator: those of torch's counterpart.

    lowered     to autocast's dtype, as F.linear and scaled_dot_product_attention
    in_float32  on a GPU to float32, as F.layer_norm, F.group_norm and F.interpolate; on a CPU as they are
    promoted    to the widest dtype among them, as a sum and torch.cat; outside autocast as they are

None stays None, and float64 is never narrowed. Inside an operator autocast is off: the dtype that it computes in
follows from its arguments alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_KEYS = {"cpu": torch._C.DispatchKey.AutocastCPU, "cuda": torch._C.DispatchKey.AutocastCUDA}
_ALL = torch._C.DispatchKeySet(_KEYS["cpu"]) | torch._C.DispatchKeySet(_KEYS["cuda"])


def _dtype(x: Tensor) -> torch.dtype | None:
    """The dtype of autocast on the device of x; None where it is off."""
    if not torch._C._is_any_autocast_enabled():
        return None
    device = x.device.type
    return torch.get_autocast_dtype(device) if device in _KEYS and torch.is_autocast_enabled(device) else None


def _cast(tensors: tuple[Any, ...], dtype: torch.dtype | None) -> tuple[Any, ...]:
    if dtype is None:
        return tensors
    return tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def lowered(*tensors: Any) -> tuple[Any, ...]:
    """Float tensors, or None, in autocast's dtype."""
    return _cast(tensors, _dtype(tensors[0]))


def in_float32(*tensors: Any) -> tuple[Any, ...]:
    """Float tensors, or None, in float32 under autocast on a GPU."""
    on_gpu = tensors[0].device.type == "cuda" and _dtype(tensors[0]) is not None
    return _cast(tensors, torch.float32 if on_gpu else None)


def promoted(*tensors: Any) -> tuple[Any, ...]:
    """Float tensors, or None, in the widest dtype among them under autocast."""
    if _dtype(tensors[0]) is None:
        return tensors
    dtype = functools.reduce(torch.promote_types, [t.dtype for t in tensors if t is not None])
    return tuple(t if t is None else t.to(dtype) for t in tensors)


def without_memory(call: Any, *names: str) -> Any:
    """A call for its check alone: its tensors on "meta", those of these names in autocast's dtype."""
    found = {}
    for name, value in call._asdict().items():
        if isinstance(value, Tensor):
            (found[name],) = _cast((value.to("meta"),), _dtype(value) if name in names else None)
    return call._replace(**found)


def excluded() -> Any:
    """A context in which autocast is off on every device."""
    return torch._C._ExcludeDispatchKeyGuard(_ALL)


Function = Callable[..., Any]


def register(library: torch.library.Library, name: str, operator: Function, rule: Function) -> None:
    """Under autocast `name` is rule(run, *arguments); `run` is `operator` with autocast off."""

    def run(*arguments: Any) -> Any:
        with excluded():
            return operator(*arguments)

    for key in _KEYS.values():
        library.impl(name, functools.partial(rule, run), key.name)


def unchanged(run: Function, *arguments: Any) -> Any:
    """The rule of an operator that autocast leaves alone."""
    return run(*arguments)

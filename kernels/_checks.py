"""What arguments must be. A refusal is a ValueError of one line, and shows what is right."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def tensors(call: Callable[..., Any], required: Sequence[Any], optional: Sequence[Any] = ()) -> None:
    """ValueError, with the signature of `call`, for what is no tensor; `optional` may be None.

    Both in the order of the parameters of `call` that are annotated as tensors: a good call is spared their names.
    """
    for value in required:
        if not isinstance(value, Tensor):
            raise _not_a_tensor(call, required, optional, value)
    for value in optional:
        if value is not None and not isinstance(value, Tensor):
            raise _not_a_tensor(call, required, optional, value)


def _not_a_tensor(
    call: Callable[..., Any], required: Sequence[Any], optional: Sequence[Any], wrong: Any
) -> ValueError:
    parameters = inspect.signature(call).parameters.values()
    names = [p.name for p in parameters if p.annotation in ("Tensor", "Tensor | None")]
    name = next(name for name, value in zip(names, (*required, *optional), strict=False) if value is wrong)
    bare = inspect.Signature([p.replace(annotation=p.empty) for p in parameters])
    return ValueError(
        f"{call.__name__}: {name} must be a tensor; got {type(wrong).__name__}; call {call.__name__}{bare}"
    )


def one_device(name: str, arguments: tuple[Any, ...]) -> None:
    """ValueError for tensors of several devices. A kernel would read what is not there."""
    devices = [value.device for value in arguments if isinstance(value, Tensor)]
    for device in devices:
        if device != devices[0]:
            raise ValueError(
                f"{name}: the tensors must share a device; got {devices[0]} and {device}: move them to one"
            )


def has_tangent(arguments: Sequence[Any]) -> bool:
    """Whether forward mode (torch.autograd.forward_ad, torch.func.jvp) differentiates by one of these."""
    return any(
        isinstance(value, Tensor) and forward_ad.unpack_dual(value, level=0).tangent is not None
        for value in arguments
    )


def whole(call: str, name: str, value: Any) -> Any:
    """A whole number of Python, numpy or torch (0-d) as an int; a tracer's symbol stays one."""
    if type(value) is int or isinstance(value, torch.SymInt):
        return value
    try:
        # operator.index takes flags, and arrays of one element.
        if isinstance(value, bool) or getattr(value, "ndim", 0) > 0 or getattr(value, "dtype", None) == torch.bool:
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{call}: {name} must be a whole number; got {_shown(value)}") from None


def flag(call: str, name: str, value: Any) -> None:
    """ValueError for what is neither True nor False."""
    if not isinstance(value, bool):
        raise ValueError(f"{call}: {name} must be True or False; got {_shown(value)}")


def choice(call: str, name: str, value: Any, choices: Sequence[str | None]) -> None:
    """ValueError for what is none of the choices."""
    if not (value is None or isinstance(value, str)) or value not in choices:
        valid = " or ".join("None" if one is None else f'"{one}"' for one in choices)
        raise ValueError(f"{call}: {name} must be {valid}; got {repr(value).splitlines()[0]}")


def real(call: str, name: str, value: Any) -> Any:
    """A number of Python, numpy or torch (0-d) as a float; a tracer's symbol stays one."""
    if isinstance(value, (float, torch.SymFloat)):
        return value
    try:
        if isinstance(value, (str, bytes)):
            raise TypeError
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{call}: {name} must be a number; got {_shown(value)}") from None


def _shown(value: Any) -> str:
    """A value in one line: of a tensor its dtype and shape."""
    if isinstance(value, Tensor) and value.ndim:
        return f"a tensor, {str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return " ".join(repr(value).split())

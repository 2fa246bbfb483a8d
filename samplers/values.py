"""Plain Python values of arguments, warnings at the caller's line, and a base for frozen dataclasses."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import os.path
import reprlib
import warnings
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor


def plain(value: Any) -> Any:
    """A number, flag, text or array of numpy or torch as a value of Python; a list as a tuple; others unchanged.

    Waits for a tensor on a GPU. Raises ValueError for a tensor on the meta device.
    """
    if isinstance(value, list | tuple | range):
        return tuple(map(plain, value))
    if isinstance(value, Tensor) and value.is_meta:
        raise ValueError("a tensor on the meta device holds no numbers: make it on the CPU")
    # tolist() of a longdouble returns a longdouble.
    if isinstance(value, np.longdouble):
        return float(value)
    if isinstance(value, np.ndarray | np.generic | Tensor):
        found = value.tolist()
        return plain(found) if isinstance(found, list) else found
    return value


def is_number(value: object) -> bool:
    """Whether a plain value is an integer or a float; a bool is neither."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def shown(value: object) -> str:
    """A short repr in one line, for messages."""
    try:
        return " ".join(reprlib.repr(value).split())
    except ValueError:
        # Python writes out no integer of more than 4300 digits.
        return f"{type(value).__name__} of too many digits"


def warn(message: str) -> None:
    """Warns at the caller's line: the first outside this package and torch, which has decorators in between."""
    folders = tuple(os.path.join(os.path.dirname(file), "") for file in (__file__, torch.__file__))
    ours = itertools.takewhile(lambda frame: frame.filename.startswith(folders), inspect.stack(context=0))
    warnings.warn(message, stacklevel=len(list(ours)) + 1)


class Copied:
    """A base for frozen dataclasses: their copies and pickles go through the constructor.

    Otherwise the arrays of a copy would be writeable, and a mapping proxy cannot be pickled.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        values = (getattr(self, field.name) for field in dataclasses.fields(self))  # type: ignore[arg-type]
        return type(self), tuple(dict(v) if isinstance(v, MappingProxyType) else v for v in values)

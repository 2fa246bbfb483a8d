"""What callers hand over, as Python's own values; and frozen dataclasses that can be copied and pickled."""

from __future__ import annotations

import dataclasses
import reprlib
from types import MappingProxyType
from typing import Any

import numpy as np
from torch import Tensor


def plain(value: Any) -> Any:
    """Numbers, flags, text and arrays of numpy and torch as Python's own; lists become tuples; all else as it is.

    Waits for a tensor on a GPU. Raises ValueError for a tensor on the meta device.
    """
    if isinstance(value, list | tuple | range):
        return tuple(map(plain, value))
    if isinstance(value, Tensor) and value.is_meta:
        raise ValueError("a tensor on the meta device holds no numbers: make it on the CPU")
    # Its item() is a longdouble again.
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
    return " ".join(reprlib.repr(value).split())


class Copied:
    """For frozen dataclasses: copies and pickles are made by the constructor.

    In a plain copy a read-only array is writeable, and a mapping proxy cannot be pickled.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        values = (getattr(self, field.name) for field in dataclasses.fields(self))  # type: ignore[arg-type]
        return type(self), tuple(dict(v) if isinstance(v, MappingProxyType) else v for v in values)

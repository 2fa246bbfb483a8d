"""Values of a configuration's fields: checks of what a file or a caller gave, and how errors show it."""

import operator
import reprlib
from collections.abc import Iterable
from typing import Any


class UnsupportedConfig(ValueError):
    """A configuration that the network does not implement; the message names every field at fault."""


# A file may hold a value of any length and depth, and an error is one line.
class _Repr(reprlib.Repr):
    def repr_int(self, x: int, level: int) -> str:
        # Python refuses to print integers of thousands of digits.
        return "an integer of thousands of digits" if abs(x) > 10**1000 else super().repr_int(x, level)


_repr = _Repr()
_repr.maxstring = 100
shown = _repr.repr

# Far above every field of a published network; products of fields still fit into 64 bits.
_MOST = 2**16


def as_integer(value: Any) -> int | None:
    """An integer of Python, numpy or torch as Python's; None for all else, a bool included."""
    is_bool = isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool")
    if is_bool or len(getattr(value, "shape", ())):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def count(name: str, value: Any, least: int = 1) -> int:
    """The value of a field that counts something."""
    number = as_integer(value)
    if number is None or not least <= number <= _MOST:
        raise UnsupportedConfig(
            f"{name} must be from {least} to {_MOST}; got {shown(value)}: give a whole number in that range"
        )
    return number


def each(config: object, name: str) -> tuple[Any, ...]:
    """The entries of a field with one for each level."""
    value = getattr(config, name)
    if not isinstance(value, Iterable) or isinstance(value, str) or getattr(value, "ndim", 1) != 1:
        raise UnsupportedConfig(f"{name} = {shown(value)}: give a tuple with one entry per level")
    return tuple(value)


def integers(value: Any) -> bool:
    """Whether the value is a list of integers."""
    return isinstance(value, list | tuple) and all(as_integer(one) is not None for one in value)


def strings(value: Any) -> bool:
    """Whether the value is a list of strings."""
    return isinstance(value, list | tuple) and all(isinstance(one, str) for one in value)


def is_same(value: Any, accepted: Any) -> bool:
    """Whether the value says the same as the accepted one, once or in a list for each level."""
    values = value if isinstance(value, list | tuple) and value else [value]
    return all(
        one is accepted if isinstance(one, bool) or isinstance(accepted, bool) else bool(one == accepted)
        for one in values
    )

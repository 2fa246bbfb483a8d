"""The values of a configuration's fields: read as Python's own, checked, and shown in errors of one line."""

import operator
import reprlib
from collections.abc import Iterable
from typing import Any


class UnsupportedConfig(ValueError):
    """A UNet configuration that this network does not implement; the message names every field at fault."""


# Far above every field of a published UNet; products of fields still fit into 64 bits.
_MOST = 2**16


def integer(value: Any) -> int | None:
    """An integer of Python, numpy or torch as Python's; None for all else, a bool included."""
    is_bool = isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool")
    if is_bool or len(getattr(value, "shape", ())):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def count(name: str, value: Any, least: int = 1) -> int:
    """A whole number from `least` on. Raises `UnsupportedConfig`, as the other functions here do."""
    number = integer(value)
    if number is None or not least <= number <= _MOST:
        raise UnsupportedConfig(
            f"{name} must be from {least} to {_MOST}; got {shown(value)}: give a whole number in that range"
        )
    return number


def counts(name: str, values: Any, least: int = 1) -> tuple[int, ...]:
    """One `count` per level."""
    return tuple(count(name, one, least) for one in each(name, values))


def each(name: str, values: Any) -> tuple[Any, ...]:
    """The entries of a field that has one per level, whatever holds them."""
    if not isinstance(values, Iterable) or isinstance(values, str) or getattr(values, "ndim", 1) != 1:
        raise UnsupportedConfig(f"{name} = {shown(values)}: give a tuple with one entry per level")
    return tuple(values)


def switches(name: str, values: Any, levels: int) -> tuple[bool, ...]:
    """One truth value per level, of Python, numpy or torch, or one for all levels."""
    found = (values,) * levels if _switch(values) is not None else each(name, values)
    if wrong := [one for one in found if _switch(one) is None]:
        raise UnsupportedConfig(f"{name} holds {shown(wrong[0])}: give True or False for each level")
    return tuple(bool(one) for one in found)


def _switch(value: Any) -> bool | None:
    is_bool = isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool")
    return bool(value) if is_bool and not len(getattr(value, "shape", ())) else None


def small(name: str, value: Any) -> float:
    """A number between 0 and 1."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = 0.0
    if isinstance(value, str) or not 0 < number < 1:
        raise UnsupportedConfig(f"{name} = {shown(value)}: give a small positive number, such as 1e-5")
    return number


# A file may hold a value of any length and depth, and an error is one line.
class _Repr(reprlib.Repr):
    def repr_int(self, x: int, level: int) -> str:
        # Python refuses to print integers of thousands of digits.
        return "an integer of thousands of digits" if abs(x) > 10**1000 else super().repr_int(x, level)


_repr = _Repr()
_repr.maxstring = 100
shown = _repr.repr


def integers(value: Any) -> bool:
    """Whether a value of JSON is a list of integers."""
    return isinstance(value, list | tuple) and all(integer(one) is not None for one in value)


def truths(value: Any) -> bool:
    """Whether a value of JSON is a list of truth values."""
    return isinstance(value, list | tuple) and all(isinstance(one, bool) for one in value)


def strings(value: Any) -> bool:
    """Whether a value of JSON is a list of strings."""
    return isinstance(value, list | tuple) and all(isinstance(one, str) for one in value)

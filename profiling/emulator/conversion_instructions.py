"""Conversions between types: cvt (PTX ISA 9.7.9.21).

A float becomes an integer by the rounding that it names, within the integer's range, and a narrower float to
nearest, ties to even. Integers are cut off or extended.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from .instruction_set import Action, Array, computes, executes, form
from .numerics import HALVES, PAIRS, flushed, greatest, odd_float32, saturated, some
from .program import DTYPES, PtxInstruction

Function = Callable[..., Array]
_INTEGER = r"[us](?:8|16|32|64)"
_FLOAT = r"f16|bf16|f32|f64"
_ROUNDINGS: Mapping[str, Callable[[Array], Array]] = {
    "rni": np.rint,
    "rzi": np.trunc,
    "rmi": np.floor,
    "rpi": np.ceil,
}
_ZERO = np.zeros((), np.float32)
# Pairs of a type and one that holds all its values.
_EXACT = {("f16", "f32"), ("f16", "f64"), ("bf16", "f32"), ("bf16", "f64"), ("f32", "f64"), ("f32", "f32")}


@executes("cvt")
def _pair(i: PtxInstruction) -> Action | None:
    """Two float32 in one register, the first in its upper half; what is too large for an 8-bit float saturates."""
    found = form(i, r"rn\.(?P<relu>relu\.)?(?P<to>bf16|f16)x2\.f32") or form(
        i, r"rn\.satfinite\.(?P<relu>relu\.)?(?P<to>e4m3|e5m2)x2\.f32"
    )
    if found is None:
        return None
    pair = PAIRS[found["to"]]
    if not found["relu"]:
        return computes(i, pair, "f32", "f32")
    return computes(i, lambda high, low: pair(_not_negative(high), _not_negative(low)), "f32", "f32")


def _not_negative(values: Array) -> Array:
    return greatest(values, _ZERO, nan=True)


@executes("cvt")
def _tensor_float(i: PtxInstruction) -> Action | None:
    """tf32: 10 bits of mantissa, to nearest, ties away from zero."""
    if not form(i, r"rna\.tf32\.f32"):
        return None

    def rounded(bits: Array) -> Array:
        values = (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
        return np.where(np.isnan(bits.view(np.float32)), np.uint32(0x7FFFFFFF), values)

    return computes(i, rounded, "b32")


@executes("cvt")
def _between_integers(i: PtxInstruction) -> Action | None:
    found = form(i, rf"(?P<sat>sat\.)?(?P<to>{_INTEGER})\.(?P<source>{_INTEGER})")
    if found is None:
        return None
    to, whole = DTYPES[found["to"]], _register_dtype(i, found["to"])
    if found["sat"]:
        (least, most), (low, high) = _limits(found["to"]), _limits(found["source"])
        low, high = max(low, least), min(high, most)
        return computes(i, lambda x: np.clip(x, low, high).astype(to).astype(whole), found["source"])
    if whole is to:
        return computes(i, lambda x: x.astype(to), found["source"])
    return computes(i, lambda x: x.astype(to).astype(whole), found["source"])


def _limits(kind: str) -> tuple[int, int]:
    bits = int(kind[1:])
    return (-(1 << bits - 1), (1 << bits - 1) - 1) if kind[0] == "s" else (0, (1 << bits) - 1)


def _register_dtype(i: PtxInstruction, kind: str) -> np.dtype[np.generic]:
    """An integer in a wider register is extended by its sign or by zeros (PTX ISA 9.4.1)."""
    return DTYPES[f"{kind[0]}{8 * i.bytes_of(i.operand(0))}"]


@executes("cvt")
def _to_float(i: PtxInstruction) -> Action | None:
    """An integer to the nearest float."""
    found = form(i, rf"rn\.(?P<to>{_FLOAT})\.(?P<source>{_INTEGER})")
    if found is None:
        return None
    to, source = found["to"], found["source"]
    if to in ("f32", "f64"):
        return computes(i, lambda x: x.astype(DTYPES[to]), source)
    if source.endswith("64"):
        return None  # not exact in float64, and would be rounded twice
    _, bits = HALVES[to]
    return computes(i, lambda x: bits(odd_float32(x.astype(np.float64))), source)


@executes("cvt")
def _to_integer(i: PtxInstruction) -> Action | None:
    """NaN becomes 0; from float64, or in 64 bits, the highest bit alone."""
    found = form(i, rf"(?P<rounding>r[nzmp]i)\.(?P<ftz>ftz\.)?(?:sat\.)?(?P<to>{_INTEGER})\.(?P<source>{_FLOAT})")
    if found is None or (found["ftz"] and found["source"] != "f32"):
        return None
    to, source = DTYPES[found["to"]], found["source"]
    whole = _register_dtype(i, found["to"])
    near, values, ftz = _ROUNDINGS[found["rounding"]], _values_of(source), found["ftz"]
    low, high = (np.array(float(limit)) for limit in _limits(found["to"]))
    greatest_integer = np.array(_limits(found["to"])[1], to)
    of_nan = np.zeros((), to)
    if source == "f64" or to.itemsize == 8:
        of_nan = np.array(1 << 8 * to.itemsize - 1, f"u{to.itemsize}").view(to)

    def convert(x: Array) -> Array:
        value = values(x)
        value = near(flushed(value) if ftz else value).astype(np.float64)
        inside = np.fmin(np.fmax(value, low), high)
        result: Array = inside.astype(to)
        if to.itemsize == 8:
            # The greatest is no float64, and what it is rounded to is past it.
            result = np.where(inside == high, greatest_integer, result)
        unknown = np.isnan(value)
        if some(unknown):
            result = np.where(unknown, of_nan, result)
        return result if whole is to else result.astype(whole)

    return computes(i, convert, source)


def _values_of(kind: str) -> Function:
    if kind in HALVES:
        return HALVES[kind][0]
    return lambda x: x


@executes("cvt")
def _between_floats(i: PtxInstruction) -> Action | None:
    """To a wider float exactly, to a narrower one to nearest."""
    found = form(
        i,
        rf"(?P<rounding>rn\.)?(?P<ftz>ftz\.)?(?P<relu>relu\.)?(?P<sat>sat\.)?(?P<to>{_FLOAT})\.(?P<source>{_FLOAT})",
    )
    if found is None:
        return None
    to, source = found["to"], found["source"]
    # A modifier for rounding stands where something is rounded, and nowhere else.
    if bool(found["rounding"]) == ((source, to) in _EXACT) or (to == source != "f32"):
        return None
    if (found["ftz"] and "f32" not in (to, source)) or (found["relu"] and to not in HALVES):
        return None
    if found["sat"] and to == "bf16":
        return None
    steps: list[Function] = [HALVES[source][0]] if source in HALVES else []
    if found["ftz"] and source == "f32":
        steps.append(flushed)
    if source == "f64":
        steps.append((lambda x: x.astype(np.float32)) if to == "f32" else odd_float32)
    if to == "f64":
        steps.append(lambda x: x.astype(np.float64))
    if found["ftz"] and to == "f32" and source != "f32":
        steps.append(flushed)
    if found["relu"]:
        steps.append(_not_negative)
    if found["sat"]:
        steps.append(saturated)
    if to in HALVES:
        steps.append(HALVES[to][1])
    return computes(i, _one_after_another(steps), source)


def _one_after_another(steps: list[Function]) -> Function:
    if len(steps) == 1:
        return steps[0]

    def function(x: Array) -> Array:
        for step in steps:
            x = step(x)
        return x

    return function


@executes("cvt")
def _to_integral(i: PtxInstruction) -> Action | None:
    """A float to a whole number of its own type."""
    found = form(i, rf"(?P<rounding>r[nzmp]i)\.(?P<ftz>ftz\.)?(?P<kind>{_FLOAT})\.(?P=kind)")
    if found is None or (found["ftz"] and found["kind"] != "f32"):
        return None
    near, kind = _ROUNDINGS[found["rounding"]], found["kind"]
    if kind in HALVES:
        values, bits = HALVES[kind]
        return computes(i, lambda x: bits(near(values(x))), kind)
    return computes(i, (lambda x: near(flushed(x))) if found["ftz"] else near, kind)

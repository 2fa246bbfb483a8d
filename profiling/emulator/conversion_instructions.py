"""Conversions between types: cvt (PTX ISA 9.7.9.21).

A float becomes an integer by the rounding that it names, within the integer's range; a float becomes a narrower one
to nearest, ties to even. Integers are cut off or extended.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from .instruction_set import Action, Array, computes, executes, form
from .numerics import HALVES, bf16_bits, bf16_values, f16_bits, f16_values, flushed, greatest, odd_float32
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


@executes("cvt")
def _convert(i: PtxInstruction) -> Action | None:
    for convert in (
        _pair,
        _tensor_float,
        _between_integers,
        _to_float,
        _to_integer,
        _between_floats,
        _to_integral,
    ):
        action = convert(i)
        if action is not None:
            return action
    return None


def _pair(i: PtxInstruction) -> Action | None:
    """Two float32 in one register, the first in its upper half."""
    found = form(i, r"rn\.(?P<relu>relu\.)?(?P<to>bf16|f16)x2\.f32")
    if found is None:
        return None
    _, bits = HALVES[found["to"]]

    def pair(high: Array, low: Array) -> Array:
        both = np.empty((max(np.size(high), np.size(low)), 2), np.float32)
        both[:, 0], both[:, 1] = low, high
        if found["relu"]:
            both = greatest(both, np.float32(0), nan=True)
        return bits(both).view(np.uint32).ravel()

    return computes(i, pair, "f32", "f32")


def _tensor_float(i: PtxInstruction) -> Action | None:
    """tf32: 10 bits of mantissa, to nearest, ties away from zero."""
    if not form(i, r"rna\.tf32\.f32"):
        return None

    def rounded(bits: Array) -> Array:
        values = (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
        return np.where(np.isnan(bits.view(np.float32)), np.uint32(0x7FFFFFFF), values)

    return computes(i, rounded, "b32")


def _between_integers(i: PtxInstruction) -> Action | None:
    found = form(i, rf"(?P<sat>sat\.)?(?P<to>{_INTEGER})\.(?P<source>{_INTEGER})")
    if found is None:
        return None
    dtype, whole = DTYPES[found["to"]], _register_dtype(i, found["to"])
    if not found["sat"]:
        if whole is dtype:
            return computes(i, lambda x: x.astype(dtype), found["source"])
        return computes(i, lambda x: x.astype(dtype).astype(whole), found["source"])
    bounds, own = np.iinfo(dtype), np.iinfo(DTYPES[found["source"]])
    low, high = max(bounds.min, own.min), min(bounds.max, own.max)
    return computes(i, lambda x: np.clip(x, low, high).astype(dtype).astype(whole), found["source"])


def _register_dtype(i: PtxInstruction, kind: str) -> np.dtype[np.generic]:
    """An integer in a wider register is extended by its sign or by zeros (PTX ISA 9.4.1)."""
    return DTYPES[f"{kind[0]}{8 * max(i.bytes_of(i.operand(0)), DTYPES[kind].itemsize)}"]


def _to_float(i: PtxInstruction) -> Action | None:
    """An integer to the nearest float."""
    found = form(i, rf"rn\.(?P<to>{_FLOAT})\.(?P<source>{_INTEGER})")
    if found is None:
        return None
    to, source = found["to"], found["source"]
    if to in ("f32", "f64"):
        return computes(i, lambda x: x.astype(DTYPES[to]), source)
    if source.endswith("64"):
        return None
    _, bits = HALVES[to]
    return computes(i, lambda x: bits(odd_float32(x.astype(np.float64))), source)


def _to_integer(i: PtxInstruction) -> Action | None:
    """NaN becomes 0, or the highest bit alone from float64 or in 64 bits."""
    found = form(
        i, rf"(?P<rounding>rni|rzi|rmi|rpi)\.(?P<ftz>ftz\.)?(sat\.)?(?P<to>{_INTEGER})\.(?P<source>{_FLOAT})"
    )
    if found is None or (found["ftz"] and found["source"] != "f32"):
        return None
    to, source = DTYPES[found["to"]], found["source"]
    round_, values, ftz = _ROUNDINGS[found["rounding"]], _values_of(source), bool(found["ftz"])
    low, high = float(np.iinfo(to).min), float(np.iinfo(to).max)
    of_nan = np.array(1 << 8 * to.itemsize - 1, f"u{to.itemsize}").view(to)
    if source != "f64" and to.itemsize != 8:
        of_nan = np.zeros((), to)
    whole = _register_dtype(i, found["to"])

    def convert(x: Array) -> Array:
        value = values(x)
        value = round_(flushed(value) if ftz else value).astype(np.float64)
        inside = value.clip(low, high)
        result = inside.astype(to)
        # 2^63 and 2^64 are no integers of 64 bits; their type's greatest is.
        past = inside >= high
        if past.any():
            result = np.where(past, np.iinfo(to).max, result).astype(to)
        unknown = np.isnan(value)
        if unknown.any():
            result = np.where(unknown, of_nan, result)
        return result if whole is to else result.astype(whole)

    return computes(i, convert, source)


def _values_of(kind: str) -> Function:
    if kind in HALVES:
        return HALVES[kind][0]
    return lambda x: x


def _between_floats(i: PtxInstruction) -> Action | None:
    """To a wider float exactly, to a narrower one to nearest."""
    found = form(
        i,
        rf"(?P<rounding>rn\.)?(?P<ftz>ftz\.)?(?P<relu>relu\.)?(?P<sat>sat\.)?(?P<to>{_FLOAT})\.(?P<source>{_FLOAT})",
    )
    if found is None:
        return None
    to, source = found["to"], found["source"]
    narrower = (to, source) in {("f32", "f64"), ("f16", "f32"), ("f16", "f64"), ("bf16", "f32"), ("bf16", "f64")}
    if bool(found["rounding"]) != (narrower or {to, source} == {"f16", "bf16"}):
        return None
    if (to == source and to != "f32") or (found["relu"] and to not in HALVES):
        return None
    if (found["ftz"] and "f32" not in (to, source)) or (found["sat"] and to not in ("f32", "f64")):
        return None
    steps: list[Function] = [_values_of(source)] if source in HALVES else []
    if found["ftz"] and source == "f32":
        steps.append(flushed)
    if source == "f64" and to != "f64":
        steps.append((lambda x: x.astype(np.float32)) if to == "f32" else odd_float32)
    if to == "f64":
        steps.append(lambda x: x.astype(np.float64))
    if found["ftz"] and to == "f32" and source == "f64":
        steps.append(flushed)
    if found["sat"]:
        steps.append(lambda x: np.fmin(np.fmax(x, x.dtype.type(0)), x.dtype.type(1)))
    if found["relu"]:
        steps.append(lambda x: greatest(x, np.float32(0), nan=True))
    if to in HALVES:
        steps.append(HALVES[to][1])
    return computes(i, _chain(steps), source)


def _chain(steps: list[Function]) -> Function:
    if len(steps) == 1:
        return steps[0]

    def chain(x: Array) -> Array:
        for step in steps:
            x = step(x)
        return x

    return chain


def _to_integral(i: PtxInstruction) -> Action | None:
    """A float to a whole number of its own type."""
    found = form(i, r"(?P<rounding>rni|rzi|rmi|rpi)\.(?P<ftz>ftz\.)?(?P<kind>f16|f32|f64)\.(?P=kind)")
    if found is None or (found["ftz"] and found["kind"] != "f32"):
        return None
    round_, kind = _ROUNDINGS[found["rounding"]], found["kind"]
    if kind == "f16":
        return computes(i, lambda x: f16_bits(round_(f16_values(x))), kind)
    if found["ftz"]:
        return computes(i, lambda x: round_(flushed(x)), kind)
    return computes(i, round_, kind)

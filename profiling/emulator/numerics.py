"""How numbers are computed where a GPU differs from numpy, or from what is documented: what can be chosen.

Formats: bfloat16 and float16 are held as their bits and computed in float32, as the hardware's mixed units do.
A sum or a product of theirs, rounded to float32 and then to 16 bits, is as if rounded once: 24 bits are at least
twice 11 and two more (S. Figueroa, "When is double rounding innocuous?", 1995). x * y + z is rounded to odd first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


@dataclass(frozen=True)
class Numerics:
    """What is chosen for a run.

    accumulate     "float32": a matmul's products are summed in float32, in numpy's order. "tensor core": as
                   measured on the chips, aligned to the largest and cut off (accumulation.py)
    perturb        a seed: approximate instructions (ex2, rcp, ...) err by up to what their documentation allows,
                   differently for each value. None: they are correctly rounded
    tf32           what a matmul takes of a float32 operand: "truncate" its lowest 13 bits, or "round" them
    """

    accumulate: Literal["float32", "tensor core"] = "float32"
    perturb: int | None = None
    tf32: Literal["truncate", "round"] = "truncate"


# Constants without dimensions, which numpy takes faster than its own scalars.
def _constant(number: int, bits: int = 32) -> Array:
    return np.array(number, f"u{bits // 8}")


_ONE, _SIXTEEN, _THIRTEEN = (_constant(n) for n in (1, 16, 13))
_UPPER, _MAGNITUDE, _EXPONENT, _SIGN16 = (_constant(n) for n in (0xFFFF0000, 0x7FFFFFFF, 0x7F800000, 0x8000))
_BF16_BELOW_HALF = _constant(0x7FFF)
_HALF_NAN = _constant(0x7FFF, 16)
_ZERO, _TINY, _NAN = (_constant(n).view(np.float32) for n in (0, 0x00800000, 0x7FFFFFFF))
_ONE64, _FLOAT32_REST, _FLOAT32_TIE = (_constant(n, 64) for n in (1, (1 << 29) - 1, 1 << 28))
# The bits of 2^-126 as float64, twice.
_TWICE_TINY = _constant((1023 - 126) << 53, 64)
# Of float16: the bits of its least normal and of 2^16 as float32, 13 and 113 as exponents.
_F16_NORMAL, _F16_OVER = _constant(0x38800000), _constant(0x47800000)
_F16_LONGER, _F16_BIAS = _constant(13 << 23), _constant(113 << 10)
_F16_UP, _F16_SPECIAL, _F16_MAGNITUDE = np.array(2.0**112, np.float32), _constant(0x7C00 << 13), _constant(0x7FFF)


def some(condition: Array) -> bool:
    """Whether any of a bool array is True, in a fifth of the time of its method `any`."""
    return bool(np.count_nonzero(condition))


def _has_nan(values: Array) -> bool:
    # A sum of squares is NaN only where one of them is: infinities are all positive.
    return math.isnan(values.dot(values)) if values.ndim == 1 else some(np.isnan(values))


# ---------------------------------------------------------------- formats


def bf16_bits(values: Array) -> Array:
    """float32 to bfloat16, to nearest, ties to even; any NaN becomes 0x7FFF, as cvt does (PTX ISA 9.7.9.21)."""
    near = (_bf16_in_upper_half(values) >> _SIXTEEN).astype(np.uint16)
    return np.where(np.isnan(values), _HALF_NAN, near) if _has_nan(values) else near


def _bf16_in_upper_half(values: Array) -> Array:
    """uint32: the nearest bfloat16 in the upper half, in the lower what rounding left there."""
    bits = values.view(np.uint32)
    carry = bits >> _SIXTEEN
    carry &= _ONE
    carry += _BF16_BELOW_HALF
    carry += bits
    return carry


def bf16_values(bits: Array) -> Array:
    return (bits.astype(np.uint32) << _SIXTEEN).view(np.float32)


def bf16_pair(high: Array, low: Array) -> Array:
    """uint32: two float32 as bfloat16, the first in the upper half."""
    upper, lower = _bf16_in_upper_half(high), _bf16_in_upper_half(low)
    upper &= _UPPER
    lower = lower >> _SIXTEEN
    if _has_nan(high) or _has_nan(low):
        nan = _HALF_NAN.astype(np.uint32)
        upper = np.where(np.isnan(high), nan << _SIXTEEN, upper)
        lower = np.where(np.isnan(low), nan, lower)
    return upper | lower


def f16_bits(values: Array) -> Array:
    """float32 to float16, to nearest, ties to even; any NaN becomes 0x7FFF.

    Does what numpy's `astype` does in three times as long. A power of two that is 2^13 times as large, or 1/2 for
    a subnormal, has a last place as wide as the float16's, so that adding it rounds. 2^16 becomes infinity.
    """
    bits = values.view(np.uint32)
    size = np.minimum(bits & _MAGNITUDE, _F16_OVER)
    exponent = np.maximum(size & _EXPONENT, _F16_NORMAL)
    longer = exponent + _F16_LONGER
    near = (size.view(np.float32) + longer.view(np.float32)).view(np.uint32)
    near -= longer
    exponent >>= _THIRTEEN
    near += exponent
    near -= _F16_BIAS
    near |= bits >> _SIXTEEN & _SIGN16
    half = near.astype(np.uint16)
    return np.where(np.isnan(values), _HALF_NAN, half) if _has_nan(values) else half


def f16_values(bits: Array) -> Array:
    """float32 of float16: its bits as those of a float32 are 2^-112 times as large."""
    word = bits.astype(np.uint32)
    size = (word & _F16_MAGNITUDE) << _THIRTEEN
    values = (size.view(np.float32) * _F16_UP).view(np.uint32)
    special = size >= _F16_SPECIAL
    if some(special):
        values = np.where(special, size | _EXPONENT, values)
    return (values | (word & _SIGN16) << _SIXTEEN).view(np.float32)


def f16_pair(high: Array, low: Array) -> Array:
    """uint32: two float32 as float16, the first in the upper half."""
    return f16_bits(high).astype(np.uint32) << _SIXTEEN | f16_bits(low)


def float8_bits(values: Array, mantissa: int, bias: int, largest: float) -> Array:
    """uint8: float32 as an 8-bit float, to nearest, ties to even; past the largest that one, of NaN 0x7F."""
    size = np.fmin(np.abs(values.astype(np.float64)), largest)
    # Below the normal numbers the last place is as wide as in the first of them.
    exponent = np.frexp(np.maximum(size, 2.0 ** (1 - bias)))[1] - 1
    code = (exponent + bias - 1 << mantissa) + np.rint(np.ldexp(size, mantissa - exponent)).astype(np.int64)
    signed = (code | np.signbit(values).astype(np.int64) << 7).astype(np.uint8)
    return np.where(np.isnan(values), np.uint8(0x7F), signed)


def e4m3_bits(values: Array) -> Array:
    return float8_bits(values, 3, 7, 448.0)


def e5m2_bits(values: Array) -> Array:
    return float8_bits(values, 2, 15, 57344.0)


def float8_pair(bits: Callable[[Array], Array]) -> Callable[[Array, Array], Array]:
    """uint16 of two float32 as 8-bit floats, the first in the upper half."""
    return lambda high, low: bits(high).astype(np.uint16) << np.uint16(8) | bits(low)


def tf32_values(bits: Array, numerics: Numerics) -> Array:
    """What a matmul takes of float32 operands: 10 bits of mantissa."""
    if numerics.tf32 == "round":
        bits = bits + np.uint32(0x1000)
    return (bits & np.uint32(0xFFFFE000)).view(np.float32)


# (to values, to bits) of the 16-bit formats.
HALVES = {"bf16": (bf16_values, bf16_bits), "f16": (f16_values, f16_bits)}
# Two float32 to a register of two 16-bit floats.
PAIRS = {"bf16": bf16_pair, "f16": f16_pair, "e4m3": float8_pair(e4m3_bits), "e5m2": float8_pair(e5m2_bits)}


def flushed(values: Array) -> Array:
    """float32 with zeros of their sign in place of subnormals, which `.ftz` asks for."""
    small = np.abs(values) < _TINY
    return np.where(small, np.copysign(_ZERO, values), values) if some(small) else values


def saturated(values: Array) -> Array:
    """Within 0 and 1, NaN as 0, which `.sat` asks for."""
    zero, one = (np.array(limit, values.dtype) for limit in (0, 1))
    inside: Array = np.minimum(greatest(values, zero, nan=False), one)
    return inside


# ---------------------------------------------------------------- rounding once


def odd_float32(values: Array) -> Array:
    """float64 to float32 by rounding to odd: an inexact one to the neighbour whose last bit is set.

    Rounding that to 22 bits or fewer is as if rounded once (S. Boldo and G. Melquiond, "Emulation of FMA and
    correctly rounded sums: proved algorithms using rounding to odd", 2008).
    """
    near = values.astype(np.float32)
    return _to_odd(near, values - near)


def _to_odd(near: Array, error: Array) -> Array:
    """Of a rounded value and what it lacks: the value, or a neighbour on the other side of the exact one."""
    bits = near.view(f"i{near.dtype.itemsize}")
    inexact = (error != 0) & np.isfinite(near) & (bits & 1 == 0)
    # The bits of a float grow with its magnitude.
    step = np.where((error > 0) == (bits >= 0), 1, -1).astype(bits.dtype)
    odd: Array = np.where(inexact, bits + step, bits).view(near.dtype)
    return odd


def _sum_to_odd(x: Array, y: Array) -> Array:
    """x + y of float64, rounded to odd. D. Knuth's sum without error finds what is lost."""
    total = x + y
    part = total - x
    return _to_odd(total, (x - (total - part)) + (y - part))


def fused_float32(x: Array, y: Array, z: Array) -> Array:
    """x * y + z of float32, rounded once.

    A product of float32 is exact in float64. Its sum with z is rounded there, and to float32 once more: that errs
    only where the float64 is halfway between two float32, or the result is subnormal and has fewer bits.
    """
    total = x.astype(np.float64) * y.astype(np.float64) + z.astype(np.float64)
    result = total.astype(np.float32)
    bits = total.view(np.uint64)
    doubtful = (bits & _FLOAT32_REST) == _FLOAT32_TIE
    bits = bits << _ONE64
    bits -= _ONE64  # without a sign, and a zero as the greatest
    doubtful |= bits < _TWICE_TINY
    if some(doubtful):
        at = np.flatnonzero(doubtful)
        x, y, z = (np.broadcast_to(v, total.shape)[at].astype(np.float64) for v in (x, y, z))
        result[at] = _sum_to_odd(x * y, z).astype(np.float32)
    return result


def fused_half(x: Array, y: Array, z: Array) -> Array:
    """x * y + z of 16-bit floats as float32, which rounds to 16 bits as if rounded once."""
    return odd_float32(_sum_to_odd(x.astype(np.float64) * y.astype(np.float64), z.astype(np.float64)))


def fused_float64(x: Array, y: Array, z: Array) -> Array:
    """x * y + z of float64, rounded once.

    By T. Dekker's product without error and a sum rounded to odd (Boldo and Melquiond, as above), which are exact
    while nothing overflows or is subnormal. What may be is computed by fractions, one by one.
    """
    x, y, z = np.broadcast_arrays(x, y, z)
    high = x * y
    low = _product_error(x, y, high)
    total = z + low
    part = total - z
    lost = (z - (total - part)) + (low - part)
    upper = high + total
    part = upper - high
    rest = (high - (upper - part)) + (total - part)
    result: Array = upper + _sum_to_odd(rest, lost)
    # Zeros, infinities and NaNs need no exact product.
    special = (x == 0) | (y == 0) | ~np.isfinite(x) | ~np.isfinite(y) | ~np.isfinite(z)
    result = np.where(special, high + z, result)
    size = np.abs(high)
    safe = (size > 2.0**-900) & (size < 2.0**1000) & (np.abs(z) < 2.0**1000)
    safe &= (np.abs(x) < 2.0**900) & (np.abs(y) < 2.0**900)
    for k in np.flatnonzero(~safe & ~special):
        result[k] = _fused_by_fractions(float(x[k]), float(y[k]), float(z[k]))
    return result


def _product_error(x: Array, y: Array, product: Array) -> Array:
    """x * y - product of float64, exactly."""

    def halves(value: Array) -> tuple[Array, Array]:
        scaled = value * 134217729.0  # 2^27 + 1
        high = scaled - (scaled - value)
        return high, value - high

    (a, b), (c, d) = halves(x), halves(y)
    error: Array = b * d - (((product - a * c) - b * c) - a * d)
    return error


def _fused_by_fractions(x: float, y: float, z: float) -> float:
    exact = Fraction(x) * Fraction(y) + Fraction(z)
    try:
        return float(exact)
    except OverflowError:
        return math.inf if exact > 0 else -math.inf


# ---------------------------------------------------------------- extremes


def greatest(x: Array, y: Array, *, nan: bool) -> Array:
    """The greater of two, +0 above -0. Of a NaN and a number it is the number; with `nan`, a canonical NaN."""
    return _extreme(x, y, np.maximum if nan else np.fmax, np.add, nan)


def least(x: Array, y: Array, *, nan: bool) -> Array:
    """The less of two, -0 below +0. Of a NaN and a number it is the number; with `nan`, a canonical NaN."""
    # -(-x - y) of two zeros is -0 unless both are +0.
    return _extreme(x, y, np.minimum if nan else np.fmin, lambda a, b: -(-a - b), nan)


def _extreme(x: Array, y: Array, pick: Callable[..., Array], of_zeros: Callable[..., Array], nan: bool) -> Array:
    result = pick(x, y)
    zero = result == 0
    if some(zero):
        # numpy takes either of two zeros.
        result = np.where(zero & (x == y), of_zeros(x, y), result)
    if nan and result.dtype == np.float32 and _has_nan(result):
        result = np.where(np.isnan(result), _NAN, result)
    return result


# ---------------------------------------------------------------- approximations


def _ulps(count: float) -> Callable[[Array], Array]:
    def bound(exact: Array) -> Array:
        one: Array = np.spacing(np.abs(exact).astype(np.float32)).astype(np.float64)
        return one * count

    return bound


def _relative(part: float) -> Callable[[Array], Array]:
    return lambda exact: np.abs(exact) * part


def _absolute(size: float) -> Callable[[Array], Array]:
    return lambda exact: np.full_like(exact, size)


# The greatest error of an approximate instruction, of its exact result (PTX ISA 9.7.3.8 to 9.7.3.22, 9.7.4.9,
# 9.7.4.10). sin and cos err more beyond 2 pi, by 2^-14.7 up to 100 pi; a half is named with its format.
ERRORS: Mapping[str, Callable[[Array], Array]] = {
    **{"div.full": _ulps(2), "div.approx": _ulps(2), "rcp": _ulps(1), "ex2": _ulps(2)},
    **{"sqrt": _relative(2.0**-23), "rsqrt": _relative(2.0**-22.9), "tanh": _relative(2.0**-11)},
    **{"sin": _absolute(2.0**-20.5), "cos": _absolute(2.0**-20.5)},
    # Absolute for operands between 1/2 and 2, relative for others: for results below 1 in magnitude, and above.
    "lg2": lambda exact: np.maximum(np.abs(exact), 1) * 2.0**-22,
    **{"ex2.f16": _relative(2.0**-9.9), "ex2.bf16": _relative(2.0**-7)},
    **{"tanh.f16": _absolute(2.0**-10.987), "tanh.bf16": _absolute(2.0**-8)},
}
# Half of a unit in the last place, at most, of a value: what rounding adds.
_ROUNDING = {"f16": 2.0**-11, "bf16": 2.0**-8}


def perturbed(name: str, exact: Array, operands: list[Array], seed: int) -> Array:
    """float64 results that err by up to what `ERRORS` allows before they are rounded.

    The error is a hash of the exact result: equal operands have equal results. Zeros, infinities and NaNs stay,
    and so do the results of zeros and infinities, which the ISA lists.
    """
    rounding = _ROUNDING.get(name.partition(".")[2])
    half_ulp = _ulps(0.5)(exact) if rounding is None else np.abs(exact) * rounding
    value = exact + _hashed(exact, seed) * (ERRORS[name](exact) - half_ulp)
    rounded = exact.astype(np.float32)
    keep = ~np.isfinite(rounded) | (rounded == 0)
    for operand in operands:
        keep = keep | ~np.isfinite(operand) | (operand == 0)
    return np.where(keep, exact, value)


def _hashed(values: Array, seed: int) -> Array:
    """Evenly between -1 and 1, by the bits of float64: the end of G. Steele's SplitMix64."""
    bits = values.view(np.uint64) ^ np.uint64((seed * 0x9E3779B97F4A7C15) % (1 << 64))
    bits = (bits ^ bits >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ bits >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return ((bits ^ bits >> np.uint64(31)) >> np.uint64(11)) * 2.0**-52 - 1.0

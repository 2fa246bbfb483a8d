"""How numbers are computed where a GPU differs from numpy, or from what is documented: what can be chosen.

Formats: bfloat16 and float16 are held as their bits and computed in float32, as the hardware's mixed units do.
"""

from __future__ import annotations

from dataclasses import dataclass
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


# ---------------------------------------------------------------- formats


def bf16_bits(values: Array) -> Array:
    """float32 to bfloat16, to nearest, ties to even; any NaN becomes 0x7FFF, as cvt does (PTX ISA 9.7.9.21)."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    nearest = ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(
        np.uint16
    )
    return np.where(np.isnan(values), np.uint16(0x7FFF), nearest)


def bf16_values(bits: Array) -> Array:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def f16_bits(values: Array) -> Array:
    """float32 to float16, to nearest, ties to even; any NaN becomes 0x7FFF."""
    return np.where(np.isnan(values), np.uint16(0x7FFF), values.astype(np.float16).view(np.uint16))


def f16_values(bits: Array) -> Array:
    return np.ascontiguousarray(bits).view(np.float16).astype(np.float32)


def tf32_values(bits: Array, numerics: Numerics) -> Array:
    """What a matmul takes of float32 operands: 10 bits of mantissa."""
    if numerics.tf32 == "round":
        bits = bits + np.uint32(0x1000)
    return (bits & np.uint32(0xFFFFE000)).view(np.float32)


def odd_float32(values: Array) -> Array:
    """float64 to float32, an inexact one to the neighbour with an odd last bit: rounding that further rounds once."""
    near = values.astype(np.float32)
    error = values - near
    inexact = (error != 0) & np.isfinite(near)
    bits = near.view(np.int32)
    # Towards the value: up the bits where it is larger in magnitude.
    step = np.where((error > 0) == (near.view(np.int32) >= 0), 1, -1).astype(np.int32)
    odd = np.where(inexact & (bits & 1 == 0), bits + step, bits)
    return odd.view(np.float32)


def flushed(values: Array) -> Array:
    """Subnormals become zeros of their sign."""
    small = np.abs(values) < _TINY
    return np.where(small, np.copysign(np.float32(0), values), values) if small.any() else values


_TINY = np.array(2.0**-126, np.float32)


# (to values, to bits) of the 16-bit formats.
HALVES = {"bf16": (bf16_values, bf16_bits), "f16": (f16_values, f16_bits)}


# ---------------------------------------------------------------- operations


def greatest(x: Array, y: Array, *, nan: bool) -> Array:
    """The greater of two, +0 above -0; of a NaN and a number the number, or NaN."""
    return (np.maximum if nan else np.fmax)(x, y)


def least(x: Array, y: Array, *, nan: bool) -> Array:
    return (np.minimum if nan else np.fmin)(x, y)


def fused_float32(x: Array, y: Array, z: Array) -> Array:
    """x * y + z in float32."""
    return (x.astype(np.float64) * y + z).astype(np.float32)


def fused_half(x: Array, y: Array, z: Array) -> Array:
    return odd_float32(x.astype(np.float64) * y + z)


def fused_float64(x: Array, y: Array, z: Array) -> Array:
    return x * y + z


# ---------------------------------------------------------------- approximations


def approximated(name: str, exact: Array, seed: int | None) -> Array:
    """float32 of a float64 result."""
    return exact.astype(np.float32)

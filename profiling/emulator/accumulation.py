"""How a matmul instruction sums its products: in float32, or as measured on the chips.

"tensor core", for each element of d = a b + c, as many products at a time as one step of the chip adds:
    exponent  e = max over the step's terms; a product's is that of a plus that of b, a subnormal's the least
    sum       s = sum of trunc(term 2^(bits - e)), exact; the terms are the products, which are exact, and c
    result    s 2^(e - bits), cut off to float32 or rounded to float16; it is the c of the next step

Sources: Khattak and Mikaitis, "Accurate Models of NVIDIA Tensor Cores", arXiv:2512.07004; Xie et al.,
"Bit-Accurate Modeling of GPU Matrix Multiply-Accumulate Units", arXiv:2511.10909, and its package mmasim 2.1.1.
Their authors compared the models with chips, bit by bit; this project has not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .numerics import Numerics
from .program import UnknownInstruction

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class TensorCore:
    """How a chip sums.

    step_bytes   of a row of A in one step: 16 are eight products of float16, four of tf32
    bits         fractional bits of the sum
    least        the exponent that terms are aligned to at least, where the result is float32
    result_bits  fractional bits of a float32 result
    """

    step_bytes: int
    bits: int
    least: int
    result_bits: int = 23


_AMPERE = TensorCore(16, 24, -132)
_CORES = {"sm_80": _AMPERE, "sm_86": _AMPERE, "sm_89": _AMPERE, "sm_90": TensorCore(32, 25, -133)}
# Of a wgmma of 8-bit floats.
_HOPPER_BYTES = TensorCore(32, 13, -133, 13)

# Of the operands' types: bytes, and the exponent of subnormals.
_FORMATS = {"bf16": (2, -126), "f16": (2, -14), "tf32": (4, -126), "e4m3": (1, -6), "e5m2": (1, -14)}
# An exponent that makes a product's less than `least`, whatever the other factor is.
_OF_ZERO = -1000
# float32's exponents begin so much earlier than float16's.
_BELOW_F16 = 112


def matmul(
    a: Array,
    b: Array,
    c: Array | None,
    kind: str,
    numerics: Numerics,
    arch: str,
    *,
    result: str = "f32",
    warp_group: bool = False,
) -> Array:
    """a b + c in float32, or float16 where `result` is "f16".

    a, b        [..., M, K], [..., K, N] values of the operands in float32; c [..., M, N], None for zeros
    kind        of the operands in PTX: "bf16", "f16", "tf32", "e4m3", "e5m2"
    arch        "sm_80", "sm_90"
    warp_group  whether it is a wgmma
    """
    if numerics.accumulate == "tensor core":
        return _tensor_core(a, b, c, kind, _core(kind, arch, warp_group), result)
    total: Array = np.matmul(a, b)
    if c is not None:
        total = total + c
    return total.astype(np.float16) if result == "f16" else total


def integer_matmul(a: Array, b: Array, c: Array | None, saturates: bool) -> Array:
    """a b + c of 8-bit integers, given as float32, in int32: clamped to its ends, or modulo 2^32."""
    total: Array = np.matmul(a, b).astype(np.int64)
    if c is not None:
        total = total + c
    return np.clip(total, -(2**31), 2**31 - 1).astype(np.int32) if saturates else total.astype(np.int32)


def _core(kind: str, arch: str, warp_group: bool) -> TensorCore:
    if _FORMATS[kind][0] > 1 and arch in _CORES:
        return _CORES[arch]
    if warp_group and arch == "sm_90":
        return _HOPPER_BYTES
    raise UnknownInstruction(f"how {arch or 'an unnamed chip'} sums products of {kind}")


def _tensor_core(a: Array, b: Array, c: Array | None, kind: str, core: TensorCore, result: str) -> Array:
    element, subnormal = _FORMATS[kind]
    step = core.step_bytes // element
    a_exponents, b_exponents = _exponents(a, subnormal), _exponents(b, subnormal)
    a, b = a.astype(np.float64), b.astype(np.float64)
    total: Array = np.zeros((*a.shape[:-1], b.shape[-1]), np.float32) if c is None else c.astype(np.float32)
    c_subnormal, least = (-14, core.least + _BELOW_F16) if result == "f16" else (-126, core.least)
    for start in range(0, a.shape[-1], step):
        terms = range(start, min(start + step, a.shape[-1]))
        exponents = np.maximum(_exponents(total, c_subnormal), np.int16(least))
        for k in terms:
            np.maximum(exponents, a_exponents[..., :, k, None] + b_exponents[..., k, None, :], out=exponents)
        scale = _power_of_two(core.bits - exponents)
        exact = np.trunc(total * scale)
        for k in terms:
            product = a[..., :, k, None] * b[..., k, None, :]
            product *= scale
            exact += np.trunc(product, out=product)
        exact /= scale
        rounded = exact.astype(np.float16) if result == "f16" else _toward_zero(exact, core.result_bits)
        # Plus zero: no result is -0.
        total = rounded.astype(np.float32) + np.float32(0)
    return _canonical(total.astype(np.float16) if result == "f16" else total)


def _exponents(values: Array, subnormal: int) -> Array:
    """int16 exponents of float32 values: `subnormal` at least, but much less of zeros."""
    exponents = (values.view(np.uint32) >> np.uint32(23) & np.uint32(255)).astype(np.int16) - np.int16(127)
    return np.where(values == 0, np.int16(_OF_ZERO), np.maximum(exponents, np.int16(subnormal)))


def _power_of_two(exponents: Array) -> Array:
    return ((exponents.astype(np.int64) + 1023) << 52).view(np.float64)


def _toward_zero(values: Array, bits: int) -> Array:
    """float64 to float32 with so many fractional bits, cut off; infinite from 2^128 on."""
    nearest = values.astype(np.float32)
    size = np.abs(values)
    cut = nearest.view(np.uint32) - ((np.abs(nearest) > size) & (size < 2.0**128))
    return (cut & np.uint32(2**32 - 2 ** (23 - bits))).view(np.float32)


def _canonical(values: Array) -> Array:
    """Any NaN is the one whose bits but the sign are all ones."""
    unsigned, nan = (np.uint16, 0x7FFF) if values.dtype == np.float16 else (np.uint32, 0x7FFFFFFF)
    return np.where(np.isnan(values), unsigned(nan), values.view(unsigned)).view(values.dtype)

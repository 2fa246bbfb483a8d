"""How a matmul instruction sums its products: in float32, or as measured on the chips."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .numerics import Numerics

Array = NDArray[Any]


def matmul(a: Array, b: Array, c: Array | None, kind: str, numerics: Numerics, arch: str) -> Array:
    """a b + c in float32: a [..., M, K], b [..., K, N], c [..., M, N] or None for zeros.

    kind   of the operands in PTX: "bf16", "f16", "tf32", "e4m3", "e5m2"; their values are given in float32
    arch   "sm_80", "sm_90"
    """
    products = np.matmul(a, b)
    return products if c is None else products + c


def integer_matmul(a: Array, b: Array, c: Array | None, saturates: bool) -> Array:
    """a b + c of 8-bit integers, given as float32, in int32: clamped to its ends, or modulo 2^32."""
    total = np.matmul(a, b).astype(np.int64)
    if c is not None:
        total = total + c
    return np.clip(total, -(2**31), 2**31 - 1).astype(np.int32) if saturates else total.astype(np.int32)

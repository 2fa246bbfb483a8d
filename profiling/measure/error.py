"""How far a result is from its reference."""

from __future__ import annotations

import math

from torch import Tensor


def relative_rms(output: Tensor, reference: Tensor) -> float:
    """RMS of the difference over that of the reference, in float64 where the reference is; not finite where the
    output is not."""
    if output.shape != reference.shape:
        return math.inf
    exact = reference.double()
    return float((output.to(exact) - exact).norm() / exact.norm())

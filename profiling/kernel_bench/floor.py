"""The least time of a call that is believed, from what this run has measured of the device."""

from __future__ import annotations

from ..measure.rates import CopyBandwidth, UnitRates
from ..step.call import OperatorCall

# Above the fastest large matmul of the run: a short call may meet a higher clock.
_OVER_MATMUL = 1.25
# Above a copy's bandwidth: a call that mostly reads is faster, and a cache may hold half of what rotates past it.
_OVER_COPY = 4.0
_MASKS = ("key_lengths", "key_mask")


def least_call_ms(
    call: OperatorCall, rates: UnitRates | None, copy: CopyBandwidth | None, is_cold: bool
) -> float | None:
    """Milliseconds below which a call's time is impossible; None where nothing is known.

    The longer of its FLOPs at a rate that no matmul reached, and, where inputs rotate past the cache (`is_cold`),
    of its bytes at a bandwidth that no memory has. Exponentials do not count: a kernel may compute them on any
    unit. Neither do calls with a mask, which may skip what it hides.
    """
    if any(tensor.name in _MASKS for tensor in call.tensors):
        return None
    least = []
    if rates is not None and (flops := call.flops) is not None:
        flop_per_ms = 2 * rates.matrix_size**3 / rates.matrix_ms.min
        least.append(flops / (_OVER_MATMUL * flop_per_ms))
    if copy is not None and is_cold:
        least.append(call.bytes_moved / (_OVER_COPY * 1e6 * copy.gb_per_s))
    return max(least, default=None)

"""Whether a time is one of the work, and a result one of its inputs: judged outside the clock.

Times: none is below the floor of its case, none is zero, the host's two clocks agree, and the device is done when
the stream that is timed is. Results: plain tensors, finite, never seen before, written by the call that returned
them, and the same afterwards. docs/integrity.md has the cheats that each of these finds, and what none finds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .outcomes import Untrusted
from .timing import Timed

# What two clocks of the host may differ by, which are read one after the other, and what the host's and the
# device's may: after the device's last work the host has to wake up.
_SECOND_MS, _TAIL_MS, _SHARE = 2.0, 0.2, 0.02

# NaNs with bits that no arithmetic makes, so that memory that was filled with them is known again.
_POISON: dict[torch.dtype, tuple[torch.dtype, int]] = {
    torch.float64: (torch.int64, 0x7FF8_1DAD_0000_1DAD),
    torch.float32: (torch.int32, 0x7FC0_1DAD),
    torch.float16: (torch.int16, 0x7EAD),
    torch.bfloat16: (torch.int16, 0x7FDA),
}

FIRST_CALL = "its first call"
WARM_UP = "its warm-up"


def impossible(times: Sequence[Timed[None]], least_ms: float | None, what: str) -> str | None:
    """Why these times of calls that all do the same work cannot be that work's; None where they can.

    least_ms: the floor of a call, None where it is not known; `what` is a call ("a trajectory of 2 evaluations").
    The fastest call counts for the floor, as one impossible sample is too many. For what clocks differ by it is
    the call where they differ least: a host that is interrupted between two clocks sees that in some calls.
    """
    if not times:
        return None
    fastest = min(min(t.wall_ms, t.wall_ms if t.gpu_ms is None else t.gpu_ms) for t in times)
    if not fastest > 0:
        return f"no time passed: {what} took {fastest:g} ms by its clock"
    if least_ms is not None and fastest < least_ms:
        return (
            f"below the floor: {what} took {fastest:.4g} ms, and takes at least {least_ms:.4g} ms on this machine"
        )
    both = [(t.second_ms, t.wall_ms) for t in times if t.second_ms is not None]
    if by := _excess(both, _SECOND_MS):
        return f"a host's clock that is wrong: of {what} a second one says {by:.4g} ms more, or yet more"
    on_gpu = [(t.wall_ms, t.gpu_ms) for t in times if t.gpu_ms is not None]
    if by := _excess([(gpu, wall) for wall, gpu in on_gpu], _TAIL_MS):
        return f"a device's clock that is wrong: of {what} it says {by:.4g} ms more than the host's around it"
    if by := _excess(on_gpu, _TAIL_MS):
        return f"work on a side stream: {what} kept the device for {by:.4g} ms after the stream that is timed"
    return None


def _excess(pairs: Sequence[tuple[float, float]], allowed_ms: float) -> float:
    """By how much the first of a pair is the longer time, at the least; 0 where two clocks may differ by that."""
    if not pairs or any(one - other <= allowed_ms + _SHARE * one for one, other in pairs):
        return 0.0
    return min(one - other for one, other in pairs)


def poison(tensor: Tensor) -> None:
    """Fills a floating-point tensor with NaNs that `is_poisoned` knows; leaves others alone."""
    if tensor.dtype in _POISON and tensor.numel():
        integer, bits = _POISON[tensor.dtype]
        with torch.inference_mode():
            tensor.detach().view(integer).fill_(bits)


def is_poisoned(tensor: Tensor) -> bool:
    """Whether all of a tensor is as `poison` leaves it."""
    if tensor.dtype not in _POISON or not tensor.numel():
        return False
    integer, bits = _POISON[tensor.dtype]
    return bool((tensor.detach().view(integer) == bits).all())


def check_plain(result: object) -> None:
    """Raises Untrusted for a tensor of a class of its own: what it does when it is read, no clock sees."""
    if isinstance(result, Tensor) and type(result) not in (Tensor, torch.nn.Parameter):
        raise Untrusted(
            "impossible", f"a lazy result: it is a {type(result).__name__}, which may do its work when it is read"
        )


@dataclass
class Returned:
    """The results that one backend has returned: each is taken as it was then, and its memory poisoned later."""

    # Where each result, by its digest, was first seen.
    _seen: dict[bytes, str] = field(default_factory=dict)
    # The last result in its own memory, its digest and where it was returned.
    _held: tuple[Tensor, bytes, str] | None = None

    def take(self, result: Tensor, where: str, may_repeat: str | None = None) -> Tensor:
        """The result as float64 of its own on the CPU.

        where: as messages say it ("round 2"). may_repeat: the earlier result with the same inputs. Raises
        Untrusted where the result is another earlier one, was not written, or is no plain tensor.
        """
        check_plain(result)
        if is_poisoned(result):
            raise Untrusted(
                "incorrect",
                f"a cached output: in {where} it returned the memory of an earlier result, unwritten",
            )
        taken = result.detach().to("cpu", torch.float64, copy=True)
        digest = _digest(taken)
        earlier = self._seen.setdefault(digest, where)
        if earlier not in (where, may_repeat):
            raise Untrusted(
                "incorrect",
                f"a cached output: in {where} it returned the result of {earlier}, though the inputs were others",
            )
        self._held = (result, digest, where)
        if result.device.type != "cpu":
            # Nothing runs on the device now. Held, it would take room in the pool from another backend's sample.
            self.let_go()
        return taken

    def let_go(self) -> None:
        """Poisons the last result's memory, before the next call. Raises Untrusted where it has changed since."""
        if self._held is None:
            return
        (result, digest, where), self._held = self._held, None
        changed = _digest(result.detach().to("cpu", torch.float64)) != digest
        poison(result)
        if changed:
            raise Untrusted(
                "impossible", f"work after the call: the result of {where} changed after it had been returned"
            )


def _digest(values: Tensor) -> bytes:
    """Of shape and bits."""
    found = hashlib.blake2b(str(tuple(values.shape)).encode())
    found.update(values.contiguous().numpy().data)
    return found.digest()

"""What a peer makes of a call: how its arguments are prepared, and the callable that is timed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from ldmperf.kernels import Launch

Arguments = dict[str, Any]


def _as_they_are(arguments: Arguments) -> Arguments:
    return arguments


@dataclass(frozen=True)
class Implementation:
    """`call(**prepare(arguments))`, of which `call` is timed; it returns None where it updates its arguments.

    `setting` is entered once around many calls: a switch that a program sets at its start. `launches`: what a call
    of our kernel launches, for arguments that are not prepared.
    """

    call: Callable[..., Any]
    prepare: Callable[[Arguments], Arguments] = _as_they_are
    setting: Callable[[], AbstractContextManager[Any]] = nullcontext
    launches: Callable[..., Sequence[Launch]] | None = None

    def polynomial(self, arguments: Arguments) -> int | None:
        """How many of every eight exponentials its launches evaluate as a polynomial, where they say so."""
        launches = [] if self.launches is None else self.launches(**arguments)
        found = [launch.arguments.get("POLYNOMIAL") for launch in launches]
        return max((int(share) for share in found if share is not None), default=None)

"""A turn among the sides of `ldmperf compare --commits`: of their processes one runs at a time, sample by sample.

The machine drifts by more in the half minute between two whole runs than many a change is worth, and by little
between two samples. So a side that has taken a round of samples lets the others take one. compare/turns.py, which
deals the turns, says the protocol.
"""

from __future__ import annotations

import os
import socket
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

# The path of the socket at which turns are asked for, and the processes that wait during the first one.
TURNS_VARIABLE, WAITING_VARIABLE = "LDMPERF_TURNS", "LDMPERF_WAITING"
ASKED = b"."


def named(processes: Iterable[int]) -> str:
    """The processes as a grant and the variable have them."""
    return " ".join(map(str, processes))


def granted(waiting: Iterable[int]) -> bytes:
    """The line that grants a turn: the processes of the other sides, which wait meanwhile."""
    return f"{named(waiting)}\n".encode()


@dataclass
class Turns:
    """This process's turns. `waited`: seconds that others had theirs.

    on_wait: called with True before a turn is waited for, and with False when it has come.
    """

    waited: float = 0.0
    on_wait: Callable[[bool], None] = lambda is_waiting: None
    _waiting: frozenset[int] | None = None
    _dealer: socket.SocketIO | None = field(default=None, repr=False)

    @property
    def waiting(self) -> frozenset[int]:
        """The processes that wait while this one runs."""
        if self._waiting is None:
            return frozenset(map(int, os.environ.get(WAITING_VARIABLE, "").split()))
        return self._waiting

    def end(self) -> None:
        """Ends this turn and waits for the next; does nothing where nobody deals turns.

        Where nobody answers there is a warning, and from there on no turns are taken. A dealer that ends once it
        was reached is an interrupt: there is nobody for whom to go on, and others may be running.
        """
        address = os.environ.get(TURNS_VARIABLE)
        if not address:
            return
        start = time.monotonic()
        try:
            self._dealer = self._dealer or _connected(address)
        except OSError as error:
            os.environ.pop(TURNS_VARIABLE)
            warnings.warn(f"{TURNS_VARIABLE}: {address} deals no turns ({error.strerror}); unset it", stacklevel=2)
            return
        self.on_wait(True)
        try:
            self._dealer.write(ASKED)
            grant = self._dealer.readline()
        except OSError:
            grant = b""
        if not grant:
            raise KeyboardInterrupt(f"whoever dealt turns at {address} has ended")
        self._waiting = frozenset(map(int, grant.split()))
        self.waited += time.monotonic() - start
        self.on_wait(False)


def _connected(address: str) -> socket.SocketIO:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.connect(address)
        # The file keeps the connection open.
        return connection.makefile("rwb", buffering=0)


TURNS = Turns()


def own_time() -> float:
    """Seconds of a clock that nothing adjusts and that stands while others have their turns."""
    return time.monotonic() - TURNS.waited

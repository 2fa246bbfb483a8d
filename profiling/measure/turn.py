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
from collections.abc import Iterable
from dataclasses import dataclass, field

# The path of the socket at which turns are asked for.
TURNS_VARIABLE = "LDMPERF_TURNS"
ASKED = b"."


def granted(others: Iterable[int]) -> bytes:
    """The line that grants a turn: the processes of the other sides, which wait meanwhile."""
    return f"{' '.join(map(str, others))}\n".encode()


@dataclass
class Turns:
    """This process's turns. `others`: the processes that wait while it runs, as the last grant tells."""

    others: frozenset[int] = frozenset()
    _dealer: socket.SocketIO | None = field(default=None, repr=False)

    def end(self) -> float:
        """Ends this turn and waits for the next; seconds of waiting, 0 where nobody takes turns.

        A dealer that does not answer is a warning, and from there on no turns are taken.
        """
        address = os.environ.get(TURNS_VARIABLE)
        if not address:
            return 0.0
        start = time.monotonic()
        try:
            dealer = self._dealer = self._dealer or _connected(address)
            dealer.write(ASKED)
            grant = dealer.readline()
            if not grant:
                raise ConnectionError("it has ended")
        except OSError as error:
            os.environ.pop(TURNS_VARIABLE)
            self.others = frozenset()
            reason = error.strerror or error
            warnings.warn(f"{TURNS_VARIABLE}: {address} deals no turns ({reason}); unset it", stacklevel=2)
        else:
            self.others = frozenset(map(int, grant.split()))
        return time.monotonic() - start


def _connected(address: str) -> socket.SocketIO:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.connect(address)
        # The file keeps the connection open.
        return connection.makefile("rwb", buffering=0)


TURNS = Turns()

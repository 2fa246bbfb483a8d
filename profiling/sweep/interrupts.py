"""Ctrl-C while a run's groups are measured: the first lets the group in flight finish, the second does not."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType
from typing import Any, Self


class Interrupts:
    """As a context, decides what SIGINT and SIGTERM do.

    is_asked: no further group is to begin. is_measuring: there is something that the first Ctrl-C can wait for.
    on_first: called then. In all other cases, and on SIGTERM, KeyboardInterrupt is raised. Outside the main thread
    signals are somebody else's.
    """

    def __init__(self, on_first: Callable[[], None]) -> None:
        self.is_asked = False
        self.is_measuring = False
        self._on_first = on_first
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._heard)
        except ValueError:
            self._before.clear()
        return self

    def __exit__(self, *_: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)

    def _heard(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGTERM or self.is_asked or not self.is_measuring:
            raise KeyboardInterrupt
        self.is_asked = True
        self._on_first()

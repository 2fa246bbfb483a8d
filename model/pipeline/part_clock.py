"""`PartClock`: the times of a pipeline's parts, and progress through them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

# progress(part, done, total): of "text" and "decode" 0 and then 1 of 1, of "steps" one more at each.
Progress = Callable[[str, int, int], None]


class PartClock:
    """Times the parts of a call on the host, each to the end of its work on the device, and tells progress."""

    def __init__(self, device: torch.device, progress: Progress | None) -> None:
        self.seconds: dict[str, float] = {}
        self._device = device
        self._progress = progress or (lambda part, done, total: None)

    @contextmanager
    def part(self, name: str, total: int) -> Iterator[Callable[[], None]]:
        """A function to call after each of `total` things; a part of one thing is counted at its end."""
        done = 0

        def count() -> None:
            nonlocal done
            done += 1
            self._progress(name, done, total)

        self._progress(name, 0, total)
        begin = time.perf_counter()
        yield count
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self.seconds[name] = time.perf_counter() - begin
        if not done:
            count()

"""When the parts of a pipeline's call end, on the clock of the device, without waiting for it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch

# In the order in which they run; "rest" is what comes after the decoder.
PARTS = ("text", "steps", "decode", "rest")


@dataclass
class PartMarks:
    """The marks of one call: its start, and the end of each part.

    On a GPU a mark is an event in the stream of the work; elsewhere it is the host's clock.
    """

    device: torch.device
    _marks: dict[str, Any] = field(default_factory=dict)

    def start(self) -> None:
        """The call begins."""
        self._marks = {"start": self._now()}

    def end(self, part: str) -> None:
        """That part has ended; of several ends the last counts."""
        self._marks[part] = self._now()

    @property
    def parts(self) -> Mapping[str, float]:
        """Milliseconds of each part of the last call, which the device has done."""
        marks = [self._marks["start"], *(self._marks[part] for part in PARTS)]
        return {part: self._ms(*ends) for part, ends in zip(PARTS, pairwise(marks), strict=True)}

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _ms(self, begin: Any, end: Any) -> float:
        return float(begin.elapsed_time(end)) if self.device.type == "cuda" else 1e3 * (end - begin)

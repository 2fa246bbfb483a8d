"""What a capture costs and saves (`Capture`), and which shapes are captured where that must pay (`Worth`)."""

from __future__ import annotations

import logging
import math
from collections import OrderedDict, deque
from collections.abc import Hashable
from dataclasses import dataclass

logger = logging.getLogger(__name__)

# Shapes and lines that are remembered; a server that is asked for any shape must not grow.
_REMEMBERED = 256


@dataclass(frozen=True)
class Capture:
    """A capture as far as it is known now.

    warm_up_ms    host time of the calls before the capture
    capture_ms    host time of the capture
    memory_bytes  what the capture added to the memory of all captures
    buffer_bytes  its inputs, outputs and state, which lie outside that memory
    eager_ms      device time of one eager call, the second of the warm-up
    replay_ms     device time of the fastest replay measured; None until the device is done with one
    uses          replays so far

    Device times are from one event to another, so they hold the waits for the host where a call launches slower
    than the device works.
    """

    description: str
    warm_up_ms: float
    capture_ms: float
    memory_bytes: int = 0
    buffer_bytes: int = 0
    eager_ms: float = 0.0
    replay_ms: float | None = None
    uses: int = 0

    @property
    def cost_ms(self) -> float:
        return self.warm_up_ms + self.capture_ms

    @property
    def breakeven(self) -> int | None:
        """Replays after which the capture has paid, or None: a replay is not faster, or not measured yet."""
        if self.replay_ms is None or self.eager_ms <= self.replay_ms:
            return None
        return math.ceil(self.cost_ms / (self.eager_ms - self.replay_ms))

    @property
    def has_paid(self) -> bool:
        return self.breakeven is not None and self.uses >= self.breakeven

    @property
    def is_slower(self) -> bool:
        """Whether a replay was measured and is not faster than the eager call."""
        return self.replay_ms is not None and self.replay_ms >= self.eager_ms

    def runs_to_pay(self, steps: int) -> int | None:
        """Runs of `steps` replays after which the capture has paid; None where `breakeven` is."""
        return None if self.breakeven is None else math.ceil(self.breakeven / steps)

    def __str__(self) -> str:
        replay = "a replay not measured yet" if self.replay_ms is None else f"a replay {self.replay_ms:.3g} ms"
        if self.replay_ms is None:
            pays = ""
        elif self.breakeven is None:
            pays = ", never pays"
        else:
            pays = f", pays after {self.breakeven} replays"
        return (
            f"{self.description}: {self.uses} replays; captured in {self.cost_ms:.3g} ms, an eager call "
            f"{self.eager_ms:.3g} ms, {replay}{pays}; {self.memory_bytes / 2**20:.1f} MiB in the pool, "
            f"{self.buffer_bytes / 2**20:.1f} MiB of buffers"
        )


@dataclass
class _Shape:
    """A shape without a capture: why it runs eagerly for good, or the eager calls before the next capture."""

    reason: str = ""
    calls: int = 0


class Worth:
    """Decides which shapes are captured, where a capture must pay (`is_asked`); otherwise all are.

    A shape is captured at its first call, because only a capture tells what one costs. From then on it runs
    eagerly where its replay is not faster, or where memory ran out. Where its capture was dropped before it had
    paid, it runs eagerly until the time that a capture would have saved is the price of one. From one capture to
    the next it never takes more than twice the extra time of the better of two plans that know the future: never
    to capture, or to capture at once (the ski-rental rule; Karlin, Manasse, Rudolph, Sleator 1988).
    """

    def __init__(self, is_asked: bool) -> None:
        self._is_asked = is_asked
        self._shapes: OrderedDict[Hashable, _Shape] = OrderedDict()
        self._lines: deque[str] = deque(maxlen=_REMEMBERED)

    @property
    def lines(self) -> tuple[str, ...]:
        return tuple(self._lines)

    def takes(self, key: Hashable) -> bool:
        """Whether a call of this shape, which has no capture, is to be captured; counts the calls that are not."""
        shape = self._shapes.get(key)
        if shape is None or not self._is_asked:
            return True
        self._shapes.move_to_end(key)
        if shape.reason:
            return False
        shape.calls -= 1
        return shape.calls < 0

    def dropped(self, key: Hashable, capture: Capture, why: str) -> None:
        """Notes that a capture was dropped; before it has paid, its shape has to wait for the next."""
        line = f"{capture.description}: the capture was dropped after {capture.uses} replays, {why}"
        # Of a replay that was not measured, the least number is taken: that of one that takes no time.
        saved = capture.eager_ms - (capture.replay_ms or 0.0)
        if self._is_asked and not capture.has_paid and saved > 0:
            calls = math.ceil(capture.cost_ms / saved)
            line += f"; it had not paid, so {calls} calls run eagerly before the next capture"
            self._remember(key, _Shape(calls=calls))
        self.say(line)
        if self._is_asked and capture.is_slower:
            self.refuse_slower(key, capture)

    def refuse_slower(self, key: Hashable, capture: Capture) -> None:
        reason = f"a replay took {capture.replay_ms:.3g} ms, an eager call {capture.eager_ms:.3g} ms"
        self.refuse(key, capture.description, reason)

    def refuse(self, key: Hashable, description: str, reason: str) -> None:
        """Notes that a shape runs eagerly until the next `forget`."""
        self._remember(key, _Shape(reason=reason))
        self.say(f"{description} runs eagerly until clear(): {reason}", logging.WARNING)

    def forget(self) -> None:
        self._shapes.clear()

    def say(self, line: str, level: int = logging.INFO) -> None:
        """Keeps a decision in words, and logs it."""
        self._lines.append(line)
        logger.log(level, "%s", line)

    def _remember(self, key: Hashable, shape: _Shape) -> None:
        self._shapes[key] = shape
        self._shapes.move_to_end(key)
        while len(self._shapes) > _REMEMBERED:
            self._shapes.popitem(last=False)

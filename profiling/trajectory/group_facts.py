"""What the backends of a group have in common, and a record of one of them."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from ..measure.environment import DeviceState, Environment
from ..measure.nvml import NO_SENSOR, Sensor
from ..measure.recorded import Samples, Status, utc_now
from ..measure.timing import RepetitionRule
from ..measure.turn import TURNS
from .case import Case
from .record_parts import Floor, Harness, Phases
from .records import Record


@dataclass
class GroupFacts:
    """What the lanes of a group have in common: how they are measured, and what all their records say.

    backends: the names of all lanes, in order. ran: called after each trajectory with its case and "first call",
    "warm-up", "timing" or "check". entered: called before each phase, never inside a timed call, with the case and
    the phase (`runner.Listener.entered`). sensor: the device's. What the network tells is None until it is made.
    floor_anew: the floor at ceilings measured once more, asked before a time below `least_step_ms` is called
    impossible.
    """

    run_id: str
    environment: Environment
    rule: RepetitionRule
    backends: tuple[str, ...]
    ran: Callable[[Case, str], None]
    before: DeviceState
    sensor: Sensor = NO_SENSOR
    started_at: datetime = field(default_factory=utc_now)
    weights_ms: float | None = None
    parameters: int | None = None
    gflop: float | None = None
    evaluations: int | None = None
    floor: Floor | None = None
    floor_anew: Callable[[], Floor | None] | None = None
    # Nobody can know the inputs of timed rounds before they are made.
    round_seed: int = field(default_factory=lambda: secrets.randbits(48))
    decoder_ms: Samples | None = None
    groups_before: int | None = None
    entered: Callable[[Case, str], None] = lambda case, phase: None

    def record(self, case: Case, **measured: Any) -> Record:
        """A record of the case: what the group knows, and the fields that were `measured`."""
        return Record(
            run_id=self.run_id,
            case_key=case.key,
            case=case.as_recorded(),
            parameters=self.parameters,
            gflop_per_forward=self.gflop,
            evaluations=self.evaluations,
            floor=self.floor,
            decoder_ms=self.decoder_ms,
            device_before=self.before,
            environment=self.environment,
            started_at=self.started_at,
            **measured,
        )

    def harness(self, **measured: Any) -> Harness:
        """How a lane was measured: the group's rule, and the fields that were `measured`."""
        return Harness(
            min_count=self.rule.min_count,
            min_seconds=self.rule.min_seconds,
            round_seed=self.round_seed,
            in_turns=TURNS.waited > 0,
            groups_before=self.groups_before,
            **measured,
        )

    def lost(self, case: Case, status: Status, message: str) -> Record:
        """The record of a case whose lane is gone, with the process that measured it."""
        return self.record(
            case,
            status=status,
            message=message,
            phases=Phases(weights_ms=self.weights_ms),
            harness=self.harness(warmup_count=0, interleaved=()),
        )

    def least_ms(self, fastest_ms: float) -> float | None:
        """What a trajectory takes at least, in ms; None where that is not known.

        Where `fastest_ms`, of a measured one, is less, the ceilings are measured once more first: those of a busy
        machine are too low, and the floor of an honest time may be.
        """
        if self.floor is None or not self.evaluations:
            return None
        if fastest_ms < self.evaluations * self.floor.least_step_ms and self.floor_anew is not None:
            self.floor = self.floor_anew() or self.floor
        return self.evaluations * self.floor.least_step_ms

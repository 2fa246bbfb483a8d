"""Tasks for tests of a study's pool (here, as workers import what they run), and trainings that are cut off."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass

from closed_world.study import Study


@dataclass(frozen=True)
class Stopped:
    """Ends its own worker by a signal when half of it is done."""

    by: signal.Signals
    cost: float = 2.0

    def run(self, study: Study) -> None:
        study.tell(0.5)
        os.kill(os.getpid(), self.by)
        time.sleep(60)


@dataclass(frozen=True)
class WaitsForTheBar:
    """Ends when a file says that its half was seen; after a minute without, it fails."""

    cost: float = 3.0

    def run(self, study: Study) -> None:
        study.tell(0.5)
        for _ in range(600):
            if (study.folder / "seen").exists():
                return
            time.sleep(0.1)
        raise TimeoutError("half of the task was never on the bar")


@dataclass(frozen=True)
class Leaves:
    """Leaves a file."""

    cost: float = 1.0

    def run(self, study: Study) -> None:
        (study.folder / "left").touch()


@dataclass(frozen=True)
class TellsBlocked:
    """Leaves whether its worker is deaf to Ctrl-C."""

    cost: float = 1.0

    def run(self, study: Study) -> None:
        blocked = signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ())
        (study.folder / "blocked").write_text(str(blocked))


def cut_off_after(steps, training):
    """The training, which is interrupted as by Ctrl-C when so many steps are done."""
    step = training.step

    def until():
        if training.done == steps:
            raise KeyboardInterrupt
        return step()

    training.step = until
    return training

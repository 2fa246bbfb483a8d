"""The energy of a group's cases: a window of trajectories each, after the timing of all of them.

Two seconds of one backend alone would leave a hotter GPU to those that are still timed. So a record is written
without its energy as soon as its case is timed, and once more with it. A profile with a deadline loses no sample
to windows: they have seconds of their own, by which its timing ends later.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..measure.energy import LEAST_COUNTED_S, USUAL_S, CounterWatch, NoEnergy, count_energy
from ..measure.environment import DeviceState, state_now
from ..measure.outcomes import failure
from ..measure.timing import Deadline, timed
from .backend import Problem
from .lane import Lane
from .record_parts import Energy
from .records import Record
from .short_traces import trace_order

# The share of a profile's seconds that windows may take, out of those for traces.
ENERGY_SHARE = 0.1
# Of the fastest sample, what a trajectory in a window takes at least.
_LEAST_SHARE = 0.5


@dataclass
class EnergyTime:
    """The seconds that windows may take: a share of those of `whole`. `timing` is put off by what they took.

    on_record: called with each record that energy was still to be measured of, now complete. taken: what windows
    took so far, those of earlier processes included.
    """

    whole: Deadline
    timing: Deadline
    on_record: Callable[[Record], None]
    taken: float = 0.0

    @property
    def left(self) -> float:
        """Seconds; infinite without a deadline."""
        return max(min(ENERGY_SHARE * self.whole.seconds - self.taken, self.whole.left), 0.0)

    def take(self, seconds: float) -> None:
        """A window took so long."""
        self.taken += seconds
        if self.timing is not self.whole:
            self.timing.put_off(seconds)


def energy_windows(lanes: Sequence[Lane], problem: Problem, time: EnergyTime) -> None:
    """Completes the records of the lanes that have a time by their energy, or by why there is none.

    The most important backends come first (`trace_order`). Only lanes on a GPU have anything to complete.
    """
    timed = [lane for lane in lanes if lane.made is not None and lane.made.energy is None and lane.active]
    for lane in sorted(timed, key=lambda lane: trace_order(lane.case)):
        assert lane.made is not None
        lane.shared.entered(lane.case, "energy")
        begun = time.whole.now()
        energy, during = _energy(lane, problem, time)
        time.take(time.whole.now() - begun)
        time.on_record(lane.made.model_copy(update={"energy": energy, "device_during": during}))


def _energy(lane: Lane, problem: Problem, time: EnergyTime) -> tuple[Energy, DeviceState]:
    sensor, during = lane.shared.sensor, lane.during
    reason = sensor.why_no_energy()
    if reason is None and (needed := seconds_of_a_window(lane)) > time.left:
        reason = (
            f"--seconds left {time.left:.1f} s for energy, {ENERGY_SHARE:.0%} of them in all; a window takes "
            f"{needed:.1f} s"
        )
    if reason is not None:
        return Energy(message=reason), during.state
    readings: list[DeviceState] = []

    def on_update() -> None:
        readings.append(state_now(sensor))

    # Inputs that no call had: what it remembers of others is no help here.
    trajectory, inputs = lane.trajectory, lane.round_inputs(problem, -1)
    assert trajectory is not None

    def run() -> None:
        # Back to back, as the samples are run, with nothing between two of them.
        timed(lambda: trajectory(inputs), lane.device)

    try:
        with lane.watch.around():
            # What was captured or freed after timing is made again outside the window.
            run()
            counted = count_energy(run, CounterWatch(sensor.millijoules, on_update))
        _check_work(lane, 1e3 * counted.window_s / counted.calls)
    except NoEnergy as unknown:
        energy = Energy(message=str(unknown))
    except Exception as error:
        energy = Energy(message=f"the trajectories for it failed: {failure(error)[1]}")
    else:
        energy = Energy(
            joules=counted.joules,
            window_s=counted.window_s,
            trajectories=counted.calls,
            counted_s=counted.counted_s,
            relative_error=counted.relative_error,
        )
    for reading in readings:
        during.add(reading)
    return energy, during.state


def _check_work(lane: Lane, mean_ms: float) -> None:
    """Raises NoEnergy where a trajectory of the window, all with the same inputs, took less than one of timing.

    Back to back it may be somewhat faster; one that remembers the result of these inputs is far from it.
    """
    assert lane.made is not None
    assert lane.made.wall_ms is not None
    if mean_ms < _LEAST_SHARE * lane.made.wall_ms.min:
        raise NoEnergy(
            f"a trajectory took {mean_ms:.4g} ms in the window of energy and {lane.made.wall_ms.min:.4g} ms at "
            "least when timed, so work was left out"
        )


def seconds_of_a_window(lane: Lane) -> float:
    """What a window of whole trajectories usually takes, one before it included."""
    assert lane.made is not None
    assert lane.made.wall_ms is not None
    trajectory = lane.made.wall_ms.p50 / 1e3
    whole = math.ceil(USUAL_S / trajectory) if trajectory else 0
    return max(whole * trajectory, LEAST_COUNTED_S) + trajectory

"""One call: its peers built, checked, timed in turn, checked again, recorded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..measure.device_watch import DeviceWatch
from ..measure.environment import Environment, state_now
from ..measure.nvml import Sensor
from ..measure.outcomes import failure, release_memory
from ..measure.rates import CopyBandwidth, UnitRates
from ..measure.recorded import Samples, utc_now
from ..measure.settings import measuring_settings
from ..measure.timing import garbage_collection_paused, interleave
from ..measure.turn import TURNS
from .device import Pace, input_sets, l2_cache_bytes
from .floor import least_call_ms
from .inputs import CallInputs, tolerance_of
from .kernel_records import KernelRecord, Mode, record_key
from .peer_lane import BuiltPeer, Check, PeerLane
from .peers import Peer
from .selection import Job


class KernelBench:
    """Measures jobs on one device; `copy` and `rates` are what that device does, measured in this run."""

    def __init__(
        self,
        device: str,
        peers: Sequence[Peer],
        modes: Sequence[Mode],
        pace: Pace,
        environment: Environment,
        copy: CopyBandwidth | None,
        rates: UnitRates | None = None,
        seed: int = 0,
    ) -> None:
        self.device_name, self.device = device, torch.device(device)
        self.peers, self.modes, self.pace = peers, modes, pace
        self.environment, self.copy, self.rates, self.seed = environment, copy, rates, seed
        # Operators of which a call was seen.
        self._operators: set[str] = set()

    def keys(self, job: Job) -> set[str]:
        """The keys of the records that `measure` would make of it now."""
        return {
            record_key(job.call, self.device_name, peer.name, mode, self.seed)
            for peer in self._peers_of(job)
            for mode in self.modes
        }

    def skip(self, job: Job) -> None:
        """Counts as measured. An operator that a peer cannot compute has one record, of its first call."""
        self._operators.add(job.call.operator)

    def _peers_of(self, job: Job) -> list[Peer]:
        first = job.call.operator not in self._operators
        return [peer for peer in self.peers if peer.serves(job.call, first)]

    @torch.inference_mode()
    def measure(self, job: Job) -> list[KernelRecord]:
        """The records of all peers in all modes; only an interrupt is raised."""
        call, peers = job.call, [BuiltPeer(peer, self.device) for peer in self._peers_of(job)]
        self._operators.add(call.operator)
        sensor = Sensor.of(self.device_name)
        lanes = [PeerLane(built, mode, during=DeviceWatch(sensor)) for mode in self.modes for built in peers]
        started_at, before, waited = utc_now(), state_now(sensor), TURNS.waited
        count, is_cold = input_sets(call.bytes_moved, l2_cache_bytes(self.device))
        with measuring_settings():
            try:
                inputs = CallInputs(call, count, self.device, self.seed)
                check = Check(inputs, inputs.reference())
            except Exception as error:
                for built in peers:
                    built.fail_with(error)
            else:
                for built in peers:
                    built.begin(check)
                least_ms = least_call_ms(call, self.rates, self.copy, is_cold)
                try:
                    for mode in self.modes:
                        of_mode = [lane for lane in lanes if lane.mode == mode and lane.built.active]
                        check = self._time(of_mode, check, least_ms)
                except Exception as error:
                    # Nothing more can be checked; what was checked stays.
                    for lane in lanes:
                        if lane.active and not lane.ms:
                            lane.fail_with(error)
            for lane in lanes:
                if lane.built.message is not None:
                    lane.fail(lane.built.status, lane.built.message)
        shared = {
            "size": job.size,
            "batch": job.batch,
            "case": call,
            "device": self.device_name,
            "seed": self.seed,
            "copy_bandwidth": self.copy,
            "unit_rates": self.rates if call.attention is not None else None,
            "device_before": before,
            "device_after": state_now(sensor),
            "environment": self.environment,
            "interleaved": tuple(peer.name for peer in self.peers),
            "in_turns": TURNS.waited > waited,
            "started_at": started_at,
        }
        clock, l2 = "device" if self.device.type == "cuda" else "host", "cold" if is_cold else "warm"
        timing = {"clock": clock, "input_sets": count, "l2": l2}
        records = [_record(lane, shared, timing) for lane in lanes]
        del peers, lanes
        release_memory()
        return records

    def _time(self, lanes: Sequence[PeerLane], check: Check, least_ms: float | None) -> Check:
        """Samples the lanes of one mode in turn, and checks them again, on other numbers: by the returned check.

        What the samples have left is checked too, but a peer that remembers its inputs by their place would be
        right there.
        """
        for lane in lanes:
            lane.prepare(self.pace)
        running = {lane.built.peer.name: lane for lane in lanes if lane.active}

        def failed(name: str, failure: Exception) -> None:
            running[name].fail_with(failure)
            for lane in running.values():
                lane.is_warm = False

        with garbage_collection_paused():
            times = interleave({name: lane.sample for name, lane in running.items()}, self.pace.rule, failed)
        for lane in running.values():
            if lane.active:
                lane.check_timed(check)
        check = _renewed(check, list(running.values()))
        for name, lane in running.items():
            if lane.active:
                lane.finish(times[name], check, least_ms)
            lane.release()
        release_memory()
        return check


def _renewed(check: Check, lanes: Sequence[PeerLane]) -> Check:
    """The check of other numbers. Where memory is short the last lane fails and gives back its own, and so on.

    Raises what the check raises when no lane is left to give room, or when it is not for memory.
    """
    while True:
        try:
            return check.renewed()
        except Exception as error:
            holders = [lane for lane in lanes if lane.active]
            if failure(error)[0] != "oom" or not holders:
                raise
            holders[-1].fail_with(error)


def _record(lane: PeerLane, shared: Mapping[str, Any], timing: Mapping[str, Any]) -> KernelRecord:
    """A lane's record: `shared` by all lanes of the call; `timing` tells how times were taken, where there are."""
    built, call = lane.built, shared["case"]
    if lane.active:
        own = {"calls_per_sample": lane.calls_per_sample, "delay_cycles": lane.delay_cycles}
        timing = {**timing, **own, "ms": Samples.of(lane.ms)}
    return KernelRecord(
        case_key=record_key(call, shared["device"], built.peer.name, lane.mode, shared["seed"]),
        peer=built.peer.name,
        mode=lane.mode,
        status=lane.status,
        message=lane.message,
        correctness=lane.correctness(tolerance_of(call)),
        first_call_ms=built.first_call_ms,
        polynomial=built.polynomial,
        device_during=lane.during.state,
        **shared,
        **(timing if lane.active else {}),
    )

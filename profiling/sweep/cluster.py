"""A run's groups as tasks of a Ray cluster: each with a GPU, or a node's cores, to itself."""

from __future__ import annotations

import logging
import math
import socket
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from ..measure.folders import RunError
from ..measure.timing import Deadline
from ..options import CaseError, device_kind
from ..terminal.visible import counted, visible
from ..trajectory.records import RecordStore
from ..trajectory.runner import groups, to_trace, wanted_and_left
from ..trajectory.short_traces import timing_deadline
from .cluster_group import ClusterGroup
from .cluster_lines import ClusterLines
from .events import Learned, Recorded, TookTurns
from .group_process import measured
from .interrupts import Interrupts
from .local import Sweep, SweepRun
from .on_node import Arrived, NodeEvent, Refused, on_node

# Starts Ray on this machine.
LOCAL = "local"
# How often Ctrl-C and the deadline are looked at while nothing comes.
_PAUSE_S = 0.5
_LONGEST_REASON = 300


def run_on_cluster(
    sweep: Sweep,
    store: RecordStore,
    lines: ClusterLines,
    deadline: Deadline,
    skip: Collection[str] = (),
) -> tuple[int, bool]:
    """As `run_sweep`, with each group a task of the Ray cluster that is connected, timed there and then traced.

    A group whose worker is lost begins again without the cases that have a record (`ClusterGroup.lost`). Raises
    RunError where a node may not measure, and for a case of a card by its number.
    """
    if numbered := next((case.device for case in sweep.cases if ":" in case.device), None):
        raise RunError(
            f"--ray: the run was begun for {numbered}, a card of one machine; go on with it without --ray"
        )
    wanted, left = wanted_and_left(sweep.cases, skip)
    timing = timing_deadline(wanted, deadline)
    located = {case.key: case for case in wanted}
    untraced = {record.case_key: record for record in to_trace(store.load(), located)}
    unfinished = {case.group_key for case in (*left, *(located[key] for key in untraced))}
    keys = {case.key for case in left}
    pending = [
        ClusterGroup(
            sweep.task(cases),
            {case.key for case in cases} - keys,
            {case.key: untraced[case.key] for case in cases if case.key in untraced},
        )
        for cases in groups(wanted)
        if cases[0].group_key in unfinished
    ]
    with Interrupts(lines.stopping) as interrupts:
        run = SweepRun(store, lines, deadline, timing, measured, interrupts)
        return _Tasks(run, lines, pending).all_done()


@contextmanager
def connected(address: str) -> Iterator[None]:
    """Ray, connected inside to the cluster at "auto" or HOST:PORT, or started on this machine for "local".

    Raises RunError where there is no such cluster, CaseError without Ray.
    """
    ray = _ray()
    if address.startswith("ray://"):
        raise RunError(f"--ray: {address} is for Ray's client, which streams nothing; give the head's HOST:PORT")
    try:
        _check_reachable(address)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            own = {"include_dashboard": False} if address == LOCAL else {}
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **own)
    except (OSError, OverflowError, RuntimeError, ValueError) as failure:
        first = str(failure).partition(".")[0].partition("\n")[0]
        raise RunError(
            f"--ray: no cluster at {address} ({first}); start one with: ray start --head, or give --ray {LOCAL}"
        ) from None
    try:
        yield
    finally:
        ray.shutdown()


def _check_reachable(address: str) -> None:
    """Raises OSError where nobody listens at HOST:PORT: Ray itself tries for minutes."""
    host, colon, port = address.rpartition(":")
    if colon and port.isdigit():
        with socket.create_connection((host.strip("[]"), int(port)), timeout=10):
            pass


def _ray() -> Any:
    try:
        import ray
    except ImportError:
        raise CaseError("--ray: Ray is not installed; pip install 'ldmperf[cluster]'") from None
    return ray


def cores_for(device: str, nodes: Sequence[Mapping[str, float]]) -> int:
    """The cores that a group on that device asks for: as many as every node can give, by the nodes' resources.

    On a GPU that GPU's share of its node's cores; on the CPU all cores of a node, as another group there would
    share them. 1 where no node is known.
    """
    if device_kind(device) == "cpu":
        shares = [node["CPU"] for node in nodes if node.get("CPU", 0) >= 1]
    else:
        shares = [node.get("CPU", 0) / node["GPU"] for node in nodes if node.get("GPU", 0) >= 1]
    return max(1, math.floor(min(shares, default=1)))


class _Tasks:
    """The groups of a run as tasks. running: each by Ray's generator of its events."""

    def __init__(self, run: SweepRun, lines: ClusterLines, pending: Sequence[ClusterGroup]) -> None:
        self._ray = _ray()
        self._run, self._lines = run, lines
        self._nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        # Each group has a process of its own beneath the worker (`measured`), which may serve the next one too.
        self._remote = self._ray.remote(num_returns="streaming", max_calls=0, max_retries=0)(on_node)
        self._running: dict[Any, ClusterGroup] = {}
        self._tell_of_missing([group.task.cases[0].device for group in pending])
        for group in pending:
            self._send(group)

    def all_done(self) -> tuple[int, bool]:
        """Waits for all; how many records were made, and whether Ctrl-C cut it short."""
        run, is_cut_short = self._run, False
        try:
            while self._running:
                run.interrupts.is_measuring = any(group.host for group in self._running.values())
                if run.interrupts.is_asked or run.timing.passed:
                    dropped = self._drop_waiting()
                    is_cut_short |= run.interrupts.is_asked and dropped
                ready, _ = self._ray.wait(list(self._running), num_returns=1, timeout=_PAUSE_S)
                for stream in ready:
                    self._next(stream)
        finally:
            for stream in self._running:
                self._ray.cancel(stream, force=True)
        return run.recorded, is_cut_short

    def _tell_of_missing(self, devices: Sequence[str]) -> None:
        has_gpu = any(node.get("GPU", 0) >= 1 for node in self._nodes)
        if not has_gpu and any(device_kind(device) != "cpu" for device in devices):
            self._lines.told("no node of the cluster has a GPU now; waiting for one")

    def _send(self, group: ClusterGroup) -> None:
        device = group.task.cases[0].device
        cores = cores_for(device, self._nodes)
        gpus = 0 if device_kind(device) == "cpu" else 1
        task = group.sent(self._run.whole, self._run.timing, cores)
        name = f"ldmperf {group.task.cases[0].label}"
        self._running[self._remote.options(num_cpus=cores, num_gpus=gpus, name=name).remote(task)] = group

    def _drop_waiting(self) -> bool:
        """Takes back the groups that no node has begun; whether there were any."""
        waiting = [stream for stream, group in self._running.items() if group.host is None]
        for stream in waiting:
            del self._running[stream]
            self._ray.cancel(stream, force=True)
        if waiting:
            self._lines.told(f"{counted(len(waiting), 'group')} not begun")
        return bool(waiting)

    def _next(self, stream: Any) -> None:
        """Takes one event of a group, or finds that there will be no more."""
        group = self._running[stream]
        try:
            event = self._ray.get(next(stream))
        except StopIteration:
            del self._running[stream]
        except self._ray.exceptions.RayError as failure:
            del self._running[stream]
            self._lost(group, failure)
        else:
            self._heard(group, event)

    def _heard(self, group: ClusterGroup, event: NodeEvent) -> None:
        group.heard(event)
        match event:
            case Refused(reason):
                raise RunError(f"--ray: {reason}")
            case Arrived(host, _, pid):
                self._lines.arrived(group.left or group.task.cases, host, pid)
            case Learned() | TookTurns():
                # Of another machine.
                pass
            case _:
                self._run.heard(event)

    def _lost(self, group: ClusterGroup, failure: Exception) -> None:
        reason = reason_of(failure)
        self._lines.lost(group.task.cases, group.host, reason)
        for record in group.lost(reason):
            self._run.heard(Recorded(record))
        if not group.is_ended and (group.left or group.untraced):
            self._send(group)


def reason_of(failure: Exception) -> str:
    """What Ray says of a lost task, in its first line, with its kind. Raises RunError where no node can do it."""
    cause = getattr(failure, "cause", None)
    lines = (visible(line.strip()) for line in str(cause or failure).splitlines() if line.strip())
    first = next(lines, "no message")[:_LONGEST_REASON]
    if isinstance(cause, ImportError) or "failed to import" in first:
        raise RunError(f"--ray: a node cannot load ldmperf ({first}); install the same ldmperf on all nodes")
    return f"{type(cause or failure).__name__}: {first}"

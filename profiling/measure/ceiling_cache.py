"""The ceilings of the devices here, measured once and kept in the user's cache folder at the best ever seen."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from .ceiling_probes import measure_ceilings
from .ceilings import CeilingDevice, Ceilings, best_of
from .conditions import crowded
from .environment import Environment, collect_environment, device_state
from .store import parsed, write_whole

# A process measures a device anew at most so often: where that changes nothing, more of it does neither.
MOST_ANEW = 3


class CeilingSource(Protocol):
    """Who tells the ceilings of a device ("cpu", "cuda:0")."""

    def of(self, device: str) -> Ceilings:
        """Those that are known."""
        ...

    def anew(self, device: str) -> Ceilings:
        """Measured again, the best of both: asked for before a time is called impossible."""
        ...


class KeptCeilings:
    """Reads a device's ceilings from its file in `folder`, or measures them there and then, and keeps the best.

    Those of a CPU that were only ever measured beside other work are measured again where there is none now.

    told: called with a line before seconds go into measuring, and where a file cannot be used or written, which is
    no failure: what was measured then serves this process alone. known: by device, what another process was told.
    """

    def __init__(
        self,
        told: Callable[[str], None],
        folder: Path | None = None,
        measure: Callable[[str, Environment], Ceilings] = measure_ceilings,
        known: Mapping[str, Ceilings] | None = None,
    ) -> None:
        self._told, self._measure = told, measure
        self._folder = ceilings_folder() if folder is None else folder
        self.known: dict[str, Ceilings] = dict(known or {})
        self._times_anew: dict[str, int] = {}

    def of(self, device: str) -> Ceilings:
        if device not in self.known:
            environment = collect_environment(device)
            kept = self._read(CeilingDevice.of(environment))
            if kept is None or (kept.crowded and not _crowded_now(kept.device)):
                kept = self._measured(device, environment)
            self.known[device] = kept
        return self.known[device]

    def anew(self, device: str) -> Ceilings:
        self._times_anew[device] = self._times_anew.get(device, 0) + 1
        if self._times_anew[device] <= MOST_ANEW:
            self.known[device] = self._measured(device, collect_environment(device))
        return self.known[device]

    def path(self, device: str) -> Path | None:
        """The file of the device's ceilings, whether it is there or not; None where nothing is kept."""
        return None if self._folder is None else self._file(CeilingDevice.of(collect_environment(device)))

    def _measured(self, device: str, environment: Environment) -> Ceilings:
        self._told(f"measuring what {device} does at most: copies, matmuls, exponentials (some seconds)")
        found = self._measure(device, environment)
        # Read again: another process may have measured meanwhile. Of two that write at once one best is lost.
        kept = self._read(found.device) or self.known.get(device)
        if kept is not None and kept.device == found.device:
            found = best_of(kept, found)
        self._write(found)
        return found

    def _file(self, device: CeilingDevice) -> Path:
        assert self._folder is not None
        return self._folder / f"{device.key}.json"

    def _read(self, device: CeilingDevice) -> Ceilings | None:
        if self._folder is None:
            return None
        path = self._file(device)
        try:
            found = parsed(path.read_bytes(), Ceilings)
        except FileNotFoundError:
            return None
        except OSError as failure:
            found = str(failure.strerror)
        if isinstance(found, str):
            self._told(f"{path} cannot be read ({found}); the ceilings are measured anew")
            return None
        return found if found.device == device else None

    def _write(self, ceilings: Ceilings) -> None:
        if self._folder is None:
            return
        path = self._file(ceilings.device)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, (ceilings.model_dump_json(indent=2) + "\n").encode())
        except OSError as failure:
            self._told(f"the ceilings cannot be kept in {path} ({failure.strerror}); set XDG_CACHE_HOME elsewhere")


def _crowded_now(device: CeilingDevice) -> bool:
    return crowded(device_state().load_average_1min, device.cores)


def ceilings_folder() -> Path | None:
    """ldmperf/ceilings in the user's cache folder (XDG_CACHE_HOME, ~/.cache); None for a user without a home."""
    # By the XDG specification a relative path does not count.
    told = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        return (told if told.is_absolute() else Path.home() / ".cache") / "ldmperf" / "ceilings"
    except RuntimeError:
        return None

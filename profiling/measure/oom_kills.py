"""How often the kernel has killed for want of memory, as the control group of this process counts it."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

# Where control groups are mounted.
GROUPS = Path("/sys/fs/cgroup")
OWN = Path("/proc/self/cgroup")
# Of the whole machine; asked where no control group counts.
MACHINE = Path("/proc/vmstat")


def oom_kills(groups: Path = GROUPS, own: Path = OWN, machine: Path = MACHINE) -> int | None:
    """The kills so far in this process's control group (v2 or v1) and those below it; None where nobody counts."""
    files = []
    with suppress(OSError):
        for line in own.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:
                files.append((path, groups, "memory.events"))
            elif "memory" in controllers.split(","):
                files.append((path, groups / "memory", "memory.oom_control"))
    for path, mounted, name in files:
        # A container may see its own group as the root, under the path that the host has for it.
        for folder in (mounted / path.lstrip("/"), mounted):
            if (count := _count(folder / name)) is not None:
                return count
    return _count(machine)


def _count(path: Path) -> int | None:
    with suppress(OSError, ValueError):
        for line in path.read_text().splitlines():
            name, _, value = line.partition(" ")
            if name == "oom_kill":
                return int(value)
    return None

"""Running the parts of a GPU check one by one, each a process of its own, and judging how each went."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from check_evidence import begun, is_evidence, recorded
from check_parts import LDMPERF, ROOT, Part

# A child begins nothing new so long before its limit; stopped, it has so long to end by itself.
MARGIN, GRACE = 20.0, 10.0
# Of that, what it has after each signal.
SIGNALS = ((signal.SIGINT, 1.0), (signal.SIGTERM, 0.3), (signal.SIGKILL, 0.1))
# Packages as a type checker sees them: with it on its path, python finds this checkout's without an installation.
VIEW = str(ROOT / ".types")


class Stopped(BaseException):
    """A signal asked for the end."""


@dataclass
class Outcome:
    """How a part went: `ok` False fails the check; `records` by status."""

    part: Part
    text: str
    ok: bool
    seconds: float = 0.0
    records: Counter[str] = field(default_factory=Counter)
    was_begun: bool = True


def run_part(part: Part, limit: float, folder: Path, grace: float = GRACE) -> Outcome:
    """Runs a part for at most `limit` seconds, its output in a log as it comes.

    It has failed when its command has, when a test has, or when it leaves no record. Raises Stopped after ending
    the part, when a signal comes.
    """
    if part.reason is not None:
        return Outcome(part, f"cannot run: {part.reason}", ok=False, was_begun=False)
    command = list(part.command)
    if part.resumes:
        command += begun(folder / part.name, part.resumes)
    if part.takes_seconds:
        command += ["--seconds", f"{max(limit - min(MARGIN, limit / 4), 1.0):.0f}"]
    variables = environment()
    if part.processes > 1:
        # Else inductor starts a pool of its own, of as many processes as cores, in each of them.
        variables.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    path = folder / f"{part.name}.log"
    before = sum(recorded(part, folder, "").values())
    start = time.monotonic()
    with path.open("ab") as log, compiled_beside(part, folder):
        said_before = log.tell()
        process = started(command, log, variables)
        try:
            code: int | None = process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            end(process, grace)
    seconds = time.monotonic() - start
    found = recorded(part, folder, path.read_bytes()[said_before:].decode(errors="replace"))
    ok, text = judged(part, code, found, limit, sum(found.values()) > before)
    return Outcome(part, text, ok, seconds, found)


def started(command: Sequence[str], log: IO[bytes], variables: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """A process in a session of its own: its workers can be ended with it, and a Ctrl-C comes through us."""
    return subprocess.Popen(
        command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, env=variables
    )


@contextlib.contextmanager
def compiled_beside(part: Part, folder: Path) -> Iterator[None]:
    """Inside, what later parts launch is compiled by the cores that `part` leaves; it is over when `part` is."""
    if not part.beside:
        yield
        return
    command = [*LDMPERF, "compile", "--for", ",".join(part.beside)]
    with (folder / f"compile-beside-{part.name}.log").open("ab") as log:
        process = started(command, log, environment())
        try:
            with contextlib.suppress(ProcessLookupError):
                os.setpriority(os.PRIO_PROCESS, process.pid, 19)
            yield
        finally:
            end(process, 2.0)


def stopped_part(part: Part, folder: Path) -> Outcome:
    """How a part went that a signal stopped, by what is on disk of it."""
    path = folder / f"{part.name}.log"
    log = path.read_text(errors="replace") if path.exists() else ""
    return Outcome(part, "stopped by a signal", ok=False, records=recorded(part, folder, log))


def judged(part: Part, code: int | None, found: Counter[str], limit: float, has_new: bool) -> tuple[bool, str]:
    """Whether a part did what it is for, and how it ended; `code` None: stopped at its limit."""
    see = f"see {part.name}.log"
    if code is None:
        text = f"stopped at its limit of {limit:.0f} s"
        if part.evidence == "compilation":
            return True, text
        if not (has_new and is_evidence(part, found)):
            return False, f"{text} without a record; {see}"
        is_wrong = any(found[status] for status in ("failed", "error", "incorrect", "impossible"))
        return not is_wrong, f"{text}; {see}" if is_wrong else text
    if code != 0:
        return False, f"failed (exit code {code}); {see}"
    if part.evidence != "compilation" and not is_evidence(part, found):
        return False, f"ended without a record; {see}"
    return True, "done"


def environment() -> dict[str, str]:
    """The children's: this checkout's ldmperf, one ptxas, and unbuffered output, as a log holds what was said."""
    variables = os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONPATH": os.pathsep.join(python_path())}
    # torch brings a second ptxas, to which inductor switches a process under the same cache keys.
    if (ptxas := tritons_ptxas()) is not None:
        variables.setdefault("TRITON_PTXAS_PATH", str(ptxas))
    return variables


def python_path() -> list[str]:
    """PYTHONPATH, this checkout's packages before all others where python does not find them by itself."""
    given = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    return [VIEW, *given] if is_elsewhere() else given


@functools.cache
def is_elsewhere() -> bool:
    """Whether the ldmperf that this process was started with is none, or not this checkout's."""
    try:
        found = importlib.util.find_spec("ldmperf.kernels")
    except ModuleNotFoundError:
        found = None
    return found is None or found.origin is None or Path(found.origin).resolve().parent != ROOT / "kernels"


def find_this_checkout() -> None:
    """Lets this process import the checkout's packages, as its children will."""
    if is_elsewhere():
        sys.path.insert(0, VIEW)


def tritons_ptxas() -> Path | None:
    """The ptxas in triton's own folder; None without one."""
    found = importlib.util.find_spec("triton")
    places = [] if found is None else found.submodule_search_locations or []
    ptxas = [Path(place) / "backends" / "nvidia" / "bin" / "ptxas" for place in places]
    return next((path for path in ptxas if path.exists()), None)


def end(process: subprocess.Popen[bytes], grace: float) -> None:
    """Ends a part and whatever it started: asked first, so that it can say where its records are."""
    for number, share in SIGNALS:
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=share * grace)
    # Workers that outlive it are of its session, which has its number.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def run_parts(chosen: Sequence[Part], seconds: float, folder: Path, keep_going: bool = False) -> Iterator[Outcome]:
    """The outcomes as they come. A part that is left fewer seconds than its floor is passed over.

    After a failed smoke only tests are begun, which tell more of what is wrong, unless it is to keep going.
    """
    deadline = time.monotonic() + seconds
    has_failed = False
    for part in chosen:
        if has_failed and not keep_going and not is_diagnosis(part):
            yield Outcome(part, "not begun: smoke failed, and no --keep-going", ok=False, was_begun=False)
            continue
        # One that is stopped at its limit still has its grace.
        left = deadline - time.monotonic() - GRACE
        if left < part.floor and part.reason is None:
            text = f"not begun: {max(left, 0):.0f} s were left, and it needs {part.floor:.0f}"
            yield Outcome(part, text, ok=True, was_begun=False)
            continue
        limit = min(part.limit, left)
        tell(f"{part.name}: at most {limit:.0f} s, {folder / (part.name + '.log')}")
        outcome = run_part(part, limit, folder)
        tell(f"{part.name}: {outcome.text}, {outcome.seconds:.0f} s")
        has_failed |= part.name == "smoke" and outcome.was_begun and not outcome.ok
        yield outcome


def is_diagnosis(part: Part) -> bool:
    """Whether a part tests or compiles for tests."""
    return part.evidence in ("tests", "tests or skips") or "tests" in part.own_launches


def tell(line: str) -> None:
    """To stderr, which writes what its encoding lacks as an escape."""
    from ldmperf.profiling.terminal.visible import visible

    print(visible(line), file=sys.stderr, flush=True)

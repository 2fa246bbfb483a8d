"""What a part of a GPU check has left on disk: its records, and a run that can go on."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from check_parts import Part

# "tests/a.py::test_b[c] PASSED [ 5%]", and of many processes "[gw0] [  5%] PASSED tests/a.py::test_b[c]".
STATUS = "(PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)"
OUTCOME = re.compile(rf"^(?:\S+\.py::.* {STATUS}(?: \(.*)? +\[ *\d+%\]|\[gw\d+\] \[ *\d+%\] {STATUS} .*)$")
# By evidence: a status, and the line of a log for each key of bench/tune.py or convolution of conv_padding.py.
LINES = {
    "tuning": ("searched", re.compile(r" ms now, \d+ of \d+ tried")),
    "convolutions": ("timed", re.compile(r" \d+ channels: [\d.]+ us ")),
}


def recorded(part: Part, folder: Path, log: str) -> Counter[str]:
    """How many records of each status a part has on disk; `log` is what it has said in this check."""
    if part.evidence in ("tests", "tests or skips"):
        found = (OUTCOME.match(line) for line in log.splitlines())
        return Counter((match[1] or match[2]).lower() for match in found if match)
    if part.evidence in LINES:
        status, line = LINES[part.evidence]
        return Counter(status for text in log.splitlines() if line.search(text))
    if part.evidence == "compilation":
        return Counter()
    name = "records.jsonl" if part.evidence == "profile" else "kernels.jsonl"
    return Counter(status for path in (folder / part.name).glob(f"*/{name}") for status in statuses(path))


def statuses(path: Path) -> Iterator[str]:
    """The status of each whole line of a file of records; the last may be torn."""
    for line in path.read_bytes().splitlines():
        try:
            yield str(json.loads(line)["status"])
        except (ValueError, KeyError, TypeError):
            continue


def is_evidence(part: Part, found: Counter[str]) -> bool:
    """Whether these records show that the part did its work: one was measured, or a test run and not skipped."""
    if part.evidence in ("profile", "kernels"):
        return found["ok"] > 0
    return any(count for status, count in found.items() if part.evidence != "tests" or status != "skipped")


def begun(folder: Path, name: str) -> tuple[str, ...]:
    """The option with which the last run of an earlier check goes on; none where a new one is to begin.

    That is also where the kernels were tuned since, as no run may hold times of two tables.
    """
    runs = sorted(path for path in folder.glob(f"*/{name}"))
    return ("--resume", str(runs[-1].parent)) if runs and has_todays_table(runs[-1]) else ()


def has_todays_table(path: Path) -> bool:
    """Whether a run was made with the tuned table that its GPU has now; `path`: its run.json or kernels.jsonl."""
    from ldmperf.kernels import Chip, tuned_table

    content = path.read_text(encoding="utf-8", errors="replace")
    for text in [content, *reversed(content.splitlines())]:
        try:
            environment = json.loads(text)["environment"]
            gpu, then = environment["gpu"], environment["tuned"]
            table = tuned_table(Chip(gpu["name"], 1)) if gpu else None
        except (ValueError, KeyError, TypeError):
            continue
        now = table is not None and table.exists() and hashlib.sha256(table.read_bytes()).hexdigest()[:16]
        return (then or False) == now
    return False

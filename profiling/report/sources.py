"""Where the figures of a report are from: what was put together, the commits, the command, the files."""

from __future__ import annotations

import os
import urllib.parse
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..compare.commits import commit_order, machine_names
from ..compare.sets import machine_kind, measured
from ..figures.text import first_of, joined
from ..measure.environment import Environment
from ..measure.timing import RepetitionRule
from ..options import CaseError
from ..record_files import AnyRecord, Gathered, joined_files
from ..rivals.command_line import cases_in_words, measuring_command
from ..terminal.visible import counted
from ..trajectory.records import Record


@dataclass(frozen=True)
class RecordsLink:
    """A file of records: its name, and where the page links it: a URL, or a path relative to the page."""

    name: str
    href: str


@dataclass(frozen=True)
class Sources:
    """The lines below the headline.

    together    what was put together, in a sentence: files, records, commits, machines; empty where that is one
                file of one environment
    commits     those measured, the oldest first ("7d35813", "unknown commit", "7d35813 with uncommitted changes")
    command     the command that measures the trajectories, or in words how many they are; empty without any
    is_command  whether `command` can be typed
    links       the files of the records
    """

    together: str = ""
    commits: tuple[str, ...] = ()
    command: str = ""
    is_command: bool = False
    links: tuple[RecordsLink, ...] = ()

    @classmethod
    def of(cls, files: Mapping[str, Gathered], page: Path | None = None, url: str = "") -> Sources:
        """Of files of records by their real paths.

        page: the folder that the page is written to, for the links. url: where the records can be had instead.
        """
        records = [record for part in files.values() for record in part.records]
        trajectories = [record for part in files.values() for record in part.trajectories]
        command = _command(trajectories)
        links = [RecordsLink(url, url)] if url else [_link(Path(path), page) for path in files]
        return cls(
            _together(files, records),
            tuple(commit_order(records)),
            command or (cases_in_words(record.case for record in trajectories) if trajectories else ""),
            command is not None,
            tuple(links),
        )


def records_url(text: str) -> str:
    """The URL where records can be had, or CaseError."""
    parts = urllib.parse.urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise CaseError(f"--records-url: {text!r} is no address; give one that begins with https://")
    return text


def _command(records: Sequence[Record]) -> str | None:
    if not records:
        return None
    rules = {(record.harness.min_count, record.harness.min_seconds) for record in records}
    rule = RepetitionRule(*rules.pop()) if len(rules) == 1 else None
    with_decoder = any(record.decoder_ms is not None for record in records)
    return measuring_command((record.case for record in records), rule, with_decoder)


def _together(files: Mapping[str, Gathered], records: Sequence[AnyRecord]) -> str:
    # A compiler makes the same of a launch on every machine.
    environments = list(dict.fromkeys(record.environment for record in measured(records)))
    kinds = {environment.kind: environment for environment in environments}
    if len(files) == 1 and len(kinds) <= 1 and len(_machines(environments)) <= 1:
        return ""
    of = joined_files(files.values())
    counts = [
        (len(of.trajectories), "record of trajectories", "records of trajectories"),
        (len(of.kernels), "record of kernels", "records of kernels"),
        (len(of.inspections), "compiled launch", "compiled launches"),
        (len(of.qualities), "record of quality", "records of quality"),
    ]
    what = " and ".join(counted(count, one, many) for count, one, many in counts if count)
    commits = list(commit_order(records))
    of_machines = list({machine_kind(e): e for e in environments}.values())
    names = list(dict.fromkeys(machine_names(of_machines)))
    machines = len(_machines(environments))
    said = [
        f"{what} from {counted(len(files), 'file')}",
        f"{counted(len(commits), 'commit')} ({first_of(commits)})",
        f"{counted(len(names), 'kind of machine', 'kinds of machines')} ({'; '.join(names)})" if names else "",
        counted(machines, "machine") if machines > len(names) else "",
    ]
    apart = " Nothing is compared across kinds of machines." if len(names) > 1 else ""
    return f"{joined(said)}.{apart}"


def _machines(environments: Iterable[Environment]) -> set[object]:
    """What tells machines apart: their ids, or all that is known of one without."""
    return {environment.machine_id or environment.kind for environment in environments}


def _link(path: Path, page: Path | None) -> RecordsLink:
    """By the name of the file and its folder's; the path, relative to the page, as a URL without a scheme."""
    target = os.path.relpath(path, os.path.realpath(page)) if page is not None else str(path)
    return RecordsLink("/".join(path.parts[-2:]), urllib.parse.quote(os.fsencode(target)))

"""Where the figures of a report are from: what was put together, the commits, the command, the files."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RecordsLink:
    """A file of records: its name, and where the page links it: a URL, or a path relative to the page."""

    name: str
    href: str


@dataclass(frozen=True)
class Sources:
    """The lines below the headline.

    together  what was put together, in a sentence: files, records, machines, commits; empty where that is one run
              of one machine
    commits   the commits measured, each once ("7d35813", "unknown commit", "7d35813 with uncommitted changes")
    command   the command that measures these cases, or in words how many they are; empty without cases
    is_command  whether `command` can be typed
    links     the files of the records
    """

    together: str = ""
    commits: tuple[str, ...] = ()
    command: str = ""
    is_command: bool = False
    links: tuple[RecordsLink, ...] = ()

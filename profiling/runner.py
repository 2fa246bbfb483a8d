"""Cases to records, group by group."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Protocol

from .backends import Backend, default_backends
from .cases import Case
from .environment import collect_environment
from .group import Group, Networks, measuring_settings
from .records import Record, RecordStore
from .timing import RepetitionRule


class Listener(Protocol):
    """Who is told how a profile goes on; called between measurements, never inside one."""

    def begin(self, cases: Sequence[Case]) -> None:
        """These cases, of one group, are in flight now."""

    def ran(self, case: Case, phase: str) -> None:
        """One more trajectory of the case is done; `phase` is "first call", "warm-up", "timing" or "check"."""

    def end(self, records: Sequence[Record]) -> None:
        """The group is measured and, given a store, on disk."""


class _Silent:
    def begin(self, cases: Sequence[Case]) -> None: ...

    def ran(self, case: Case, phase: str) -> None: ...

    def end(self, records: Sequence[Record]) -> None: ...


def profile(
    cases: Iterable[Case],
    *,
    rule: RepetitionRule | None = None,
    store: RecordStore | None = None,
    skip: Collection[str] = (),
    listener: Listener | None = None,
    backends: Mapping[str, Backend] | None = None,
) -> list[Record]:
    """Measures the cases and returns a record for each, failures included, in the order measured.

    Cases that differ only in the backend run interleaved. Each group's records go to `store` as soon as they are
    there; cases whose key is in `skip` are left out. An interrupt (KeyboardInterrupt) passes through: what is in
    the store stays. `rule` defaults to three repetitions.
    """
    listener = listener or _Silent()
    networks = Networks()
    # Once: the code that runs is what was loaded, whatever is committed meanwhile.
    environment_of = functools.cache(collect_environment)
    records: list[Record] = []
    for cases_in_flight in groups(case for case in cases if case.key not in skip):
        listener.begin(cases_in_flight)
        with measuring_settings():
            group = Group(cases_in_flight, rule or RepetitionRule(), listener.ran, backends or default_backends())
            done = group.measure(networks, environment_of(cases_in_flight[0].device))
        if store is not None:
            store.append(*done)
        listener.end(done)
        records += done
    return records


def groups(cases: Iterable[Case]) -> list[list[Case]]:
    """The cases by what they share but the backend, in the order of first appearance, each case once."""
    found: dict[str, list[Case]] = {}
    for case in dict.fromkeys(cases):
        found.setdefault(case.group_key, []).append(case)
    return list(found.values())

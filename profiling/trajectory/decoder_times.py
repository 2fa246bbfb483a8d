"""The times of a decoder, measured apart from the cases whose samples it makes images of."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from ..measure.recorded import Samples
from ..measure.timing import Deadline, RepetitionRule
from .backend import Subject
from .case import Case, Task
from .check import References
from .group import Group
from .group_facts import GroupFacts
from .network import Networks
from .records import Record


@dataclass
class DecoderTimes:
    """Times of decodes, each measured once: what they depend on are batch, image, dtype and device alone.

    decoder: the decode of a case's samples, as a case; None for one whose samples are images. A decode is timed
    and checked as every case is, with as many samples. known: what was measured, by the decode's key; None where
    there is no time.
    """

    decoder: Callable[[Case], Case | None]
    subjects: Mapping[Task, Subject]
    deadline: Deadline
    known: dict[str, Samples | None] = field(default_factory=dict)

    def of(self, case: Case, shared: GroupFacts, references: References) -> Samples | None:
        """Decodes of the case's batch, in ms, under the facts of its group; None, with a warning, on failure."""
        decode = self.decoder(case)
        if decode is None or self.deadline.passed:
            return None
        if decode.key not in self.known:
            self.known[decode.key] = self._measured(decode, shared, references)
        return self.known[decode.key]

    def _measured(self, decode: Case, shared: GroupFacts, references: References) -> Samples | None:
        # A count is enough: min_seconds is for the cases themselves.
        rule = RepetitionRule(shared.rule.min_count, 0.0)
        facts = replace(shared, rule=rule, backends=(decode.backend,))
        records: list[Record] = []
        backends = self.subjects[decode.task].backends
        Group([decode], backends, facts, references, records.append, self.deadline).measure(
            Networks(self.subjects)
        )
        for record in records:
            if record.wall_ms is None:
                warnings.warn(f"no time of {decode.unet}: {record.status}: {record.message}", stacklevel=2)
        return records[0].wall_ms if records else None

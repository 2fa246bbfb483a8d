"""The tables of kernels and of compiled launches on a page."""

from __future__ import annotations

from ..record_files import Gathered
from .page_input import GridSection


def kind_sections(found: Gathered) -> tuple[GridSection, ...]:
    """A section for each kind of record besides trajectories, where there are any."""
    sections: list[GridSection] = []
    return tuple(sections)

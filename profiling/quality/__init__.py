"""Quality of generated samples, as records: how far they are from real ones, and what of a caption they show.

Who samples and judges writes them (`QualityStore`); `claims` reads them beside the times of the same networks.
"""

from __future__ import annotations

from .quality_records import (
    QUALITY_NAME,
    Generator,
    QualityCase,
    QualityRecord,
    QualityStore,
    quality_schema,
    stitched_label,
)

# By its short name, as the field's word; another class of the repository has it in its file.
from .quality_records import QualityEstimate as Estimate

__all__ = [
    "QUALITY_NAME",
    "Estimate",
    "Generator",
    "QualityCase",
    "QualityRecord",
    "QualityStore",
    "quality_schema",
    "stitched_label",
]

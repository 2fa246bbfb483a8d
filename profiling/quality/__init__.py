"""Quality of generated samples, as records: how far they are from real ones, and what of a caption they show.

Who samples and judges writes them (`QualityStore`); `claims` reads them beside the times of the same networks.
"""

from __future__ import annotations

from .quality_records import (
    QUALITY_NAME,
    Estimate,
    QualityCase,
    QualityRecord,
    QualityStore,
    quality_schema,
    stitched_label,
)

__all__ = [
    "QUALITY_NAME",
    "Estimate",
    "QualityCase",
    "QualityRecord",
    "QualityStore",
    "quality_schema",
    "stitched_label",
]

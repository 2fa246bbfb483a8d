"""The charts of quality in closed worlds: which there are, and what each says; quality_panels.py draws a panel."""

from __future__ import annotations

from functools import lru_cache

from ..claims.closed_worlds import QUALITY_METRICS, QualityMetric
from .charts import Chart
from .palette import Palette
from .quality_curves import ALIGNMENT
from .quality_panels import frontier_panel, guidance_panel, metric_name

_CURVES = (
    "A line is one network over its step counts, at the guidance that was best on held-out prompts; the mean over "
    "training seeds on test prompts, and its interval over samples and seeds. Filled: generators of another kind. "
    "The heavy stairs are the best at each budget, chosen by the values shown. Dashed: real samples against real. "
    "All of it in this closed world only."
)
_SWEEP = (
    "A line is one network over its guidance rates, the mean over training seeds with its interval over samples "
    "and seeds. Dashed: real samples."
)
_TIMES_TOO = "it takes trajectory records of two networks of a closed world besides their quality"
_TWO_CELLS = "it takes two networks or step counts of a closed world, tuned, on test prompts"
_TWO_RATES = "it takes a network of a closed world at two guidance rates, with the same sampler and steps"


@lru_cache(maxsize=8)
def quality_charts(palette: Palette) -> tuple[Chart, ...]:
    """Every chart of quality, in the order of the page; `palette`: of the series."""
    return (
        *(chart for metric in QUALITY_METRICS for chart in _frontiers(palette, metric)),
        *(
            Chart(
                f"guidance-{_of(metric)}",
                f"{metric_name(metric)} over the guidance rate",
                _SWEEP,
                _TWO_RATES,
                "quality-guidance",
                ("rate", metric.field),
                guidance_panel(palette, metric),
                note=f"{metric.field}_note",
                across="rate",
                most=1,
                series=palette.column,
            )
            for metric in (*QUALITY_METRICS, ALIGNMENT)
        ),
    )


def _frontiers(palette: Palette, metric: QualityMetric) -> tuple[Chart, Chart]:
    """Over time, and over FLOPs."""
    return (
        Chart(
            f"{_of(metric)}-ms",
            f"{metric_name(metric)} against measured time",
            f"{metric_name(metric)} over the wall-clock time of an image. Lines, marks and stairs as over FLOPs.",
            _TIMES_TOO,
            "quality-times",
            ("ms", metric.field),
            frontier_panel(palette, metric, "ms"),
            note=f"{metric.field}_note",
            across="cell",
            most=1,
            series=palette.column,
        ),
        Chart(
            f"{_of(metric)}-flops",
            f"{metric_name(metric)} against FLOPs",
            f"{metric_name(metric)} to real samples over the FLOPs of an image, guidance counted as two forwards. "
            f"{_CURVES}",
            _TWO_CELLS,
            "quality",
            ("gflop_image", metric.field),
            frontier_panel(palette, metric, "gflop_image"),
            note=f"{metric.field}_note",
            across="cell",
            most=1,
            series=palette.column,
        ),
    )


def _of(metric: QualityMetric) -> str:
    return metric.field.replace("_", "-")

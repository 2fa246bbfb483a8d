"""The charts of a page: what each is of, which panels it has, and what it says. chart_panels.py draws a panel."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from .chart_panels import (
    batch_panel,
    by_size_panel,
    cost_panel,
    fid_flops_panel,
    fid_panel,
    history_panel,
    ladder_panel,
    steps_panel,
)
from .palette import Palette
from .panel_parts import Panel

# Small panels of sizes that are shown side by side.
MOST_SIZES = 12


# Equal where it is the same one: what is made of a panel is kept by its chart.
@dataclass(frozen=True, eq=False)
class Chart:
    """A chart in panels, one for each set of conditions.

    table     the facts it is of (facts.py)
    values    the numbers that a fact needs to be drawn
    across    the column of which a panel has `least` different values; with fewer there is no panel
    beside    columns that set panels apart besides the conditions
    without   conditions that a panel has several of
    note      the column that says what a reader of a panel has to know of its facts
    most      sets of conditions that are shown together; with more, a condition is chosen. Sizes that have panels
              of their own stand side by side, up to MOST_SIZES
    series    the column whose texts have colours and marks; of trajectories the backend
    needs     what records it takes
    """

    name: str
    title: str
    summary: str
    needs: str
    table: str
    values: tuple[str, ...]
    panel: Panel
    note: str = ""
    across: str = "size"
    least: int = 2
    beside: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    most: int = 2
    series: str = "backend"

    @property
    def is_of_quality(self) -> bool:
        """Whether it is of a closed world, and not of trajectories."""
        return self.series != "backend"

    @property
    def is_small(self) -> bool:
        """Whether its panels are small ones, of which many are shown."""
        return "size" in self.beside

    def limit(self, name: str) -> int:
        """The panels from which on a column is chosen of, in place of shown side by side."""
        return MOST_SIZES if name == "size" else self.most


@lru_cache(maxsize=8)
def all_charts(palette: Palette) -> tuple[Chart, ...]:
    """Every chart of trajectories, in the order of the page."""
    return (
        Chart(
            "fid",
            "The paper's FID against measured time",
            "The paper's FID after 50 steps of DDIM at guidance 7.5 (30,000 samples of COCO-2014), over the "
            "wall-clock time of such an image here. Hollow marks are predictions by the line through fewer steps. "
            "The FID is the paper's, the time is ours: networks here have random weights.",
            "it takes sizes of the paper with DDIM at guidance 7.5, latent 64x64, 77 text tokens, and 50 steps "
            "or three step counts",
            "fid",
            ("fid", "ms"),
            fid_panel(palette),
            note="basis",
        ),
        Chart(
            "fid-flops",
            "The paper's FID against FLOPs",
            "The same FID over what the paper counts: FLOPs relative to a forward of the 866M, times 50 steps.",
            "it takes what its neighbour takes",
            "fid",
            ("fid", "paper_image"),
            fid_flops_panel(),
        ),
        Chart(
            "cost",
            "Measured cost against the paper's cost",
            "Time of a step over the paper's normalized cost, both relative to the largest size. On the dashed "
            "line time follows FLOPs; above it a small model costs more than they say. Dotted: the floor, the "
            "least time of a step at the ceilings measured on this machine. Bars: p20 to p80.",
            "it takes two sizes measured under the same conditions",
            "cases",
            ("paper", "cost_p50"),
            cost_panel(palette),
            beside=("reference",),
        ),
        Chart(
            "ladder",
            "The ladder at each size",
            "Time of a step on each backend, medians, with p20 to p80; where there is none, the reason.",
            "it takes a size tried on 3 backends under the same conditions",
            "cases",
            (),
            ladder_panel(palette),
            across="backend",
            least=3,
            beside=("size",),
            most=1,
        ),
        Chart(
            "steps",
            "Time of a trajectory over its steps",
            "Time from noise to latents over model evaluations, with the least-squares line; of three step counts "
            "or more it goes on to zero, where it shows the fixed part. Bars: p20 to p80.",
            "it takes a size measured at two step counts or more",
            "cases",
            ("wall_p50", "line"),
            steps_panel(palette),
            across="evaluations",
            beside=("size",),
            without=("steps",),
            most=1,
        ),
        Chart(
            "images",
            "Images per second",
            "Images a second at the median wall time, latents without decoder.",
            "it takes two sizes measured under the same conditions",
            "cases",
            ("images_per_s",),
            by_size_panel(palette, "images_per_s", "images per second"),
        ),
        Chart(
            "joules",
            "Energy of an image",
            "Joules of the whole GPU for an image by NVML's counter, idle power included.",
            "it takes two sizes whose energy was measured, on a GPU",
            "cases",
            ("joules",),
            by_size_panel(palette, "joules", "joules per image"),
        ),
        Chart(
            "batch",
            "Images per second over the batch",
            "Images a second at the median wall time over the images of a batch.",
            "it takes a size measured at two batches or more",
            "cases",
            ("images_per_s",),
            batch_panel(palette),
            across="images",
            beside=("size",),
            without=("batch",),
            most=1,
        ),
        Chart(
            "history",
            "Time of a step over commits",
            "Medians of a step on each commit, the oldest first, with p20 to p80. A ring marks a change against "
            "the commit before that repeating the run does not explain: ▼ FASTER, ▲ SLOWER.",
            "it takes a case measured on two commits on one kind of machine",
            "history",
            ("step_p50",),
            history_panel(palette),
            across="commit",
            beside=("size",),
            most=1,
        ),
    )

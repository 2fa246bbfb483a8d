"""The metrics of records: what `compare` judges and exporters write, each with its unit, spread and direction."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..measure.recorded import Samples
from ..options import CaseError, known_name, split_values

if TYPE_CHECKING:
    from ..record_files import AnyRecord

Values = tuple[float, ...]


@dataclass(frozen=True)
class Figure:
    """A record's value in one metric: the median of its `samples` in the order taken, or the one value there is.

    p20, p80 and min are null where it is measured once.
    """

    value: float
    samples: Values
    p20: float | None = None
    p80: float | None = None
    min: float | None = None

    @classmethod
    def of(cls, found: Samples | None) -> Figure | None:
        """The figure of a record's samples."""
        return None if found is None else cls(found.p50, found.samples, found.p20, found.p80, found.min)

    def over(self, count: int) -> Figure:
        """All of it divided by a count of at least 1."""
        p20, p80, least = (None if v is None else v / count for v in (self.p20, self.p80, self.min))
        return Figure(self.value / count, tuple(value / count for value in self.samples), p20, p80, least)


@dataclass(frozen=True)
class Metric:
    """A figure of a record: `figure` is null where the record does not have it.

    quantity    what is measured, without its unit: with `base` the name of a metric of OpenMetrics
    unit        as people write it; empty for a count
    about       what it is, in a line
    sampled     whether it has samples and a spread
    counted     a figure that does not vary from run to run, as memory does not: any difference is one of the code
    bigger      more is better
    less, more  the verdicts on a change
    """

    name: str
    quantity: str
    unit: str
    about: str
    figure: Callable[[Any], Figure | None]
    sampled: bool = False
    counted: bool = False
    bigger: bool = False
    less: str = "LESS"
    more: str = "MORE"

    def values(self, record: AnyRecord) -> Values:
        """The samples of a record, one value where it is measured once, none where the figure is null."""
        found = self.figure(record)
        return () if found is None else found.samples


def _time(
    name: str, quantity: str, about: str, figure: Callable[[Any], Figure | None], sampled: bool = True
) -> Metric:
    return Metric(name, quantity, "ms", about, figure, sampled, less="FASTER", more="SLOWER")


def _samples(name: str) -> Callable[[Any], Figure | None]:
    # Records of trajectories, kernels and inspections have different fields.
    return lambda record: Figure.of(getattr(record, name, None))


def _single(name: str) -> Callable[[Any], Figure | None]:
    def figure(record: Any) -> Figure | None:
        found = getattr(record, name, None)
        # A rate of an immeasurably short time is no number.
        return None if found is None or not math.isfinite(found) else Figure(float(found), (float(found),))

    return figure


def _ms_per_step(record: Any) -> Figure | None:
    count, wall = getattr(record, "evaluations", None), _part("steps")(record) or _samples("wall_ms")(record)
    return wall.over(count) if wall and count else None


def _ms_per_image(record: Any) -> Figure | None:
    wall = _samples("wall_ms")(record)
    return wall.over(record.case.batch) if wall else None


def _part(name: str) -> Callable[[Any], Figure | None]:
    return lambda record: _samples(name)(getattr(record, "parts", None))


def _first_call_ms(record: Any) -> Figure | None:
    return _single("first_call_ms")(getattr(record, "phases", record))


def _count(name: str, quantity: str, unit: str, about: str, bigger: bool = False) -> Metric:
    return Metric(name, quantity, unit, about, _single(name), counted=True, bigger=bigger)


def _serialized(record: Any) -> Figure | None:
    found = getattr(record, "serialized", None)
    return None if found is None else Figure(float(len(found)), (float(len(found)),))


def _overlap(record: Any) -> Figure | None:
    """Of attention alone; 0 where its matmuls are not asynchronous, so that a lost overlap is a change."""
    if not any(constant.startswith("HEAD_DIM=") for constant in getattr(record, "constants", ())):
        return None
    share = record.overlap.share if record.overlap is not None else 0.0
    return Figure(share, (share,))


def _estimate(name: str, about: str, bigger: bool = False) -> Metric:
    """Of a quality: the figure of all its samples. Its replicates are of one run, and no samples of the figure."""

    def figure(record: Any) -> Figure | None:
        found = getattr(record, name, None)
        return None if found is None else Figure(found.value, (found.value,))

    return Metric(name, name, "", about, figure, bigger=bigger)


def _rate(name: str, quantity: str, unit: str, about: str) -> Metric:
    return Metric(name, quantity, unit, about, _single(name), bigger=True)


METRICS: Mapping[str, Metric] = {
    metric.name: metric
    for metric in (
        _time(
            "wall_ms",
            "wall",
            "Wall time of a trajectory: to latents, of a pipeline to images",
            _samples("wall_ms"),
        ),
        _time("gpu_ms", "gpu", "GPU time of a trajectory", _samples("gpu_ms")),
        _time("ms", "kernel", "Time of one call of a kernel", _samples("ms")),
        _time(
            "ms_per_step",
            "step",
            "Wall time of a model evaluation, its whole batch; of a pipeline on its parts' clock",
            _ms_per_step,
        ),
        _time("ms_per_image", "image", "Wall time of a trajectory over its images", _ms_per_image),
        _time("decoder_ms", "decoder", "Time to decode a batch of latents to images", _samples("decoder_ms")),
        _time("text_ms", "text", "A pipeline's text encoder", _part("text")),
        _time("steps_ms", "steps", "A pipeline's steps, from the text to scaled latents", _part("steps")),
        _time("decode_ms", "decode", "A pipeline's decoder", _part("decode")),
        _time("first_call_ms", "first_call", "Wall time of the first call", _first_call_ms, sampled=False),
        _count("peak_memory_bytes", "peak_memory", "B", "The most memory that torch held on the GPU"),
        Metric("joules_per_image", "image_energy", "J", "GPU energy of an image", _single("joules_per_image")),
        _rate("images_per_s", "images", "images/s", "Images a second at the median wall time"),
        _rate("gb_per_s", "kernel", "GB/s", "Bytes that a kernel reads and writes over its median time"),
        _rate("tflops", "kernel", "TFLOP/s", "Matmul FLOPs of a kernel over its median time"),
        _rate("percent_of_copy", "copy_bandwidth", "%", "A kernel's bandwidth in that of a copy"),
        _count("registers", "registers", "", "Registers of a thread"),
        _count("spills", "spills", "", "Loads and stores of spilled registers"),
        _count("shared_bytes", "shared_memory", "B", "Shared memory of a program"),
        _count("instructions", "instructions", "", "Instructions of a kernel's machine code"),
        _count("hot_instructions", "hot_instructions", "", "Instructions of a kernel's hot loop, or of all"),
        _count("warps_per_multiprocessor", "warps", "", "Warps that fit a multiprocessor", bigger=True),
        Metric(
            "serialized", "serialized", "", "Reasons why matmuls wait for each other", _serialized, counted=True
        ),
        Metric(
            "overlap",
            "overlap",
            "",
            "Share of attention's exponentials that run beside its score matmul",
            _overlap,
            counted=True,
            bigger=True,
        ),
        _estimate("frechet", "Frechet distance of samples to real ones, in a judge's features"),
        _estimate("kid", "Kernel distance of samples to real ones, unbiased: it may lie below zero"),
        _estimate("sliced_wasserstein", "Squared sliced Wasserstein-2 distance of latents to real ones"),
        _estimate("alignment", "Share of a caption's factors that a judge reads right", bigger=True),
    )
}
# What `compare` takes: a rate repeats a time.
COMPARED: Mapping[str, Metric] = {
    name: metric for name, metric in METRICS.items() if metric.counted or not metric.bigger
}
# Compared unless told, where the records have them; the others repeat these, or vary much.
USUAL = (
    *("wall_ms", "gpu_ms", "ms", "peak_memory_bytes"),
    *("registers", "spills", "shared_bytes", "warps_per_multiprocessor", "hot_instructions", "serialized"),
    *("frechet", "kid", "sliced_wasserstein"),
)


def metrics_named(
    given: list[str], of: Mapping[str, Metric] = COMPARED, usual: tuple[str, ...] = USUAL
) -> tuple[Metric, ...]:
    """The metrics of these names, or CaseError; the usual ones without names."""
    names = split_values(given)
    if given and not names:
        raise CaseError(f"--metric: no value given; choose from {', '.join(of)}")
    return tuple(of[known_name("metric", name, of)] for name in dict.fromkeys(names or usual))

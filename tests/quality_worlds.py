"""Families of closed worlds with known quality and cost, for tests of verdicts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy

from ldmperf.profiling import Case, Record
from ldmperf.profiling.claims import judge
from ldmperf.profiling.claims.verdict import Verdict
from ldmperf.profiling.measure.recorded import Samples
from ldmperf.profiling.quality import Estimate, QualityRecord

Make = Callable[..., QualityRecord]
MakeRecord = Callable[..., Record]
Quality = Callable[[str, int], float]
# GFLOP of a step; a step of the w32 costs 16 of the w8.
NETWORKS = {"w8": 1.0, "w12": 2.25, "w16": 4.0, "w24": 9.0, "w32": 16.0}
STEPS = (1, 2, 3, 4, 6, 8, 12, 16, 25, 50)
METRICS = ("Frechet distance", "KID", "sliced Wasserstein")


def as_the_paper_says(network: str, steps: int) -> float:
    """A floor that is lower for larger networks, and an error that more steps take away."""
    return 0.2 + 0.5 / NETWORKS[network] ** 0.5 + 10.0 / steps


def estimate(value: float, rng: Any = None, noise: float = 0.02, count: int = 200) -> Estimate:
    """With replicates that are too large, as those of a distance are: a resample has samples twice."""
    spread = (rng or numpy.random.default_rng(0)).normal(0.0, noise, count)
    return Estimate(value=value, replicates=tuple(float(1.1 * value + abs(value) * z) for z in spread))


def world(make_quality: Make, value: Quality = as_the_paper_says, *, seeds: Sequence[int] = (0,),
          noise: float = 0.01, networks: Sequence[str] = tuple(NETWORKS), steps: Sequence[int] = STEPS,
          count: int = 200, frechet: Quality | None = None, kid_offset: float = 0.0,
          between: float = 0.0, draw: int = 7, **changes: Any) -> list[QualityRecord]:  # fmt: skip
    """A family, every network at every step count; `frechet` replaces that metric alone.

    between: by what factor seeds differ. noise: of the replicates; with the same `draw` it is the same.
    """
    rng = numpy.random.default_rng(draw)
    found = []
    for name in networks:
        for seed in seeds:
            luck = math.exp(between * rng.normal())
            for n in steps:
                of = luck * value(name, n)
                figures = {
                    "frechet": estimate(luck * (frechet or value)(name, n), rng, noise, count),
                    "kid": estimate(0.01 * of + kid_offset, rng, noise, count),
                    "sliced_wasserstein": estimate(0.1 * of, rng, noise, count),
                }
                costs = {
                    "gflop_per_image": 2 * NETWORKS[name] * n,
                    "training_gflop": 1e5 * NETWORKS[name],
                    "parameters": int(1e4 * NETWORKS[name]),
                }
                found.append(make_quality(name, n, training_seed=seed, **(figures | costs | changes)))
    return found


def times(make_record: MakeRecord, ms: Callable[[str], float] = lambda name: NETWORKS[name], fixed: float = 0.0,
          steps: Sequence[int] = (4, 20), networks: Sequence[str] = tuple(NETWORKS),
          **fields: Any) -> list[Record]:  # fmt: skip
    """Trajectories of the networks: `fixed` ms and `ms` of each step and image."""
    found = []
    for name in networks:
        for n in steps:
            case = Case(unet=name, weights_sha256=f"{list(NETWORKS).index(name):064x}", steps=n,
                        **({"latent_height": 8, "latent_width": 8, "guidance_scale": 2.0} | fields))  # fmt: skip
            wall = fixed + ms(name) * n * case.batch
            found.append(make_record(case, wall_ms=Samples.of([wall * (1 + k / 1000) for k in range(-4, 5)])))
    return found


def judged(qualities: Sequence[QualityRecord], claim: str, records: Sequence[Record] = ()) -> tuple[Verdict, ...]:
    """The verdicts by quality."""
    of = next(of for of in judge(records, qualities) if of.claim.id == claim)
    return tuple(verdict for verdict in of.verdicts if verdict.is_of_quality)


def by_metric(verdicts: Sequence[Verdict]) -> dict[str, Verdict]:
    found = {verdict.conditions["metric"]: verdict for verdict in verdicts}
    assert len(found) == len(verdicts)
    return found


def rows(verdict: Verdict) -> list[dict[str, str]]:
    assert verdict.figures is not None
    return [dict(zip(verdict.figures.headings, row, strict=True)) for row in verdict.figures.rows]


def both(
    make_quality: Make, ddpm: Quality, ddim: Quality = as_the_paper_says, **changes: Any
) -> list[QualityRecord]:
    """The family under two samplers."""
    return world(make_quality, ddim, **changes) + world(make_quality, ddpm, sampler="ddpm", **changes)


def fine_tuned(make_quality: Make, value: Callable[[str, str, int], float],
               trained: Sequence[int] = (100, 300, 1000), kinds: Sequence[str] = ("diffusion", "scratch"),
               steps: Sequence[int] = (16,), **changes: Any) -> list[QualityRecord]:  # fmt: skip
    """Networks of super-resolution of both beginnings; `value` of kind, network and training steps."""
    found = []
    for kind in kinds:
        for count in trained:
            of_case = {"task": "sr", "guidance_scale": 1.0, "kind": kind, "training_steps": count} | changes
            of_case["draw"] = len(found) + 8
            found += world(make_quality, lambda name, _, at=(kind, count): value(at[0], name, at[1]),
                           steps=steps, **of_case)  # fmt: skip
    return found


def students(make_quality: Make, value: Callable[[str], float], steps: int = 4,
             **changes: Any) -> list[QualityRecord]:  # fmt: skip
    """Distilled networks: without guidance a step is one forward."""
    of_case = {"kind": "distilled", "guidance_scale": 1.0, "training_steps": 800, "draw": 8} | changes
    made = world(make_quality, lambda name, _: value(name), steps=(steps,), **of_case)
    return [record.model_copy(update={"gflop_per_image": record.gflop_per_image / 2}) for record in made]


def rival(make_quality: Make, value: float, network: str = "w8-gan", steps: int = 1, kind: str = "gan",
          parameters: int | None = 11_000, **changes: Any) -> QualityRecord:  # fmt: skip
    rng = numpy.random.default_rng(steps)
    figures = {
        name: estimate(share * value, rng, 0.01)
        for name, share in (("frechet", 1.0), ("kid", 0.01), ("sliced_wasserstein", 0.1))
    }
    sampler = "masked" if kind == "masked-transformer" else "none"
    of_case = {"kind": kind, "sampler": sampler, "guidance_scale": 1.0, "parameters": parameters}
    return make_quality(network, steps, **(figures | of_case | changes))


def sweep(make_quality: Make, quality: Callable[[float], float], alignment: Callable[[float], float],
          rates: Sequence[float] = (1.0, 1.5, 2.0, 4.0, 8.0), networks: Sequence[str] = ("w8", "w32"),
          **changes: Any) -> list[QualityRecord]:  # fmt: skip
    found = []
    for rate in rates:
        right, off = alignment(rate), quality(rate)
        figures = {
            "frechet": estimate(off),
            "kid": estimate(0.01 * off),
            "sliced_wasserstein": estimate(0.1 * off),
            "alignment": Estimate(value=right, replicates=tuple(right + 0.002 * math.sin(k) for k in range(200))),
        }
        for name in networks:
            of_network = {"parameters": int(1e4 * NETWORKS[name]), "tuned": rate == 2.0}
            found.append(make_quality(name, 50, guidance_scale=rate, **(figures | of_network | changes)))
    return found

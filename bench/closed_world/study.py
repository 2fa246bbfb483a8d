"""What a study has on disk, and a cell of it: sampled, judged and kept.

What is done is on disk: a folder for each network, a line for each judged cell. Whoever asks again finds it there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from itertools import groupby
from pathlib import Path
from typing import Literal

from torch import Tensor

from ldmperf.model import UNet
from ldmperf.profiling.measure.store import load_lines
from ldmperf.profiling.quality import (
    QUALITY_NAME,
    QualityCase,
    QualityRecord,
    QualityStore,
    stitched_label,
)

from . import cells
from .family import WORLDS, World
from .judging import RESAMPLES, Judging
from .networks import forward_gflop, label, load_network, network_folder, parameters
from .progress import Tell, to_nobody
from .sampling import Prompts, Split, plan_of, sampled
from .training import ADVERSARIAL, CONTINUED, Recipe

# The training seed by whose networks the guidance of a cell is chosen.
TUNED_ON = 0


@dataclass(frozen=True)
class Study:
    """Where a study keeps its files, and how large it is.

    folder     records and the states of trainings
    weights    the judge and the trained networks
    distilling           how a round of distillation is trained
    fine_tuned           steps of super-resolution's trainings
    adversarial          how a GAN is trained
    masked               how a masked transformer is trained
    samples, held_out    images of a cell that decides, and of one that a guidance is chosen by
    tell                 takes how much of a task is done
    """

    folder: Path
    weights: Path
    run_id: str
    latent: int = 8
    device: str = "cpu"
    recipe: Recipe = field(default_factory=Recipe)
    distilling: Recipe = CONTINUED
    fine_tuned: tuple[int, ...] = cells.FINE_TUNED
    adversarial: Recipe = ADVERSARIAL
    masked: Recipe = field(default_factory=Recipe)
    seeds: tuple[int, ...] = (0, 1, 2)
    samples: int = cells.SAMPLES
    held_out: int = cells.HELD_OUT
    tell: Tell = field(default=to_nobody, compare=False)

    @property
    def world(self) -> World:
        return WORLDS[self.latent]

    @property
    def judge(self) -> Path:
        """The file of its judge."""
        return self.weights / "judge.safetensors"

    @property
    def records(self) -> Path:
        """The file of its records."""
        return self.folder / QUALITY_NAME

    def training_state(self, name: str) -> Path:
        """The file that a training of that name goes on from; its folder is there."""
        folder = self.folder / "training"
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"{name}.pt"

    def further(self, place: Path) -> Path:
        """Where a network that comes of the family's lies: beside these, or in the study's own folder.

        What is not there yet is made in the latter: `weights` may be others' networks.
        """
        beside = self.weights / place
        return beside if beside.exists() else self.folder / "weights" / place

    def case(self, widths: Sequence[int], seed: int, sampler: str, guidance: float, split: Split) -> QualityCase:
        """A cell of the family, by the width of the network that takes each step."""
        takes = takes_of(widths)
        return QualityCase(
            world=self.world.name,
            kind="diffusion" if len(takes) == 1 else "stitched",
            network=takes[0][0] if len(takes) == 1 else stitched_label(takes),
            training_seed=seed,
            training_steps=self.recipe.steps,
            sampler=sampler,
            steps=len(widths),
            guidance_scale=guidance,
            split=split,
            samples=self.samples if split == "test" else self.held_out,
        )

    def real_case(self, network: str, task: Literal["t2i", "sr"] = "t2i") -> QualityCase:
        """The cell of real samples of the test prompts; `network` tells what they went through."""
        return QualityCase(
            world=self.world.name,
            task=task,
            kind="real",
            network=network,
            training_steps=0,
            sampler="none",
            steps=1,
            samples=self.samples,
        )


def tuned_rates(study: Study, width: int, sampler: str, tell: Tell = to_nobody) -> dict[int, float]:
    """The guidance of each number of steps: that of the least Frechet distance on held-out prompts."""

    def score(steps: int, rate: float) -> float:
        case = study.case([width] * steps, TUNED_ON, sampler, rate, "held-out")
        return held_out_score(judged_cell(study, case, [width] * steps))

    return cells.climbed_each(score, cells.STEPS[sampler], tell)


def held_out_score(record: QualityRecord) -> float:
    """What a choice on held-out prompts goes by, the less the better; a cell without figures is never chosen."""
    return float("inf") if record.frechet is None else record.frechet.value


def judged_cell(study: Study, case: QualityCase, widths: Sequence[int], *, tuned: bool = False) -> QualityRecord:
    """The record of a cell of the family: from disk, or sampled and judged now. `widths` has that of each step."""
    if there := kept(study).get(case.key):
        return there
    networks = {
        width: loaded(network_folder(study.weights, width, case.training_seed), study.device)
        for width in dict.fromkeys(widths)
    }
    gflop = sum(family_gflop(study, width) for width in networks)
    return judged(study, case, [networks[width] for width in widths], takes_of(widths), gflop, tuned=tuned)


def judged(
    study: Study,
    case: QualityCase,
    networks: Sequence[UNet],
    takes: tuple[tuple[str, int], ...],
    training_gflop: float,
    *,
    tuned: bool,
    beside: Tensor | None = None,
) -> QualityRecord:
    """The record of a cell that is not on disk, sampled, judged and kept now.

    networks    that of each step
    beside      what they see in further channels (`sampled`)
    """
    prompts, plan = Prompts.of(case.split, case.samples), plan_of(case.sampler, case.steps)
    latents = sampled(networks, study.world, plan, prompts, case.guidance_scale, beside=beside)
    forward = {network: forward_gflop(network.config, study.latent) for network in dict.fromkeys(networks)}
    return judged_latents(
        study,
        case,
        latents,
        prompts,
        tuned=tuned,
        takes=takes,
        parameters=sum(map(parameters, forward)),
        gflop_per_image=sum(forward[network] for network in networks) * (2 if case.guided else 1),
        training_gflop=training_gflop,
    )


def judged_latents(
    study: Study, case: QualityCase, latents: Tensor, prompts: Prompts, **known: object
) -> QualityRecord:
    """The record of samples [n, 4, h, w] of those prompts, whatever made them, judged and kept now.

    known    the record's other fields
    """
    resamples = RESAMPLES if case.split == "test" else 0
    record = judging(study).record(case, latents, prompts.factors, resamples=resamples, **known)
    keep(study, record)
    return record


def family_gflop(study: Study, width: int) -> float:
    """GFLOP of the training of a network of the family; a backward takes twice its forward.

    A forward is that of `forward_gflop`: the conditioning on timestep and caption, which training computes in
    every step, is not counted. It is about a hundredth of the rest.
    """
    recipe = study.recipe
    return 3 * forward_gflop(study.world.config(width), study.latent) * recipe.batch * recipe.steps


def takes_of(widths: Sequence[int]) -> tuple[tuple[str, int], ...]:
    """Which network takes how many steps, in order, by the width of each step."""
    return tuple((label(width), len(list(steps))) for width, steps in groupby(widths))


def kept(study: Study) -> dict[str, QualityRecord]:
    """The judged cells on disk, by their keys."""
    return _read(study.records, study.records.stat().st_size) if study.records.exists() else {}


@lru_cache(1)
def _read(path: Path, size: int) -> dict[str, QualityRecord]:
    records, _ = load_lines(path, QualityRecord)
    return {record.case_key: record for record in records}


def keep(study: Study, record: QualityRecord) -> None:
    """Appends a record; other processes may do the same."""
    QualityStore(study.records).append(record)


@cache
def judging(study: Study) -> Judging:
    """The judge with its real samples, made once in a process."""
    return Judging(study.world, study.judge, study.run_id, study.device)


@cache
def loaded(folder: Path, device: str) -> UNet:
    """The network of a folder, read once in a process."""
    return load_network(folder, device)

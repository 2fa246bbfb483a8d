"""The masked transformers of a study: trained, their guidance chosen, their samples judged as the family's are."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from ldmperf.profiling.quality import QualityCase, QualityRecord

from . import cells
from .masked import (
    SHAPES,
    TokenShape,
    TrainingTokens,
    drawn_token_network,
    evaluation_gflop,
    load_token_network,
    sampled_tokens,
    save_token_network,
)
from .networks import parameters
from .progress import Tell, part, to_nobody
from .sampling import Prompts, Split, real_samples
from .study import TUNED_ON, Study, held_out_score, judged_latents, judging, keep, kept
from .tokens import codebook
from .training import trained

if TYPE_CHECKING:
    from .tasks import Task


@dataclass(frozen=True)
class JudgeTokens:
    """Judges real scenes that went through the tokens: the best that a network of tokens can reach."""

    cost: float = 0.5

    def run(self, study: Study) -> None:
        case = study.real_case("real-tokens")
        if case.key not in kept(study):
            real, codes = real_samples(study.world, "test", study.samples), codebook(study.world)
            quantized = codes.latents(codes.tokens(real.latents))
            keep(study, judging(study).record(case, quantized, real.factors))


@dataclass(frozen=True)
class Masked:
    """Trains and judges the masked transformers of one size, the seed whose networks choose the guidance first.

    All seeds are one task: the others sample at the guidance of that one.
    """

    name: str
    shape: TokenShape
    seeds: tuple[int, ...]

    @property
    def cost(self) -> float:
        return len(self.seeds) * self.shape.hidden_size / 6

    def run(self, study: Study) -> None:
        rates: dict[int, float] = {}
        seeds = tuple(dict.fromkeys((TUNED_ON, *self.seeds)))
        for number, seed in enumerate(seeds):
            tell = part(study.tell, number / len(seeds), (number + 1) / len(seeds))
            self._train(study, seed, part(tell, 0.0, 0.5))
            rates = rates or masked_rates(study, self.name, part(tell, 0.5, 0.8))
            if seed in self.seeds:
                for evaluations, rate in rates.items():
                    case = masked_case(study, self.name, seed, evaluations, rate, "test")
                    judged_tokens(study, case, tuned=True)

    def _train(self, study: Study, seed: int, tell: Tell) -> None:
        folder = masked_folder(study, self.name, seed)
        if folder.exists():
            return
        network = drawn_token_network(self.shape, seed, study.device)
        training = TrainingTokens(study.world, network, seed, study.masked)
        keep = study.training_state(f"{self.name}-seed-{seed}-of-{study.masked.steps}")
        done = trained(training, keep, tell=tell)
        save_token_network(done.averaged_network(), folder)


def masked_tasks(study: Study) -> list[Task]:
    """Every size; none in a world without tokens."""
    shapes = SHAPES.get(study.latent, {})
    return [JudgeTokens(), *(Masked(name, shape, study.seeds) for name, shape in shapes.items())] if shapes else []


def masked_folder(study: Study, name: str, seed: int) -> Path:
    """Where a masked transformer lies; its last part is its label."""
    return study.further(Path(f"masked-of-{study.masked.steps}", f"seed-{seed}", name))


def masked_case(
    study: Study, name: str, seed: int, evaluations: int, guidance: float, split: Split
) -> QualityCase:
    """A cell of it."""
    return QualityCase(
        world=study.world.name,
        kind="masked-transformer",
        network=name,
        training_seed=seed,
        training_steps=study.masked.steps,
        sampler="masked",
        steps=evaluations,
        guidance_scale=guidance,
        split=split,
        samples=study.samples if split == "test" else study.held_out,
    )


def masked_rates(study: Study, name: str, tell: Tell = to_nobody) -> dict[int, float]:
    """The guidance of each number of evaluations: that of the least Frechet distance on held-out prompts."""

    def score(number: int, rate: float) -> float:
        return held_out_score(judged_tokens(study, masked_case(study, name, TUNED_ON, number, rate, "held-out")))

    return cells.climbed_each(score, cells.EVALUATIONS, tell)


def judged_tokens(study: Study, case: QualityCase, *, tuned: bool = False) -> QualityRecord:
    """The record of a cell: from disk, or sampled and judged now."""
    if there := kept(study).get(case.key):
        return there
    network = _loaded(masked_folder(study, case.network, case.training_seed), study.device)
    prompts = Prompts.of(case.split, case.samples)
    tokens = sampled_tokens(network, study.latent, case.steps, prompts, case.guidance_scale)
    gflop = evaluation_gflop(network, study.latent)
    return judged_latents(
        study,
        case,
        codebook(study.world).latents(tokens),
        prompts,
        tuned=tuned,
        takes=((case.network, case.steps),),
        parameters=parameters(network),
        gflop_per_image=gflop * case.steps * (2 if case.guided else 1),
        # A backward takes twice its forward.
        training_gflop=3 * gflop * study.masked.batch * study.masked.steps,
    )


@cache
def _loaded(folder: Path, device: str) -> nn.Module:
    return load_token_network(folder, device)

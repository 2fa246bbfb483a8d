"""The parts of a study that run beside each other, each in one process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from . import cells
from .adversarial import TrainGan
from .distillation import Distill
from .judge import ceiling, save_judge, trained_judge
from .masked_cells import masked_tasks
from .networks import label, network_folder, save_network, step_cost
from .sampling import real_samples
from .stitching import JudgePlan, ScorePlan, plans
from .study import Study, judged_cell, judging, keep, kept, tuned_rates
from .super_resolution import fine_tunings
from .training import Training, drawn_network, trained


class Task(Protocol):
    """`cost`, in any unit, orders tasks and fills the bar; `run` does what is not on disk yet, and tells
    `study.tell` how far it is where it takes minutes."""

    @property
    def cost(self) -> float: ...

    def run(self, study: Study) -> None: ...


@dataclass(frozen=True)
class TrainJudge:
    """Trains the judge, and refuses one that is not good enough."""

    cost: float = 2.5

    def run(self, study: Study) -> None:
        if study.judge.exists():
            return
        judge = trained_judge(study.world, tell=study.tell)
        ceiling(judge, study.world)
        study.weights.mkdir(parents=True, exist_ok=True)
        save_judge(judge, study.judge)


@dataclass(frozen=True)
class Train:
    """Trains a network of the family."""

    width: int
    seed: int

    @property
    def cost(self) -> float:
        return step_cost(self.width) * 2

    def run(self, study: Study) -> None:
        folder = network_folder(study.weights, self.width, self.seed)
        if folder.exists():
            return
        network = drawn_network(study.world.config(self.width), self.seed, study.device)
        training = Training(study.world, network, self.seed, study.recipe)
        keep = study.training_state(f"{label(self.width)}-seed-{self.seed}")
        done = trained(training, keep, tell=study.tell)
        save_network(done.averaged_network(), folder)


@dataclass(frozen=True)
class Tune:
    """Chooses the guidance of a network's cells on held-out prompts."""

    width: int
    sampler: str

    @property
    def cost(self) -> float:
        return step_cost(self.width) * sum(cells.STEPS[self.sampler]) / 20

    def run(self, study: Study) -> None:
        tuned_rates(study, self.width, self.sampler, study.tell)


@dataclass(frozen=True)
class JudgeCell:
    """Judges a cell at the guidance chosen for it."""

    width: int
    seed: int
    sampler: str
    steps: int

    @property
    def cost(self) -> float:
        return step_cost(self.width) * self.steps / 20

    def run(self, study: Study) -> None:
        rate = tuned_rates(study, self.width, self.sampler)[self.steps]
        widths = [self.width] * self.steps
        judged_cell(study, study.case(widths, self.seed, self.sampler, rate, "test"), widths, tuned=True)


@dataclass(frozen=True)
class JudgeRates:
    """Judges a cell at every guidance."""

    width: int
    seed: int
    sampler: str
    steps: int

    @property
    def cost(self) -> float:
        return step_cost(self.width) * self.steps * len(cells.RATES) / 20

    def run(self, study: Study) -> None:
        chosen = tuned_rates(study, self.width, self.sampler)[self.steps]
        widths = [self.width] * self.steps
        for done, rate in enumerate(cells.RATES, 1):
            case = study.case(widths, self.seed, self.sampler, rate, "test")
            judged_cell(study, case, widths, tuned=rate == chosen)
            study.tell(done / len(cells.RATES))


@dataclass(frozen=True)
class JudgeReal:
    """Judges real scenes of the test prompts as if a network had made them: the floor, and the judge's ceiling."""

    task: Literal["t2i", "sr"] = "t2i"
    cost: float = 0.5

    def run(self, study: Study) -> None:
        case = study.real_case("real", self.task)
        if case.key not in kept(study):
            real = real_samples(study.world, "test", study.samples)
            keep(study, judging(study).record(case, real.latents, real.factors))


def stages(study: Study, samplers: tuple[str, ...]) -> dict[str, list[Task]]:
    """The tasks of each stage by its name; a stage needs those before it."""
    widths, seeds = study.world.widths, study.seeds
    sampler, steps = cells.VARIED
    return {
        "judge": [TrainJudge()],
        "train": [Train(width, seed) for width in widths for seed in seeds],
        "tune": [JudgeReal(), *(Tune(width, name) for width in widths for name in samplers)],
        "sample": [
            JudgeCell(width, seed, name, number)
            for name in samplers
            for width in widths
            for seed in seeds
            for number in cells.STEPS[name]
        ],
        "guidance": [JudgeRates(width, seeds[0], sampler, steps) for width in widths],
        "shares": [ScorePlan(plan) for plan in plans(study.world)],
        "stitch": [JudgePlan(plan, seed) for plan in plans(study.world) for seed in seeds],
        "distill": [Distill(width, seed) for width in widths for seed in seeds],
        "super-resolution": [JudgeReal("sr"), *fine_tunings(study)],
        "gan": [TrainGan(width, seed) for width in widths for seed in seeds],
        "masked": masked_tasks(study),
    }

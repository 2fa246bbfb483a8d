"""Progressive distillation: a student's four steps of DDIM without guidance for its teacher's sixteen with it.

Salimans and Ho, arXiv 2202.00512; guidance as in Meng et al., arXiv 2210.03142. A round teaches a student to reach
in one step what its teacher reaches in two. The first teacher is the network at its tuned guidance, the next one
the student of the first round.

    x_t            = alpha_t x_0 + sigma_t eps
    x_t, x_m, x_e    by two DDIM steps of the teacher
    loss           = |v_student(x_t) - v|^2, where one DDIM step of v goes from x_t to x_e

A student of consistency distillation, which the `lcm` plan samples, would learn from its own answer at the next of
some 50 timesteps: what is known at the clean end moves up one timestep at a time, no faster than the averaged
weights follow. 800 steps of 32 images are few for that. A round here is a regression on a target that stands
still, from weights that nearly meet it. The price is about the same: a step takes 7 forwards in the round with
guidance and 5 in the other (a backward counts two), one of consistency distillation 6. These are reasons; the two
were not compared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ldmperf.model import UNet
from ldmperf.profiling.quality import QualityCase

from . import cells
from .captions import embedded, none_embedded
from .family import SCHEDULE, World
from .networks import forward_gflop, label, load_network, network_folder, save_network, step_cost
from .progress import part
from .sampling import plan_of
from .study import Study, family_gflop, judged, kept, loaded, tuned_rates
from .training import Recipe, Training, trained

# v of latents [n, 4, h, w] at timesteps [n] under contexts [n, 6, 32].
Teacher = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Levels:
    """Points of a trajectory, the noisiest first: timesteps [n], alpha and sigma [n + 1, 1, 1, 1].

    The last point is clean and has no timestep.
    """

    timesteps: Tensor
    alpha: Tensor
    sigma: Tensor

    @classmethod
    def of(cls, steps: int, device: torch.device | str = "cpu") -> Levels:
        """Those of a DDIM plan."""
        timesteps = plan_of("ddim", steps).timesteps
        levels = torch.tensor([*SCHEDULE.alphas_cumprod[timesteps.astype(int)], 1.0], dtype=torch.float64)
        alpha, sigma = (root.sqrt().float()[:, None, None, None].to(device) for root in (levels, 1 - levels))
        return cls(torch.tensor(timesteps, dtype=torch.float32, device=device), alpha, sigma)

    def step(self, x: Tensor, v: Tensor, now: Tensor, then: Tensor) -> Tensor:
        """DDIM from points `now` [n] to `then` [n] (Song et al., arXiv 2010.02502, equation 12)."""
        cos, sin = self._turn(now, then)
        return cos * x - sin * v

    def v_between(self, x: Tensor, reached: Tensor, now: Tensor, then: Tensor) -> Tensor:
        """The v whose step from `now` to `then` reaches that."""
        cos, sin = self._turn(now, then)
        return (cos * x - reached) / sin

    def _turn(self, now: Tensor, then: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine of the angle between two points: x_then = alpha_then x_0 + sigma_then eps, where
        x_0 = alpha x - sigma v and eps = alpha v + sigma x."""
        alpha, sigma, next_alpha, next_sigma = self.alpha[now], self.sigma[now], self.alpha[then], self.sigma[then]
        return alpha * next_alpha + sigma * next_sigma, sigma * next_alpha - alpha * next_sigma


def guided(network: UNet, rate: float) -> Teacher:
    """The network with guidance, as `ldmperf.samplers.sample` has it."""
    if rate == 1:
        return network

    def predicted(x: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        contexts = torch.cat([none_embedded(len(x)).to(context), context])
        both: Tensor = network(torch.cat([x, x]), torch.cat([timesteps, timesteps]), contexts)
        untold, told = both.chunk(2)
        return untold + rate * (told - untold)

    return predicted


class Distilling(Training[UNet]):
    """A round: the student `network`, at first its teacher's weights, learns to sample in `steps` steps."""

    def __init__(
        self,
        world: World,
        network: UNet,
        seed: int,
        recipe: Recipe,
        *,
        before: int,
        teacher: Teacher,
        steps: int,
    ) -> None:
        if SCHEDULE.num_train_timesteps % steps:
            raise ValueError(f"DDIM of {steps} steps leaves its own timesteps: give a divisor of 1000")
        super().__init__(world, network, seed, recipe, before=before)
        self._teacher, self._steps, self._levels = teacher, steps, Levels.of(2 * steps, self._device)

    def _loss(self, number: int) -> Tensor:
        batch, draws, levels = self._read(self._source, number), self._draws(number), self._levels
        noise = torch.randn(batch.latents.shape, generator=draws)
        now = 2 * torch.randint(0, self._steps, (self.recipe.batch,), generator=draws)
        latents, noise, now, context = (
            tensor.to(self._device) for tensor in (batch.latents, noise, now, embedded(batch.factors))
        )
        x = levels.alpha[now] * latents + levels.sigma[now] * noise
        with torch.no_grad():
            reached = x
            for place in (now, now + 1):
                v = self._teacher(reached, levels.timesteps[place], context)
                reached = levels.step(reached, v, place, place + 1)
            target = levels.v_between(x, reached, now, now + 2)
        predicted: Tensor = self.network(x, levels.timesteps[now], context)
        return (predicted - target).square().mean()


@dataclass(frozen=True)
class Distill:
    """Distills a network of the family at the guidance chosen for its teacher, and judges the student."""

    width: int
    seed: int

    @property
    def cost(self) -> float:
        return step_cost(self.width) * 1.2

    def run(self, study: Study) -> None:
        steps = cells.STUDENT_STEPS[-1]
        case = student_case(study, self.width, self.seed)
        rate = tuned_rates(study, self.width, "ddim")[2 * cells.STUDENT_STEPS[0]]
        folder = distilled(study, self.width, self.seed, rate)
        if case.key not in kept(study):
            student = loaded(folder, study.device)
            gflop = family_gflop(study, self.width) + distilling_gflop(study, self.width, rate)
            judged(study, case, [student] * steps, ((case.network, steps),), gflop, tuned=True)


def student_case(study: Study, width: int, seed: int) -> QualityCase:
    """A student's only cell. It has the label of its teacher, whose times without guidance are its own."""
    return QualityCase(
        world=study.world.name,
        kind="distilled",
        network=label(width),
        training_seed=seed,
        training_steps=len(cells.STUDENT_STEPS) * study.distilling.steps,
        steps=cells.STUDENT_STEPS[-1],
        samples=study.samples,
    )


def distilled(study: Study, width: int, seed: int, rate: float) -> Path:
    """The folder of the last student, after the rounds that are not on disk yet."""
    teacher, before = network_folder(study.weights, width, seed), study.recipe.steps
    rounds = len(cells.STUDENT_STEPS)
    for place, steps in enumerate(cells.STUDENT_STEPS):
        folder = student_folder(study, width, seed, steps)
        if not folder.exists():
            training = Distilling(
                study.world,
                load_network(teacher, study.device),
                seed,
                study.distilling,
                before=before,
                teacher=guided(load_network(teacher, study.device), rate),
                steps=steps,
            )
            name = f"{label(width)}-seed-{seed}-in-{steps}-steps-of-{study.distilling.steps}"
            tell = part(study.tell, place / rounds, (place + 1) / rounds)
            done = trained(training, study.training_state(name), tell=tell)
            save_network(done.averaged_network(), folder)
        # A student has its teacher's guidance in its weights.
        teacher, rate, before = folder, 1.0, before + study.distilling.steps
    return teacher


def student_folder(study: Study, width: int, seed: int, steps: int) -> Path:
    """Where the student that takes so many steps lies; its last part is its label."""
    return study.further(network_folder(Path(f"in-{steps}-steps-of-{study.distilling.steps}"), width, seed))


def distilling_gflop(study: Study, width: int, rate: float) -> float:
    """GFLOP of all rounds: a teacher's two steps, with guidance of two forwards each in the first, and a student's
    forward and backward."""
    rounds, guidance = len(cells.STUDENT_STEPS), 2 if rate != 1 else 1
    forwards = 2 * (guidance + rounds - 1) + 3 * rounds
    recipe = study.distilling
    return forwards * forward_gflop(study.world.config(width), study.latent) * recipe.batch * recipe.steps

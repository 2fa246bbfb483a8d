"""Super-resolution: from the latent of a scene in half its side to that of the scene.

The condition is the same scene rendered at half the side and encoded by the world's autoencoder: 4x4 latents where
the world has 8x8. Pixels and weights are integers there too, so every bit is the same on every machine; a mean of
latents would depend on how a library adds, and would be the latent of no scene. Each place is doubled (nearest),
and a network sees these four channels after the four of the noised latent. It is told every caption, as the
text-to-image networks know them, and samples without guidance.

Two networks "w8-sr" are trained for equally long on the same scenes, noise and timesteps: one from the weights of
text-to-image, whose first convolution gets four more input channels of zero weights, and one from drawn weights,
whose records have the kind "scratch".
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ldmperf.model import UNet
from ldmperf.profiling.quality import QualityCase

from . import cells
from .data import Source
from .family import World
from .latents import CHANNELS
from .networks import forward_gflop, label, load_network, network_folder, save_network, step_cost
from .progress import part
from .sampling import Split, real_samples
from .study import Study, family_gflop, judged, kept, loaded
from .training import CONTINUED, Recipe, Training, drawn_network, trained

IN_CHANNELS = 2 * CHANNELS
_SAMPLER = "ddim"


def doubled(low: Tensor) -> Tensor:
    """[n, 4, h, w] to [n, 4, 2h, 2w]: each place four times."""
    return low.repeat_interleave(2, -2).repeat_interleave(2, -1)


def half_side(world: World) -> int:
    """Of an image of low resolution, in pixels."""
    return world.side // 2


def conditions(world: World, split: Split, count: int) -> Tensor:
    """What a network sees beside its latents for the prompts of a split, [count, 4, h, w]."""
    return doubled(real_samples(world, split, count, half_side(world)).latents)


def widened(network: UNet, world: World, width: int) -> UNet:
    """The text-to-image network of a width with four more input channels, which change nothing yet."""
    weights = dict(network.state_dict())
    first = weights["conv_in.weight"]
    weights["conv_in.weight"] = torch.cat([first, torch.zeros_like(first)], 1)
    wide = UNet(world.config(width, IN_CHANNELS), backend=network.choices.backend)
    wide = wide.to(device=first.device, dtype=first.dtype)
    wide.load_state_dict(weights)
    return wide


class TrainingSuperResolution(Training[UNet]):
    """A network of 8 input channels in training."""

    def __init__(self, world: World, network: UNet, seed: int, recipe: Recipe, *, before: int = 0) -> None:
        super().__init__(world, network, seed, recipe, before=before)
        self._low = Source(world, self.scenes, half_side(world))

    def _input(self, noised: Tensor, number: int) -> Tensor:
        low = doubled(self._read(self._low, number).latents)
        return torch.cat([noised, low.to(noised)], 1)


def recipe_of(steps: int, pretrained: bool) -> Recipe:
    """Drawn weights learn at the family's own rate; the others already know."""
    if pretrained:
        return replace(CONTINUED, steps=steps)
    return Recipe(steps, warmup=max(1, min(Recipe.warmup, steps // 5)), untold=0.0)


@dataclass(frozen=True)
class FineTune:
    """Trains a network for super-resolution and judges it.

    pretrained    starts from the weights of text-to-image, not from drawn ones
    sampled       numbers of steps that it samples with
    """

    width: int
    seed: int
    steps: int
    pretrained: bool
    sampled: tuple[int, ...]

    @property
    def cost(self) -> float:
        return step_cost(self.width) * (self.steps / 1500 + sum(self.sampled) / 32)

    @property
    def _share_of_training(self) -> float:
        return step_cost(self.width) * self.steps / 1500 / self.cost

    @property
    def network(self) -> str:
        return super_label(self.width)

    def run(self, study: Study) -> None:
        folder = super_folder(study, self.width, self.seed, self.steps, self.pretrained)
        if not folder.exists():
            save_network(self._trained(study).averaged_network(), folder)
        network = loaded(folder, study.device)
        forward = forward_gflop(network.config, study.latent)
        gflop = 3 * forward * recipe_of(self.steps, self.pretrained).batch * self.steps
        if self.pretrained:
            gflop += family_gflop(study, self.width)
        tell, done = part(study.tell, self._share_of_training, 1), 0
        for split in ("held-out", "test"):
            beside = conditions(study.world, split, study.samples if split == "test" else study.held_out)
            for number in self.sampled:
                case = self.case(study, number, split)
                if case.key not in kept(study):
                    takes = ((self.network, number),)
                    judged(study, case, [network] * number, takes, gflop, tuned=split == "test", beside=beside)
                done += number * case.samples
                tell(done / sum(self.sampled) / (study.samples + study.held_out))

    def case(self, study: Study, number: int, split: Split) -> QualityCase:
        """A cell of it."""
        return QualityCase(
            world=study.world.name,
            task="sr",
            kind="diffusion" if self.pretrained else "scratch",
            network=self.network,
            training_seed=self.seed,
            training_steps=self.steps,
            sampler=_SAMPLER,
            steps=number,
            split=split,
            samples=study.samples if split == "test" else study.held_out,
        )

    def _trained(self, study: Study) -> Training[UNet]:
        if self.pretrained:
            folder = network_folder(study.weights, self.width, self.seed)
            network = widened(load_network(folder, study.device), study.world, self.width)
        else:
            network = drawn_network(study.world.config(self.width, IN_CHANNELS), self.seed, study.device)
        recipe = recipe_of(self.steps, self.pretrained)
        training = TrainingSuperResolution(study.world, network, self.seed, recipe, before=study.recipe.steps)
        keep = study.training_state(f"{self.network}-seed-{self.seed}-{_of(self.steps, self.pretrained)}")
        return trained(training, keep, tell=part(study.tell, 0, self._share_of_training))


def super_folder(study: Study, width: int, seed: int, steps: int, pretrained: bool) -> Path:
    """Where a network of super-resolution lies after so many steps; its last part is its label."""
    return study.further(Path(f"sr-{_of(steps, pretrained)}", f"seed-{seed}", super_label(width)))


def _of(steps: int, pretrained: bool) -> str:
    return f"of-{steps}" if pretrained else f"of-{steps}-from-scratch"


def super_label(width: int) -> str:
    """What records call a network of super-resolution."""
    return f"{label(width)}-sr"


def fine_tunings(study: Study) -> list[FineTune]:
    """Every width, from both kinds of weights, for every time; after the longest more steps of sampling."""
    longest = max(study.fine_tuned)
    return [
        FineTune(
            width,
            seed,
            steps,
            pretrained,
            cells.SUPER_RESOLVED if pretrained and steps == longest else cells.SUPER_RESOLVED_BRIEFLY,
        )
        for width in study.world.widths
        for seed in study.seeds
        for steps in study.fine_tuned
        for pretrained in (True, False)
    ]

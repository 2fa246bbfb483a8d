"""Training of a network on the world: v prediction, AdamW, a cosine, averaged weights.

All widths see the same scenes, noise and timesteps in the same order, so that they differ by their width alone.
What a step draws depends on its number and not on the steps before: a training that was cut off goes on to the
same bits.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from ldmperf.model import UNet, UNetConfig

from .captions import embedded
from .data import Batch, Source
from .family import SCHEDULE, World
from .progress import Tell, to_nobody

Network = TypeVar("Network", bound=nn.Module)
InTraining = TypeVar("InTraining", bound="Training[Any]")

# A seed's scenes; those of judging and of prompts are other seeds (`judge`, `judging`, `sampling`).
_FIRST_SEED = 1000


@dataclass(frozen=True)
class Recipe:
    """How a network is trained. `untold`: the share of captions that are dropped, for guidance."""

    steps: int = 3000
    batch: int = 32
    learning_rate: float = 5e-3
    last_rate: float = 5e-5
    warmup: int = 100
    weight_decay: float = 0.01
    averaging: float = 0.995
    untold: float = 0.1
    betas: tuple[float, float] = (0.9, 0.99)

    def rate(self, step: int) -> float:
        """The learning rate of a step, from 1 on."""
        cosine = 0.5 + 0.5 * math.cos(math.pi * step / self.steps)
        falling = self.last_rate + (self.learning_rate - self.last_rate) * cosine
        return falling * min(1.0, step / self.warmup)

    def optimizer(self, network: nn.Module) -> torch.optim.Optimizer:
        """Of all its parameters, at the highest learning rate."""
        return torch.optim.AdamW(
            network.parameters(),
            self.learning_rate,
            betas=self.betas,
            weight_decay=self.weight_decay,
            fused=True,
        )


# Of a network that is trained already: smaller steps, and every caption is told, as it samples without guidance.
CONTINUED = Recipe(steps=400, learning_rate=2e-3, last_rate=2e-5, warmup=20, untold=0.0)

# Of a generator against a discriminator, both of which change under the other: no momentum, no decay of weights.
ADVERSARIAL = Recipe(learning_rate=2e-3, last_rate=2e-5, weight_decay=0.0, untold=0.0, betas=(0.0, 0.99))


def drawn_network(config: UNetConfig, seed: int, device: str = "cpu") -> UNet:
    """A network whose weights a training seed draws."""
    torch.manual_seed(seed)
    return UNet(config, backend="torch" if device == "cpu" else "auto").to(device)


class Training(Generic[Network]):
    """A network in training. `step` runs one; `state` and `restore` carry it over a break.

    It changes `network`, on whose device it runs. `before`: how many steps were trained before these; scenes and
    draws are those of the steps after them.
    """

    def __init__(self, world: World, network: Network, seed: int, recipe: Recipe, *, before: int = 0) -> None:
        self.world, self.recipe, self.seed = world, recipe, seed
        # A network that was loaded wants no gradients.
        self.network = network.train().requires_grad_()
        self._device = next(network.parameters()).device
        self.averaged = {name: value.clone() for name, value in self.network.state_dict().items()}
        self.optimizer = recipe.optimizer(self.network)
        self.done, self._before = 0, before
        # The seed of its scenes.
        self.scenes = _FIRST_SEED + seed
        self._source = Source(world, self.scenes)
        self._alphas = torch.tensor(SCHEDULE.alphas_cumprod, dtype=torch.float32, device=self._device)

    def step(self) -> float:
        """Trains one step and returns its loss."""
        recipe, number = self.recipe, self.done + 1
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.rate(number)
        loss = self._loss(number)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._average(min(recipe.averaging, (1 + number) / (10 + number)))
        self.done = number
        return loss.item()

    def _read(self, source: Source, number: int) -> Batch:
        """The scenes of a step."""
        return source.read((self._before + number - 1) * self.recipe.batch, self.recipe.batch)

    def _draws(self, number: int) -> torch.Generator:
        """What a step draws from."""
        return torch.Generator().manual_seed(self.seed << 32 | self._before + number)

    def _input(self, noised: Tensor, number: int) -> Tensor:
        """What the network sees of noised latents at a step."""
        return noised

    def _loss(self, number: int) -> Tensor:
        recipe, batch, draws = self.recipe, self._read(self._source, number), self._draws(number)
        noise = torch.randn(batch.latents.shape, generator=draws)
        timesteps = torch.randint(0, len(self._alphas), (recipe.batch,), generator=draws)
        told = torch.rand(recipe.batch, generator=draws) >= recipe.untold
        latents, noise, timesteps, context = (
            tensor.to(self._device) for tensor in (batch.latents, noise, timesteps, embedded(batch.factors, told))
        )
        alpha = self._alphas[timesteps].sqrt()[:, None, None, None]
        sigma = (1 - self._alphas[timesteps]).sqrt()[:, None, None, None]
        seen = self._input(alpha * latents + sigma * noise, number)
        predicted: Tensor = self.network(seen, timesteps.float(), context)
        return (predicted - (alpha * noise - sigma * latents)).square().mean()

    @torch.no_grad()
    def _average(self, decay: float) -> None:
        now = self.network.state_dict()
        torch._foreach_lerp_(list(self.averaged.values()), [now[name] for name in self.averaged], 1 - decay)

    def averaged_network(self) -> Network:
        """The network with its averaged weights, in eval mode."""
        network = copy.deepcopy(self.network)
        network.load_state_dict(self.averaged)
        return network.eval()

    def state(self) -> dict[str, Any]:
        """All that goes on from here."""
        return {
            "done": self.done,
            "network": self.network.state_dict(),
            "averaged": self.averaged,
            "optimizer": self.optimizer.state_dict(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from a `state`."""
        self.done = state["done"]
        self.network.load_state_dict(state["network"])
        self.averaged = state["averaged"]
        self.optimizer.load_state_dict(state["optimizer"])


def trained(training: InTraining, keep: Path, *, every: int = 200, tell: Tell = to_nobody) -> InTraining:
    """The training at its end; its state goes to the file `keep` every so many steps, and comes from there."""
    if keep.exists():
        training.restore(torch.load(keep, map_location=training._device, weights_only=True))
    while training.done < training.recipe.steps:
        training.step()
        tell(training.done / training.recipe.steps)
        if training.done % every == 0 or training.done == training.recipe.steps:
            whole = keep.with_suffix(".part")
            torch.save(training.state(), whole)
            whole.replace(keep)
    return training

"""A conditional GAN: the family's own network as a generator of one pass, and a small discriminator.

    latents  = network(noise, t = 999, caption)
    D's loss = max(0, 1 - D(real)) + max(0, 1 + D(made)) + w max(0, 1 + D(real under others' captions)) + R1
    G's loss = -D(made)

The hinge (Lim and Ye, arXiv 1705.02894); captions by projection (Miyato and Koyama, arXiv 1802.05637) and real
latents under wrong captions among the fakes (Reed et al., arXiv 1605.05396), so that a caption is worth following;
R1, the squared gradient at real latents (Mescheder et al., arXiv 1801.04406), in one step of four and four times
as much there (Karras et al., arXiv 1912.04958). There is no pre-training: both networks begin with drawn weights.

A generator is trained for as many steps as the family is, on the same scenes in the same order, and its averaged
weights are judged. It makes a latent in one forward, from the noise that the family's samples begin with.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldmperf.model import UNet
from ldmperf.profiling.quality import QualityCase
from ldmperf.profiling.step.flops import flop_counter
from ldmperf.samplers import initial_noise

from .captions import CONTEXT_DIM, TOKENS, embedded
from .family import SCHEDULE, World
from .latents import CHANNELS
from .networks import forward_gflop, label, network_folder, parameters, save_network, step_cost
from .sampling import Prompts, Split
from .study import Study, judged_latents, kept, loaded
from .training import Recipe, Training, drawn_network, trained

# The timestep of every forward: the noisiest, as the input is noise.
TIMESTEP = float(SCHEDULE.num_train_timesteps - 1)
# The discriminator: channels of its first convolution, features that captions are projected to, and its learning
# rate over the generator's.
_CHANNELS, _FEATURES, _RATE = 32, 128, 0.5
# What real latents under wrong captions weigh; the penalty, and in which steps it is taken.
WRONG, PENALTY, PENALTY_EVERY = 0.5, 0.1, 4
# Latents whose spread the discriminator sees as one.
_GROUP = 4
_SLOPE = 0.2


class _Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        inner: Tensor = self.conv2(F.leaky_relu(self.conv1(F.leaky_relu(x, _SLOPE)), _SLOPE))
        return (x + inner) / 2**0.5


class Discriminator(nn.Module):
    """Latents [n, 4, h, w] under contexts [n, 6, 32] to scores [n], above zero where they seem real.

    n is a multiple of 4: the spread within a group of four is a feature of each of its latents (Karras et al.,
    arXiv 1710.10196), so that latents that are all alike give themselves away.
    """

    def __init__(self, world: World) -> None:
        super().__init__()
        c = _CHANNELS
        layers: list[nn.Module] = [nn.Conv2d(CHANNELS, c, 3, padding=1), _Residual(c), nn.LeakyReLU(_SLOPE)]
        # Down to 4x4 whatever the latent's size, at twice the channels in the end.
        halvings = (world.latent // 4).bit_length() - 1
        for place in range(halvings):
            wider = 2 * c if place == halvings - 1 else c
            layers += [nn.Conv2d(c, wider, 3, stride=2, padding=1), _Residual(wider), nn.LeakyReLU(_SLOPE)]
        self.body = nn.Sequential(*layers, nn.Flatten())
        self.features = nn.Linear(2 * c * 16 + 1, _FEATURES)
        self.plain = nn.Linear(_FEATURES, 1)
        self.projection = nn.Linear(TOKENS * CONTEXT_DIM, _FEATURES)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks it

    def forward(self, latents: Tensor, context: Tensor) -> Tensor:
        body = self.body(latents)
        features = F.leaky_relu(self.features(torch.cat([body, spread(body)], 1)), _SLOPE)
        told: Tensor = (features * self.projection(context.flatten(1))).sum(1) / _FEATURES**0.5
        plain: Tensor = self.plain(features)
        return plain[:, 0] + told


def spread(features: Tensor) -> Tensor:
    """The mean deviation of features [n, d] within each group of four, for each of its rows: [n, 1]."""
    groups = features.unflatten(0, (-1, _GROUP))
    # A deviation of zero has no gradient.
    deviations: Tensor = (groups.var(1, correction=0) + 1e-8).sqrt().mean(1, keepdim=True)
    return deviations.repeat_interleave(_GROUP, 0)


def discriminator_loss(real: Tensor, made: Tensor, wrong: Tensor) -> Tensor:
    """The hinge on scores [n] of real latents, of made ones, and of real ones under others' captions."""
    return F.relu(1 - real).mean() + F.relu(1 + made).mean() + WRONG * F.relu(1 + wrong).mean()


def gradient_penalty(scores: Tensor, latents: Tensor) -> Tensor:
    """Half the mean squared gradient of scores [n] by their latents [n, 4, h, w], which want gradients."""
    (gradient,) = torch.autograd.grad(scores.sum(), latents, create_graph=True)
    return gradient.square().sum((1, 2, 3)).mean() / 2


class Adversarial(Training[UNet]):
    """A generator in training: in each step the discriminator learns first, from the same captions."""

    def __init__(self, world: World, network: UNet, seed: int, recipe: Recipe) -> None:
        super().__init__(world, network, seed, recipe)
        torch.manual_seed(seed)
        self.discriminator = Discriminator(world).to(self._device)
        self._against = recipe.optimizer(self.discriminator)

    def step(self) -> float:
        """Trains the discriminator one step, then the generator; returns the generator's loss."""
        number = self.done + 1
        for group in self._against.param_groups:
            group["lr"] = _RATE * self.recipe.rate(number)
        self.discriminator.requires_grad_()
        self._discriminator_loss(number).backward()
        self._against.step()
        self._against.zero_grad(set_to_none=True)
        # The generator's gradients go through it, and need none of its weights.
        self.discriminator.requires_grad_(False)
        return super().step()

    def _discriminator_loss(self, number: int) -> Tensor:
        batch, (noise, _) = self._read(self._source, number), self._noises(number)
        real, context = batch.latents.to(self._device), embedded(batch.factors).to(self._device)
        with torch.no_grad():
            made = self.network(noise, TIMESTEP, context)
        penalized = number % PENALTY_EVERY == 0
        if penalized:
            real = real.clone().requires_grad_()
        scores: Tensor = self.discriminator(real, context)
        wrong = self.discriminator(real.detach(), context.roll(1, 0))
        loss = discriminator_loss(scores, self.discriminator(made, context), wrong)
        if penalized:
            loss = loss + PENALTY_EVERY * PENALTY * gradient_penalty(scores, real)
        return loss

    def _loss(self, number: int) -> Tensor:
        context = embedded(self._read(self._source, number).factors).to(self._device)
        _, noise = self._noises(number)
        scores: Tensor = self.discriminator(self.network(noise, TIMESTEP, context), context)
        return -scores.mean()

    def _noises(self, number: int) -> Tensor:
        """A step's noise for the discriminator's fakes and for the generator, [2, n, 4, h, w]."""
        shape = (2, self.recipe.batch, CHANNELS, self.world.latent, self.world.latent)
        return torch.randn(shape, generator=self._draws(number)).to(self._device)

    def state(self) -> dict[str, Any]:
        """All that goes on from here, of both networks."""
        against = {"network": self.discriminator.state_dict(), "optimizer": self._against.state_dict()}
        return {**super().state(), "against": against}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from a `state`."""
        super().restore(state)
        self.discriminator.load_state_dict(state["against"]["network"])
        self._against.load_state_dict(state["against"]["optimizer"])


def generated(network: UNet, world: World, prompts: Prompts, batch: int = 125) -> Tensor:
    """Latents [n, 4, h, w] in float32 of one forward each."""
    device, shape = next(network.parameters()).device, (CHANNELS, world.latent, world.latent)
    made = []
    with torch.inference_mode():
        for start in range(0, len(prompts.seeds), batch):
            place = slice(start, start + batch)
            noise = initial_noise(prompts.seeds[place], shape, device=device)
            made.append(network(noise, TIMESTEP, embedded(prompts.factors[place]).to(device)).cpu())
    return torch.cat(made).contiguous()


@dataclass(frozen=True)
class TrainGan:
    """Trains a generator and judges it."""

    width: int
    seed: int

    @property
    def cost(self) -> float:
        return step_cost(self.width) * 4

    def run(self, study: Study) -> None:
        folder = gan_folder(study, self.width, self.seed)
        if not folder.exists():
            save_network(self._trained(study).averaged_network(), folder)
        network = loaded(folder, study.device)
        for split in ("held-out", "test"):
            case = self.case(study, split)
            if case.key not in kept(study):
                prompts = Prompts.of(split, case.samples)
                judged_latents(
                    study,
                    case,
                    generated(network, study.world, prompts),
                    prompts,
                    tuned=split == "test",
                    takes=((case.network, 1),),
                    parameters=parameters(network),
                    gflop_per_image=forward_gflop(network.config, study.latent),
                    training_gflop=gan_gflop(study, self.width),
                )

    def case(self, study: Study, split: Split) -> QualityCase:
        """Its cell of a split."""
        return QualityCase(
            world=study.world.name,
            kind="gan",
            network=gan_label(self.width),
            training_seed=self.seed,
            training_steps=study.adversarial.steps,
            sampler="none",
            steps=1,
            split=split,
            samples=study.samples if split == "test" else study.held_out,
        )

    def _trained(self, study: Study) -> Training[UNet]:
        network = drawn_network(study.world.config(self.width), self.seed, study.device)
        training = Adversarial(study.world, network, self.seed, study.adversarial)
        name = f"{gan_label(self.width)}-seed-{self.seed}-of-{study.adversarial.steps}"
        return trained(training, study.training_state(name), tell=study.tell)


def gan_label(width: int) -> str:
    """What records call a generator: "w8-gan"."""
    return f"{label(width)}-gan"


def gan_folder(study: Study, width: int, seed: int) -> Path:
    """Where a generator lies after so many steps; its last part is its label."""
    place = network_folder(Path(f"gan-of-{study.adversarial.steps}"), width, seed)
    return study.further(place.with_name(gan_label(width)))


def gan_gflop(study: Study, width: int) -> float:
    """GFLOP of the training of both networks.

    The generator: a forward for the discriminator's fakes, then a forward and a backward of twice that. The
    discriminator: three scores with their backwards; for the generator a score and a backward to its latents
    alone, as long as a forward; for the penalty, in one step of four, such a backward and its own, of twice that.
    """
    recipe = study.adversarial
    against = 3 * 3 + 2 + 3 / PENALTY_EVERY
    each = 4 * forward_gflop(study.world.config(width), study.latent) + against * discriminator_gflop(study.world)
    return each * recipe.batch * recipe.steps


def discriminator_gflop(world: World) -> float:
    """GFLOP of one score."""
    with torch.device("meta"), torch.no_grad(), flop_counter() as counter:
        shape = (_GROUP, CHANNELS, world.latent, world.latent)
        Discriminator(world)(torch.empty(shape), torch.empty(_GROUP, TOKENS, CONTEXT_DIM))
    return float(counter.get_total_flops()) / _GROUP / 1e9

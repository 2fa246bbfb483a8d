"""The judge: a small network that reads the six factors of a scene off its latent.

Its answers are the alignment, its features the space of the Frechet distance and of KID.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .data import Source
from .family import World
from .latents import CHANNELS
from .progress import Tell, to_nobody
from .scenes import COUNTS, FACTORS

FEATURES = 64
# What a judge must read right of every factor on real latents.
LEAST_RIGHT = 0.95
_TRAINED_ON, _CHECKED_ON = 9, 10
_CHECKED_SCENES = 4000
_WIDTH = 48
# Latents that are judged at once.
_AT_ONCE = 500


class JudgeError(RuntimeError):
    """A judge that is not good enough for its task."""


class _Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.layers(x))


def _smaller(channels: int, wider: int) -> list[nn.Module]:
    return [nn.Conv2d(channels, wider, 3, stride=2, padding=1), nn.BatchNorm2d(wider), nn.ReLU()]


@dataclass(frozen=True)
class Answers:
    """features [n, 64]; right [n, 6]: whether each factor was read as the caption has it."""

    features: Tensor
    right: Tensor


class Judge(nn.Module):
    """Latents [n, 4, h, w] to the logits of each factor, by features [n, 64]."""

    def __init__(self, world: World) -> None:
        super().__init__()
        c = _WIDTH
        # Down to 4x4 whatever the latent's size.
        halvings = (world.latent // 4).bit_length() - 1
        layers: list[nn.Module] = [
            nn.Conv2d(CHANNELS, c, 3, padding=1),
            nn.BatchNorm2d(c),
            nn.ReLU(),
            _Residual(c),
        ]
        for _ in range(halvings - 1):
            layers += [*_smaller(c, c), _Residual(c)]
        layers += [_Residual(c), *_smaller(c, 2 * c), _Residual(2 * c), nn.Flatten()]
        self.body = nn.Sequential(*layers, nn.Linear(2 * c * 16, FEATURES))
        self.head = nn.Linear(FEATURES, sum(COUNTS))
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks it

    def forward(self, latents: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Features, and the logits [n, values] of each factor."""
        features = self.body(latents)
        return features, self.head(F.relu(features)).split(COUNTS, 1)

    @torch.inference_mode()
    def answers(self, latents: Tensor, factors: Tensor) -> Answers:
        """What it makes of latents whose captions have these factors [n, 6]."""
        features, right = [], []
        for part, told in zip(latents.split(_AT_ONCE), factors.split(_AT_ONCE), strict=True):
            found, logits = self(part)
            features.append(found)
            right.append(torch.stack([one.argmax(1) for one in logits], 1) == told)
        return Answers(torch.cat(features), torch.cat(right))


def trained_judge(
    world: World, *, steps: int = 1500, batch: int = 128, shuffled: bool = False, tell: Tell = to_nobody
) -> Judge:
    """A judge trained on scenes of its own; `shuffled`: on other scenes' factors, which must come to nothing."""
    torch.manual_seed(0)
    judge = Judge(world).train()
    optimizer = torch.optim.AdamW(judge.parameters(), weight_decay=0.02)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    source = Source(world, _TRAINED_ON)
    for step in range(steps):
        read = source.read(step * batch, batch)
        factors = read.factors.roll(1, 0) if shuffled else read.factors
        _, logits = judge(read.latents)
        loss = torch.stack([F.cross_entropy(one, factors[:, i]) for i, one in enumerate(logits)]).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        rate.step()
        tell((step + 1) / steps)
    return judge.eval()


def ceiling(judge: Judge, world: World) -> dict[str, float]:
    """The share of each factor that it reads right on real latents. Raises JudgeError below 95% of any."""
    real = Source(world, _CHECKED_ON).read(0, _CHECKED_SCENES)
    shares = judge.answers(real.latents, real.factors).right.double().mean(0).tolist()
    found = dict(zip(FACTORS, shares, strict=True))
    if wrong := {name: share for name, share in found.items() if share < LEAST_RIGHT}:
        told = ", ".join(f"{name} {share:.1%}" for name, share in wrong.items())
        raise JudgeError(
            f"the judge reads too little of real latents ({told}; {LEAST_RIGHT:.0%} needed): train it longer"
        )
    return found


def save_judge(judge: Judge, path: Path) -> None:
    """Writes its weights in 16 bits. A file that is there is whole."""
    part = path.with_suffix(".part")
    save_file({name: _short(value) for name, value in judge.state_dict().items()}, part)
    part.replace(path)


def load_judge(path: Path, world: World) -> Judge:
    """A judge of `save_judge`, in float32."""
    judge = Judge(world)
    judge.load_state_dict(
        {name: value.float() if value.is_floating_point() else value for name, value in load_file(path).items()}
    )
    return judge.eval()


def _short(value: Tensor) -> Tensor:
    return value.half().contiguous() if value.is_floating_point() else value

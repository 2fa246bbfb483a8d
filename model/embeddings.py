"""What the time shifts are made of: embeddings of timesteps, of their conditions and of classes."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class EmbeddingMLP(nn.Module):
    """Two linear layers with a SiLU between them: [N, in_dim] -> [N, out_dim]."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_dim, out_dim)
        self.linear_2 = nn.Linear(out_dim, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear_2(F.silu(self.linear_1(x)))
        return out


class TimestepEmbedding(EmbeddingMLP):
    """Sinusoids of a timestep, and a condition of `cond_dim` numbers added to them, through a two-layer MLP."""

    def __init__(self, in_dim: int, out_dim: int, cond_dim: int | None = None) -> None:
        super().__init__(in_dim, out_dim)
        self.cond_proj = None if cond_dim is None else nn.Linear(cond_dim, in_dim, bias=False)

    def forward(self, timesteps: Tensor, cond: Tensor | None = None) -> Tensor:
        """timesteps [K, 1 or B] float32, cond [B, cond_dim] -> [K, 1 or B, out_dim] in the layers' dtype."""
        weight = self.linear_1.weight
        x = sinusoids(timesteps.reshape(-1), weight.shape[1]).to(weight.dtype).unflatten(0, tuple(timesteps.shape))
        if cond is not None and self.cond_proj is not None:
            x = x + self.cond_proj(cond.to(weight))
        # Two dimensions, because a linear layer of three is rounded another way on some devices.
        out: Tensor = super().forward(x.flatten(0, 1)).unflatten(0, tuple(x.shape[:2]))
        return out


class LabelEmbedding(nn.Embedding):
    """A table's rows [B, out_dim] of labels [B]; NaN for a label outside, which no device refuses in a line."""

    def forward(self, labels: Tensor) -> Tensor:
        last = self.num_embeddings - 1
        inside = (labels >= 0) & (labels <= last)
        rows: Tensor = super().forward(labels.clamp(0, last))
        return rows.where(inside[:, None], math.nan)


def sinusoids(timesteps: Tensor, dim: int) -> Tensor:
    """[cos, sin] of timesteps [N] at dim / 2 geometric frequencies, float32 whatever the network computes in."""
    half = dim // 2
    exponent = -math.log(10000) * torch.arange(half, dtype=torch.float32, device=timesteps.device) / half
    angles = timesteps.float()[:, None] * torch.exp(exponent)
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=-1), (0, dim % 2))

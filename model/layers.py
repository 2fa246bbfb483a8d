"""The blocks of the UNet, each reading and writing channels-last activations in place.

[B, C, H, W] in channels-last memory is [B, H * W, C] tokens read another way: convolutions take the one view,
norms, attention and linear layers the other, and nothing is copied between them.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldmperf.kernels import attention, geglu, group_norm_silu, layer_norm, residual_add

# The GroupNorm before a transformer has its own eps, and no SiLU, in every Stable Diffusion release.
TRANSFORMER_NORM_EPS = 1e-6


class GroupNorm(nn.GroupNorm):
    """Group norm with an optional shift [B, C] before it and an optional SiLU after it.

    With `skip` it is of x and skip side by side along the channels, which are read where they are.
    """

    def __init__(self, groups: int, channels: int, eps: float, activation: str | None, backend: str) -> None:
        super().__init__(groups, channels, eps)
        self.activation = activation
        self.backend = backend

    def forward(self, x: Tensor, shift: Tensor | None = None, skip: Tensor | None = None) -> Tensor:
        return group_norm_silu(
            x,
            self.num_groups,
            self.weight,
            self.bias,
            self.eps,
            shift=shift,
            skip=skip,
            activation=self.activation,
            backend=self.backend,
        )


class LayerNorm(nn.LayerNorm):
    """Layer norm of tokens; `add` takes the residual sum with it."""

    def __init__(self, channels: int, backend: str) -> None:
        super().__init__(channels)
        self.backend = backend

    def forward(self, x: Tensor) -> Tensor:
        out = layer_norm(x, self.weight, self.bias, self.eps, backend=self.backend)
        assert isinstance(out, Tensor)
        return out

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(norm(x + residual), x + residual)."""
        both = layer_norm(x, self.weight, self.bias, self.eps, residual=residual, backend=self.backend)
        assert isinstance(both, tuple)
        return both


class ResBlock(nn.Module):
    """Two convolutions around the time shift. The shift already holds the first convolution's bias."""

    def __init__(self, in_channels: int, out_channels: int, groups: int, eps: float, backend: str) -> None:
        super().__init__()
        self.backend = backend
        self.norm1 = GroupNorm(groups, in_channels, eps, "silu", backend)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = GroupNorm(groups, out_channels, eps, "silu", backend)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        # A 1x1 convolution of channels-last memory is a linear layer of its tokens.
        self.shortcut = nn.Linear(in_channels, out_channels) if in_channels != out_channels else None

    def forward(
        self, x: Tensor, shift: Tensor, skip: Tensor | None = None, size: torch.Size | None = None
    ) -> Tensor:
        """x [B, Cin, H, W], shift [B, Cout] -> [B, Cout, H, W], or [B, Cout, *size] by nearest neighbour.

        With `skip` [B, Cskip, H, W] the input is both side by side, and Cin counts the channels of both.
        """
        h = F.conv2d(self.norm1(x, skip=skip), self.conv1.weight, padding=1)
        h = F.conv2d(self.norm2(h, shift), self.conv2.weight, padding=1)
        return residual_add(self._shortcut(x, skip), h, self.conv2.bias, size=size, backend=self.backend)

    def _shortcut(self, x: Tensor, skip: Tensor | None) -> Tensor:
        if self.shortcut is None:
            return x
        size = x.shape[2:]
        if skip is None:
            return as_image(self.shortcut(as_tokens(x)), size)
        # W [x; skip] = Wx x + Ws skip: no concatenation is written.
        of_x, of_skip = self.shortcut.weight.split([x.shape[1], skip.shape[1]], dim=1)
        out = F.linear(as_tokens(x), of_x, self.shortcut.bias)
        out.flatten(0, 1).addmm_(as_tokens(skip).flatten(0, 1), of_skip.t())
        return as_image(out, size)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention and a gated feed-forward, each added to the tokens it read."""

    def __init__(self, channels: int, heads: int, context_dim: int, backend: str) -> None:
        super().__init__()
        self.heads = heads
        self.backend = backend
        self.norm1 = LayerNorm(channels, backend)
        self.to_qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.to_out = nn.Linear(channels, channels)
        self.norm2 = LayerNorm(channels, backend)
        self.cross_q = nn.Linear(channels, channels, bias=False)
        self.cross_kv = nn.Linear(context_dim, 2 * channels, bias=False)
        self.cross_out = nn.Linear(channels, channels)
        self.norm3 = LayerNorm(channels, backend)
        self.ff_in = nn.Linear(channels, 8 * channels)
        self.ff_out = nn.Linear(4 * channels, channels)

    def project_context(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, T, heads, D] of a context [B, T, Dctx], read in place from one projection."""
        batch, tokens, _ = context.shape
        k, v = self.cross_kv(context).view(batch, tokens, 2, self.heads, -1).unbind(2)
        return k, v

    def forward(self, x: Tensor, context: tuple[Tensor, Tensor]) -> Tensor:
        """x [B, N, C], context of `project_context` -> [B, N, C]."""
        batch, tokens, channels = x.shape
        q, k, v = self.to_qkv(self.norm1(x)).view(batch, tokens, 3, self.heads, -1).unbind(2)
        h = self.to_out(attention(q, k, v, backend=self.backend).view(batch, tokens, channels))
        h, x = self.norm2.add(h, x)
        q = self.cross_q(h).view(batch, tokens, self.heads, -1)
        h = self.cross_out(attention(q, *context, backend=self.backend).view(batch, tokens, channels))
        h, x = self.norm3.add(h, x)
        out: Tensor = x + self.ff_out(geglu(self.ff_in(h), backend=self.backend))
        return out


class Transformer(nn.Module):
    """A transformer block over the positions of an image, between a projection in and one out."""

    def __init__(self, channels: int, heads: int, context_dim: int, groups: int, backend: str) -> None:
        super().__init__()
        self.backend = backend
        self.norm = GroupNorm(groups, channels, TRANSFORMER_NORM_EPS, None, backend)
        self.proj_in = nn.Linear(channels, channels)
        self.block = TransformerBlock(channels, heads, context_dim, backend)
        self.proj_out = nn.Linear(channels, channels)

    def forward(self, x: Tensor, context: tuple[Tensor, Tensor], size: torch.Size | None = None) -> Tensor:
        """x [B, C, H, W], context of `TransformerBlock.project_context` -> [B, C, H, W], or [B, C, *size]."""
        tokens = self.block(self.proj_in(as_tokens(self.norm(x))), context)
        h = as_image(self.proj_out(tokens), x.shape[2:])
        return residual_add(x, h, size=size, backend=self.backend)


class Downsample(nn.Module):
    """Half the resolution, rounded up, by a convolution of stride 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x)
        return out


class Upsample(nn.Module):
    """The convolution after an enlargement; what comes before enlarges as it writes (`size` of the blocks)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x)
        return out


class TimestepEmbedding(nn.Module):
    """Sinusoids of a timestep through a two-layer MLP."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.in_dim = in_dim
        self.linear_1 = nn.Linear(in_dim, out_dim)
        self.linear_2 = nn.Linear(out_dim, out_dim)

    def forward(self, timesteps: Tensor) -> Tensor:
        """timesteps [N] float32 -> [N, out_dim] in the layers' dtype."""
        embedded = sinusoids(timesteps, self.in_dim).to(self.linear_1.weight.dtype)
        out: Tensor = self.linear_2(F.silu(self.linear_1(embedded)))
        return out


def sinusoids(timesteps: Tensor, dim: int) -> Tensor:
    """[cos, sin] of timesteps [N] at dim / 2 geometric frequencies, float32 whatever the network computes in."""
    half = dim // 2
    exponent = -math.log(10000) * torch.arange(half, dtype=torch.float32, device=timesteps.device) / half
    angles = timesteps.float()[:, None] * torch.exp(exponent)
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=-1), (0, dim % 2))


def as_tokens(x: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, H * W, C], a view of channels-last memory."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def as_image(tokens: Tensor, size: torch.Size) -> Tensor:
    """[B, H * W, C] -> [B, C, H, W], a view: the result is channels-last."""
    return tokens.view(tokens.shape[0], *size, tokens.shape[2]).permute(0, 3, 1, 2)
